"""Scaling of AdamW: from a thousand elements to billions, from one thread to all, and every instruction set.

If there is not enough memory for two contenders, only onepass and the limit are measured. The first and the last
elements are then compared with torch's fused step of copies of them, which is enough because the rule is element-wise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onepass
import torch
from onepass import _core
from onepass.cli import limit
from onepass.cli.bench import ADAMW, CHECKED_STEPS, SUBJECTS, Subject, compare, stepped
from onepass.cli.timing import Result, Run, gradients, time_in_turn
from torch import Tensor

SHARED = 10**8  # elements up to which torch is measured as well
ENDS = 1 << 20  # number of elements at either end that are checked for larger tensors


def measure(quick: bool, rounds: int) -> Iterator[Result | str]:
    for exponent in range(3, 7 if quick else 9):
        yield compare(ADAMW, f"elements: 1e{exponent}", gradients([(10**exponent,)]), rounds)
    for elements, dtype in (
        (10**7 if quick else 10**9, torch.float32),
        (10**7 if quick else (1 << 31) + 64, torch.bfloat16),  # beyond what 32 bits count
    ):
        needed = 4 * elements * dtype.itemsize
        if needed * 1.05 > available_memory():
            yield f"{elements} elements in {dtype} are not measured: they need {needed / 1e9:.0f} GB of memory"
        else:
            yield huge(elements, dtype, rounds)
    yield from threads(quick, rounds)
    yield from isas(quick, rounds)


def available_memory() -> int:
    with open("/proc/meminfo") as info:
        (line,) = [line for line in info if line.startswith("MemAvailable:")]
    return 1024 * int(line.split()[1])


def huge(elements: int, dtype: torch.dtype, rounds: int) -> Result:
    """Measure onepass on one tensor that fits memory only once."""
    p = torch.nn.Parameter(torch.empty(elements, dtype=dtype).normal_())
    p.grad = torch.empty_like(p).normal_()
    ends = [slice(0, ENDS), slice(elements - ENDS, elements)]
    copies: list[Tensor] = [torch.nn.Parameter(p.detach()[end].clone()) for end in ends]
    for copy, end in zip(copies, ends, strict=True):
        copy.grad = p.grad[end].clone()
    # In 16 bits a small learning rate would change hardly any parameter.
    arguments = {**ADAMW.arguments, "lr": 1e-3 if dtype is torch.float32 else 0.1}
    optimizer = onepass.AdamW([p], **arguments)
    theirs = torch.optim.AdamW(copies, **arguments, fused=True)
    for _ in range(CHECKED_STEPS):
        optimizer.step()
        theirs.step()
    ADAMW.check("torch's fused of the ends", [p.detach()[end] for end in ends], copies)
    runs: dict[str, Run] = {"onepass": optimizer.step}
    if dtype is torch.float32:
        runs |= limit.runs(limit.arrays_of(optimizer.step, [p]))
    name = f"elements: {elements:.0e}" if dtype is torch.float32 else "elements: 2^31 + 64, bfloat16"
    moved = 7 * elements * dtype.itemsize
    return Result(name.replace("e+0", "e"), "AdamW", elements, 1, limit.fastest(time_in_turn(runs, rounds)), moved)


def threads(quick: bool, rounds: int) -> Iterator[Result]:
    """Measure the same step on one thread, on two, and so on up to all."""
    all_threads = torch.get_num_threads()
    counts = sorted({1 << k for k in range(all_threads.bit_length()) if 1 << k <= all_threads} | {all_threads})
    for name, shapes in (
        ("16 x 4M", [(64 << 10 if quick else 4 << 20,)] * 16),
        ("64 x 64k", [(64 << 10,)] * 64),
        ("1000 x 100", [(100,)] * 1000),
    ):
        made = stepped(ADAMW, {k: v for k, v in ADAMW.makers().items() if k in ("onepass", "fused")}, gradients(shapes))

        def on(count: int, step: Run) -> Run:
            def run() -> None:
                torch.set_num_threads(count)
                step()

            return run

        runs = {
            f"{contender}, {count} thread{'s' if count > 1 else ''}": on(count, step)
            for contender, (_, step) in made.items()
            for count in counts
        }
        elements = sum(torch.Size(shape).numel() for shape in shapes)
        try:
            yield Result(f"threads: {name}", "AdamW", elements, len(shapes), time_in_turn(runs, rounds))
        finally:
            torch.set_num_threads(all_threads)


def isas(quick: bool, rounds: int) -> Iterator[Result]:
    """Measure every instruction set of this machine on one thread, with arrays that fit a cache."""
    chosen, all_threads = _core.isa(), torch.get_num_threads()
    names = [chosen, *(name for name, supported in _core.isas().items() if supported and name != chosen)]
    torch.set_num_threads(1)
    try:
        for name in ("SGD", "AdamW", "Rprop"):
            subject = next(subject for subject in SUBJECTS if subject.name == name)
            for dtype in (torch.float32, torch.bfloat16):
                yield in_cache(subject, dtype, names, 2 if quick else 16, rounds)
    finally:
        _core.force_isa(chosen)
        torch.set_num_threads(all_threads)


def in_cache(subject: Subject, dtype: torch.dtype, names: list[str], tensors: int, rounds: int) -> Result:
    """Measure tensors of 4096 elements with a contender per instruction set; all must have the same bits."""
    grads = gradients([(4096,)] * tensors, dtype)

    def maker(name: str) -> Callable[[list[Tensor]], Run]:
        def make(params: list[Tensor]) -> Run:
            step = subject.ours(params, **subject.arguments).step

            def run() -> None:
                _core.force_isa(name)
                step()

            return run

        return make

    made = stepped(subject, {"onepass": maker(names[0]), **{name: maker(name) for name in names[1:]}}, grads)
    first = made["onepass"][0]
    for name, (params, _) in made.items():
        if not all(torch.equal(a, b) for a, b in zip(first, params, strict=True)):
            raise AssertionError(f"{subject.name} on {name} differs bitwise from {names[0]}")
    runs = {names[0] if name == "onepass" else name: run for name, (_, run) in made.items()}
    what = str(dtype).removeprefix("torch.")
    return Result(f"ISA: 16 x 4096 {what}, 1 thread", subject.name, 4096 * tensors, tensors, time_in_turn(runs, rounds))


if __name__ == "__main__":
    from run import alone

    alone(measure, __doc__)
