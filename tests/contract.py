"""What the contract tests share: our classes, each beside the stock class that it must behave like, and small runs."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import onepass
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer


class PlainLion(Optimizer):
    """Lion as the paper's algorithm 2 has it, in torch's operations: torch has no class to compare with."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, maximize=False):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        self._update(group, p, -p.grad if group["maximize"] else p.grad)
        return loss

    def _update(self, group, p, grad):
        beta1, beta2 = group["betas"]
        lr = group["lr"].item() if isinstance(group["lr"], Tensor) else group["lr"]
        if "exp_avg" not in self.state[p]:
            self.state[p]["exp_avg"] = torch.zeros_like(p)
        exp_avg = self.state[p]["exp_avg"]
        mixed = beta1 * exp_avg + (1 - beta1) * grad
        sign = torch.view_as_complex(torch.view_as_real(mixed).sign()) if p.is_complex() else mixed.sign()
        p.sub_(lr * (sign + group["weight_decay"] * p))
        exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)


@dataclass(frozen=True, eq=False)
class Kind:
    ours: type[Optimizer]
    stock: type[Optimizer]
    options: dict[str, Any]
    states: tuple[str, ...]  # one value for each element

    @property
    def name(self) -> str:
        return self.ours.__name__

    __name__ = name  # by which pytest calls the tests of a table

    @property
    def counts(self) -> bool:
        """Whether each parameter has a step counter."""
        return "exp_avg_sq" in self.states


KINDS = (
    Kind(onepass.SGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, ("momentum_buffer",)),
    Kind(onepass.Adam, torch.optim.Adam, {"lr": 0.01}, ("exp_avg", "exp_avg_sq")),
    Kind(onepass.AdamW, torch.optim.AdamW, {"lr": 0.01}, ("exp_avg", "exp_avg_sq")),
    Kind(onepass.Lion, PlainLion, {"lr": 0.01, "weight_decay": 0.1}, ("exp_avg",)),
)
SGD, ADAM, ADAMW, LION = KINDS

every_kind = pytest.mark.parametrize("kind", KINDS)
torchs_kinds = pytest.mark.parametrize("kind", KINDS[:3])
adams = pytest.mark.parametrize("kind", KINDS[1:3])

SHAPES = ((), (5,), (4, 3), (2, 0), (2, 3, 4, 5))

# Between our classes and the stock ones, in float64: the order of the same few operations may differ, no more.
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def leaves(shapes: Iterable[tuple[int, ...]] = SHAPES, dtype=torch.float64, seed=0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, dtype=dtype, generator=generator)) for shape in shapes]


def numbers(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape)))


def params_of(opt: Optimizer) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def give_gradients(params: Iterable[Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)


def train(opt: Optimizer, steps: int = 1, first: int = 0) -> None:
    """Steps with gradients that depend on the number of the step only."""
    for t in range(first, first + steps):
        give_gradients(params_of(opt), t)
        opt.step()


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


def torch_path(before: dict[str, Any]) -> set[str]:
    """The reasons for which torch's code has stepped tensors of ours since ``before = onepass.stats()``."""
    return {why for why, count in onepass.stats()["torch"].items() if count != before["torch"].get(why, 0)}


def run_both(
    kind: Kind, script: Callable[[Optimizer], Any], shapes=SHAPES, dtype=torch.float64, path=frozenset(), **kw
) -> tuple[Optimizer, Optimizer]:
    """Runs a script on the stock optimizer and on ours, on equal parameters, and asserts that they end up equal.

    Args:
        kind: The class.
        script: What to do; it also makes the steps. What it returns must be equal as well.
        shapes: Of the parameters.
        dtype: Of the parameters.
        path: The reasons for which torch's code must have stepped some of the parameters; none by default, so that a
            silent fallback cannot pass for a kernel.
        kw: Further arguments of the class; tensors are copied, so that either optimizer has its own.
    """
    opts = [cls(leaves(shapes, dtype), **copy.deepcopy({**kind.options, **kw})) for cls in (kind.ours, kind.stock)]
    expected = script(opts[1])
    before = onepass.stats()
    actual = script(opts[0])
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
