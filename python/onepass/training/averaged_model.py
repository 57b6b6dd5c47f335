"""Averages of a model's parameters, which an optimizer can move in its own step."""

from __future__ import annotations

import contextlib
import math
import operator
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer, swa_utils

from ..optimizers.arguments import check_number, number
from ..optimizers.hooks import params_of
from ..optimizers.master import low_bits_kept
from .module_tree import ModuleTree, is_fsdp_module, reshard
from .restoring import uninterrupted, without_repeats

AvgFn = Callable[[Tensor, Tensor, Tensor | int], Tensor]
MultiAvgFn = Callable[[tuple[Tensor, ...] | list[Tensor], tuple[Tensor, ...] | list[Tensor], Tensor | int], None]
Pairs = list[tuple[Tensor, Tensor]]  # an averaged tensor, and the tensor of the model that it averages


Slot = tuple[Any, Any]  # the dict that holds a parameter of a module, and its key there


class Slots:
    """Slots, with the tensors that they held when this object was created.

    A module may get other tensors later, by ``load_state_dict(..., assign=True)`` for example.

    Attributes:
        held: The tensor of each slot; None if it was empty.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        pairs = list(slots)
        self._dicts = [held_in for held_in, _ in pairs]
        self._keys = [key for _, key in pairs]
        # Not get(), which the dicts of TorchScript's modules do not have.
        self.held: list[Any] = [held_in[key] if key in held_in else None for held_in, key in pairs]  # noqa: SIM401

    def are_unchanged(self) -> bool:
        """Return whether the slots hold the same tensors. Every step asks this, so no Python code runs per slot."""
        try:
            return all(map(operator.is_, map(operator.getitem, self._dicts, self._keys), self.held))
        except KeyError:  # a parameter has been deleted
            return False


class _Binding(NamedTuple):
    """The model that is averaged. Its parameters are known by their ids."""

    ids: tuple[list[int], list[int]]  # of the entries for parameters of the model and of the average
    slots: dict[int, Slot]  # of the average of each parameter
    refs: dict[int, weakref.ref[Tensor]]  # the parameters that have an average
    freed: deque[weakref.ref[Tensor]]  # those that have been freed since, so that an id may be another tensor's
    model: weakref.ref[Module]


class _Step(NamedTuple):
    """A step that an optimizer has made in a round."""

    params: frozenset[int]  # ids of the optimizer's parameters
    averages: Collection[int]  # ids of the parameters that had an average then

    def moved(self) -> frozenset[int]:
        return self.params.intersection(self.averages)


class _Round(NamedTuple):
    """A round that is open: each average is moved at most once in it."""

    n: int  # number of rounds before it
    steps: tuple[_Step, ...]

    def moved(self) -> frozenset[int]:
        """Return the ids of the parameters whose averages have been moved."""
        return frozenset().union(*(step.moved() for step in self.steps))

    def has_stepped(self, optimizer: Optimizer) -> bool:
        """Return whether a parameter of an optimizer has been stepped."""
        return not all(step.params.isdisjoint(map(id, params_of(optimizer))) for step in self.steps)


class AveragedModel(swa_utils.AveragedModel):
    r"""A copy of a model whose parameters are averages of the model's parameters over the steps.

    After :math:`n` averaged steps, the next step moves each average :math:`\bar\theta` towards its parameter
    :math:`\theta`:

    .. math::
        \bar\theta \leftarrow \bar\theta + (1 - d_n) (\theta - \bar\theta), \qquad
        d_n = \begin{cases}
            0 & n = 0 \\
            n / (n + 1) & \text{without decay: the mean of all} \\
            d & \text{with decay: an exponential moving average} \\
            \min(d, 1 - (1 + n / \gamma)^{-p}) & \text{with warmup}
        \end{cases}

    The first average is a copy of the parameter. Buffers are copied; with ``use_buffers`` they are averaged, too.

    The averages have the dtypes of the model. ``AveragedModel(model, ...).float()`` averages a bfloat16 or float16
    model in float32. With 16-bit averages and a decay near 1, the changes are below the rounding error and are lost.

    ``state_dict`` has the keys of torch's class, and each class loads the other's. It does not contain the arguments of
    the constructor, such as ``decay``; a pickle contains them.

    Sources: Polyak and Juditsky 1992, "Acceleration of stochastic approximation by averaging"; Izmailov et al. 2018,
    "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407. The warm-up is that of timm's
    ``ModelEmaV3``.

    Args:
        model: The model to average. It is copied.
        device: Device of the averages; by default that of the model.
        avg_fn: Function of an average, its parameter and ``n_averaged`` that returns the new average, instead of
            ``decay``.
        multi_avg_fn: Function of a list of averages, the list of their parameters and ``n_averaged`` that changes the
            averages in place, instead of ``decay``.
        use_buffers: Whether buffers are averaged; otherwise they are copied.
        decay: Decay :math:`d` of an exponential moving average, in [0, 1]. None: the mean of all parameters so far,
            with equal weights.
        warmup: Whether the decay increases from 0 to ``decay``, so that early parameters lose their weight sooner. With
            the default :math:`\gamma` and :math:`p`, it reaches 0.999 after 31,600 steps.
        warmup_gamma: Time scale :math:`\gamma` of the warm-up in steps, > 0.
        warmup_power: Exponent :math:`p` of the warm-up, > 0.

    Raises:
        AssertionError: Both ``avg_fn`` and ``multi_avg_fn`` are given.
        TypeError: ``decay``, ``warmup_gamma`` or ``warmup_power`` is not a number.
        ValueError: One of them is out of range; ``decay`` is given with ``avg_fn`` or ``multi_avg_fn``; ``warmup``
            without ``decay``; or ``fully_shard`` was applied to the model, which can then not be copied: create the
            average first, then call ``fully_shard`` on both.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = onepass.SGD(model.parameters(), lr=0.1)
        >>> average = onepass.swa_utils.AveragedModel(model, decay=0.9)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     average.update_parameters(model)
        >>> with average.swapped(model):
        ...     bool(torch.equal(model.weight, average.module.weight))
        True
    """

    decay: float | None  #: Decay of the exponential moving average; None: equal weights, or a function.
    warmup: bool  #: Whether the decay increases from 0 to ``decay``.
    warmup_gamma: float  #: Time scale of the warm-up, in steps.
    warmup_power: float  #: Exponent of the warm-up.

    # What refers to the model and to optimizers; copies and pickles do not have it. Values are replaced and never
    # changed in place, so that `restored` can put them back; the trees are a cache.
    _trees: weakref.WeakKeyDictionary[Module, ModuleTree] | None = None  # of the model and of `module`
    _binding: _Binding | None = None
    _optimizers: tuple[weakref.ref[Optimizer], ...] = ()
    _round: _Round | None = None  # the last round, unless update_parameters has closed it
    _known_count: tuple[Tensor, int, int] | None = None  # n_averaged, its version, its value
    _is_swapped = False

    def __init__(
        self,
        model: Module,
        device: int | torch.device | None = None,
        avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None,
        use_buffers: bool = False,
        *,
        decay: float | None = None,
        warmup: bool = False,
        warmup_gamma: float = 1.0,
        warmup_power: float = 2 / 3,
    ) -> None:
        if decay is not None:
            decay = _checked("decay", decay)
            if not 0.0 <= decay <= 1.0:
                raise ValueError(f"AveragedModel: decay must be in [0, 1], got {decay}")
            if avg_fn is not None or multi_avg_fn is not None:
                given = "multi_avg_fn" if avg_fn is None else "avg_fn"
                raise ValueError(f"AveragedModel: pass either decay or {given}, got both")
        elif warmup:
            raise ValueError("AveragedModel: warmup needs a decay, got None: pass decay=")
        warmup_gamma = _checked("warmup_gamma", warmup_gamma)
        warmup_power = _checked("warmup_power", warmup_power)
        for name, value in (("warmup_gamma", warmup_gamma), ("warmup_power", warmup_power)):
            if not 0.0 < value < math.inf:
                raise ValueError(f"AveragedModel: {name} must be > 0 and finite, got {value}")
        if any(map(is_fsdp_module, model.modules())):
            raise ValueError(
                "AveragedModel: a model of fully_shard cannot be copied: make the average first, then call "
                "fully_shard on the model and, in the same way, on average.module"
            )
        super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)
        self.decay = decay
        self.warmup = bool(warmup)
        self.warmup_gamma = warmup_gamma
        self.warmup_power = warmup_power
        self._bind(model)

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_trees", "_binding", "_optimizers", "_round", "_known_count", "_is_swapped")
        return {name: value for name, value in vars(self).items() if name not in left_out}

    # -- averages ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_parameters(self, model: Module) -> None:
        """Move the averages towards the parameters of a model, and copy or average its buffers.

        If an optimizer moves averages in its steps, this method does the rest: it moves the averages of parameters that
        are not the optimizer's, and updates the buffers. It changes nothing if the optimizer has made no step since the
        last call, for example because the step was skipped.

        Args:
            model: The model, or a wrapper of it. Its parameters are matched by their order.

        Raises:
            RuntimeError: Called within ``swapped()``.
            ValueError: The model has more or fewer buffers than the average.
        """
        self._check_not_swapped("update_parameters")
        reshard(model)
        reshard(self.module)
        self._bind(model)
        opened = self._open_round()
        if opened is not None:
            self._finish_round(model, opened)
        elif self._is_attached():
            return
        elif self._has_function():
            super().update_parameters(model)
        else:
            self._update(model)

    def _has_function(self) -> bool:
        return self.avg_fn is not None or self.multi_avg_fn is not None

    def _update(self, model: Module) -> None:
        """Make one round: move the averages, and copy or average the buffers."""
        averaged, copied = self._pairs(model)
        if self.decay is None and all(average.dtype == tensor.dtype for average, tensor in averaged):
            super().update_parameters(model)
        else:
            self._move(averaged, copied, self._count())
            self._add_one()

    def _finish_round(self, model: Module, opened: _Round) -> None:
        """Do what the optimizers have left of the open round, and close it."""
        averaged, copied = self._pairs(model, opened.moved())
        self._move(averaged, copied, opened.n)
        self._round = None

    def _pairs(self, model: Module, moved: frozenset[int] = frozenset()) -> tuple[Pairs, Pairs]:
        """Return what is averaged and what is copied; without the parameters in ``moved``. The model is bound."""
        assert self._trees is not None
        assert self._binding is not None
        tree, own = self._trees[model], self._trees[self.module]
        buffers, own_buffers = tree.buffers(), own.buffers()
        averaged: Pairs = []
        if not moved.issuperset(self._binding.slots):
            pairs = zip(own.parameters(), tree.parameters(), strict=False)  # not strict, as in torch
            averaged = [(average, p) for average, p in pairs if id(p) not in moved]
        if self.use_buffers:
            return [*averaged, *zip(own_buffers, buffers, strict=False)], []
        return averaged, list(zip(own_buffers, buffers, strict=True))

    def _move(self, averaged: Pairs, copied: Pairs, n: int) -> None:
        """Make the update of the round after ``n`` rounds."""
        if n == 0:
            copied = averaged + copied
        else:
            _average(averaged, n, self._decay(n))
        for average, tensor in copied:
            average.detach().copy_(tensor.detach())

    def _decay(self, n: int) -> float | None:
        """Return the decay in the round after ``n`` rounds; None for equal weights."""
        if self.decay is None or not self.warmup:
            return self.decay
        return min(self.decay, 1 - float((1 + n / self.warmup_gamma) ** -self.warmup_power))

    def _count(self) -> int:
        """Return ``n_averaged`` as an int. Wait for a GPU only if something else has changed it."""
        known, held = self._known_count, self._buffers["n_averaged"]
        assert held is not None
        if known is None or known[0] is not held or known[1] != held._version:
            known = self._known_count = (held, held._version, int(held))
        return known[2]

    def _add_one(self) -> None:
        n, held = self._count(), self._buffers["n_averaged"]
        assert held is not None
        held += 1
        self._set("_known_count", (held, held._version, n + 1))

    def _set(self, name: str, value: object) -> None:
        """Set an attribute that is no tensor or module. Module's own way takes 3 us."""
        self.__dict__[name] = value

    # -- evaluation --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def swapped(self, model: Module) -> Iterator[None]:
        """Set the parameters and buffers of a model to the averages within this context, to evaluate or save the model.

        The values are converted to the model's dtypes and devices and written in place. At exit, also after an
        exception, all parameters and buffers get their former values back, bit for bit. The context needs memory for
        one more copy of the model. Train or eval mode is not changed.

        The buffers are those of the average. ``update_parameters`` copies them from the model; for batch normalization
        layers, ``update_bn`` computes them from data.

        Args:
            model: A model with the names and shapes of the average, or a wrapper of one (``DistributedDataParallel``,
                ``torch.compile``).

        Raises:
            RuntimeError: The context is already entered.
            ValueError: The names or shapes of the model's parameters and buffers are not those of the average; nothing
                has been changed.
        """
        self._check_not_swapped("swapped")
        reshard(model)
        reshard(self.module)
        pairs = _matched(model, self.module)
        addresses = [_alias(tensor) for (_, _, tensor), _ in pairs]
        memory = [without_repeats(tensor) for tensor in addresses]
        averages = [_first_of_repeats(_alias(average), tensor) for (_, _, tensor), average in pairs]
        before = [tensor.clone() for tensor in memory]
        self._is_swapped = True
        with low_bits_kept(tensor for (_, _, tensor), _ in pairs):
            try:
                with torch.no_grad():
                    for tensor, average in zip(memory, averages, strict=True):
                        tensor.copy_(average)
                yield
            finally:
                with uninterrupted(), torch.no_grad():
                    self._is_swapped = False
                    reshard(model)
                    for tensor, value in zip(memory, before, strict=True):
                        tensor.copy_(value)
                    for address, ((owner, name, tensor), _) in zip(addresses, pairs, strict=True):
                        if getattr(owner, name, None) is not tensor:  # a forward pass may replace a buffer
                            setattr(owner, name, tensor)
                        if address.layout == torch.strided and tensor.data_ptr() != address.data_ptr():
                            tensor.data = address  # model.half() replaces it

    def _check_not_swapped(self, method: str) -> None:
        if self._is_swapped:
            raise RuntimeError(f"AveragedModel: {method}() was called within swapped()")

    # -- optimizers --------------------------------------------------------------------------------------------------
    #
    # An optimizer that moves the averages of its parameters in its own step calls `_attach` once and, at each step,
    # `_step_weight` and `_averages_of` before and `_note_step` after it. It may keep the averages as long as
    # `_living_slots` returns the same dict and the `Slots` of its parameters are unchanged.
    #
    # In a round, each average is moved at most once. Several optimizers of one model share a round, whose weight is the
    # same for all. The first step of a round increases n_averaged, so that a checkpoint after any step is complete.
    # `update_parameters` closes the round; so does a step of a parameter that has already been stepped in it.

    def _bind(self, model: Module) -> None:
        """Make a model the source of the averages. Parameters are matched by their order and are held weakly."""
        tree, own = self._tree(model), self._tree(self.module)
        ids = (tree.parameter_ids(), own.parameter_ids())
        if self._binding is not None and self._binding.ids == ids and not self._binding.freed:
            return
        slots = parameter_slots(self.module)
        pairs = [
            (p, slots[id(average)])
            for p, average in zip(tree.parameters(), own.parameters(), strict=False)
            if id(average) in slots
        ]
        freed: deque[weakref.ref[Tensor]] = deque()
        refs = {id(p): weakref.ref(p, freed.append) for p, _ in pairs}
        self._binding = _Binding(ids, {id(p): slot for p, slot in pairs}, refs, freed, weakref.ref(model))

    def _tree(self, module: Module) -> ModuleTree:
        if self._trees is None:
            self._trees = weakref.WeakKeyDictionary()
        tree = self._trees.get(module)
        if tree is None or not tree.is_of(module):
            tree = self._trees[module] = ModuleTree(module)
        return tree

    def _averages_of(self, params: Iterable[Tensor]) -> dict[int, Tensor]:
        """Return the averages of parameters of the source model.

        Args:
            params: Parameters, of the source model or not.

        Returns:
            By the id of the parameter, its average, for those that have one. Shapes and dtypes may differ from the
            parameter's.
        """
        slots = self._slots_of(params)
        averages = zip(slots, Slots(slots.values()).held, strict=True)
        return {key: average for key, average in averages if average is not None}

    def _slots_of(self, params: Iterable[Tensor]) -> dict[int, Slot]:
        """Return the slots of the averages of parameters, by the id of the parameter."""
        slots = self._living_slots()
        return {key: slots[key] for key in map(id, params) if key in slots}

    def _living_slots(self) -> dict[int, Slot]:
        """Return the slots of the binding: the same dict as long as they are the same.

        If the model has replaced parameters, it is bound again.
        """
        if self._binding is not None and self._binding.freed:
            model = self._binding.model()
            if model is not None:
                self._bind(model)
            else:
                slots = self._binding.slots
                living = {key: slot for key, slot in slots.items() if self._binding.refs[key]() is not None}
                if len(living) < len(slots):
                    self._binding = self._binding._replace(ids=([], []), slots=living)
        return {} if self._binding is None else self._binding.slots

    def _attach(self, optimizer: Optimizer) -> None:
        """Let the steps of an optimizer move the averages of its parameters. The optimizer is held weakly.

        Called again after the optimizer's parameters have changed, because those of the model may have changed, too.

        Raises:
            ValueError: The averages are computed by a function.
        """
        if self._has_function():
            name = "multi_avg_fn" if self.avg_fn is None else "avg_fn"
            raise ValueError(
                f"AveragedModel: {type(optimizer).__name__} cannot move averages that {name} computes: "
                f"pass decay= instead of {name}"
            )
        others = [ref for ref in self._optimizers if ref() is not None and ref() is not optimizer]
        self._optimizers = (*others, weakref.ref(optimizer))
        model = None if self._binding is None else self._binding.model()
        # Averages are matched by their order. Where only averages were deleted, the others keep their parameters.
        if model is not None and self._binding and self._tree(model).parameter_ids() != self._binding.ids[0]:
            self._bind(model)

    def _is_attached(self) -> bool:
        return any(ref() is not None for ref in self._optimizers)

    def _step_weight(self, optimizer: Optimizer) -> float:
        """Return the weight w of ``average += w * (param - average)`` in the step that an optimizer is about to make.

        It is 1 in the first round, in which the averages become copies. Nothing is changed.

        Raises:
            RuntimeError: Called within ``swapped()``.
        """
        self._check_not_swapped("step")
        joined = self._joined_by(optimizer)
        n = self._count() if joined is None else joined.n
        if n == 0:
            return 1.0
        decay = self._decay(n)
        return 1 / (n + 1) if decay is None else 1 - decay

    def _note_step(self, optimizer: Optimizer, params: frozenset[int] | None = None) -> None:
        """Note that an optimizer has made a step, in which it has moved the averages of its parameters.

        Those are the averages that ``_averages_of`` gives. Without a source model there are none, and
        ``update_parameters`` moves them.

        Args:
            optimizer: The optimizer.
            params: The ids of its parameters, if they are known.
        """
        joined = self._joined_by(optimizer)
        step = _Step(params or frozenset(map(id, params_of(optimizer))), self._living_slots().keys())
        if joined is None:
            self._set("_round", _Round(self._count(), (step,)))
            self._add_one()
        else:
            self._set("_round", joined._replace(steps=(*joined.steps, step)))

    def _open_round(self) -> _Round | None:
        """Return the open round. Loading another ``n_averaged`` ends it."""
        return self._round if self._round is not None and self._count() == self._round.n + 1 else None

    def _joined_by(self, optimizer: Optimizer) -> _Round | None:
        """Return the open round, if the next step of an optimizer belongs to it; None if the step opens another."""
        opened = self._open_round()
        return None if opened is None or opened.has_stepped(optimizer) else opened


