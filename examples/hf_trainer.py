"""Hugging Face's Trainer: a small BERT, evaluated on its slow weights."""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ranger_cuda import Ranger

DATA = [{"input_ids": [i % 50, (7 * i) % 50, i % 3], "labels": i % 2} for i in range(160)]


def train(out: Path, steps: int, resume: bool = False, by_class: bool = False) -> nn.Module:
    """Train until step ``steps``, from the start or from the last checkpoint in ``out``.

    The learning rate is Ranger's own unless the class is handed over: then Trainer makes the
    optimizer, with weight decay for matrices alone.
    """
    set_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=8,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    arguments = TrainingArguments(
        output_dir=str(out), max_steps=steps, save_steps=10, per_device_train_batch_size=8,
        lr_scheduler_type="constant", eval_strategy="steps", eval_steps=5, report_to="none",
        learning_rate=4e-3, use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
    )  # fmt: skip
    options = {"eval_with_slow_weights": True}
    if by_class:
        made = {"optimizer_cls_and_kwargs": (Ranger, {"lr": 4e-3, **options})}
    else:
        made = {"optimizers": (Ranger(model.parameters(), lr=4e-3, **options), None)}
    trainer = Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA[:16], **made)
    trainer.train(resume_from_checkpoint=resume)
    return model


if __name__ == "__main__":
    train(Path("runs/hf"), 100)
