"""Small models: step times per tensor, with the same gradients ("small") and with new ones ("fresh").

For small tensors, most of a step's time is spent on reading Python objects. In "small" all steps use the same
gradients. In "fresh" a backward pass has just made them, in other memory and as other objects, and has used the caches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import peers
import torch
from onepass.cli.bench import ADAMW, FRESH, MLP, SUBJECTS, Subject, compare, fresh, stepped
from onepass.cli.timing import Maker, Result, Run, check, gradients, parameters, time_in_turn
from torch.optim import Optimizer

COUNTS = LENGTHS = (10, 100, 1000, 10_000)
PROBED = ("SGD", "Adam", "AdamW", "Lion")  # groups and denormals are measured for these

# torch.compile unrolls the loop over the tensors, and takes a quarter of a second per tensor.
COMPILED_TENSORS = 16


def measure(quick: bool, rounds: int) -> Iterator[Result | str]:
    def more(subject: Subject, tensors: int) -> dict[str, Maker]:
        beyond = peers.makers if quick or tensors > COMPILED_TENSORS else peers.every
        return beyond(subject.name, subject.arguments)

    yield f"torch.compile is not measured on more than {COMPILED_TENSORS} tensors: it takes too long to compile"
    left_out: list[str] = []
    many = 100 if quick else 1000
    for subject in SUBJECTS:
        yield compare(subject, "small: 1000 x 100", gradients([(100,)] * many), rounds, more(subject, many), left_out)
    for subject in SUBJECTS:
        yield fresh(subject, FRESH, [(100,)] * many, rounds, more(subject, many), left_out)
    for subject in SUBJECTS:
        yield compare(subject, "MLP: 6 tensors", gradients(MLP), rounds, more(subject, len(MLP)), left_out)
    for count in COUNTS[: 2 if quick else None]:
        for length in LENGTHS[: 2 if quick else None]:
            grads = gradients([(length,)] * count)
            yield compare(ADAMW, f"small: {count} x {length}", grads, rounds, more(ADAMW, count), left_out)
            del grads
        yield fresh(ADAMW, f"fresh: {count} x 100", [(100,)] * count, rounds, more(ADAMW, count), left_out)
    for subject in SUBJECTS:
        if subject.name in PROBED:
            yield groups(subject, 50 if quick else 500, rounds)
            yield against_torch(subject, 50 if quick else 500, rounds)
            yield denormals(subject, 1 << 14 if quick else 1 << 16, rounds)
    yield from dict.fromkeys(left_out)


def groups(subject: Subject, count: int, rounds: int) -> Result:
    """Measure one group of all tensors, and one group per tensor."""
    grads = gradients([(100,)] * count)
    together, apart = parameters(grads), parameters(grads)
    runs: dict[str, Run] = {
        "one group": subject.ours(together, **subject.arguments).step,
        "a group each": subject.ours([{"params": [p]} for p in apart], **subject.arguments).step,
    }
    for _ in range(3):
        for run in runs.values():
            run()
    check("groups", together, apart)
    return Result("500 groups", subject.name, 100 * count, count, time_in_turn(runs, rounds))


def against_torch(subject: Subject, count: int, rounds: int) -> Result:
    """Return ours and torch's contenders with one group per tensor."""

    def maker(make: Callable[..., Optimizer]) -> Maker:
        return lambda params: make([{"params": [p]} for p in params]).step

    makers = {name: maker(make) for name, make in subject.optimizers().items()}
    made = stepped(subject, makers, gradients([(100,)] * count))
    runs = {name: run for name, (_, run) in made.items()}
    return Result("500 groups, with torch's", subject.name, 100 * count, count, time_in_turn(runs, rounds))


def denormals(subject: Subject, length: int, rounds: int) -> Result:
    """Measure states that are normal numbers and states that are denormals, for ours and torch's fused form."""
    grads = [torch.zeros(length) for _ in range(64)]
    runs: dict[str, Run] = {}
    refills: dict[str, list[Run]] = {}
    ours = parameters(grads)
    for contender, make in subject.optimizers().items():
        if contender not in ("onepass", "fused"):
            continue
        for kind, value in (("normal", 1e-3), ("denormal", 1e-40)):
            name = kind if contender == "onepass" else f"{contender}, {kind}"
            params = parameters(grads) if runs else ours
            optimizer = make(params)
            optimizer.step()
            states = [v for state in optimizer.state.values() for v in state.values() if v.dim() > 0]
            refills[name] = [functools.partial(state.fill_, value) for state in states]
            runs[name] = optimizer.step
            subject.check(name, ours, params)
    samples = time_in_turn(runs, rounds, before=lambda name: [refill() for refill in refills[name]])
    return Result("denormal states", subject.name, 64 * length, 64, samples)


if __name__ == "__main__":
    from run import alone

    alone(measure, __doc__)
