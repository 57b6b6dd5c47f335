"""Lookahead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import _core
from .arguments import check_keys, check_number, check_optimizer, whole_at_least
from .base import Native, new_follower
from .combined import Combined
from .hooks import has_found_inf, hooked, only_creates_states, params_of, unwrapped
from .loading import SLOW_PARAM
from .master import low_bits_kept, master_of, write_master
from .sam import SAM
from .tail import Tail
from .torch_private import disable_dynamo
from .wrapper import Forwarded, Wrapper, has_skipped, loaded_with_hooks, master_names

_NO_MASTERS: Mapping[Tensor, str] = {}


class SlowWeightUpdate:
    """The update of the slow weights in one step: ``slow += blend * (param - slow); param = slow``.

    The kernels update most parameters; this class updates the others. New slow weights are stored as states only after
    the step, because torch's classes create their states only if a parameter has none at all.

    Args:
        optimizer: The wrapped optimizer, whose states hold the slow weights.
        name: Their name among the states.
        blend: Factor of the update in the last step of a cycle; None in all other steps.
    """

    def __init__(self, optimizer: Optimizer, name: str, blend: float | None) -> None:
        self.followers = [_core.Follower("slow weights", name, blend, True)]
        self._blend = blend
        self._optimizer = optimizer
        self._name = name
        self._begun: dict[Tensor, Tensor] = {}

    def _slow_param(self, p: Tensor) -> Tensor | None:
        return _slow_param(self._optimizer, self._name, p)

    def before(self, params: Iterable[Tensor], master_names: Mapping[Tensor, str] = _NO_MASTERS) -> None:
        """Copy the parameters that have a gradient but no slow weights yet. Call this before they are stepped.

        Args:
            params: The parameters.
            master_names: The state that holds the master, of each parameter that has one. The master is copied.
        """
        for p in params:
            if self._slow_param(p) is None and p.grad is not None and p not in self._begun:
                name = master_names.get(p)
                self._begun[p] = master_of(p, self._optimizer.state.get(p, {}), name) if name else new_follower(p)

    @torch.no_grad()
    def after(self, params: Iterable[Tensor]) -> None:
        """Update the slow weights of these parameters, all of which have been stepped."""
        for p, begun in self._begun.items():
            self._optimizer.state[p][self._name] = begun
        if self._blend is None:
            return
        pairs = [(p, slow) for p in dict.fromkeys(params) if (slow := self._slow_param(p)) is not None]
        names = master_names(self._optimizer)
        for p, slow in pairs:
            fast = master_of(p, self._optimizer.state[p], names[p]) if p in names else p
            slow.lerp_(fast.to(slow.dtype), self._blend)
        for p, slow in pairs:  # after all reads: parameters may share memory
            if p in names:
                write_master(p, self._optimizer.state[p], names[p], slow)
            else:
                p.copy_(slow)


class Lookahead(Wrapper):
    r"""Lookahead: slow weights that are blended with the parameters of another optimizer every k steps.

    The wrapped optimizer steps the parameters :math:`\theta` (the fast weights). After every :math:`k`-th step, element
    by element,

    .. math::
        \phi &= \phi + \alpha (\theta - \phi) \\
        \theta &= \phi

    The initial slow weights :math:`\phi` are the values of the parameter before the first step in which it has a
    gradient. The slow weights do not affect the wrapped optimizer's own states.

    The kernels compute the :math:`k`-th step in one pass, and read and write the slow weights as one more state. They
    compute :math:`\phi` before :math:`\theta` is rounded to the parameter's dtype. torch operations update the slow
    weights of parameters that have no gradient in that step, or that torch's implementation steps.

    Lookahead is itself an optimizer, and works with learning rate schedulers, ``torch.amp.GradScaler`` and checkpoints.
    ``param_groups``, ``state`` and ``defaults`` are the wrapped optimizer's. The slow weights are the state
    ``slow_param``, in the parameter's dtype (float32 if it has a master). Each group has the key ``lookahead``: one
    dict, shared by all groups, of ``k``, ``alpha`` and the ``step`` within the cycle. A ``state_dict`` is that of the
    wrapped optimizer plus these. Lookahead and the wrapped optimizer can load each other's state_dict; loading one
    without slow weights starts a new cycle. Skipped steps do not count.

    Source: Zhang et al. 2019, "Lookahead Optimizer: k steps forward, 1 step back", arXiv:1907.08610, algorithm 1.

    Args:
        optimizer: The optimizer to wrap: torch's, onepass's or any other. A new cycle starts.
        k: Number of steps in a cycle, at least 1.
        alpha: Blend factor :math:`\alpha` of the slow weights, in [0, 1].

    Raises:
        TypeError: ``optimizer`` is not a ``torch.optim.Optimizer``, ``k`` is not an integer, or ``alpha`` is not a
            number.
        ValueError: ``k`` or ``alpha`` is out of range, or ``optimizer`` wraps an optimizer that has ``average`` or
            ``copy_to``. (Lookahead can wrap that optimizer itself.)

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = onepass.Lookahead(onepass.AdamW(model.parameters(), lr=1e-3), k=5, alpha=0.5)
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 4)).sum().backward()
        ...     optimizer.step()
        >>> with optimizer.slow_weights():
        ...     bool(torch.equal(model.weight, optimizer.state[model.weight]["slow_param"]))
        True
    """

    _depth: int  # how many Lookaheads are nested inside
    _cycle: dict[str, Any]  # k, alpha, step

    # GradScaler sets, tests (hasattr) and deletes these around each step.
    grad_scale = Forwarded()
    found_inf = Forwarded()
    _step_supports_amp_scaling = Forwarded()

    def __init__(self, optimizer: Optimizer, k: int = 5, alpha: float = 0.5) -> None:
        check_optimizer("Lookahead: optimizer", optimizer)
        self.__setstate__(
            {
                "optimizer": optimizer,
                "_depth": optimizer._depth + 1 if isinstance(optimizer, Lookahead) else 0,
                "_cycle": _checked({"k": k, "alpha": alpha, "step": 0}),
            }
        )
        self._check_wrapped_steps()
        self._forget()
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in ("optimizer", "_depth", "_cycle")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._lent = False  # the parameters hold the slow weights
        super().__setstate__(state)

    @property
    def k(self) -> int:
        """Number of steps in a cycle."""
        return int(self._cycle["k"])

    @property
    def alpha(self) -> float:
        """Blend factor of the slow weights."""
        return float(self._cycle["alpha"])

    # -- the step ----------------------------------------------------------------------------------------------------

    def _update(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single step of the wrapped optimizer; at every k-th step, update the slow weights.

        Args:
            closure: Passed to the wrapped optimizer's step.

        Returns:
            The result of the wrapped optimizer's step.

        Raises:
            RuntimeError: Called within ``slow_weights()``.
        """
        if self._lent:
            raise RuntimeError("Lookahead: step() was called within slow_weights()")
        if has_found_inf(self):
            return self._step_wrapped(closure)  # the wrapped optimizer skips this step
        counts = not only_creates_states(self)
        step = self._cycle["step"] + 1
        ends = step >= self.k
        update = SlowWeightUpdate(self.optimizer, self._slow_name, self.alpha if ends else None)
        loss = self._step_natively(closure, update) if self._is_native else self._step_anyhow(closure, update)
        if counts and not has_skipped(self.optimizer):
            self._cycle["step"] = 0 if ends else step
        return loss

    step = hooked(_update, "Lookahead")

    def _check_wrapped_steps(self) -> None:
        """Refuse to wrap what this Lookahead could not keep in step with.

        Averages and copies of an optimizer that is not wrapped itself would be updated before the slow weights, and so
        differ from the parameters. A part of Combined may skip a step that the others make. SAM moves the parameters
        before the step.
        """
        inner = _optimizers_within(self.optimizer)
        if sam := next((each for each in inner if isinstance(each, SAM)), None):
            raise ValueError(f"Lookahead cannot wrap {type(sam).__name__}: use SAM(Lookahead(optimizer))")
        if self._is_native:
            return
        is_combined = any(isinstance(each, Combined) for each in inner)
        for each in inner:
            tail = getattr(each, "_tail", None)
            if not isinstance(tail, Tail):
                continue
            why = ""
            if tail.follows():
                why = "average or copy_to: they would not follow the slow weights"
            elif is_combined and tail.may_skip():
                why = "steps that may be skipped: the others would not be"
            if why:
                name = type(each).__name__
                raise ValueError(
                    f"Lookahead cannot wrap {type(self.optimizer).__name__} if its {name} has {why}. "
                    f"Wrap the {name} itself"
                )

    @property
    def _is_native(self) -> bool:
        """Return whether the wrapped optimizer is a Native whose step no subclass overrides."""
        kind = type(self.optimizer)
        return issubclass(kind, Native) and all(
            getattr(kind, name) is getattr(Native, name)
            for name in ("step", "_step_all")  # Muon's _step_natively also updates the slow weights
        )

    def _step_natively(self, closure: Callable[[], Any] | None, update: SlowWeightUpdate) -> Any:
        assert isinstance(self.optimizer, Native)
        self.optimizer._slow_weight_update = update
        try:
            return self._step_wrapped(closure)
        finally:
            del self.optimizer._slow_weight_update

    def _step_anyhow(self, closure: Callable[[], Any] | None, update: SlowWeightUpdate) -> Any:
        def watched() -> Any:
            assert closure is not None
            loss = closure()
            update.before(params_of(self), master_names(self.optimizer))
            return loss

        if closure is None:
            update.before(params_of(self), master_names(self.optimizer))
        loss = self._step_wrapped(None if closure is None else watched)
        if not has_skipped(self.optimizer):
            update.after(params_of(self))
        return loss

    # -- slow weights ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def slow_weights(self) -> Iterator[None]:
        """Set the parameters to the slow weights within this context, to evaluate or save the model.

        Parameters without slow weights are not changed. All parameters are restored at exit, also after an exception.
        The context needs memory for one more copy of the parameters.

        Raises:
            RuntimeError: The context is already entered.
        """
        if self._lent:
            raise RuntimeError("Lookahead: slow_weights() was entered within slow_weights()")
        slow_params = {p: self._slow_param(p) for p in params_of(self)}
        pairs = [(p, slow) for p, slow in slow_params.items() if slow is not None]
        fast = [p.detach().clone() for p, _ in pairs]
        self._lent = True
        with low_bits_kept(p for p, _ in pairs):
            try:
                with torch.no_grad():
                    for p, slow in pairs:
                        p.copy_(slow)
                yield
            finally:
                self._lent = False
                with torch.no_grad():
                    for (p, _), was in zip(pairs, fast, strict=True):
                        p.copy_(was)

    @property
    def _slow_name(self) -> str:
        return f"{SLOW_PARAM}_{self._depth}" if self._depth else SLOW_PARAM

    def _slow_param(self, p: Tensor) -> Tensor | None:
        return _slow_param(self.optimizer, self._slow_name, p)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    @property
    def _cycle_name(self) -> str:
        return f"lookahead_{self._depth}" if self._depth else "lookahead"

    def _own(self) -> tuple[str, dict[str, Any]]:
        return self._cycle_name, self._cycle

    def _forget(self) -> None:
        """Start a new cycle, without slow weights."""
        self._cycle["step"] = 0
        for state in self.state.values():
            if isinstance(state, dict):
                state.pop(self._slow_name, None)

    @disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class, including k, alpha and step, or of the wrapped optimizer's class.

        A state_dict without slow weights starts a new cycle; with one of the wrapped class, k and alpha do not change.

        Raises:
            TypeError: ``k`` or ``step`` in the state_dict is not an integer, or ``alpha`` is not a number.
            ValueError: The state_dict does not match this optimizer.

        If it raises, nothing has been loaded.
        """
        loaded_with_hooks(self, state_dict, self._load)

    def _load(self, state_dict: dict[str, Any]) -> None:
        found = self._own_in(state_dict)
        cycle = _checked(self._cycle if found is None else found)
        self._check_saved_slow_params(state_dict)
        self.optimizer.load_state_dict(state_dict)
        self._cycle = cycle
        # A checkpoint before the first gradient has a count, but no states yet.
        if found is None or (self.state and all(self._slow_param(p) is None for p in params_of(self))):
            self._forget()
        self._share()

    def _check_saved_slow_params(self, state_dict: dict[str, Any]) -> None:
        """Raise ValueError if saved slow weights do not have the shape of their parameter.

        Their dtype does not matter: loading converts them.
        """
        keys = (key for group in state_dict["param_groups"] for key in group["params"])
        for p, key in zip(params_of(self), keys, strict=False):  # the wrapped optimizer refuses other numbers of them
            saved = state_dict["state"].get(key)
            slow = saved.get(self._slow_name) if isinstance(saved, Mapping) else None
            if isinstance(slow, Tensor):
                _check_shape(self.optimizer, self._slow_name, p, slow)


def _optimizers_within(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those that it wraps or combines."""
    optimizer = unwrapped(optimizer)
    parts = optimizer._inner() if isinstance(optimizer, Combined | Wrapper) else []
    return [optimizer, *(each for part in parts for each in _optimizers_within(part))]


