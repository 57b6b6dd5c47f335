"""Constructors with the arguments of torch's classes and those that onepass adds."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer


def constructor(
    cls: type[Optimizer], declared: Callable[..., None], construct: Callable[..., None]
) -> Callable[..., None]:
    """Return a constructor for a class.

    It has the arguments of ``declared``, and the keyword-only arguments of the methods ``_take_arguments``.

    Args:
        cls: The class. Its method ``_take_arguments`` is called last, with the arguments that the methods of this name
            in ``cls`` and its bases declare as keyword-only.
        declared: The constructor whose signature declares all other arguments.
        construct: Called first, with the optimizer and the arguments of ``declared``, which it checks.
    """
    parameters = list(inspect.signature(declared).parameters.values())
    take_arguments: Callable[..., None] = cls._take_arguments  # type: ignore[attr-defined]
    own = _own_arguments(cls)

    def construct_both(self: Optimizer, *args: Any, **kwargs: Any) -> None:
        given = {p.name: kwargs.pop(p.name) for p in own if p.name in kwargs}
        construct(self, *args, **kwargs)
        take_arguments(self, **given)

    construct_both.__name__ = "__init__"
    construct_both.__doc__ = construct.__doc__
    in_order = sorted([*parameters, *own], key=lambda parameter: parameter.kind)  # **kwargs last
    construct_both.__signature__ = inspect.Signature(in_order)  # type: ignore[attr-defined]
    return construct_both


def _own_arguments(cls: type[Optimizer]) -> list[inspect.Parameter]:
    """Return the keyword-only arguments of all methods ``_take_arguments``, those of the class itself first."""
    own: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if (declared := vars(base).get("_take_arguments")) is not None:
            parameters = inspect.signature(declared, eval_str=True).parameters
            own.update({name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY and name not in own})
    return list(own.values())
