"""PEFT and TRL: LoRA with SFTTrainer, which is a Trainer of Hugging Face."""

from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from ranger_cuda import Ranger


def train(out: Path, steps: int, resume: bool = False) -> torch.nn.Module:
    """Train until step ``steps``, from the start or from where ``out`` is."""
    set_seed(0)
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefghijklmnop"])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    letters = torch.randint(16, (160, 8), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_dict(
        {"text": [" ".join("abcdefghijklmnop"[i] for i in row) for row in letters]}
    )
    args = SFTConfig(
        out, max_steps=steps, per_device_train_batch_size=4, eval_strategy="steps", eval_steps=5,
        save_strategy="steps", save_steps=10, use_cpu=True, bf16=False, report_to=[],
        disable_tqdm=True, lr_scheduler_type="constant", gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args, train_dataset=data, eval_dataset=data.select(range(16)),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        optimizer_cls_and_kwargs=(Ranger, {"lr": 4e-3, "eval_with_slow_weights": True}),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer.model


if __name__ == "__main__":
    train(Path("runs/trl"), 20)
