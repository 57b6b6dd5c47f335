"""Parameter groups by what parameters are: no weight decay for some, smaller rates for early layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

# What `no_decay` may name beside patterns.
KINDS = ("bias", "norm", "embedding")

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm)
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
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: An argument is out of its range, ``lr`` is missing, a pattern matches no parameter, or the model has
            no such list of layers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is a {type(model).__name__}")
    for name, value in (("lr", lr), ("weight_decay", weight_decay)):
        if value is not None and not value >= 0.0:
            raise ValueError(f"Invalid {name}: {value}; it must be at least 0")
    if layer_decay is not None and not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"Invalid layer_decay: {layer_decay}; it must be above 0 and at most 1")
    if lr is None and (layer_decay is not None or lr_scale):
        raise ValueError("layer_decay and lr_scale scale a learning rate: say which, by lr")
    if isinstance(no_decay, str):
        raise ValueError(f"no_decay must be several of {KINDS} and patterns of names, but is the text {no_decay!r}")
    no_decay = tuple(no_decay)

    params = dict(model.named_parameters())
    exempt = set() if weight_decay is None else set(_exempt(model, params, no_decay))
    scales = dict.fromkeys(params, 1.0)
    if layer_decay is not None:
        layers = _layers(model, params)
        for name, layer in layers.items():
            scales[name] *= layer_decay ** (max(layers.values()) - layer)
    for pattern, scale in (lr_scale or {}).items():
        if not scale >= 0.0:
            raise ValueError(f"Invalid lr_scale: {scale} for {pattern!r}; it must be at least 0")
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
    """The layer of each parameter."""
    lists = {
        prefix: [name for name, part in module.named_children() if any(True for _ in part.parameters())]
        for prefix, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    longest = max(lists, key=lambda prefix: len(lists[prefix]), default=None)
    if longest is None or not lists[longest]:
        raise ValueError("layer_decay: the model has no ModuleList or Sequential, along which layers could be counted")
    begins = [f"{longest}.{name}." if longest else f"{name}." for name in lists[longest]]
    inside = sum(name.startswith(tuple(begins)) for name in params)
    if 2 * inside < len(params):
        raise ValueError(
            f"layer_decay: the longest list of the model, {longest!r}, has only {inside} of its {len(params)} "
            "parameters, so its depth is not to be read off it; scale rates by name, with lr_scale"
        )
    layers: dict[str, int] = {}
    after = 0
    for name in params:
        here = next((number for number, begin in enumerate(begins, 1) if name.startswith(begin)), None)
        if here is not None:
            after = len(begins) + 1
        layers[name] = after if here is None else here
    return layers
