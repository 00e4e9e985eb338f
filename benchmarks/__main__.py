"""``python -m benchmarks``: what can be measured, and what a GPU machine can say."""

from __future__ import annotations

import argparse
import importlib
import sys

# A module is imported when it is asked for: `gpu` must say what is wrong where torch is broken.
COMMANDS = {
    "step": (".step", "time optimizer.step() against its peers, on a CPU or a GPU"),
    "show": (".show", "the tables, promises and comparison of a result that is there"),
    "memory": (".memory", "bytes of state a parameter: ours in every format, and the peers'"),
    "scale": (".scale", "bytes, launches and times of large models on many GPUs: arithmetic"),
    "release": (".release", "what gradients released in backward cost and save, on the CPU"),
    "sharded": (".sharded", "what a step over DTensors costs the host, beside whole tensors"),
    "sweep": (".sweep", "which sizes of the CUDA kernels' tables are fastest"),
    "gpu": (".on_gpu.runner", "build, test, sanitize and measure on a machine with a GPU"),
}


def main(argv: list[str]) -> int:
    """Run one command; its own ``--help`` has its arguments."""
    if not argv or argv[0] not in COMMANDS:
        print("usage: python -m benchmarks COMMAND ...\n")
        print("\n".join(f"  {name:<7} {what}" for name, (_, what) in COMMANDS.items()))
        return 0 if argv in ([], ["-h"], ["--help"]) else 2
    module, what = COMMANDS[argv[0]]
    parser = argparse.ArgumentParser(f"python -m benchmarks {argv[0]}", description=what)
    return importlib.import_module(module, __package__).main(parser, argv[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
