"""Run the benchmarks: ``python bench/run.py --all --json FILE``, or with the names of questions.

Each question is a file in this folder. Its ``measure(quick, rounds)`` yields results, and messages about what could not
be measured. ``bench/report.py`` makes tables and plots of the results, and ``bench/compare.py`` compares two runs.
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
from onepass.cli.timing import Result, prepare

QUESTIONS = tuple(figures.QUESTIONS)

Measure = Callable[[bool, int], Iterable[Result | str]]


def ask(question: str, measure: Measure, quick: bool, rounds: int) -> tuple[list[Result], list[str], bool]:
    """Measure and print; return the results, what could not be measured, and whether all results were right."""
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
    """Run the file of one question as a script."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    add_options(parser)
    args = parser.parse_args()
    begin(args)
    sys.exit(not ask(Path(sys.argv[0]).stem, measure, args.quick, rounds_of(args))[2])


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that it works")
    parser.add_argument("--rounds", type=int, help="samples of each contender; default: 7 (2 if quick)")
    parser.add_argument("--threads", type=int, help="number of CPU threads; default: torch's")


def begin(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    prepare(args.quick)
    print(machine())
    for name, why in peers.missing().items():
        print(f"missing: {name}: {why}")


def rounds_of(args: argparse.Namespace) -> int:
    return args.rounds or (2 if args.quick else 7)


def run_question(question: str, args: argparse.Namespace, path: Path) -> bool:
    """Run one question, write its results to a file, and return whether all results were right."""
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
    """Run one question in a new process, so that its memory and compiled code do not affect the next."""
    flags = ["--json", path, "--rounds", rounds_of(args), *(["--threads", args.threads] if args.threads else [])]
    command = [sys.executable, __file__, question, *map(str, flags), *(["--quick"] if args.quick else [])]
    return subprocess.run(command).returncode == 0


def merged(paths: list[Path]) -> str:
    """Return the text of one file with the contents of these."""
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
    del told["machine"]  # as_json adds it
    return as_json(results, **told)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=", ".join(QUESTIONS))
    parser.add_argument("--all", action="store_true", help="run all questions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all results to this file")
    add_options(parser)
    args = parser.parse_args()
    if args.all == bool(args.questions):
        parser.error("name questions, or --all")
    if unknown := sorted({*args.questions} - {*QUESTIONS}):
        parser.error(f"no such question: {', '.join(unknown)}; there are {', '.join(QUESTIONS)}")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: the folder {args.json.parent} does not exist")
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
            if args.json:  # after each question, so that an interrupted run keeps its results
                args.json.write_text(merged([written for written in paths if written.exists()]))
    return not right


if __name__ == "__main__":
    sys.exit(main())