def _slow_param(optimizer: Optimizer, name: str, p: Tensor) -> Tensor | None:
    held = optimizer.state.get(p, {}).get(name)  # state[p] would create an entry
    if not isinstance(held, Tensor):
        return None
    _check_shape(optimizer, name, p, held)
    return held


def _check_shape(optimizer: Optimizer, name: str, p: Tensor, slow: Tensor) -> None:
    if slow.shape != p.shape:
        raise ValueError(f"Lookahead: the state {name} has shape {list(slow.shape)}, its {_describe(optimizer, p)}")


def _describe(optimizer: Optimizer, p: Tensor) -> str:
    groups = enumerate(optimizer.param_groups)
    group, index = next((g, i) for g, group in groups for i, q in enumerate(group["params"]) if q is p)
    return f"parameter {index} of group {group} has shape {list(p.shape)} and dtype {p.dtype}"


def _checked(cycle: dict[str, Any]) -> dict[str, Any]:
    """Return a new dict of k, alpha and step after checking their ranges."""
    check_keys("Lookahead: the state_dict's 'lookahead'", cycle, ("k", "alpha", "step"))
    k = whole_at_least("Lookahead: k", cycle["k"], 1)
    step = whole_at_least("Lookahead: step", cycle["step"], 0)
    alpha = cycle["alpha"]
    check_number("Lookahead: alpha", alpha)
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"Lookahead: alpha must be in [0, 1], got {alpha}")
    if step >= k:
        raise ValueError(f"Lookahead: step must be >= 0 and < k = {k}, got {step}")
    return {"k": k, "alpha": float(alpha), "step": step}
