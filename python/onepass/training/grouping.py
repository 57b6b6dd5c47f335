"""Parameter groups by role: no weight decay for some parameters, smaller learning rates for early layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..optimizers.arguments import check_number, described
from ..optimizers.torch_private import NormBase

# The roles that `no_decay` accepts in addition to patterns.
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
    r"""Return the parameters of a model as parameter groups for any optimizer.

    The learning rate of a parameter is :math:`\gamma \, d^{\,n - i} \, x`, where :math:`d` is ``layer_decay``,
    :math:`i = 0 \ldots n` is its layer, and :math:`x` is the product of ``lr_scale`` over the patterns that its name
    matches. Its weight decay is ``weight_decay``, or 0 if ``no_decay`` selects it.

    Layers are counted along the longest ``ModuleList`` or ``Sequential`` of the model (the blocks of a transformer).
    Parameters before this list in ``named_parameters()`` are layer 0, its modules are layers 1, 2, ..., and parameters
    after it are the last layer. The list must contain at least half of the model's parameter tensors. (In a ResNet,
    whose blocks are in several lists, none does.) If any list has a parameter that requires a gradient, lists without
    one (a frozen teacher) and frozen parameters outside the list are not counted.

    Sources of layer-wise decay: Clark et al. 2020, "ELECTRA", arXiv:2003.10555; Bao et al. 2022, "BEiT",
    arXiv:2106.08254.

    Args:
        model: The model, whose ``named_parameters()`` are grouped. A tied parameter is included once. Parameters that
            require no gradient are included, because they may be unfrozen later.
        lr: Learning rate :math:`\gamma`. Required with ``layer_decay`` and ``lr_scale``.
        weight_decay: Weight decay of the parameters that ``no_decay`` does not select. If None, the optimizer's own
            weight decay applies to all parameters and ``no_decay`` has no effect.
        no_decay: Parameters without weight decay: ``"bias"`` (named ``bias``, ``bias_*`` or ``*_bias``), ``"norm"``
            (those of normalization layers), ``"embedding"`` (those of ``nn.Embedding`` and ``nn.EmbeddingBag``), or
            patterns of names as in ``lr_scale``. Your own class is recognized as a norm or an embedding if its
            name ends in ``Norm``, ``Embedding`` or ``Embeddings``. A tied parameter has the roles of all its owners.
        layer_decay: Factor :math:`d` per layer, in (0, 1].
        lr_scale: Factors by pattern of the parameter's name, such as ``{"head.*": 10.0}``. The wildcards are those of
            :mod:`fnmatch`: ``*``, ``?`` and ``[...]``. A pattern that matches no parameter is an error.

    Returns:
        Groups with ``params`` (names and parameters; optimizers keep the names as ``param_names``), and with ``lr`` and
        ``weight_decay`` if they are given. Parameters with equal hyperparameters share a group, in the model's order.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``, or an argument has the wrong type.
        ValueError: An argument is out of range, ``lr`` is missing, a pattern matches no parameter, or the model has no
            such list of layers or several of equal length.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> groups = onepass.param_groups(model, weight_decay=0.1)
        >>> [(group["weight_decay"], [name for name, _ in group["params"]]) for group in groups]
        [(0.1, ['0.weight']), (0.0, ['0.bias', '1.weight', '1.bias'])]
        >>> optimizer = onepass.AdamW(groups, lr=1e-3)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups: model must be a torch.nn.Module, got a {type(model).__name__}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("layer_decay", layer_decay)):
        if value is not None:
            check_number(f"param_groups: {name}", value)
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value is not None and not value >= 0.0:
            raise ValueError(f"param_groups: {name} must be >= 0, got {value}")
    if layer_decay is not None and not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"param_groups: layer_decay must be in (0, 1], got {layer_decay}")
    scales_by_name = _checked_scales(lr_scale)
    if lr is None and (layer_decay is not None or scales_by_name):
        raise ValueError("param_groups: lr must be given with layer_decay or lr_scale, got None")
    no_decay = checked_patterns(f"param_groups: no_decay must be a list of {KINDS} and patterns of names", no_decay)

    params = dict(model.named_parameters())
    exempt = set() if weight_decay is None else set(_exempt(model, params, no_decay))
    scales = dict.fromkeys(params, 1.0)
    if layer_decay is not None:
        layers = _layers(model, params)
        for name, layer in layers.items():
            scales[name] *= layer_decay ** (max(layers.values()) - layer)
    for pattern, scale in scales_by_name.items():
        for name in _matches(params, pattern, "param_groups: lr_scale"):
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
            "param_groups: lr_scale must be a mapping of patterns of names to factors, such as {'head.*': 10.0}, got "
            f"{described(lr_scale)}"
        )
    for pattern, scale in lr_scale.items():
        if not isinstance(pattern, str):
            raise TypeError(f"param_groups: lr_scale must have patterns of names for keys, got {described(pattern)}")
        check_number(f"param_groups: lr_scale of {pattern!r}", scale)
        if not scale >= 0.0:
            raise ValueError(f"param_groups: lr_scale of {pattern!r} must be >= 0, got {scale}")
    return lr_scale


