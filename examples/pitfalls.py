"""Accumulation and order: zero_grad forgotten or misplaced, a model moved, parameters replaced.

Every case trains the same line with the same optimizer for a few steps. The table shows whether its weight is the right
one, and whether the optimizer still holds the model's parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onepass
import torch
from onepass.examples.common import Gallery, alone
from torch import Tensor, nn
from torch.optim import Optimizer

LR, STEPS = 0.05, 5


class Line(nn.Module):
    """y = weight * x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


@dataclass
class Outcome:
    weights: list[float]  # of the model, after each step
    held: bool  # whether the optimizer holds the model's own parameter at the end
    model: Line
    optimizer: Optimizer


def begin() -> tuple[Line, Optimizer]:
    model = Line()
    return model, onepass.SGD(model.parameters(), lr=LR)


def backward(model: Line) -> None:
    x = torch.tensor([1.0, 2.0], dtype=model.weight.dtype)
    ((model(x) - 3 * x) ** 2).mean().backward()


def outcome(model: Line, optimizer: Optimizer, step: Callable[[], None]) -> Outcome:
    weights = []
    for _ in range(STEPS):
        step()
        weights.append(model.weight.item())
    held = any(p is model.weight for group in optimizer.param_groups for p in group["params"])
    return Outcome(weights, held, model, optimizer)


def in_order(*calls: str) -> Outcome:
    """Train with steps that make these calls."""
    model, optimizer = begin()
    actions: dict[str, Callable[[], object]] = {
        "zero_grad": optimizer.zero_grad,
        "backward": lambda: backward(model),
        "step": optimizer.step,
    }

    def step() -> None:
        for call in calls:
            actions[call]()

    return outcome(model, optimizer, step)


def accumulated() -> Outcome:
    """Train with two half batches per step, each with half the loss, which have the gradient of the whole batch."""
    model, optimizer = begin()

    def step() -> None:
        optimizer.zero_grad()
        for x in (torch.tensor([1.0]), torch.tensor([2.0])):
            (((model(x) - 3 * x) ** 2).mean() / 2).backward()
        optimizer.step()

    return outcome(model, optimizer, step)


def moved(replaces: bool) -> Outcome:
    """Move the model after the optimizer was made; torch changes its parameters in place, or replaces them."""
    model, optimizer = begin()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(replaces)
    try:
        model.to(torch.float64)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    return finish(model, optimizer)


def replaced() -> Outcome:
    model, optimizer = begin()
    model.weight = nn.Parameter(torch.zeros(1))
    return finish(model, optimizer)


def added() -> Outcome:
    """Replace the parameter, and add the new one to the optimizer."""
    model, optimizer = begin()
    model.weight = nn.Parameter(torch.zeros(1))
    optimizer.add_param_group({"params": [model.weight]})
    return finish(model, optimizer)


def finish(model: Line, optimizer: Optimizer) -> Outcome:
    def step() -> None:
        optimizer.zero_grad()
        model.zero_grad()
        backward(model)
        optimizer.step()

    return outcome(model, optimizer, step)


CASES: dict[str, Callable[[], Outcome]] = {
    "zero_grad, backward, step": lambda: in_order("zero_grad", "backward", "step"),
    "backward, step, zero_grad": lambda: in_order("backward", "step", "zero_grad"),
    "no zero_grad: gradients add up": lambda: in_order("backward", "step"),
    "backward, zero_grad, step: nothing to step with": lambda: in_order("backward", "zero_grad", "step"),
    "two half batches, half the loss each": accumulated,
    "model.to(float64) after the optimizer was made": lambda: moved(replaces=False),
    "the same where torch replaces parameters": lambda: moved(replaces=True),
    "parameter replaced after the optimizer was made": replaced,
    "replaced, then add_param_group": added,
}


def run(gallery: Gallery) -> None:
    outcomes = {name: case() for name, case in CASES.items()}
    wanted = outcomes["zero_grad, backward, step"].weights
    gallery.print(f"the weight of y = w x after each of {STEPS} steps, from 0; its best value is 3")
    gallery.table(
        ["", *(f"step {t + 1}" for t in range(STEPS)), "optimizer holds it", "as it should be"],
        (
            [
                name,
                *o.weights,
                "yes" if o.held else "no",
                "yes" if np.allclose(o.weights, wanted) else "NO",
            ]
            for name, o in outcomes.items()
        ),
    )
    gallery.print("\nonepass.explain(optimizer), where the parameter was replaced; it has no gradient, ever:")
    gallery.print(str(onepass.explain(outcomes["parameter replaced after the optimizer was made"].optimizer)))


if __name__ == "__main__":
    alone(run)
