"""``python -m onepass gallery``: run classic experiments of optimization with onepass and plot them.

The experiments are the files of ``examples/``, which are installed as the package ``onepass.examples``.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path

NAMES = (
    "learning_rate",
    "momentum",
    "trajectories",
    "surfaces",
    "batch_sizes",
    "schedules",
    "digits",
    "pitfalls",
    "tensorboard_run",
    "local_sgd",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command to the parser."""
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"experiments; default: all ({', '.join(NAMES)})")
    parser.add_argument("--out", type=Path, default=Path("gallery"), metavar="DIR", help="folder; default: gallery")
    parser.add_argument("--quick", action="store_true", help="run a few steps only, to check that everything works")


def main(args: argparse.Namespace) -> int:
    """Run the experiments; return 2 if they cannot run."""
    if unknown := [name for name in args.names if name not in NAMES]:
        print(f"onepass gallery: there is no {', '.join(unknown)}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    names = args.names or NAMES
    begin = time.perf_counter()
    try:
        gallery = importlib.import_module("onepass.examples.common").Gallery(args.out, args.quick)
        for number, name in enumerate(names, 1):
            experiment = importlib.import_module(f"onepass.examples.{name}")
            title = (experiment.__doc__ or "").splitlines()[0]
            print(f"\n== {number} of {len(names)}: {name}\n{title}\n", flush=True)
            experiment.run(gallery)
    except ImportError as error:
        print(f"onepass gallery: {error}; pip install 'onepass[gallery]'", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"onepass gallery: {error}", file=sys.stderr)
        return 2
    print(f"\n{len(gallery.written)} files in {args.out}, {time.perf_counter() - begin:.0f} s")
    return 0
