"""The benchmarks: ``python bench/run.py --all --json FILE``, or the questions that are named.

Each question is a file beside this one, whose ``measure(quick, rounds)`` yields results, or sentences on what could not
be measured. ``bench/report.py`` makes tables and pictures of the file, ``bench/compare.py`` compares two of them.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import figures
import peers
import torch
from onepass.cli.bench import as_json, from_json, line_of, machine
from onepass.cli.timing import Result

QUESTIONS = tuple(figures.QUESTIONS)

Measure = Callable[[bool, int], Iterable[Result | str]]


def ask(question: str, measure: Measure, quick: bool, rounds: int) -> tuple[list[Result], list[str], bool]:
    """Measures and prints; returns the results, what could not be measured, and whether all was right."""
    results: list[Result] = []
    notes: list[str] = []
    try:
        for found in measure(quick, rounds):
            if isinstance(found, str):
                notes.append(f"{question}: {found}")
                print(f"({found})", flush=True)
            else:
                found.question = question
                results.append(found)
                print(line_of(found), flush=True)
    except AssertionError as error:
        print(f"{question}: wrong result, not timed: {error}", file=sys.stderr)
        return results, notes, False
    return results, notes, True


def alone(measure: Measure, description: str | None) -> None:
    """What a question's file does when it is run by itself."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    add_options(parser)
    args = parser.parse_args()
    begin(args)
    sys.exit(not ask(Path(sys.argv[0]).stem, measure, args.quick, rounds_of(args))[2])


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small sizes: to see that it works, no measurement")
    parser.add_argument("--rounds", type=int, help="samples of each contender (default 7; 2 if quick)")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")


def begin(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    print(machine())
    for name, why in peers.missing().items():
        print(f"missing: {name}: {why}")


def rounds_of(args: argparse.Namespace) -> int:
    return args.rounds or (2 if args.quick else 7)


def run_question(question: str, args: argparse.Namespace, path: Path) -> bool:
    """Asks one question, and writes what was found to a file; returns whether all was right."""
    start = time.perf_counter()
    module = importlib.import_module(question)
    results, notes, right = ask(question, module.measure, args.quick, rounds_of(args))
    installed = {}
    if question == "surroundings":
        installed = module.facts(install=not args.quick)
        print(*(f"{name}: {text}" for name, text in installed.items()), sep="\n")
    more = {
        "quick": args.quick,
        "missing": peers.missing(),
        "peers": peers.versions() | (module.versions() if question == "frameworks" else {}),
        "notes": notes,
        "installed": installed,
        "seconds": {question: round(time.perf_counter() - start)},
    }
    path.write_text(as_json(results, rounds_of(args), **more))
    return right


def run_apart(question: str, args: argparse.Namespace, path: Path) -> bool:
    """The same in a process of its own, lest one question's memory and compiled code weigh on the next."""
    flags = ["--json", path, "--rounds", rounds_of(args), *(["--threads", args.threads] if args.threads else [])]
    command = [sys.executable, __file__, question, *map(str, flags), *(["--quick"] if args.quick else [])]
    return subprocess.run(command).returncode == 0


def merged(paths: list[Path]) -> str:
    """The text of one file with all that is in these."""
    told: dict[str, Any] = {}
    results: list[Result] = []
    for path in paths:
        more, found = from_json(path.read_text())
        results += found
        for name, what in more.items():
            if isinstance(what, dict):
                told[name] = told.get(name, {}) | what
            elif isinstance(what, list):
                told[name] = told.get(name, []) + what
            else:
                told[name] = what
    del told["machine"]  # as_json tells it
    return as_json(results, **told)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=", ".join(QUESTIONS))
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    add_options(parser)
    args = parser.parse_args()
    if args.all == bool(args.questions):
        parser.error("name questions, or --all")
    if unknown := sorted({*args.questions} - {*QUESTIONS}):
        parser.error(f"no such question: {', '.join(unknown)}; there are {', '.join(QUESTIONS)}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}")
    questions = QUESTIONS if args.all else args.questions
    right = True
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{question}.json" for question in questions]
        for question, path in zip(questions, paths, strict=True):
            if len(questions) == 1:
                begin(args)
                right &= run_question(question, args, path)
            else:
                print(f"\n== {question}", flush=True)
                right &= run_apart(question, args, path)
            if args.json:  # after each question, so that a run which is cut off has something to show
                args.json.write_text(merged([written for written in paths if written.exists()]))
    return not right


if __name__ == "__main__":
    sys.exit(main())
