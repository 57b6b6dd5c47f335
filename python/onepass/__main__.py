"""The command line: ``python -m onepass info | demo | bench | gallery | schedule | lr-find``."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys

from . import __version__
from .cli import bench, demo, gallery, info, lr_find, schedule

# Each module declares its options in `add_arguments` and does its work in `main`.
COMMANDS = {
    "info": (info, "print versions, instruction sets, threads and GPUs"),
    "demo": (demo, "train two real models with torch.optim and with onepass"),
    "bench": (bench, "compare step times with torch.optim, after checking the results"),
    "gallery": (gallery, "run classic experiments of optimization and plot them"),
    "schedule": (schedule, "plot a learning rate schedule"),
    "lr-find": (lr_find, "run the learning rate range test on handwritten digits"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = argparse.ArgumentParser(prog="onepass", description="A faster drop-in replacement for torch.optim.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    for name, (module, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that an ASCII locale lacks are written as \xNN
            stream.reconfigure(errors="backslashreplace")
    args = parser.parse_args(argv)
    try:
        code: int = args.run(args)
        print(end="", flush=True)
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE
    return code


if __name__ == "__main__":
    sys.exit(main())
