"""The optimizers of this package, by name and as a table."""

from __future__ import annotations

import argparse
import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from ..optimizers.arguments import described
from ..optimizers.muon import Orthogonalizing
from .grouping import checked_patterns, hidden_matrices, param_groups
from .table import markdown_table


def optimizers() -> Iterator[type[Optimizer]]:
    """Yield all optimizers with kernels. Lookahead is not one of them: it wraps any optimizer."""
    import onepass

    for name in sorted(onepass.__all__, key=str.lower):
        found = getattr(onepass, name)
        if inspect.isclass(found) and issubclass(found, Optimizer) and hasattr(found, "_state_names"):
            yield found


def list_optimizers() -> list[str]:
    """Return the names that :func:`create` accepts: the optimizers' class names in lower case.

    Example:
        >>> "adamw" in onepass.list_optimizers()
        True
    """
    return [found.__name__.lower() for found in optimizers()]


def create(name: str, params: nn.Module | ParamsT, **arguments: Any) -> Optimizer:
    """Return a new optimizer, given the name of its class.

    :class:`onepass.Muon` and :class:`onepass.NorMuon` step matrices only. For whole models, ``create("muon", model)``
    and ``create("normuon", model)`` return :class:`onepass.Combined` of that optimizer, for the matrices of hidden
    layers, and of AdamW, for all other parameters:

    - parameters that are not matrices;
    - those of embeddings (:class:`torch.nn.Embedding`, :class:`torch.nn.EmbeddingBag`, and classes whose name ends in
      ``Embedding`` or ``Embeddings``);
    - those of the head (the module that ``model.get_output_embeddings()`` or ``model.get_classifier()`` returns, or
      else the last :class:`torch.nn.Linear`);
    - those whose names match a pattern in ``no_muon``, such as positional embeddings that are plain
      :class:`torch.nn.Parameter` matrices.

    A tied parameter has the roles of all its owners. The arguments are those of Muon or NorMuon. AdamW gets those that
    it also has, such as ``lr`` and ``weight_decay``, and those of the dict ``adamw``. ``adjust_lr_fn`` is
    ``"match_rms_adamw"`` unless it is given, so that one ``lr`` suits both (Liu et al. 2025, arXiv:2502.16982).

    Args:
        name: Name of the optimizer, such as ``"adamw"``; see :func:`list_optimizers`. Case, ``_`` and ``-`` are
            ignored.
        params: A module, whose named parameters are used, or any ``params`` that the optimizer's class accepts.
        **arguments: Further arguments of the class. For a module, ``no_decay``, ``layer_decay`` and ``lr_scale`` are
            also accepted and are passed to :func:`onepass.param_groups`. With ``no_decay`` and without
            ``weight_decay``, the other parameters have the class's default ``weight_decay``. For ``"muon"`` and
            ``"normuon"`` with a module, ``no_muon`` (patterns of the names of matrices that AdamW steps, as in
            ``lr_scale``) and ``adamw`` (a dict of arguments of AdamW) are also accepted.

    Returns:
        An optimizer of that class; :class:`onepass.Combined` for ``"muon"`` and ``"normuon"`` with a module.

    Raises:
        TypeError: ``name`` is not a string; ``no_decay``, ``layer_decay`` or ``lr_scale`` is given without a module;
            ``no_muon`` or ``adamw`` is given without a module, or for another optimizer; or an argument has the wrong
            type.
        ValueError: There is no optimizer of that name, an argument is out of range, or ``create("muon", model)`` gets
            an argument that needs all parameters in one optimizer, such as ``max_norm``.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.create("adamw", model, lr=1e-3, weight_decay=0.1, no_decay=["bias"])
        >>> [group["weight_decay"] for group in optimizer.param_groups]
        [0.1, 0.0]
    """
    found = optimizer_named(name, "create: ")
    grouping: dict[str, Any] = {
        key: arguments.pop(key) for key in ("no_decay", "layer_decay", "lr_scale") if key in arguments
    }
    if issubclass(found, Orthogonalizing) and isinstance(params, nn.Module):
        return _muon_and_adamw(found, params, arguments, grouping)
    if isinstance(params, nn.Module):
        if grouping:
            both = {key: arguments[key] for key in ("lr", "weight_decay") if key in arguments}
            default = inspect.signature(found).parameters.get("weight_decay")
            if "no_decay" in grouping and default is not None:
                both.setdefault("weight_decay", default.default)
            params = param_groups(params, **both, **grouping)
        else:
            params = params.named_parameters()
    elif grouping:
        raise TypeError(
            f"create: {next(iter(grouping))} needs a torch.nn.Module for params, got the {type(params).__name__}: pass "
            "the model, not its parameters()"
        )
    for key in ("no_muon", "adamw"):
        if key in arguments:
            raise TypeError(f"create: {key} is only for muon and normuon, with a module")
    optimizer: Optimizer = found(params, **arguments)
    return optimizer


