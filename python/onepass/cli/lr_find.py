"""``python -m onepass lr-find``: the learning rate range test on the demo's handwritten digits."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from ..training.catalog import plain_name
from ..training.figure import check_path
from ..training.lr_finder import LRRangeTest, lr_find
from .demo import ARGUMENTS, CLASSES, digits


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``python -m onepass lr-find`` to the parser."""
    parser.add_argument("--optimizer", type=plain_name, choices=sorted(CLASSES), default="adamw", help="default: adamw")
    parser.add_argument("--steps", type=int, default=100, help="number of optimizer steps; default: 100")
    parser.add_argument("--seed", type=int, default=0, help="seed of initial parameters and batches; default: 0")
    parser.add_argument("--table", action="store_true", help="print every step")
    parser.add_argument("--png", type=Path, metavar="FILE", help="plot the losses to this file")


def find(optimizer: str, steps: int, seed: int) -> LRRangeTest:
    """Run the test on the digits with one of the demo's optimizers."""
    task = digits(optimizer, quick=False)
    torch.manual_seed(seed)
    model = task.build()
    batches = torch.Generator().manual_seed(seed)
    make = CLASSES[optimizer][1]
    return lr_find(
        model,
        make(model.parameters(), lr=task.lr, **ARGUMENTS[optimizer]),
        torch.nn.functional.cross_entropy,
        [task.draw(batches) for _ in range(steps)],
        steps=steps,
    )


def main(args: argparse.Namespace) -> int:
    """Run the test and print its suggestions; return 2 if it cannot run."""
    try:
        if args.png is not None:
            check_path(args.png)
        found = find(args.optimizer, args.steps, args.seed)
        if args.table:
            print(found.table())
        print(found)
        if args.png is not None:
            found.plot(path=args.png)
    except ImportError as error:
        print(f"onepass lr-find: {error}; install what it needs: pip install 'onepass[demo]'", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"onepass lr-find: {error}", file=sys.stderr)
        return 2
    return 0
