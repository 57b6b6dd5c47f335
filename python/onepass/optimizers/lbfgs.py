"""L-BFGS."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import _core
from .arguments import (
    HyperTypes,
    check_hyperparameters,
    check_number,
    groups_kept_on_error,
    module_refused,
    noted,
    whole_at_least,
)
from .hooks import evaluate, hooked, unhooked
from .loading import while_loading

Closure = Callable[[], Any]

# Options that must be equal in all groups, because all groups form one vector with one history.
_SHARED = ("max_iter", "max_eval", "tolerance_grad", "tolerance_change", "history_size", "line_search_fn")

# Hyperparameters that must be numbers.
_TYPES: HyperTypes = {"lr": False, "tolerance_grad": False, "tolerance_change": False}

# From torch 2.14 on.
_TORCH_MAXIMIZES = "maximize" in inspect.signature(torch.optim.LBFGS).parameters

# The state entries of the history. All others are counters.
_HISTORY = ("d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss", "al")


# -- the line search -------------------------------------------------------------------------------------------------


class _Point(NamedTuple):
    """A point x + t d of the line search."""

    t: float
    loss: float  # infinite if the loss or a gradient there is not finite
    slope: float  # gradient . d
    gradient: Tensor
    largest: float  # largest magnitude in the gradient

    @property
    def finite(self) -> bool:
        return self.loss < math.inf


def _interpolate(a: _Point, b: _Point, low: float, high: float) -> float:
    """Return the minimizer, within bounds, of the cubic through two points and their slopes (Nocedal and Wright, 3.59).

    If there is no minimum or a point is not finite, return the middle of the bounds.
    """
    a, b = (a, b) if a.t <= b.t else (b, a)
    middle = (low + high) / 2
    if not (a.finite and b.finite) or a.t == b.t:
        return middle
    d1 = a.slope + b.slope - 3 * (a.loss - b.loss) / (a.t - b.t)
    square = d1 * d1 - a.slope * b.slope
    if not 0 <= square < math.inf:
        return middle
    d2 = math.sqrt(square)
    denominator = b.slope - a.slope + 2 * d2
    if denominator == 0:
        return middle
    return min(max(b.t - (b.t - a.t) * ((b.slope + d2 - d1) / denominator), low), high)


def _strong_wolfe(
    evaluate: Callable[[float], _Point],
    start: _Point,
    t: float,
    size: float,
    tolerance: float,
    rounds: int,
    c1: float = 1e-4,
    c2: float = 0.9,
) -> _Point:
    """Search a step that satisfies the strong Wolfe conditions (Nocedal and Wright 2006, algorithms 3.5 and 3.6).

    A trial that is not finite counts as one of infinite loss: the next trial is halfway to it.

    Args:
        evaluate: Returns the point at a step length.
        start: The point at 0, which is finite and has a negative slope.
        t: Step length of the first trial.
        size: Largest magnitude in the direction, which converts a difference of step lengths to a change of parameters.
        tolerance: The search ends when the bracket changes no parameter by this much.
        rounds: Largest number of trials after the first.
        c1: Constant of the sufficient decrease condition.
        c2: Constant of the curvature condition.

    Returns:
        The point found; if none is found, the lower end of the bracket, which may be the start.
    """

    def too_high(point: _Point) -> bool:
        return point.loss > start.loss + c1 * point.t * start.slope

    def flat(point: _Point) -> bool:
        return abs(point.slope) <= -c2 * start.slope

    # Algorithm 3.5: increase the step length until the last two points bracket a minimum.
    before, point = start, evaluate(t)
    made = 0
    ends = [start, point]
    while made < rounds:
        ends = [before, point]
        if too_high(point) or (made > 1 and point.loss >= before.loss):
            break
        if flat(point):
            return point
        if point.slope >= 0:
            break
        t = _interpolate(before, point, point.t + 0.01 * (point.t - before.t), 10 * point.t)
        before, point = point, evaluate(t)
        made += 1
    if made >= rounds:
        ends = [start, point]

    # Algorithm 3.6: narrow the bracket. `low` is the index of its end with the lower loss.
    low = 0 if ends[0].loss <= ends[1].loss else 1
    stalled = False
    while made < rounds:
        left, right = sorted((ends[0].t, ends[1].t))
        if (right - left) * size < tolerance:
            break
        t = _interpolate(ends[0], ends[1], left, right)
        # Near an end twice in a row, or outside, is no progress: then use a point a tenth of the bracket from the end.
        margin = 0.1 * (right - left)
        near = min(right - t, t - left) < margin
        if near and (stalled or not left < t < right):
            t = right - margin if right - t < t - left else left + margin
            near = False
        stalled = near

        point = evaluate(t)
        made += 1
        if too_high(point) or point.loss >= ends[low].loss:
            ends[1 - low] = point
            low = 0 if ends[0].loss <= ends[1].loss else 1
            continue
        if flat(point):
            return point
        if point.slope * (ends[1 - low].t - ends[low].t) >= 0:
            ends[1 - low] = ends[low]
        ends[low] = point
    return ends[low]


# -- the optimizer ---------------------------------------------------------------------------------------------------


def _finite(numbers: list[float]) -> bool:
    return all(map(math.isfinite, numbers))


class _Run:
    """One call of step: evaluates the closure as a function of a flat vector."""

    def __init__(
        self,
        native: _core.Lbfgs,
        groups: list[list[Tensor]],
        weights: list[float],
        closure: Closure,
        maximize: bool,
    ) -> None:
        self.native = native
        self.groups = groups
        self.weights = weights
        self.closure = closure
        self.maximize = maximize  # whether losses and gradients of points are negated
        self.evaluations = 0
        self.x: Tensor | None = None  # the parameters before the first move; None if not moved
        self.moved = 0.0  # current step length t
        self.failed = False  # whether a point since the last stay() was not finite

    def evaluate(self) -> Any:
        """Call the closure and return its result."""
        loss = evaluate(self.closure)
        self.evaluations += 1
        return loss

    def point(self, t: float, loss: float, direction: Tensor | None) -> _Point:
        """Return the point of the current parameters, for which the closure has returned this loss."""
        gradient = self.native.buffer()
        if math.isfinite(loss):
            largest, slope = self.native.gather(self.groups, True, gradient, direction)
            if self.maximize:
                loss, slope = -loss, -slope
                gradient.neg_()
            if _finite(largest):
                steered = (most for most, weight in zip(largest, self.weights, strict=True) if weight != 0)
                return _Point(t, loss, slope, gradient, max(steered, default=0.0))
        self.failed = True
        return _Point(t, math.inf, math.nan, gradient, math.inf)

    def along(self, direction: Tensor) -> Callable[[float], _Point]:
        """Return a function that moves the parameters to x + t d and returns the point there."""

        def at(t: float) -> _Point:
            self.move(direction, t)
            return self.point(t, float(self.evaluate()), direction)

        return at

    def move(self, direction: Tensor, t: float) -> None:
        """Move the parameters to x + t d, where x is their position at the first call after `stay`."""
        first = self.x is None
        if self.x is None:
            self.x = self.native.buffer()
        if first or t != self.moved:
            self.native.move(self.groups, self.x, direction, t, first)
        self.moved = t

    def stay(self) -> None:
        """Make the current parameters the origin of the next move."""
        self.x = None
        self.failed = False

    def numbers(self) -> Tensor:
        """Return the parameters as a flat vector."""
        out = self.native.buffer()
        self.native.gather(self.groups, False, out, None)
        return out


def _step(self: LBFGS, closure: Closure) -> Any:
    """Perform a single optimization step: up to ``max_iter`` iterations.

    Args:
        closure: Reevaluates the model, with gradients enabled, and returns the loss.

    Returns:
        The loss of the first evaluation of the closure.

    Raises:
        RuntimeError: ``line_search_fn`` is neither None nor ``"strong_wolfe"``.
        RuntimeError: ``step`` is called from within the closure.
        ValueError: The groups differ in an argument other than ``lr``; the state does not match the parameters; or
            there are several groups and the kernels do not cover one of the parameters.
    """
    with torch.no_grad(), self._native:
        return self._make_step(closure)


class LBFGS(torch.optim.LBFGS):
    r"""L-BFGS with an optional strong Wolfe line search, a drop-in replacement for :class:`torch.optim.LBFGS`.

    All parameters together form one vector :math:`\theta`. With its gradient :math:`g`, and the last ``history_size``
    pairs :math:`s_i = \theta_{i+1} - \theta_i`, :math:`y_i = g_{i+1} - g_i` for which :math:`s_i \cdot y_i > 10^{-10}`,
    an iteration is

    .. math::
        d_k &= -H_k g_k, \qquad \theta_{k+1} = \theta_k + t_k d_k \\
        H_{i+1} &= (I - \rho_i s_i y_i^T) H_i (I - \rho_i y_i s_i^T) + \rho_i s_i s_i^T,
            \qquad \rho_i = 1 / (s_i \cdot y_i)

    from the oldest pair to the newest. The initial matrix is :math:`\gamma D`, where
    :math:`\gamma = s \cdot y / y \cdot D y` is computed from the newest pair. The step length :math:`t_k` is ``lr``, or
    in the very first iteration ``lr`` times :math:`\min(1, 1 / \|d\|_1)`. With a line search, it is the first trial.

    Sources: Nocedal and Wright 2006, "Numerical Optimization", algorithms 7.4 (two-loop recursion), 3.5 and 3.6 (line
    search). The recursion works on inner products as in Chen et al. 2014, "Large-scale L-BFGS using MapReduce", so it
    needs two passes over the history. Sums are accumulated in float64.

    **Several parameter groups**, which torch's class does not support, may each have a learning rate. ``lr`` above is
    then the largest of them, and :math:`D` is diagonal: the ratio of the group's learning rate to the largest. A group
    with learning rate 0 is not changed and does not contribute to any sum. With a single group :math:`D = I`. Adding a
    group after the first step resets the history.

    **A loss or gradient that is NaN or infinite** never changes the parameters or the state. The line search treats
    such a trial as one of infinite loss and tries half the step length. If no trial is accepted, or if there is no line
    search, the step ends with the parameters of the last finite point, and the history is reset. A step without a line
    search does not evaluate the last point to which it moves. If the next step finds that the loss there is not finite,
    and the parameters have not been changed since, it restores the previous point. After an exception in the closure,
    the parameters are also those of the last finite point.

    Args:
        params: Parameters, named parameters, or parameter groups, of any shape and strides. The kernels step float32,
            float64, bfloat16, float16 and their complex dtypes on the CPU. If there is any other parameter, torch's
            implementation performs the whole step. A sparse gradient is treated as dense, a missing one as zeros.
        lr: Learning rate; a float, or a tensor of one element. The only argument in which groups may differ.
        max_iter: Largest number of iterations in a step.
        max_eval: Number of closure evaluations after which a step starts no further iteration; None:
            ``max_iter * 1.25``.
        tolerance_grad: A step ends when no element of the gradient is larger than this in magnitude.
        tolerance_change: A step ends when an iteration changes the loss by less than this, or no parameter by more, or
            when the directional derivative is greater than ``-tolerance_change``.
        history_size: Number of pairs kept. A pair takes two vectors of the parameters' size; a step needs about 7 more.
        line_search_fn: ``"strong_wolfe"`` or None.
        maximize: Ascend instead of descend: the loss that the closure returns, and its gradient, are negated. torch's
            class has this argument from torch 2.14 on.

    Raises:
        TypeError: A hyperparameter is not a number, or ``max_iter`` or ``history_size`` is not an integer.
        ValueError: A hyperparameter is out of range; or, at the step, ``maximize`` is set, kernels cannot step a
            parameter, and torch's class does not have ``maximize``.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([3.0, -2.0]))
        >>> optimizer = onepass.LBFGS([x], line_search_fn="strong_wolfe")
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = (x - 1).square().sum()
        ...     loss.backward()
        ...     return loss
        >>> first_loss = optimizer.step(closure)
        >>> bool((x - 1).abs().max() < 1e-3)
        True
    """

    torch_step = unhooked(torch.optim.LBFGS)

    if TYPE_CHECKING:

        def step(self, closure: Closure) -> Any: ...  # type: ignore[override]  # noqa: D102
    else:
        step = hooked(_step, "LBFGS")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1,
        max_iter: int = 20,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-7,
        tolerance_change: float = 1e-9,
        history_size: int = 100,
        line_search_fn: str | None = None,
        *,
        maximize: bool = False,
    ) -> None:
        evaluations = math.inf if max_eval is None else max_eval
        counts = _counts("LBFGS", {"max_iter": max_iter, "max_eval": evaluations, "history_size": history_size})
        max_iter, history_size = counts["max_iter"], counts["history_size"]
        given = {"lr": lr, "tolerance_grad": tolerance_grad, "tolerance_change": tolerance_change}
        # torch's constructor accepts one group only; the others are added afterwards. It also raises for arguments that
        # are not iterable, after it has checked lr.
        others: list[Any] = []
        with noted(lambda: check_hyperparameters("LBFGS", _TYPES, given)), module_refused("LBFGS", params):
            if isinstance(params, Iterable) and not isinstance(params, Tensor | dict | set):  # torch warns of sets
                listed: list[Any] = list(params)
                several = bool(listed) and isinstance(listed[0], dict)
                params, others = (listed[:1], listed[1:]) if several else (listed, [])
            more = {"maximize": maximize} if _TORCH_MAXIMIZES else {}
            super().__init__(
                params, lr, max_iter, max_eval, tolerance_grad, tolerance_change, history_size, line_search_fn, **more
            )
        if maximize and not _TORCH_MAXIMIZES:
            self.defaults["maximize"] = maximize
            self.param_groups[0].setdefault("maximize", maximize)
        check_hyperparameters("LBFGS", _TYPES, self.defaults)  # torch accepts some values that no step can use
        for group in others:
            self.add_param_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; after the first step, this resets the history.

        Raises:
            TypeError: A hyperparameter of the group is not a number, or not an integer.
            ValueError: An argument other than ``lr`` differs from that of the first group.
        """
        where = f"LBFGS: group {len(self.param_groups)}"
        group = param_group if isinstance(param_group, dict) else {}  # torch refuses others
        check_hyperparameters(where, _TYPES, group)
        with groups_kept_on_error(self), module_refused(where, group.get("params")):
            super().add_param_group(param_group)
            self.param_groups[-1].update(_counts(where, self.param_groups[-1]))
            if len(self.param_groups) > 1:
                self._shared_options()
        if len(self.param_groups) > 1:
            for state in self.state.values():
                _forget(state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # torch's constructor sets these, and its step reads them.
        self._params = self.param_groups[0]["params"]
        self._numel_cache = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch's.

        Differs from ``torch.optim.Optimizer.load_state_dict`` in that vectors keep the dtype in which they were saved;
        torch casts them to that of the first parameter. A checkpoint without ``maximize`` minimizes the loss.
        """
        saved: dict[str, Any] = {}

        def look(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            saved.update(final["state"].get(_first_of(final["param_groups"]), {}))

        def restore(_: torch.optim.Optimizer) -> None:
            state = self.state[_first_of(self.param_groups)] if saved else {}
            for name in state.keys() & saved.keys():
                state[name] = _with_dtypes_of(saved[name], state[name])

        with while_loading(self, look, restore):
            super().load_state_dict(state_dict)
        self._unproven = None
        self.__dict__.pop("_cached_maximize", None)

    # -- the step ----------------------------------------------------------------------------------------------------

    def _make_step(self, closure: Closure) -> Any:
        for number, group in enumerate(self.param_groups):
            check_hyperparameters(f"LBFGS: group {number}", _TYPES, group)
        shared = self._shared_options()
        groups = [list(group["params"]) for group in self.param_groups]
        refused = self._native.refusals(groups)
        if refused:
            return self._step_by_torch(refused, closure)
        rates = [float(group["lr"]) for group in self.param_groups]
        lr = max(rates)
        weights = [1.0 if lr == rate else rate / lr for rate in rates]
        run = _Run(self._native, groups, weights, closure, shared.pop("maximize"))

        if not any(groups):
            return run.evaluate()

        state = self.state[_first_of(self.param_groups)]
        if self.__dict__.get("_cached_maximize", run.maximize) != run.maximize:
            _forget(state)  # the history is of the negative
        self.__dict__["_cached_maximize"] = run.maximize
        state.setdefault("func_evals", 0)
        state.setdefault("n_iter", 0)
        first_loss = run.evaluate()
        state["func_evals"] += 1
        loss = float(first_loss)
        self._native.begin(groups, weights, torch.get_num_threads())
        point = run.point(0.0, loss, None)
        _core.count({"cpu": sum(map(len, groups))}, {})

        unproven, self._unproven = self._unproven, None
        if not point.finite:
            if unproven is not None:
                self._go_back(run, state, unproven)
        elif not point.largest <= shared["tolerance_grad"]:
            self._iterate(run, state, point, lr, **shared)
        return first_loss

    @property
    def _native(self) -> _core.Lbfgs:
        # Created on first use, and never pickled or copied: it caches what was read from the state.
        native: _core.Lbfgs | None = self.__dict__.get("_cached_native")
        if native is None:
            native = self.__dict__["_cached_native"] = _core.Lbfgs()
        return native

    @property
    def _unproven(self) -> Tensor | None:
        """The parameters before the last move, if the point after it has not been evaluated."""
        x: Tensor | None = self.__dict__.get("_cached_unproven")
        return x

    @_unproven.setter
    def _unproven(self, x: Tensor | None) -> None:
        self.__dict__["_cached_unproven"] = x

    def _shared_options(self) -> dict[str, Any]:
        first, *others = (
            {name: group[name] for name in _SHARED}
            | _counts(f"LBFGS: group {index}", group)
            | {"maximize": _maximizes(group)}
            for index, group in enumerate(self.param_groups)
        )
        for index, options in enumerate(others, 1):
            for name, value in options.items():
                if value != first[name]:
                    raise ValueError(
                        f"LBFGS: all parameter groups must have the same {name}, "
                        f"but group {index} has {value!r}, and group 0 {first[name]!r}"
                    )
        if first["line_search_fn"] not in (None, "strong_wolfe"):
            raise RuntimeError("only 'strong_wolfe' is supported")
        return first

    def _iterate(
        self,
        run: _Run,
        state: dict[str, Any],
        point: _Point,
        lr: float,
        *,
        max_iter: int,
        max_eval: int,
        tolerance_grad: float,
        tolerance_change: float,
        history_size: int,
        line_search_fn: str | None,
    ) -> None:
        """Iterate from a point that is finite and not optimal.

        The state is always that of the last finite point, so that a later step can continue from it.
        """
        native = run.native
        alpha: list[float] | None = None
        for iteration in range(1, max_iter + 1):
            state["n_iter"] += 1
            if first := state.get("d") is None:
                state.update(old_dirs=[], old_stps=[], ro=[], H_diag=1)
            else:
                taken = native.update(
                    state["old_dirs"],
                    state["old_stps"],
                    point.gradient,
                    state["prev_flat_grad"],
                    state["d"],
                    float(state["t"]),
                    history_size,
                )
                if taken is not None:
                    ro, h_diag = taken
                    state["ro"] = [*state["ro"], _like(point.gradient, ro)][-history_size:]
                    state["H_diag"] = _like(point.gradient, h_diag)
            d = native.buffer()
            slope, norm, size, alpha = native.direction(state["old_dirs"], state["old_stps"], point.gradient, d)
            state.update(d=d, t=0.0, prev_flat_grad=point.gradient, prev_loss=point.loss)
            if not math.isfinite(size):
                return _forget(state)
            if not slope <= -tolerance_change:
                break

            start = point._replace(t=0.0, slope=slope)
            t = lr / max(1.0, norm) if first else lr
            before = run.evaluations
            run.stay()
            try:
                if line_search_fn is not None:
                    trials = max_eval - run.evaluations
                    point = _strong_wolfe(run.along(d), start, t, size, tolerance_change, trials)
                elif iteration < max_iter:
                    point = run.along(d)(t)
                else:  # not evaluated: the next step's closure may be another function
                    point = start._replace(t=t)
                    run.move(d, t)
                    self._unproven = run.x
                if not point.finite:
                    point = start
                run.move(d, point.t)
            except BaseException:
                run.move(d, 0.0)
                raise
            finally:
                state["func_evals"] += run.evaluations - before
            state["t"] = point.t
            if run.failed and point.t == 0.0:
                return _forget(state)

            if (
                iteration == max_iter
                or run.evaluations >= max_eval
                or point.largest <= tolerance_grad
                or abs(point.t) * size <= tolerance_change
                or abs(point.loss - start.loss) < tolerance_change
            ):
                break
        if alpha is not None and state["n_iter"] > 1:
            als = _like(point.gradient, alpha).unbind()
            state["al"] = [*als, *[None] * (history_size - len(als))]

    def _go_back(self, run: _Run, state: dict[str, Any], x: Tensor) -> None:
        """Undo the last move of the previous step, because the loss at its end is not finite.

        Do nothing if the parameters have been changed since.
        """
        d, t = state.get("d"), state.get("t")
        if d is None or t is None or x.numel() != run.native.length:
            return
        native, groups = run.native, run.groups
        here, found = native.buffer(), run.numbers()
        native.move(groups, here, d, 0.0, True)
        native.move(groups, x, d, float(t), False)
        if torch.equal(run.numbers(), found):
            native.move(groups, x, d, 0.0, False)
            _forget(state)
        else:
            native.move(groups, here, d, 0.0, False)

    # -- what the kernels do not cover -------------------------------------------------------------------------------

    def _step_by_torch(self, refused: list[tuple[int, int, str]], closure: Closure) -> Any:
        group, index, reason = refused[0]
        if len(self.param_groups) > 1:
            raise ValueError(
                f"LBFGS: several parameter groups need the kernels, which cannot take parameter {index} of group "
                f"{group}: {reason}"
            )
        if _maximizes(self.param_groups[0]) and not _TORCH_MAXIMIZES:
            raise ValueError(
                f"LBFGS: maximize=True needs torch 2.14 or the kernels, which cannot take parameter {index} of group "
                f"{group}: {reason}"
            )
        loss = type(self).torch_step(self, closure)
        counts: dict[str, int] = {}
        for _, _, _, why in self._explain():
            counts[why] = counts.get(why, 0) + 1
        _core.count({}, counts)
        return loss

    @classmethod
    def _state_names(cls) -> list[str]:
        return ["d", "prev_flat_grad", "old_dirs", "old_stps"]

    def _explain(self) -> list[tuple[int, int, str, str]]:
        """Return group, index, path and reason of each parameter, for :func:`onepass.explain`."""
        groups = [list(group["params"]) for group in self.param_groups]
        places = [(g, i) for g, params in enumerate(groups) for i in range(len(params))]
        try:
            self._shared_options()
            refused = {(g, i): why for g, i, why in self._native.refusals(groups)}
        except (TypeError, ValueError, RuntimeError) as error:
            return [(g, i, "error", str(error)) for g, i in places]
        if not refused:
            return [(g, i, "kernel", "") for g, i in places]
        is_error = len(groups) > 1 or (_maximizes(self.param_groups[0]) and not _TORCH_MAXIMIZES)
        path = "error" if is_error else "torch"
        first = next(iter(refused.values()))
        return [(g, i, path, refused.get((g, i), f"beside a parameter with {first}")) for g, i in places]


def _counts(where: str, group: Mapping[str, Any]) -> dict[str, Any]:
    """Check ``max_iter``, ``max_eval`` and ``history_size`` of a group, and return the first and the last as ints.

    ``max_eval`` may have a fraction or be infinite, as in torch: it is only compared.

    Raises:
        TypeError: ``max_eval`` is not a number, or one of the others is not an integer.
        ValueError: One of them is out of range. With ``history_size=0``, torch raises in the second iteration.
    """
    check_number(f"{where}: max_eval", group["max_eval"])
    if not group["max_eval"] >= 0:
        raise ValueError(f"{where}: max_eval must be >= 0, got {group['max_eval']}")
    return {
        "max_iter": whole_at_least(f"{where}: max_iter", group["max_iter"], 0),
        "history_size": whole_at_least(f"{where}: history_size", group["history_size"], 1),
    }


def _first_of(param_groups: list[dict[str, Any]]) -> Any:
    """Return the first parameter, whose state entry holds the state of the whole optimizer."""
    return next((p for group in param_groups for p in group["params"]), None)


def _maximizes(group: dict[str, Any]) -> bool:
    """Return a group's ``maximize``, which groups of a torch before 2.14 do not have."""
    return bool(group.get("maximize", False))


def _like(vector: Tensor, values: float | list[float]) -> Tensor:
    """Return numbers as a tensor of the vector's dtype and device."""
    return torch.tensor(values, dtype=vector.dtype, device=vector.device)


def _forget(state: dict[str, Any]) -> None:
    """Reset the history, and n_iter, by which torch's implementation recognizes the first iteration."""
    for name in _HISTORY:
        state.pop(name, None)
    if "n_iter" in state:
        state["n_iter"] = 0


def _with_dtypes_of(saved: Any, loaded: Any) -> Any:
    if isinstance(saved, list) and isinstance(loaded, list):
        return [_with_dtypes_of(*both) for both in zip(saved, loaded, strict=True)]
    if isinstance(saved, Tensor) and saved.dtype != loaded.dtype:
        return saved.to(loaded.device)
    return loaded