def _checked(name: str, value: float) -> float:
    check_number(f"AveragedModel: {name}", value)
    return number(value)


def _average(pairs: Pairs, n: int, decay: float | None) -> None:
    """Move averages towards the tensors of the model, by torch's functions.

    These take lists of one device and dtype. Where dtypes differ, the arithmetic is in the dtype that holds both.
    """
    if decay is None:
        mean = swa_utils.get_swa_avg_fn()
        for average, tensor in pairs:
            average.detach().copy_(mean(average.detach(), tensor.detach().to(average.device), n))
        return
    groups: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}
    rounded: Pairs = []  # averages of fewer bits than the model's tensor, with their new values in more bits
    for average, tensor in pairs:
        average, tensor = average.detach(), tensor.detach()
        dtype, device = average.dtype, average.device
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
            if dtype != average.dtype:
                rounded.append((average, average.to(dtype)))
                average = rounded[-1][1]
        if tensor.dtype != dtype or tensor.device != device:
            tensor = tensor.to(device, dtype)
        averages, tensors = groups.setdefault((type(average), dtype, device), ([], []))
        averages.append(average)
        tensors.append(tensor)
    update = swa_utils.get_ema_multi_avg_fn(decay)
    for averages, tensors in groups.values():
        update(averages, tensors, n)
    for average, value in rounded:
        average.copy_(value)


