"""The benchmarks: ``python bench/run.py --all --json FILE``, or the questions that are named.

Each question is a file beside this one, whose ``measure(quick, rounds)`` yields results, or sentences on what could not
be measured. ``bench/report.py`` makes tables and pictures of the file, ``bench/compare.py`` compares two of them.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import peers
import torch
from onepass.bench import as_json, line_of, machine
from onepass.timing import Result

QUESTIONS = ("large", "small", "scaling", "formats", "tail", "training", "surroundings", "kernels")

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("questions", nargs="*", choices=[*QUESTIONS, []], metavar="QUESTION", help=", ".join(QUESTIONS))
    parser.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to a file")
    add_options(parser)
    args = parser.parse_args()
    if args.all == bool(args.questions):
        parser.error("name questions, or --all")
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}")
    begin(args)
    results, notes, right, seconds, installed = [], [], True, {}, {}
    for question in QUESTIONS if args.all else args.questions:
        print(f"\n== {question}", flush=True)
        start = time.perf_counter()
        module = importlib.import_module(question)
        found, told, fine = ask(question, module.measure, args.quick, rounds_of(args))
        if question == "surroundings":
            installed = module.facts(install=not args.quick)
            print(*(f"{name}: {text}" for name, text in installed.items()), sep="\n")
        seconds[question] = round(time.perf_counter() - start)
        results += found
        notes += told
        right &= fine
        if args.json:  # after each question, so that a run which is cut off has something to show
            more = {
                "quick": args.quick,
                "missing": peers.missing(),
                "peers": peers.versions(),
                "notes": notes,
                "installed": installed,
                "seconds": seconds,
            }
            args.json.write_text(as_json(results, rounds_of(args), **more))
    print("\nseconds: " + ", ".join(f"{question} {taken}" for question, taken in seconds.items()))
    return not right


if __name__ == "__main__":
    sys.exit(main())
