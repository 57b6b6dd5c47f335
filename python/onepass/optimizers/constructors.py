"""Constructors with the arguments of torch's classes and those that onepass adds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


def constructor(
    theirs: type[Optimizer], construct: Callable[..., None], take_arguments: Callable[..., None]
) -> Callable[..., None]:
    """Return a constructor with the signature of a torch class, followed by onepass's keyword-only arguments.

    Args:
        theirs: The torch class, which declares, documents and checks its arguments.
        construct: Called first, with the optimizer and the arguments of the torch class.
        take_arguments: Called afterwards, with the optimizer and onepass's arguments, which are its own keyword-only
            arguments.
    """
    parameters = list(inspect.signature(theirs.__init__).parameters.values())
    own = [p for p in inspect.signature(take_arguments, eval_str=True).parameters.values() if p.kind is p.KEYWORD_ONLY]

    def construct_both(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        given = {p.name: kwargs.pop(p.name) for p in own if p.name in kwargs}
        construct(self, *args, **kwargs)
        take_arguments(self, **given)

    construct_both.__name__ = "__init__"
    in_order = sorted([*parameters, *own], key=lambda parameter: parameter.kind)  # **kwargs last
    construct_both.__signature__ = inspect.Signature(in_order)  # type: ignore[attr-defined]
    return construct_both