Held = tuple[Module, str, Tensor]  # a module, the name of an attribute of it, and its value


def _tensors(module: Module, buffers: bool = True) -> dict[str, Held]:
    """Return the parameters, and the buffers, by their full names; one that has several names by the first."""
    seen: set[int] = set()
    found = {}
    for prefix, owner in module.named_modules():
        named: Iterable[tuple[str, Tensor]] = owner.named_parameters(recurse=False)
        for name, tensor in chain(named, owner.named_buffers(recurse=False)) if buffers else named:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{prefix}.{name}" if prefix else name] = (owner, name, tensor)
    return found


def parameter_slots(module: Module) -> dict[int, Slot]:
    """Return the slots of a module's parameters, by the parameter's id."""
    return {id(p): (owner._parameters, name) for owner, name, p in _tensors(module, buffers=False).values()}


def _unwrapped(module: Module) -> Iterator[dict[str, Held]]:
    """Yield the tensors of a module and, as long as all of them are in one child, those of the child."""
    while True:
        tensors = _tensors(module)
        yield tensors
        children = list(module.children())
        if len(children) != 1 or any(owner is module for owner, _, _ in tensors.values()):
            return
        module = children[0]


def _matched(model: Module, averaged: Module) -> list[tuple[Held, Tensor]]:
    """Return the tensors of the model, each with its average.

    Raises:
        ValueError: Names or shapes differ.
    """
    averages, *more_averages = list(_unwrapped(averaged))
    tensors, *more_tensors = list(_unwrapped(model))
    for theirs in [averages, *more_averages]:
        for ours in [tensors, *more_tensors]:
            if ours.keys() == theirs.keys():
                for name, (_, _, tensor) in ours.items():
                    shape = theirs[name][2].shape
                    if tensor.shape != shape:
                        raise ValueError(
                            f"AveragedModel: {name} must have the shape of its average, {list(shape)}, "
                            f"got {list(tensor.shape)}: pass the model that is averaged"
                        )
                return [(held, theirs[name][2]) for name, held in ours.items()]
    missing = [name for name in averages if name not in tensors]
    extra = [name for name in tensors if name not in averages]
    what = f"no {missing[0]}" if missing else f"{extra[0]}, which the average does not have"
    raise ValueError(
        f"AveragedModel: model must have the parameters and buffers of the average, got a {type(model).__name__} with "
        f"{what}: pass the model that is averaged"
    )


def _alias(tensor: Tensor) -> Tensor:
    """Return a tensor over the same memory. A sparse tensor is returned itself: a copy replaces its memory."""
    return tensor.detach() if tensor.layout == torch.strided else tensor


def _first_of_repeats(average: Tensor, tensor: Tensor) -> Tensor:
    """Return the part of an average that belongs to ``without_repeats(tensor)``."""
    for dim, size in enumerate(without_repeats(_alias(tensor)).shape):
        average = average if average.shape[dim] == size else average.narrow(dim, 0, size)
    return average
