"""Parameter groups by what parameters are: no weight decay for some, smaller rates for early layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..optimizers.arguments import check_number, described
from ..optimizers.torch_private import NormBase

# What `no_decay` may name beside patterns.
KINDS = ("bias", "norm", "embedding")

_NORMS = (NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def param_groups(
    model: nn.Module,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    no_decay: Iterable[str] = KINDS,
    layer_decay: float | None = None,
    lr_scale: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    r"""The parameters of a model in groups, for any optimizer.

    The learning rate of a parameter is :math:`\gamma \, d^{\,n - i} \, x`, where :math:`d` is ``layer_decay``,
    :math:`i = 0 \ldots n` is its layer, and :math:`x` is the product of ``lr_scale`` over the patterns that its name
    matches. Its weight decay is ``weight_decay``, or 0 if it is one of ``no_decay``.

    Layers are counted along the longest ``ModuleList`` or ``Sequential`` of the model (the blocks of a transformer):
    what comes before it in ``named_parameters()`` is layer 0, its modules are 1, 2, ..., what comes after is the last.
    It must have at least half of the model's parameter tensors: a ResNet, whose blocks are in several lists, has not.
    Beside a list that is trained, one without any parameter that requires a gradient does not count (a frozen teacher),
    nor do frozen parameters outside the list.

    Sources of layer-wise decay: Clark et al. 2020, "ELECTRA", arXiv:2003.10555; Bao et al. 2022, "BEiT",
    arXiv:2106.08254.

    Args:
        model: Its parameters are taken by ``named_parameters()``, tied ones once. Those that require no gradient are in
            the groups, too: they may be unfrozen later.
        lr: Learning rate :math:`\gamma`; needed with ``layer_decay`` and ``lr_scale``.
        weight_decay: Of all parameters but those of ``no_decay``; None leaves it to the optimizer, and then there is
            nothing to exempt from.
        no_decay: ``"bias"`` (parameters named so, or whose name begins with ``bias_`` or ends in ``_bias``), ``"norm"``
            (parameters of normalization layers), ``"embedding"`` (of ``nn.Embedding`` and ``nn.EmbeddingBag``), and
            patterns of names as in ``lr_scale``. A norm or an embedding of your own is known by the end of its class's
            name: ``Norm``, ``Embedding``, ``Embeddings``. A tied parameter is all that its owners make it.
        layer_decay: :math:`d`, above 0 and at most 1.
        lr_scale: Factors by pattern of the parameter's name, such as ``{"head.*": 10.0}``: the wildcards of
            :mod:`fnmatch`, ``*``, ``?`` and ``[...]``. A pattern of which nothing is found is an error.

    Returns:
        Groups with ``params`` (names and parameters, which optimizers keep as ``param_names``), and ``lr`` and
        ``weight_decay`` where they are known; parameters of equal hyperparameters share a group, in the model's order.

    Raises:
        TypeError: ``model`` is no ``nn.Module``, or an argument is of another type.
        ValueError: An argument is out of its range, ``lr`` is missing, a pattern matches no parameter, or the model has
            no such list of layers, or several of equal length.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> groups = onepass.param_groups(model, weight_decay=0.1)
        >>> [(group["weight_decay"], [name for name, _ in group["params"]]) for group in groups]
        [(0.1, ['0.weight']), (0.0, ['0.bias', '1.weight', '1.bias'])]
        >>> optimizer = onepass.AdamW(groups, lr=1e-3)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is a {type(model).__name__}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("layer_decay", layer_decay)):
        if value is not None:
            check_number(name, value)
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value is not None and not value >= 0.0:
            raise ValueError(f"Invalid {name}: {value}; it must be at least 0")
    if layer_decay is not None and not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"Invalid layer_decay: {layer_decay}; it must be above 0 and at most 1")
    scales_by_name = _checked_scales(lr_scale)
    if lr is None and (layer_decay is not None or scales_by_name):
        raise ValueError("layer_decay and lr_scale scale a learning rate: say which, by lr")
    no_decay = _checked_patterns(no_decay)

    params = dict(model.named_parameters())
    exempt = set() if weight_decay is None else set(_exempt(model, params, no_decay))
    scales = dict.fromkeys(params, 1.0)
    if layer_decay is not None:
        layers = _layers(model, params)
        for name, layer in layers.items():
            scales[name] *= layer_decay ** (max(layers.values()) - layer)
    for pattern, scale in scales_by_name.items():
        for name in _matches(params, pattern, "lr_scale"):
            scales[name] *= scale

    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, p in params.items():
        key = scales[name], name in exempt
        if key not in groups:
            groups[key] = {"params": []}
            if lr is not None:
                groups[key]["lr"] = lr * scales[name]
            if weight_decay is not None:
                groups[key]["weight_decay"] = 0.0 if name in exempt else weight_decay
        groups[key]["params"].append((name, p))
    return list(groups.values())


