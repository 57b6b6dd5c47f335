"""Restore everything that training has changed."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..optimizers.master import confirm_low_bits, low_bits_are_valid
from .module_tree import is_fsdp_module

Undo = Callable[[], None]


class Part:
    """Base class of the parts of an optimizer, whose attributes are restored like the optimizer's own."""

    def undos(self) -> Iterable[Undo]:
        """Return functions that restore what the attributes refer to and ``restored`` does not know."""
        return ()


@contextlib.contextmanager
def restored(*roots: object, generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Restore at the end of this context what was changed within it, also after an exception or Ctrl-C.

    Restored are: the attributes of modules and optimizers, and all dicts, lists and sets in them; the values of the
    tensors found there, in place; their gradients and ``requires_grad``; the statistics of an optimizer's clipping
    policy; and the states of the random number generators of torch (the CPU's, and CUDA's if it is in use), Python and
    NumPy. Attributes that hold other objects refer to the same objects again; the contents of those objects are not
    restored. Within the context the tensors take twice their memory.

    Args:
        roots: Modules, optimizers, containers and tensors from which all others are reached.
        generators: Random number generators in addition to the default ones.
    """
    # Parameters that a forward pass of FSDP has gathered are copies, whose memory the next backward pass frees.
    reshards: list[Undo] = [thing.reshard for thing in _reached(roots) if is_fsdp_module(thing)]
    for reshard in reshards:
        reshard()
    undos = [*reshards, *_random_states(generators), *_contents(roots)]
    try:
        yield
    finally:
        with uninterrupted():
            for undo in undos:
                undo()


def _random_states(generators: Iterable[torch.Generator]) -> Iterator[Undo]:
    yield _later(torch.set_rng_state, torch.get_rng_state())
    if torch.cuda.is_initialized():
        yield _later(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())
    for generator in generators:
        yield _later(generator.set_state, generator.get_state())
    yield _later(random.setstate, random.getstate())
    yield _later(np.random.set_state, np.random.get_state())


def _later(function: Callable[..., object], *args: object) -> Undo:
    def undo() -> None:
        function(*args)

    return undo


def _contents(roots: Iterable[object]) -> Iterator[Undo]:
    """Yield the functions that restore everything that can be reached from the roots."""
    for thing in _reached(roots):
        if isinstance(thing, torch.jit.ScriptModule):
            yield from (_later(module.train, module.training) for module in thing.modules())  # children after parents
        elif isinstance(thing, Part):
            yield from thing.undos()
        elif isinstance(thing, Tensor):
            yield _tensor(thing)
        elif isinstance(thing, dict | list | set):
            content: Any = dict(thing) if isinstance(thing, dict) else [*thing]
            yield _container(thing, content)


def _reached(roots: Iterable[object]) -> Iterator[Any]:
    """Yield everything that can be reached from the roots; containers and tensors once."""
    seen: dict[int, object] = {}  # by id; the objects are held, so that no id is used again
    pending = list(roots)
    while pending:
        thing = pending.pop()
        if isinstance(thing, torch.jit.ScriptModule):  # its parameters are not Python attributes
            pending.extend([*thing.parameters(), *thing.buffers()])
        if isinstance(thing, nn.Module | Optimizer | Part):
            yield thing
            thing = vars(thing)
        if id(thing) in seen:
            continue
        if isinstance(thing, Tensor):
            if thing.is_inference():  # training cannot write it
                continue
            if thing.is_leaf:
                pending.append(thing.grad)
        elif isinstance(thing, dict):
            pending.extend(thing.values())
        elif isinstance(thing, list | tuple):
            pending.extend(thing)
        elif not isinstance(thing, set):
            continue
        seen[id(thing)] = thing
        yield thing


def _container(container: Any, content: Any) -> Undo:
    # The container is emptied first, to restore the order of a dict, too.
    def undo() -> None:
        container.clear()
        if isinstance(container, list):
            container.extend(content)
        else:
            container.update(content)

    return undo


def _tensor(tensor: Tensor) -> Undo:
    # The tensor's present memory: an assignment to .data may replace it.
    memory = tensor.detach()
    value = without_repeats(memory).clone()
    kept = low_bits_are_valid(tensor)
    is_leaf, requires_grad = tensor.is_leaf, tensor.requires_grad
    grad = tensor.grad if is_leaf else None

    @torch.no_grad()
    def undo() -> None:
        without_repeats(memory).copy_(value)
        if kept:
            confirm_low_bits(tensor)
        if not is_leaf:
            return
        if memory.layout == torch.strided and (tensor.data_ptr(), tensor.shape) != (memory.data_ptr(), memory.shape):
            tensor.data = memory
        tensor.requires_grad_(requires_grad)
        tensor.grad = grad

    return undo


def without_repeats(tensor: Tensor) -> Tensor:
    """Return the tensor without the dimensions repeated by ``expand``, which cannot be written."""
    if tensor.layout == torch.strided:
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dim] > 1:
                tensor = tensor.narrow(dim, 0, 1)
    return tensor


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C within this context until its end."""
    before = signal.getsignal(signal.SIGINT)
    # Python's handlers run in the main thread only. A handler that was not set by Python could not be restored.
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    pressed = False

    def note(*_: object) -> None:
        nonlocal pressed
        pressed = True

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            signal.raise_signal(signal.SIGINT)
