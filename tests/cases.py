"""The table of cases: one row for each optimizer. What is tested for one is tested for all.

To add an optimizer, write its formula in reference.py and a row here; hyperparameters of a new name get a strategy in
test_fuzz.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onepass
import pytest
import reference
import torch
from torch import Tensor


class PlainLion(torch.optim.Optimizer):
    """Lion in torch's operations, for want of one in torch."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, maximize=False):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = -p.grad if group["maximize"] else p.grad
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                c = m.mul(beta1).add_(grad, alpha=1 - beta1)
                sign = torch.where(c.isnan(), c, c.sign())  # torch's sign of NaN is 0, ours NaN: a broken run must show
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * sign)
                m.lerp_(grad, 1 - beta2)


@dataclass(frozen=True, kw_only=True)
class Row:
    """An optimizer, and all that the tests need to know of it."""

    ours: type[torch.optim.Optimizer]
    theirs: type[torch.optim.Optimizer]  # torch's class; a plain one above where torch has none
    flavours: tuple[dict[str, Any], ...] = ({"foreach": False}, {"foreach": True}, {"fused": True})  # of torch's code
    formula: Callable
    doubt: Callable | None = None  # where the formula jumps, which elements may fall on either side
    states: tuple[str, ...]  # all that it can have, besides `step`
    counts_steps: bool = True
    full: dict[str, Any]  # keyword arguments with which it uses all states and terms
    variants: dict[str, dict[str, Any]]  # name -> keyword arguments; every flag and argument occurs

    @property
    def name(self) -> str:
        return self.ours.__name__

    @property
    def undecayed(self) -> dict[str, Any]:
        """`full`, but for the weight decay: without a gradient the parameter stays."""
        return {name: 0.0 if name == "weight_decay" else value for name, value in self.full.items()}

    def flavours_for(self, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Those that accept these arguments: foreach takes no tensors."""
        values = [v[0] if isinstance(v, tuple) else v for v in kwargs.values()]
        tensors = any(isinstance(v, Tensor) for v in values)
        return (flavour for flavour in self.flavours if not (tensors and flavour.get("foreach")))


ADAM_VARIANTS = {
    "default": {},
    "lr": {"lr": 0.03},
    "no_lr": {"lr": 0.0, "weight_decay": 0.1},
    "betas": {"betas": (0.5, 0.75)},
    "zero_betas": {"betas": (0.0, 0.0)},
    "eps": {"eps": 0.1},
    "no_decay": {"weight_decay": 0.0},
    "weight_decay": {"lr": 0.01, "weight_decay": 0.3},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "amsgrad": {"amsgrad": True, "lr": 0.01},
    "amsgrad_maximize": {"amsgrad": True, "maximize": True, "weight_decay": 0.1, "betas": (0.8, 0.9)},
    "tensor_lr": {"lr": torch.tensor(0.01)},
    "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1, "amsgrad": True},
    "tensor_betas": {"betas": (torch.tensor(0.8), torch.tensor(0.95)), "lr": torch.tensor(0.01)},
}

ROWS = [
    Row(
        ours=onepass.SGD,
        theirs=torch.optim.SGD,
        formula=reference.sgd,
        states=("momentum_buffer",),
        counts_steps=False,
        full={"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.1},
            "weight_decay": {"lr": 0.01, "weight_decay": 0.3},
            "momentum": {"lr": 0.01, "momentum": 0.9},
            "momentum_decay": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1},
            "dampening": {"lr": 0.01, "momentum": 0.8, "dampening": 0.4},
            "dampening_all": {"lr": 0.01, "momentum": 0.8, "dampening": 0.4, "weight_decay": 0.1, "maximize": True},
            "nesterov": {"lr": 0.01, "momentum": 0.9, "nesterov": True},
            "nesterov_all": {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
            "maximize": {"lr": 0.01, "maximize": True},
            "tensor_lr": {"lr": torch.tensor(0.01), "momentum": 0.9},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64)},
            "tensor_weight_decay": {"lr": 0.01, "weight_decay": torch.tensor(0.1)},
        },
    ),
    Row(
        ours=onepass.Adam,
        theirs=torch.optim.Adam,
        formula=reference.adam,
        states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        full={"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
        variants={
            **ADAM_VARIANTS,
            "decoupled": {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
            "decoupled_amsgrad_maximize": {
                "lr": 0.01,
                "weight_decay": 0.1,
                "decoupled_weight_decay": True,
                "amsgrad": True,
                "maximize": True,
            },
        },
    ),
    Row(
        ours=onepass.AdamW,
        theirs=torch.optim.AdamW,
        formula=reference.adam,
        states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        full={"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
        variants=ADAM_VARIANTS,
    ),
    Row(
        ours=onepass.Lion,
        theirs=PlainLion,
        flavours=({},),
        formula=reference.lion,
        doubt=reference.lion_doubt,
        states=("exp_avg",),
        counts_steps=False,
        full={"lr": 0.01, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.01},
            "betas": {"betas": (0.5, 0.75)},
            "zero_betas": {"betas": (0.0, 0.0)},
            "weight_decay": {"lr": 0.01, "weight_decay": 0.3},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.01), "weight_decay": 0.1},
        },
    ),
]

CASES = [pytest.param(row, kw, id=f"{row.name}-{name}") for row in ROWS for name, kw in row.variants.items()]

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
each_case = pytest.mark.parametrize(("row", "kwargs"), CASES)


# -- models and gradients --------------------------------------------------------------------------------------------


def model(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters of every kind of shape, packed in several orders."""
    params = [torch.randn(shape) for shape in [(), (0,), (3, 0, 2), (1,), (1, 1), (7,), (33, 65), (1031,)]]
    params.append(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    params.append(torch.randn(5, 9, 2).permute(2, 0, 1))
    return [p.to(dtype).requires_grad_() for p in params]


def copies(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in params]


def gradients(params: list[Tensor], step: int) -> list[Tensor | None]:
    """Fresh gradients, with exact zeros among them; after the first step some are missing."""
    kept = [step == 1 or (7 * step + 3 * i) % 11 > 0 for i in range(len(params))]
    return [torch.randn_like(p) * (torch.rand_like(p) > 0.02) if k else None for p, k in zip(params, kept, strict=True)]


def give(optimizer: torch.optim.Optimizer, grads: list[Tensor | None]) -> None:
    """Copies of the gradients to the optimizer's parameters."""
    for p, grad in zip(reference.params_of(optimizer), grads, strict=True):
        p.grad = None if grad is None else grad.clone()