def _muon_and_adamw(
    muon: type[Optimizer], model: nn.Module, arguments: dict[str, Any], grouping: dict[str, Any]
) -> Optimizer:
    from ..optimizers.adamw import AdamW
    from ..optimizers.combined import Combined

    for name, default in {"max_norm": None, "skip_nonfinite": False, "average": None, "copy_to": None}.items():
        if arguments.get(name, default) is not default:
            raise ValueError(
                f"create: {name} needs all parameters together, but {muon.__name__} and AdamW each step only a part: "
                "leave it out, or create both and combine them by onepass.Combined"
            )
    no_muon = checked_patterns("create: no_muon must be a list of patterns of names", arguments.pop("no_muon", ()))
    adamw = arguments.pop("adamw", {})
    if not isinstance(adamw, Mapping):
        raise TypeError(f"create: adamw must be a dict of arguments of AdamW, got {described(adamw)}")
    if unknown := [key for key in arguments if key not in inspect.signature(muon).parameters]:
        # The class would refuse it, but a model without matrices needs none.
        raise TypeError(f"create: {muon.__name__} has no argument {unknown[0]!r}")
    if isinstance(no_decay := grouping.get("no_decay"), Iterator):  # it is read twice
        grouping["no_decay"] = list(no_decay)
    arguments = {"lr": 1e-3, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw", **arguments}
    of_both = inspect.signature(AdamW).parameters.keys() - {"eps"}
    for_adamw = {**{key: value for key, value in arguments.items() if key in of_both}, **adamw}
    matrices = set(hidden_matrices(model, no_muon))
    groups: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for of_muon, given in ((True, arguments), (False, for_adamw)):
        if not grouping:
            own = [{"params": [(n, p) for n, p in model.named_parameters() if (n in matrices) == of_muon]}]
        else:
            own = param_groups(model, lr=given["lr"], weight_decay=given["weight_decay"], **grouping)
            own = [{**g, "params": [(n, p) for n, p in g["params"] if (n in matrices) == of_muon]} for g in own]
        groups[of_muon] = [group for group in own if group["params"]]
    parts: list[Optimizer] = []
    if groups[True]:
        parts.append(muon(groups[True], **arguments))
    if groups[False]:
        parts.append(AdamW(groups[False], **for_adamw))
    if not parts:
        raise ValueError("optimizer got an empty parameter list")
    return Combined(parts)


def optimizer_named(name: str, prefix: str = "") -> type[Any]:
    """Return the class of an optimizer, given a name that :func:`create` accepts. Messages begin with ``prefix``.

    Raises:
        TypeError: ``name`` is not a string.
        ValueError: There is no optimizer of that name.
    """
    if not isinstance(name, str):
        is_class = inspect.isclass(name)
        got = f"the class {name.__name__}, which makes an optimizer when it is called" if is_class else described(name)
        raise TypeError(f"{prefix}name must be the name of an optimizer, such as 'adamw', got {got}")
    wanted = name.lower().replace("_", "").replace("-", "")
    known = {found.__name__.lower(): found for found in optimizers()}
    if wanted not in known:
        close = difflib.get_close_matches(wanted, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        raise ValueError(f"{prefix}there is no optimizer {name!r}: {hint}")
    return known[wanted]


def class_name(name: str) -> str:
    """Return the name of an optimizer's class. Used as the type of a command-line argument by argparse."""
    try:
        return optimizer_named(name).__name__
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def plain_name(name: str) -> str:
    """Return the name of an optimizer as in :func:`list_optimizers`. Used as a type by argparse."""
    return class_name(name).lower()


def takes_sparse(optimizer: type[Optimizer]) -> bool:
    """Return whether the optimizer's kernels accept sparse gradients with its default hyperparameters."""
    from .introspect import explain

    p = torch.nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.ones(1, 2), (2, 2), check_invariants=True)
    (row,) = explain(optimizer([p]))  # type: ignore[call-arg]
    return row.path == "kernel"


def markdown() -> str:
    """Return the table of optimizers as Markdown, as shown in the README."""
    rows = []
    for found in optimizers():
        theirs = f"`torch.optim.{found.__name__}`" if hasattr(torch.optim, found.__name__) else "(torch has none)"
        states = ", ".join(f"`{name}`" for name in found._state_names())  # type: ignore[attr-defined]
        rows.append([f"`{found.__name__}`", theirs, states, "yes" if takes_sparse(found) else ""])
    return markdown_table(["`onepass`", "in place of", "states", "sparse gradients"], rows)
