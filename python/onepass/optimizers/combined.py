"""Combined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .arguments import check_optimizer, described, module_refused
from .hooks import evaluate, hooked, params_of
from .sam import SAM
from .torch_private import disable_dynamo
from .wrapper import Forwarded, loaded_with_hooks, master_names, saved_with_hooks


class _States(MutableMapping[Tensor, Any]):
    """The states of several optimizers, in one mapping: a parameter's entry is that of its optimizer."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = optimizers

    def _owner(self, p: Tensor) -> Any:
        for optimizer in self._optimizers:
            if any(q is p for group in optimizer.param_groups for q in group["params"]):
                return optimizer.state
        raise KeyError(p)

    def __getitem__(self, p: Tensor) -> Any:
        for optimizer in self._optimizers:
            if p in optimizer.state:
                return optimizer.state[p]
        return self._owner(p)[p]  # a new entry, as torch's

    def __setitem__(self, p: Tensor, state: Any) -> None:
        self._owner(p)[p] = state

    def __delitem__(self, p: Tensor) -> None:
        del self._owner(p)[p]

    def __contains__(self, p: object) -> bool:
        return any(p in optimizer.state for optimizer in self._optimizers)

    def get(self, p: Tensor, default: Any = None) -> Any:
        # Not the mixin's, which would make an entry.
        held = (optimizer.state[p] for optimizer in self._optimizers if p in optimizer.state)
        return next(held, default)

    def __iter__(self) -> Iterator[Tensor]:
        return (p for optimizer in self._optimizers for p in optimizer.state)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self._optimizers)


