"""The command line: ``python -m onepass info | demo | bench | lr-find``."""

from __future__ import annotations

import argparse
import sys

from . import __version__, bench, demo, info, lr_find_command


def main(argv: list[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = argparse.ArgumentParser(prog="onepass", description="A faster drop-in replacement for torch.optim.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | demo | bench | lr-find")
    info_parser = commands.add_parser("info", help="what is installed and what this machine has")
    info.add_arguments(info_parser)
    info_parser.set_defaults(run=info.main)
    demo_parser = commands.add_parser("demo", help="train two real models with torch.optim and with onepass")
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=demo.main)
    bench_parser = commands.add_parser("bench", help="step throughput against torch.optim, checked and then timed")
    bench.add_arguments(bench_parser)
    bench_parser.set_defaults(run=bench.main)
    lr_find_parser = commands.add_parser("lr-find", help="the learning rate range test on handwritten digits")
    lr_find_command.add_arguments(lr_find_parser)
    lr_find_parser.set_defaults(run=lr_find_command.main)
    args = parser.parse_args(argv)
    code: int = args.run(args)
    return code


if __name__ == "__main__":
    sys.exit(main())
