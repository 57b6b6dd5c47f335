"""L-BFGS."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import _core
from .arguments import HyperTypes, check_hyperparameters, module_refused, noted
from .base import while_loading
from .hooks import hooked, unhooked

Closure = Callable[[], Any]

# What all groups must agree on: there is one vector, and one history.
_SHARED = ("max_iter", "max_eval", "tolerance_grad", "tolerance_change", "history_size", "line_search_fn")

# Its hyperparameters that must be numbers.
_TYPES: HyperTypes = {"lr": False, "tolerance_grad": False, "tolerance_change": False}

# What of the state belongs to the history. The rest are counters.
_HISTORY = ("d", "t", "old_dirs", "old_stps", "ro", "H_diag", "prev_flat_grad", "prev_loss", "al")


# -- the line search -------------------------------------------------------------------------------------------------


class _Point(NamedTuple):
    """A point x + t d of the line along which is searched."""

    t: float
    loss: float  # infinite if the loss or a gradient there is not finite
    slope: float  # gradient . d
    gradient: Tensor
    largest: float  # of the gradient's magnitudes

    @property
    def finite(self) -> bool:
        return self.loss < math.inf


def _interpolate(a: _Point, b: _Point, low: float, high: float) -> float:
    """The minimum of the cubic through two points with their slopes (Nocedal and Wright, 3.59), within bounds.

    The middle of the bounds if there is no minimum, or a point is not finite.
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
    """A step that satisfies the strong Wolfe conditions (Nocedal and Wright 2006, algorithms 3.5 and 3.6).

    A trial that is not finite counts as one of infinite loss: it is too far, and the search goes on halfway to it.

    Args:
        evaluate: The point at a step length.
        start: The point at 0, which is finite and has a negative slope.
        t: The first trial.
        size: The largest magnitude in the direction; it makes a difference of step lengths a change of parameters.
        tolerance: A bracket that changes no parameter by more is not searched any further.
        rounds: How many trials may follow the first.
        c1: Least decrease, in relation to that of the first derivative.
        c2: Largest slope left, in relation to the first.

    Returns:
        The point found; or when the trials are used up the lowest of the bracket, which may be the start.
    """

    def too_high(point: _Point) -> bool:
        return point.loss > start.loss + c1 * point.t * start.slope

    def flat(point: _Point) -> bool:
        return abs(point.slope) <= -c2 * start.slope

    # Algorithm 3.5: go further until a minimum lies between the last two points.
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

    # Algorithm 3.6: narrow it down. `low` is the end of lower loss.
    low = 0 if ends[0].loss <= ends[1].loss else 1
    stalled = False
    while made < rounds:
        left, right = sorted((ends[0].t, ends[1].t))
        if (right - left) * size < tolerance:
            break
        t = _interpolate(ends[0], ends[1], left, right)
        # Twice in a row near an end, or on it, is no progress: then a tenth of the way in.
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
    """One call of step: the closure as a function on flat vectors."""

    def __init__(self, native: _core.Lbfgs, groups: list[list[Tensor]], weights: list[float], closure: Closure) -> None:
        self.native = native
        self.groups = groups
        self.weights = weights
        self.closure = closure
        self.evaluations = 0
        self.x: Tensor | None = None  # the parameters, when they have been moved
        self.moved = 0.0  # by how many directions
        self.failed = False  # whether a point since then was not finite

    def evaluate(self) -> Any:
        """What the closure returns."""
        with torch.enable_grad():
            loss = self.closure()
        self.evaluations += 1
        return loss

    def point(self, t: float, loss: float, direction: Tensor | None) -> _Point:
        """The point where the parameters now are, at which the closure has returned this loss."""
        gradient = self.native.buffer()
        if math.isfinite(loss):
            largest, slope = self.native.gather(self.groups, True, gradient, direction)
            if _finite(largest):
                steered = (most for most, weight in zip(largest, self.weights, strict=True) if weight != 0)
                return _Point(t, loss, slope, gradient, max(steered, default=0.0))
        self.failed = True
        return _Point(t, math.inf, math.nan, gradient, math.inf)

    def along(self, direction: Tensor) -> Callable[[float], _Point]:
        """The function that moves the parameters to x + t d, and returns the point there."""

        def at(t: float) -> _Point:
            self.move(direction, t)
            return self.point(t, float(self.evaluate()), direction)

        return at

    def move(self, direction: Tensor, t: float) -> None:
        """Moves the parameters to x + t d; x is where they were at the first call since `stay`."""
        first = self.x is None
        if self.x is None:
            self.x = self.native.buffer()
        if first or t != self.moved:
            self.native.move(self.groups, self.x, direction, t, first)
        self.moved = t

    def stay(self) -> None:
        """Where the parameters are is where the next move begins."""
        self.x = None
        self.failed = False

    def numbers(self) -> Tensor:
        """The parameters as a flat vector."""
        out = self.native.buffer()
        self.native.gather(self.groups, False, out, None)
        return out


