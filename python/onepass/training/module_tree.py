"""The parameters and buffers of a module, found without walking through all of its submodules each time."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn import Module


class ModuleTree:
    """A module's submodules, from which its parameters and buffers are read.

    ``Module.parameters()`` spends most of its time on the walk through the submodules, which rarely change. Here the
    walk is made once, and again after a submodule has been added, removed or replaced. A module that is not made of
    plain modules (one of TorchScript, or one that overrides ``parameters`` or ``modules``) is walked each time.

    The tree holds the submodules, but not the module itself.
    """

    def __init__(self, module: Module) -> None:
        modules = list(module.modules())
        self._is_plain = _is_plain(modules)
        if self._is_plain:
            self._below = modules[1:]
            self._children = self._child_ids(module)
            self._parameters = [m._parameters for m in modules]
            self._buffers = [m._buffers for m in modules]
        else:
            self._parameters = [dict(module.named_parameters())]
            self._buffers = [dict(module.named_buffers())]

    def is_of(self, module: Module) -> bool:
        """Return whether this is the tree of the module that it was made for, which may have changed since then."""
        return self._is_plain and self._children == self._child_ids(module)

    def _child_ids(self, module: Module) -> list[int]:
        return list(map(id, _values([module._modules, *(m._modules for m in self._below)])))

    def parameter_ids(self) -> list[int]:
        """Return the ids of all entries for parameters; one that has several entries occurs several times."""
        return list(map(id, _values(self._parameters)))

    def parameters(self) -> list[Tensor]:
        """Return what ``Module.parameters()`` yields."""
        return list({id(p): p for p in _values(self._parameters) if p is not None}.values())

    def buffers(self) -> list[Tensor]:
        """Return what ``Module.buffers()`` yields."""
        return list({id(b): b for b in _values(self._buffers) if b is not None}.values())


def _is_plain(modules: list[Module]) -> bool:
    """Return whether all parameters and buffers are in the dicts of these modules, of which the first is the root."""
    walks = ("parameters", "named_parameters", "buffers", "named_buffers", "_named_members", "modules")
    return (
        all(getattr(type(modules[0]), walk) is getattr(Module, walk) for walk in walks)
        and all(type(m).named_modules is Module.named_modules for m in modules)
        and all(isinstance(m._modules, dict) and isinstance(m._parameters, dict) for m in modules)
    )


def _values(dicts: list[dict[str, Any]]) -> Iterable[Any]:
    return chain.from_iterable(d.values() for d in dicts)


def is_fsdp_module(thing: object) -> bool:
    """Return whether ``fully_shard`` was applied to an object, without importing ``torch.distributed.fsdp``."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(thing, kind)


def reshard(module: Module) -> None:
    """Set parameters that a forward pass of ``fully_shard`` has gathered, which are copies, to this process's parts."""
    if "torch.distributed.fsdp" not in sys.modules or not dist.is_initialized():  # the walk would take a while
        return
    for part in filter(is_fsdp_module, module.modules()):
        part.reshard()  # type: ignore[operator]