def checked_patterns(wanted: str, patterns: Iterable[str]) -> tuple[str, ...]:
    """Return patterns of names as a tuple; raise an error whose message begins with ``wanted`` if they are not."""
    if isinstance(patterns, str):
        raise ValueError(f"{wanted}, got {described(patterns)}: pass [{patterns!r}]")
    listed = tuple(patterns) if isinstance(patterns, Iterable) else None
    if listed is None or not all(isinstance(pattern, str) for pattern in listed):
        raise TypeError(f"{wanted}, got {described(patterns)}")
    return listed


def _matches(params: Mapping[str, Tensor], pattern: str, argument: str) -> list[str]:
    found = fnmatch.filter(params, pattern)
    if not found:
        raise ValueError(
            f"{argument}: no parameter has a name like {pattern!r}; the first is {next(iter(params), None)!r}"
        )
    return found


def _exempt(model: nn.Module, params: Mapping[str, Tensor], no_decay: Collection[str]) -> Iterator[str]:
    """Yield the names of the parameters without weight decay."""
    for pattern in no_decay:
        if pattern not in KINDS:
            yield from _matches(params, pattern, "param_groups: no_decay")
    first_names = {p: name for name, p in params.items()}  # a tied parameter has the roles of all its owners
    for module in model.modules():
        kind = type(module).__name__
        is_norm = isinstance(module, _NORMS) or kind.endswith("Norm")
        is_embedding = _is_embedding(module)
        for own, p in module.named_parameters(recurse=False):
            if (
                ("bias" in no_decay and (own == "bias" or own.startswith("bias_") or own.endswith("_bias")))
                or ("norm" in no_decay and is_norm)
                or ("embedding" in no_decay and is_embedding)
            ):
                yield first_names[p]


def hidden_matrices(model: nn.Module, others: Iterable[str] = ()) -> Iterator[str]:
    """Yield the names of the matrices in hidden layers: not those of embeddings, of the head, and of ``others``.

    Args:
        model: The model.
        others: Patterns of the names of further parameters that are left out.
    """
    params = dict(model.named_parameters())
    left_out = {name for pattern in others for name in _matches(params, pattern, "create: no_muon")}
    first_names = {p: name for name, p in params.items()}
    for module in (*_heads(model), *filter(_is_embedding, model.modules())):
        left_out |= {first_names[p] for p in module.parameters()}
    return (name for name, p in params.items() if p.ndim == 2 and name not in left_out)


def _heads(model: nn.Module) -> list[nn.Module]:
    """Return the modules that a model says are its head, or else its last linear layer."""
    inner = getattr(model, "module", model)  # DistributedDataParallel's
    for ask in ("get_output_embeddings", "get_classifier"):
        found = getattr(inner, ask, lambda: None)()
        heads = [
            head for head in (found if isinstance(found, tuple | list) else [found]) if isinstance(head, nn.Module)
        ]
        if any(True for head in heads for _ in head.parameters()):
            return heads
    linear: list[nn.Module] = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return linear[-1:]


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, _EMBEDDINGS) or type(module).__name__.endswith(("Embedding", "Embeddings"))


def _layers(model: nn.Module, params: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the layer of each parameter, from 0.

    Parameters after the list are a layer of their own if any of them is counted; else they belong to the list's last
    layer.
    """
    lists: dict[str, tuple[str, ...]] = {}  # prefix of each list -> prefixes of the parameter names of its layers
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
            f"param_groups: layer_decay: the longest list of the model, {longest!r}, has only {len(inside)} of its "
            f"{len(inside) + len(outside)} parameters, so it does not give the depth of each; scale the learning rates "
            "by name, with lr_scale"
        )
    names = list(params)
    places = [place for place, name in enumerate(names) if name in inside]
    before, after = names[: places[0]], names[places[-1] + 1 :]
    layers = dict.fromkeys(before, 0)
    for name in names[places[0] : places[-1] + 1]:
        layers[name] = next(number for number, begin in enumerate(begins, 1) if name.startswith(begin))
    return layers | dict.fromkeys(after, len(begins) + any(name in counted for name in after))


def _longest(lists: Mapping[str, tuple[str, ...]]) -> tuple[str, tuple[str, ...]]:
    """Return the list with the most layers, and the prefixes of the parameter names of its layers."""
    length = max(map(len, lists.values()), default=0)
    if length == 0:
        raise ValueError(
            "param_groups: layer_decay: the model has no ModuleList or Sequential, along which layers could be counted"
        )
    longest = [prefix for prefix, begins in lists.items() if len(begins) == length]
    # A list inside a layer of another list does not count.
    longest = [prefix for prefix in longest if not any(f"{prefix}.".startswith(lists[other]) for other in longest)]
    if len(longest) > 1:
        names = ", ".join(map(repr, longest[:-1])) + f" and {longest[-1]!r}"
        raise ValueError(
            f"param_groups: layer_decay: the lists {names} have equally many layers ({length}), so it is not clear "
            "along which to count; scale the learning rates by name, with lr_scale"
        )
    return longest[0], lists[longest[0]]