def _step(self: LBFGS, closure: Closure) -> Any:
    """Performs a single optimization step: up to ``max_iter`` iterations.

    Args:
        closure: Reevaluates the model, with gradients enabled, and returns the loss.

    Returns:
        What the closure returned at the first evaluation.

    Raises:
        RuntimeError: ``line_search_fn`` is neither None nor ``"strong_wolfe"``.
        RuntimeError: ``step`` is called from within the closure.
        ValueError: The groups disagree in an argument other than ``lr``; the state does not fit the parameters; or the
            kernels do not cover a parameter of one of several groups.
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

    from the oldest pair to the newest, beginning with :math:`\gamma D`, :math:`\gamma = s \cdot y / y \cdot D y` of the
    newest pair. The step :math:`t_k` is ``lr``, at the very first iteration ``lr`` times
    :math:`\min(1, 1 / \|d\|_1)`; the line search begins with it.

    Sources: Nocedal and Wright 2006, "Numerical Optimization", algorithms 7.4 (two-loop recursion), 3.5 and 3.6 (line
    search); the recursion works on inner products as in Chen et al. 2014, "Large-scale L-BFGS using MapReduce", and so
    takes two passes over the history. Sums are in double.

    **Several parameter groups**, which torch refuses, may have a learning rate each: ``lr`` above is the largest of
    them, and :math:`D` is diagonal, for each group its learning rate in relation to the largest. A group of learning
    rate 0 is left where it is, and left out of all that is summed. With a single group :math:`D = I`. Adding a group
    after the first step makes the history begin anew.

    **A loss or gradient that is NaN or infinite** never reaches the parameters or the state. The line search takes such
    a trial for one that went too far, and tries half the way. If no trial was any good, and without a line search, the
    step ends with the parameters of the last point that was, and the history begins anew. A step without a line search
    does not evaluate where its last iteration has led to; if the next step finds the loss there not to be finite, and
    the parameters are still the same, it goes back to the point before, too. An exception in the closure leaves the
    parameters at the last good point as well.

    Args:
        params: Parameters, named parameters, or parameter groups; any shape and strides. float32, float64, bfloat16,
            float16 and their complex kinds on the CPU are stepped by the kernels; if there is any other, torch's own
            code makes the step. A sparse gradient counts as a dense one, a missing one as zeros.
        lr: Learning rate; a float, or a tensor of one element. The only argument in which groups may differ.
        max_iter: Iterations of a step, at most.
        max_eval: Evaluations of the closure in a step, beyond which no further iteration is begun; None for
            ``max_iter * 1.25``.
        tolerance_grad: A step ends when no element of the gradient is larger.
        tolerance_change: A step ends when an iteration changes the loss by less, no parameter by more, or the
            directional derivative is above its negative.
        history_size: Pairs kept, two vectors of the parameters' size each. Beside them a step needs some 7 more.
        line_search_fn: ``"strong_wolfe"`` or None.

    Raises:
        ValueError: A hyperparameter is out of range.

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
    ) -> None:
        given = {"lr": lr, "tolerance_grad": tolerance_grad, "tolerance_change": tolerance_change}
        # torch's constructor takes one group; the others are added to what it has made. What is no iterable it refuses
        # itself, after it has looked at lr.
        others: list[Any] = []
        with noted(lambda: check_hyperparameters("LBFGS", _TYPES, given)), module_refused("LBFGS", params):
            if isinstance(params, Iterable) and not isinstance(params, Tensor | dict):
                listed: list[Any] = list(params)
                several = bool(listed) and isinstance(listed[0], dict)
                params, others = (listed[:1], listed[1:]) if several else (listed, [])
            super().__init__(
                params, lr, max_iter, max_eval, tolerance_grad, tolerance_change, history_size, line_search_fn
            )
        check_hyperparameters("LBFGS", _TYPES, self.defaults)  # torch takes some with which no step can be made
        for group in others:
            self.add_param_group(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group; after the first step, the history begins anew.

        Raises:
            TypeError: One of its hyperparameters is not a number.
            ValueError: The group has another value than the first one for an argument other than ``lr``.
        """
        where = f"LBFGS: group {len(self.param_groups)}"
        group = param_group if isinstance(param_group, dict) else {}  # torch refuses others
        check_hyperparameters(where, _TYPES, group)
        with module_refused(where, group.get("params")):
            super().add_param_group(param_group)
        if len(self.param_groups) > 1:
            try:
                self._shared_options()
            except ValueError:
                self.param_groups.pop()
                raise
            for state in self.state.values():
                _forget(state)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # What torch's constructor sets, and its step needs.
        self._params = self.param_groups[0]["params"]
        self._numel_cache = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class or of torch's.

        As ``torch.optim.Optimizer.load_state_dict``, except that vectors keep the dtype they were saved with, where
        torch casts them to that of the first parameter.
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
        run = _Run(self._native, groups, weights, closure)

        if not any(groups):
            return run.evaluate()

        state = self.state[_first_of(self.param_groups)]
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
        # Made when it is first needed, and never pickled or copied: it caches what the state holds.
        native: _core.Lbfgs | None = self.__dict__.get("_cached_native")
        if native is None:
            native = self.__dict__["_cached_native"] = _core.Lbfgs()
        return native

    @property
    def _unproven(self) -> Tensor | None:
        """Where the parameters were before a last move that has not been evaluated."""
        x: Tensor | None = self.__dict__.get("_cached_unproven")
        return x

    @_unproven.setter
    def _unproven(self, x: Tensor | None) -> None:
        self.__dict__["_cached_unproven"] = x

    def _shared_options(self) -> dict[str, Any]:
        first = self.param_groups[0]
        for index, group in enumerate(self.param_groups[1:], 1):
            for name in _SHARED:
                if group[name] != first[name]:
                    raise ValueError(
                        f"LBFGS: all parameter groups must have the same {name}, "
                        f"but group {index} has {group[name]!r}, and group 0 {first[name]!r}"
                    )
        if first["line_search_fn"] not in (None, "strong_wolfe"):
            raise RuntimeError("only 'strong_wolfe' is supported")
        return {name: first[name] for name in _SHARED}

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
        """Iterates from a point that is finite and not optimal.

        At any time the state is one from which a step can go on: it is that of the last good point.
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
                    state["ro"] = [*state["ro"], torch.tensor(ro, dtype=point.gradient.dtype)][-history_size:]
                    state["H_diag"] = torch.tensor(h_diag, dtype=point.gradient.dtype)
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
                else:  # in a stochastic setting the next step evaluates another function
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
            als = torch.tensor(alpha, dtype=point.gradient.dtype).unbind()
            state["al"] = [*als, *[None] * (history_size - len(als))]

    def _go_back(self, run: _Run, state: dict[str, Any], x: Tensor) -> None:
        """Undoes the last step's last move, to a point whose loss has now been found not to be finite.

        Unless something else has been written to the parameters since.
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
        """Group, index, path and reason of every parameter, as :func:`onepass.explain` tells them."""
        groups = [list(group["params"]) for group in self.param_groups]
        places = [(g, i) for g, params in enumerate(groups) for i in range(len(params))]
        try:
            self._shared_options()
            refused = {(g, i): why for g, i, why in self._native.refusals(groups)}
        except (ValueError, RuntimeError) as error:
            return [(g, i, "error", str(error)) for g, i in places]
        if not refused:
            return [(g, i, "kernel", "") for g, i in places]
        path = "torch" if len(groups) == 1 else "error"
        first = next(iter(refused.values()))
        return [(g, i, path, refused.get((g, i), f"beside a parameter with {first}")) for g, i in places]


def _first_of(param_groups: list[dict[str, Any]]) -> Any:
    """The first parameter, which has the state of all."""
    return next((p for group in param_groups for p in group["params"]), None)


def _forget(state: dict[str, Any]) -> None:
    """Makes the history begin anew, also for torch, which takes n_iter for the sign of it."""
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