class Combined(Optimizer):
    r"""Several optimizers in one, each with its own parameters: Muon for matrices and AdamW for the rest, for example.

    ``param_groups`` are the groups of the first optimizer, then those of the second, and so on, so that learning rate
    schedulers and checkpoints see one optimizer. The ``state_dict`` has torch's form, with the parameters numbered in
    the order of the groups. ``step`` steps one optimizer after the other. Arguments such as ``max_norm`` belong to each
    optimizer, and affect only its parameters. ``create("muon", model)`` returns a combination of Muon and AdamW.

    torch's ``OneCycleLR`` and ``CyclicLR`` need ``cycle_momentum=False``, unless all optimizers have the same kind of
    momentum. Call the methods ``train()`` and ``eval()`` of a Schedule-Free class on that optimizer, an element of
    ``optimizers``.

    Args:
        optimizers: The optimizers, torch's or onepass's, whose steps need no closure (neither LBFGS nor SAM, which may
            wrap this optimizer); at least one. No two may have a parameter in common.

    Raises:
        TypeError: One is not a ``torch.optim.Optimizer``, or needs a closure.
        ValueError: There is none, or two have a parameter in common.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.Combined([onepass.Muon([model.weight]), onepass.AdamW([model.bias])])
        >>> model(torch.ones(8, 4)).sum().backward()
        >>> optimizer.step()
        >>> [len(group["params"]) for group in optimizer.param_groups]
        [1, 1]
    """

    optimizers: list[Optimizer]  #: The optimizers.

    grad_scale = Forwarded()
    found_inf = Forwarded()

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        if not isinstance(optimizers, Iterable):
            raise TypeError(f"Combined: optimizers must be a list of optimizers, got {described(optimizers)}")
        optimizers = list(optimizers)
        if not optimizers:
            raise ValueError("Combined: optimizers must have at least one optimizer, got none")
        for i, optimizer in enumerate(optimizers):
            check_optimizer(f"Combined: optimizers[{i}]", optimizer)
            if isinstance(optimizer, SAM | torch.optim.LBFGS):
                raise TypeError(
                    f"Combined: optimizers[{i}] must be an optimizer whose step needs no closure, "
                    f"got {type(optimizer).__name__}"
                )
        params = [p for optimizer in optimizers for p in params_of(optimizer)]
        if len(set(params)) < len(params):
            raise ValueError("Combined: two of the optimizers have a parameter in common")
        self.__setstate__({"optimizers": optimizers})

    def _inner(self) -> list[Optimizer]:
        return self.optimizers

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.optimizers = state["optimizers"]
        super().__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all optimizers: a new list of the same dicts."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self) -> MutableMapping[Tensor, Any]:  # type: ignore[override]
        """The states of all optimizers."""
        return _States(self.optimizers)

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults that all optimizers share."""
        first, *others = (optimizer.defaults for optimizer in self.optimizers)
        return {name: value for name, value in first.items() if all(name in other for other in others)}

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return all(getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in self.optimizers)

    @property
    def last_step(self) -> None:
        """None: each of ``optimizers`` has its own."""

    def _master_names(self) -> dict[Tensor, str]:
        return {p: name for optimizer in self.optimizers for p, name in master_names(optimizer).items()}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the last of ``optimizers``, so that the other groups keep their numbers.

        Raises:
            TypeError: ``param_group`` is not a dict, or the last optimizer refuses its parameters.
            ValueError: A parameter is that of another group.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group must be a dict, but got {type(param_group)}")
        params = param_group["params"]
        if isinstance(params, Iterator):  # it is read twice
            params = param_group["params"] = list(params)
        with module_refused(f"Combined: group {len(self.param_groups)}", params):
            listed = [params] if isinstance(params, Tensor) else list(params)
        named = [p[1] if isinstance(p, tuple) else p for p in listed]
        if any(p is q for q in params_of(self) for p in named):
            raise ValueError("some parameters appear in more than one parameter group")
        self.optimizers[-1].add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def _update(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single step of every optimizer.

        Args:
            closure: Computes the loss and the gradients, and returns the loss. It is called once.

        Returns:
            What the closure returned.
        """
        loss = None if closure is None else evaluate(closure)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    step = hooked(_update, "Combined")

    @disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """Return one state_dict of torch's form, with the parameters numbered in the order of the groups."""
        return saved_with_hooks(self, self._save)

    def _save(self) -> dict[str, Any]:
        states: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        for optimizer, first in zip(self.optimizers, self._firsts(), strict=True):
            own = optimizer.state_dict()
            states |= {first + number: state for number, state in own["state"].items()}
            groups += [{**group, "params": [first + n for n in group["params"]]} for group in own["param_groups"]]
        return {"state": states, "param_groups": groups}

    @disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class, whose optimizers have as many groups and parameters as these.

        Raises:
            ValueError: The state_dict does not match these; nothing has been loaded.
        """
        loaded_with_hooks(self, state_dict, self._load)

    def _load(self, state_dict: dict[str, Any]) -> None:
        saved, own = state_dict["param_groups"], self.param_groups
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in own]:
            raise ValueError(
                "Combined: the loaded state dict has other parameter groups, or groups with other numbers of parameters"
            )
        parts = []
        group = 0
        for optimizer in self.optimizers:
            groups = saved[group : group + len(optimizer.param_groups)]
            group += len(groups)
            keys = {key for each in groups for key in each["params"]}
            states = {key: state for key, state in state_dict["state"].items() if key in keys}
            parts.append({"state": states, "param_groups": groups})
        before = [optimizer.state_dict() for optimizer in self.optimizers]
        for i, (optimizer, part) in enumerate(zip(self.optimizers, parts, strict=True)):
            try:
                optimizer.load_state_dict(part)
            except BaseException:
                for changed, was in zip(self.optimizers[: i + 1], before, strict=False):  # this one perhaps in part
                    changed.load_state_dict(was)
                raise

    def _firsts(self) -> list[int]:
        """Return the number of the first parameter of each optimizer."""
        counts = [len(params_of(optimizer)) for optimizer in self.optimizers]
        return [sum(counts[:i]) for i in range(len(counts))]
