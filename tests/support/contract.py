"""What the contract tests share: small runs of our classes, each beside torch's, which it must behave like."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import onepass
import torch
from cases import ROW, SHAPES, Row
from reference import params_of
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

# Between our classes and torch's, in float64: the order of the same few operations may differ, no more.
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def leaves(shapes: Iterable[tuple[int, ...]] = SHAPES, dtype=torch.float64, seed=0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in shapes]


def numbers(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def give_gradients(params: Iterable[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)


def row_of(opt: Optimizer) -> Row:
    """The row of an optimizer of our class, of torch's or of a subclass."""
    names = (cls.__name__.removeprefix("Plain") for cls in type(opt).__mro__)
    return next(ROW[name] for name in names if name in ROW)


class AroundOther(Optimizer):
    """A wrapper without hooks of its own, as accelerate's."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure=None):
        return self.optimizer.step(closure)


def step(opt: Optimizer) -> Any:
    """A step with the gradients that there are; if it wants a closure, of a loss that has these at zero."""
    if not row_of(opt).wants_closure:
        return opt.step()
    slopes = {p: p.grad for p in params_of(opt) if p.grad is not None}

    def closure():
        for p, slope in slopes.items():
            p.grad = slope + p.detach() ** 3
        return sum((slope * p.detach() + p.detach() ** 4 / 4).sum() for p, slope in slopes.items())

    return opt.step(closure)


def train(opt: Optimizer, steps: int = 1, first: int = 0) -> None:
    """Steps with gradients that depend on the number of the step only."""
    for t in range(first, first + steps):
        give_gradients(params_of(opt), t)
        if row_of(opt).wants_sparse:
            for p in params_of(opt):
                p.grad = p.grad.to_sparse(1)
        step(opt)


def snapshot(opt: Optimizer) -> dict[str, Any]:
    """Copies of all parameters and states, to compare; the state of a parameter that has none is None."""
    return copy.deepcopy(
        {
            "params": [p.detach() for p in params_of(opt)],
            "state": [dict(opt.state[p]) if p in opt.state else None for p in params_of(opt)],
        }
    )


def assert_same(actual: Any, expected: Any) -> None:
    """Asserts that all values are equal, element by element."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_close(actual: Any, expected: Any, **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, **(tolerance or CLOSE))


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def torch_path(before: dict[str, Any]) -> set[str]:
    """The reasons for which torch's code has stepped tensors of ours since ``before = onepass.stats()``."""
    return {why for why, count in onepass.stats()["torch"].items() if count != before["torch"].get(why, 0)}


def run_both(
    row: Row, script: Callable[[Optimizer], Any], shapes=None, dtype=torch.float64, path=frozenset(), **kw
) -> tuple[Optimizer, Optimizer]:
    """Runs a script on torch's optimizer and on ours, on equal parameters, and asserts that they end up equal.

    Args:
        row: The optimizer.
        script: What to do; it also makes the steps. What it returns must be equal as well.
        shapes: Of the parameters; those of the row by default.
        dtype: Of the parameters.
        path: The reasons for which torch's code must have stepped some of the parameters; none by default, so that a
            silent fallback cannot pass for a kernel.
        kw: Further arguments of the class; tensors are copied, so that either optimizer has its own.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # for the numbers that torch keeps for each parameter
    try:
        opts = [
            cls(leaves(shapes or row.shapes, dtype), **copy.deepcopy({**row.full, **kw}))
            for cls in (row.ours, row.theirs)
        ]
        expected = script(opts[1])
        before = onepass.stats()
        actual = script(opts[0])
    finally:
        torch.set_default_dtype(default)
    took = torch_path(before)
    assert took == set(path), took
    assert actual == expected, f"{actual} != {expected}"
    assert_close(snapshot(opts[0]), snapshot(opts[1]))
    return opts[0], opts[1]


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new Python, with warnings as errors."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
