"""``train``: a small GPT trained with several optimizers side by side, and what came of it."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, corpus, parallel, settings
from .errors import CommandError
from .flags import DEFAULT_OUT, add_arguments
from .interrupt import Interrupt, QuickExit
from .parallel import Ranks, is_first, say
from .settings import Settings
from .training import Run, reproducible, train

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Train, report, and return the exit status."""
    _require_extras()
    out = Path(os.path.abspath(args.out))
    saved = _saved_run(out, args)
    if saved:
        chosen = settings.resume(saved["settings"], vars(args))
    else:
        chosen = settings.resolve(vars(args))
    with QuickExit():
        from . import report

    own_files = [*checkpoint.files_in(out), *report.files_in(out)]
    text = corpus.load(chosen.data, chosen.max_bytes, chosen.context, exclude=own_files)
    if saved:
        _check_continuation(saved, chosen, text)
    if torch.device(chosen.device).type == "cuda":
        # cuBLAS is reproducible only with this, set before its first call.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    ranks = Ranks(chosen.parallel, chosen.slices)
    with reproducible(chosen.threads), ranks.joined(chosen.device):
        return _train_and_report(args, out, chosen, text, saved, ranks)


def _train_and_report(
    args: argparse.Namespace,
    out: Path,
    chosen: Settings,
    text: corpus.Corpus,
    saved: dict[str, Any] | None,
    ranks: Ranks,
) -> int:
    with QuickExit():
        from rich.console import Console

        from . import report
        from .progress import Display

    console = Console(quiet=not is_first())
    runs = [Run(name, chosen, ranks) for name in chosen.optimizers]
    title = report.describe(chosen, text, sum(p.numel() for p in runs[0].model.parameters()))
    say(title)
    done = 0
    if saved:
        done = saved["step"]
        _go_back(runs, saved, out)
        say(f"Resuming at step {done} of {chosen.steps}.")
    elif is_first():
        report.make_room(out)  # an overwritten run's results must not pass for this one's
    saved_at = done if saved else -1
    stopped_by = 0

    def save() -> None:
        nonlocal saved_at
        if done != saved_at:
            _save(_content(done, chosen, text, runs), runs, out)
            saved_at = done

    def after_step(step: int) -> bool:
        nonlocal done, stopped_by
        done = step
        display.update(step)
        if step % chosen.checkpoint_every == 0:
            save()
        stopped_by = ranks.largest(interrupt.signal or 0)
        return not stopped_by

    with Interrupt() as interrupt:
        save()  # at once: what cannot be written should be known before the training
        with Display(console, runs, done, chosen.steps, is_quiet=not is_first()) as display:
            train(runs, text, chosen, done, after_step)
        save()
    if stopped_by:
        say(
            f"Stopped by {signal.Signals(stopped_by).name} after step {done} of {chosen.steps}, "
            f"saved. To go on: {_command(ranks)} train --resume{_out_flag(args)}"
        )
        return 128 + stopped_by  # what a shell reports for a process that this signal ended
    if not is_first():
        return 0

    summaries = [report.summarise(each, chosen) for each in runs]
    console.print(report.table(summaries))
    print(report.LEGEND)
    try:
        files = report.write_numbers(out, summaries, runs, chosen, text)
        files.append(report.draw(out, runs, chosen, title))
    except OSError as error:
        raise CommandError(
            f"cannot write {error.filename or out}: {error.strerror or error}; the checkpoint is "
            f"safe: make room there, and write the results with --resume{_out_flag(args)}"
        ) from error
    print(f"Wrote {', '.join(file.name for file in files)} to {args.out}")
    return 0


def _content(step: int, chosen: Settings, text: corpus.Corpus, runs: list[Run]) -> dict[str, Any]:
    return {
        "step": step,
        "settings": settings.as_dict(chosen),
        "text_sha256": text.digest,
        "torch": str(torch.__version__),
        "runs": {each.name: each.state_dict() for each in runs},
    }


def _save(content: dict[str, Any], runs: list[Run], out: Path) -> None:
    """Replace the checkpoint. Of several ranks' the tensors are in a folder of their own, which the
    file that the first rank writes names: it is whole before, and the last one is there until then.
    """
    if not runs[0].ranks.is_alone:
        # Before the first step there is no state, and to ask for it would make some.
        parts = {each.name: (each.model, each.optimizer) for each in runs}
        step = content["step"]
        content["shards"] = parallel.save(parts, out, step) if step else None
        if not is_first():
            return
    checkpoint.save(content, checkpoint.path_in(out))
    parallel.remove_all(out, but=content.get("shards"))


def _go_back(runs: list[Run], saved: dict[str, Any], out: Path) -> None:
    """To where a checkpoint was taken."""
    for each in runs:
        each.load_state_dict(saved["runs"][each.name])
    if saved.get("shards"):
        parts = {each.name: (each.model, each.optimizer) for each in runs}
        parallel.load(parts, out / saved["shards"])


def _saved_run(out: Path, args: argparse.Namespace) -> dict[str, Any] | None:
    """The checkpoint to go on from, if there is one and going on was asked for."""
    path = checkpoint.path_in(out)
    if not os.path.exists(path):  # unlike Path.exists, it never raises
        if args.resume:
            say(f"Nothing to resume in {args.out}: starting from step 0.")
        return None
    if args.resume:
        return checkpoint.load(path)
    if args.overwrite:
        return None
    raise CommandError(
        f"{args.out} has a run already: go on with --resume{_out_flag(args)}, keep it and choose "
        "another --out, or start over with --overwrite"
    )


def _check_continuation(saved: dict[str, Any], chosen: Settings, text: corpus.Corpus) -> None:
    """Raise unless the steps to come would be those of the saved run."""
    if text.digest != saved["text_sha256"]:
        raise CommandError(
            f"the text has changed since this run started: {text.description}. Bring the old one "
            "back (for stdlib, use the same Python), or start another run with another --out"
        )
    if chosen.steps < saved["step"]:
        raise CommandError(
            f"--steps is {chosen.steps}, but the saved run has done {saved['step']} already; give "
            "at least that, or start another run with another --out"
        )
    if saved["torch"] != str(torch.__version__):
        say(
            f"Note: this run was started with torch {saved['torch']}, and this is "
            f"{torch.__version__}: it goes on, but the last bits of the results may differ."
        )


def _require_extras() -> None:
    missing = [name for name in ("rich", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise CommandError(
            f"this needs {' and '.join(missing)}, not installed here: pip install "
            f"{' '.join(missing)} (or the package with its extra: ranger_cuda[train])"
        )


def _command(ranks: Ranks) -> str:
    if ranks.is_alone:
        return "python -m ranger_cuda"
    return f"torchrun --nproc-per-node {ranks.size} -m ranger_cuda"


def _out_flag(args: argparse.Namespace) -> str:
    return "" if args.out == DEFAULT_OUT else f" --out {shlex.quote(args.out)}"
