"""Large models: step times compared with the memory limit and with the peers.

64M float32 elements in 16 tensors: far more than a cache holds. The limit is the fastest of several loops over the same
arrays with additions only (:mod:`onepass.cli.limit`). Each optimizer that is not element-wise has its own workload.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import onepass
import peers
import torch
from onepass.cli.bench import SUBJECTS, Subject, compare
from onepass.cli.timing import Result, Run, check, gradients, parameters, time_in_turn
from torch import Tensor
from torch.optim import Optimizer

SHAPES = [(4 << 20,)] * 16
QUICK_SHAPES = [(64 << 10,)] * 16


def measure(quick: bool, rounds: int) -> Iterator[Result | str]:
    left_out: list[str] = []
    beyond = peers.makers if quick else peers.every  # compiling takes half a minute per optimizer
    grads = gradients(QUICK_SHAPES if quick else SHAPES)
    for subject in SUBJECTS:
        yield compare(subject, "large: 16 x 4M", grads, rounds, beyond(subject.name, subject.arguments), left_out)
    del grads
    yield embedding(quick, rounds)
    yield from factored(quick, rounds, left_out)
    yield matrices(quick, rounds, left_out)
    yield quasi_newton(quick, rounds)
    yield lookahead(quick, rounds)
    yield from left_out


def embedding(quick: bool, rounds: int) -> Result:
    """Measure SparseAdam on an embedding with gradients of some rows."""
    rows, touched = (1 << 12, 1 << 8) if quick else (1 << 20, 1 << 12)
    generator = torch.Generator().manual_seed(2)
    indices = torch.randint(rows, (1, touched), generator=generator)
    values = torch.randn(touched, 64, generator=generator)
    grad = torch.sparse_coo_tensor(indices, values, (rows, 64), check_invariants=True)
    return compare(Subject(onepass.SparseAdam, {"lr": 1e-3}), "embedding: 1M x 64, 4096 rows", [grad], rounds)


def factored(quick: bool, rounds: int, left_out: list[str]) -> Iterator[Result]:
    grads = gradients([(256, 256) if quick else (4096, 4096)])
    # torch sums squares in float32, so it is 1e-4 off; its update is 0.05.
    for subject in (
        Subject(onepass.Adafactor, {}, tolerance=2e-4),
        Subject(onepass.CAME, {"lr": 1e-2}, tolerance=2e-4),
    ):
        contenders = peers.makers(subject.name, subject.arguments)
        yield compare(subject, "matrix: 4096 x 4096", grads, rounds, contenders, left_out)


def matrices(quick: bool, rounds: int, left_out: list[str]) -> Result:
    subject = Subject(onepass.Muon, {"lr": 1e-4})
    grads = gradients([(64, 64) if quick else (1024, 1024)] * 4)
    return compare(
        subject, "matrices: 4 x 1024 x 1024", grads, rounds, peers.makers(subject.name, subject.arguments), left_out
    )


def quasi_newton(quick: bool, rounds: int) -> Result:
    """Measure LBFGS with a full history of 10: steps of 4 iterations on a quadratic whose gradient is one pass."""
    size = 1 << 16 if quick else 10_000_000
    curvature = torch.linspace(1.0, 100.0, size)
    arguments: dict[str, Any] = {"lr": 0.5, "history_size": 10, "tolerance_grad": 0.0, "tolerance_change": 0.0}

    def step_of(make: Callable[..., Optimizer], p: Tensor) -> Run:
        calls = 0

        def closure() -> float:
            nonlocal calls
            calls += 1
            # The gradient does not converge and the loss always falls, so that no step ends early.
            p.grad = torch.mul(curvature, p.detach()).add_(0.1 * (calls % 3 - 1))
            return -float(calls)

        return functools.partial(make([p], max_iter=4, **arguments).step, closure)

    makes = {"onepass": onepass.LBFGS, "default": torch.optim.LBFGS}
    params = {name: parameters([torch.zeros(size)])[0] for name in makes}
    runs = {name: step_of(make, params[name]) for name, make in makes.items()}
    for _ in range(3):  # the history is full after 11 iterations
        for run in runs.values():
            run()
    error = (params["onepass"] - params["default"]).detach().abs().max()
    if not error <= 1e-4 * params["default"].detach().abs().max():
        raise AssertionError(f"LBFGS against torch's default: the largest difference is {float(error):.1e}")
    return Result("history: 10 of 10M, 4 iterations", "LBFGS", size, 1, time_in_turn(runs, rounds))


def lookahead(quick: bool, rounds: int) -> Result:
    """Measure 5 steps of Lookahead over AdamW, and the same in torch's operations over torch's fused AdamW."""
    grads = gradients(QUICK_SHAPES if quick else SHAPES)
    ours, theirs = parameters(grads), parameters(grads)
    made = onepass.Lookahead(onepass.AdamW(ours, lr=1e-3))
    slow = [p.detach().clone() for p in theirs]
    fused = torch.optim.AdamW(theirs, lr=1e-3, fused=True)

    @torch.no_grad()
    def in_torch() -> None:
        for _ in range(5):
            fused.step()
        torch._foreach_lerp_(slow, theirs, 0.5)
        torch._foreach_copy_(theirs, slow)

    def cycle() -> None:
        for _ in range(5):
            made.step()

    runs: dict[str, Run] = {"onepass": cycle, "fused": in_torch}
    for run in runs.values():
        run()
    check("Lookahead against torch's operations", ours, theirs)
    elements = sum(map(Tensor.numel, grads))
    return Result("cycle: 5 steps of AdamW, 16 x 4M", "Lookahead", elements, len(grads), time_in_turn(runs, rounds))


if __name__ == "__main__":
    from run import alone

    alone(measure, __doc__)