def _checked_scales(lr_scale: Mapping[str, float] | None) -> Mapping[str, float]:
    if lr_scale is None:
        return {}
    if not isinstance(lr_scale, Mapping):
        raise TypeError(
            "lr_scale must be a mapping of patterns of names to factors, such as {'head.*': 10.0}, got "
            f"{described(lr_scale)}"
        )
    for pattern, scale in lr_scale.items():
        if not isinstance(pattern, str):
            raise TypeError(f"lr_scale must have patterns of names for keys, got {described(pattern)}")
        check_number(f"lr_scale of {pattern!r}", scale)
        if not scale >= 0.0:
            raise ValueError(f"Invalid lr_scale: {scale} for {pattern!r}; it must be at least 0")
    return lr_scale


def _checked_patterns(no_decay: Iterable[str]) -> tuple[str, ...]:
    wanted = f"no_decay must be several of {KINDS} and patterns of names"
    if isinstance(no_decay, str):
        raise ValueError(f"{wanted}, but is the text {no_decay!r}")
    patterns = tuple(no_decay) if isinstance(no_decay, Iterable) else None
    if patterns is None or not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{wanted}, got {described(no_decay)}")
    return patterns


def _matches(params: Mapping[str, Tensor], pattern: str, argument: str) -> list[str]:
    found = fnmatch.filter(params, pattern)
    if not found:
        raise ValueError(
            f"{argument}: no parameter has a name like {pattern!r}; the first is {next(iter(params), None)!r}"
        )
    return found


def _exempt(model: nn.Module, params: Mapping[str, Tensor], no_decay: Collection[str]) -> Iterator[str]:
    """Names of the parameters without weight decay."""
    for pattern in no_decay:
        if pattern not in KINDS:
            yield from _matches(params, pattern, "no_decay")
    first_names = {p: name for name, p in params.items()}  # a tied one counts as all that it is tied to
    for module in model.modules():
        kind = type(module).__name__
        is_norm = isinstance(module, _NORMS) or kind.endswith("Norm")
        is_embedding = isinstance(module, _EMBEDDINGS) or kind.endswith(("Embedding", "Embeddings"))
        for own, p in module.named_parameters(recurse=False):
            if (
                ("bias" in no_decay and (own == "bias" or own.startswith("bias_") or own.endswith("_bias")))
                or ("norm" in no_decay and is_norm)
                or ("embedding" in no_decay and is_embedding)
            ):
                yield first_names[p]


def _layers(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the layer of each parameter, from 0.

    What comes after the list is a layer of its own if it counts; if not, it has the layer of the list's end.
    """
    lists: dict[str, tuple[str, ...]] = {}  # the prefix of each list -> what the names in each of its layers begin with
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList | nn.Sequential):
            parts = [name for name, part in module.named_children() if any(True for _ in part.parameters())]
            lists[prefix] = tuple(f"{prefix}.{name}." if prefix else f"{name}." for name in parts)
    trained = {name for name, p in params.items() if p.requires_grad}
    in_training = {prefix: begins for prefix, begins in lists.items() if any(n.startswith(begins) for n in trained)}
    longest, begins = _longest(in_training or lists)
    counted = trained if in_training else set(params)

    inside = {name for name in params if name.startswith(begins)}
    outside = counted - inside
    if len(inside) < len(outside):
        raise ValueError(
            f"layer_decay: the longest list of the model, {longest!r}, has only {len(inside)} of its "
            f"{len(inside) + len(outside)} parameters, so its depth is not to be read off it; scale rates by name, "
            "with lr_scale"
        )
    names = list(params)
    places = [place for place, name in enumerate(names) if name in inside]
    before, after = names[: places[0]], names[places[-1] + 1 :]
    layers = dict.fromkeys(before, 0)
    for name in names[places[0] : places[-1] + 1]:
        layers[name] = next(number for number, begin in enumerate(begins, 1) if name.startswith(begin))
    return layers | dict.fromkeys(after, len(begins) + any(name in counted for name in after))


def _longest(lists: Mapping[str, tuple[str, ...]]) -> tuple[str, tuple[str, ...]]:
    """Return the list with the most layers, and what the names in each of them begin with."""
    length = max(map(len, lists.values()), default=0)
    if length == 0:
        raise ValueError("layer_decay: the model has no ModuleList or Sequential, along which layers could be counted")
    longest = [prefix for prefix, begins in lists.items() if len(begins) == length]
    # Lists within the layers of another are its details.
    longest = [prefix for prefix in longest if not any(f"{prefix}.".startswith(lists[other]) for other in longest)]
    if len(longest) > 1:
        names = ", ".join(map(repr, longest[:-1])) + f" and {longest[-1]!r}"
        raise ValueError(
            f"layer_decay: the lists {names} have equally many layers ({length}), so it is not clear along which to "
            "count; scale rates by name, with lr_scale"
        )
    return longest[0], lists[longest[0]]
