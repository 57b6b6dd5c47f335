"""The optimizers of this package as a table, made from the classes, the registry of rules and what `explain` says."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import torch
from torch.optim import Optimizer


def optimizers() -> Iterator[type[Optimizer]]:
    """All optimizers with kernels; Lookahead, which wraps any, is not among them."""
    import onepass

    for name in sorted(onepass.__all__, key=str.lower):
        found = getattr(onepass, name)
        if inspect.isclass(found) and issubclass(found, Optimizer) and hasattr(found, "_state_names"):
            yield found


def takes_sparse(optimizer: type[Optimizer]) -> bool:
    """Whether its kernels take sparse gradients, with its default hyperparameters."""
    from .introspect import explain

    p = torch.nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (2, 2), check_invariants=True)
    (row,) = explain(optimizer([p]))  # type: ignore[call-arg]
    return row.path == "kernel"


def markdown() -> str:
    """The table, as README shows it."""
    lines = ["| `onepass` | in place of | states | sparse gradients |", "|---|---|---|---|"]
    for found in optimizers():
        theirs = f"`torch.optim.{found.__name__}`" if hasattr(torch.optim, found.__name__) else "(torch has none)"
        states = ", ".join(f"`{name}`" for name in found._state_names())  # type: ignore[attr-defined]
        lines.append(f"| `{found.__name__}` | {theirs} | {states} | {'yes' if takes_sparse(found) else ''} |")
    return "\n".join(lines)
