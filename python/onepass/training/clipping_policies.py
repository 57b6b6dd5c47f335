"""Clipping policies: objects that choose the factor of each step's gradients from the history of gradient norms."""

from __future__ import annotations

import math
import sys
from array import array
from collections import deque
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal, Protocol, get_args, runtime_checkable

from torch import Tensor

from ..optimizers.arguments import check_number, described, number, whole_at_least
from .sorted_values import SortedValues

Mode = Literal["reciprocal", "mean", "max"]


@runtime_checkable
class ClippingPolicy(Protocol):
    """The protocol of objects that an optimizer accepts as ``max_norm=`` instead of a number.

    In each step the optimizer measures the norm of all gradients, calls :meth:`coefficient` once, and multiplies the
    gradients by the result. The optimizer's ``state_dict`` contains the policy's. In distributed training every process
    has its own policy, and all policies receive the same norms.

    Any class with these three methods is a policy; it need not derive from this one. :class:`ZClip`,
    :class:`AutoClip` and :class:`SkipSpikes` are policies.

    Example:
        >>> class HalveLarge:
        ...     def coefficient(self, norm):
        ...         return 0.5 if norm > 1.0 else 1.0
        ...
        ...     def state_dict(self):
        ...         return {}
        ...
        ...     def load_state_dict(self, state_dict):
        ...         pass
        >>> isinstance(HalveLarge(), onepass.ClippingPolicy)
        True
    """

    def coefficient(self, norm: float) -> float:
        """Return the factor of the gradients in this step, and update the policy's statistics.

        Args:
            norm: Norm of all gradients in this step, after unscaling. It may be NaN or infinite. Such a norm must not
                enter the statistics.

        Returns:
            A finite number >= 0; one above 1 makes the gradients larger. 0.0 skips the step. A skipped step changes no
            parameter, state or step count.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics as numbers, strings, lists and dicts, which ``torch.load`` reads by default."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the statistics that :meth:`state_dict` has returned.

        Raises:
            ValueError: The statistics are not those of such a policy; nothing has been loaded.
        """
        ...


class _Policy:
    """The base of the three policies: norms that are not finite change nothing; the form of a ``state_dict``."""

    _name: ClassVar[str]
    _arguments: ClassVar[tuple[str, ...]]  # of the constructor
    _keys: ClassVar[tuple[str, ...]]  # of the state_dict, apart from "policy"

    def coefficient(self, norm: float) -> float:
        """Return the factor of the gradients in this step (:meth:`ClippingPolicy.coefficient`)."""
        norm = float(norm)
        return self._coefficient(norm) if 0.0 <= norm < math.inf else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return the statistics (:meth:`ClippingPolicy.state_dict`). The constructor's arguments are not part of it."""
        return {"policy": self._name, **self._state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load the statistics of a policy of the same class. The constructor's arguments are kept.

        Raises:
            TypeError: ``state_dict`` is not a mapping.
            ValueError: ``state_dict`` is that of another class or is not complete; nothing has been loaded.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"{self._name}: state_dict must be a mapping, got {described(state_dict)}")
        if state_dict.get("policy") != self._name:
            raise ValueError(
                f"{self._name}: state_dict['policy'] must be {self._name!r}, got {state_dict.get('policy')!r}"
            )
        if missing := [key for key in self._keys if key not in state_dict]:
            raise ValueError(f"{self._name}: state_dict must have the keys {list(self._keys)}, but lacks {missing}")
        self._load(state_dict)

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._arguments)
        return f"{type(self).__name__}({arguments})"

    def _coefficient(self, norm: float) -> float:
        raise NotImplementedError

    def _state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load(self, state: Mapping[str, Any]) -> None:
        raise NotImplementedError

    def _number(self, name: str, value: float | Tensor) -> float:
        check_number(f"{self._name}: {name}", value)
        return number(value)

    def _positive(self, name: str, value: float | Tensor) -> float:
        found = self._number(name, value)
        if not 0.0 < found < math.inf:
            raise ValueError(f"{self._name}: {name} must be finite and > 0, got {found}")
        return found

    def _norms_of(self, state: Mapping[str, Any], key: str) -> array[float]:
        """Return a list of norms from a ``state_dict``, checked."""
        found = state[key]
        if not isinstance(found, list | tuple) or not all(_is_norm(each) for each in found):
            raise ValueError(
                f"{self._name}: state_dict[{key!r}] must be a list of finite numbers >= 0, got {described(found)}"
            )
        return array("d", found)


def _is_norm(value: object) -> bool:
    return isinstance(value, int | float) and 0.0 <= value < math.inf


def _clip_coefficient(max_norm: float, norm: float) -> float:
    """Return the coefficient of ``torch.nn.utils.clip_grad_norm_``; not 0, also where the quotient underflows."""
    return min(1.0, max(max_norm / (norm + 1e-6), sys.float_info.min))


def _mean_and_std(norms: Collection[float], fewer: int) -> tuple[float, float]:
    """Return the mean, and the standard deviation with the divisor ``len(norms) - fewer``.

    Of equal norms, these are exactly that norm and 0: a rounded mean is moved into the range of the norms.
    """
    count, total = len(norms), sum(norms)
    if total == math.inf:  # only then can the distance below overflow, too
        mean, std = _mean_and_std([norm * 2.0**-64 for norm in norms], fewer)
        return mean * 2.0**64, std * 2.0**64
    mean = min(max(total / count, min(norms)), max(norms))
    return mean, math.dist(tuple(norms), (mean,) * count) / math.sqrt(count - fewer)


class ZClip(_Policy):
    r"""Clip norms that are far above their moving average, in units of the standard deviation.

    The first :math:`N` norms (``warmup_steps``) initialize the mean :math:`\mu` and the variance :math:`\sigma^2` (with
    the divisor :math:`N`). Then, for each norm :math:`g_t`,

    .. math::
        z_t &= (g_t - \mu_{t-1}) / (\sigma_{t-1} + \epsilon) \\
        g_t^* &= \mu_{t-1} + \xi(z_t)\, \sigma_{t-1} \text{ if } z_t > z_\text{thres}, \text{ else } g_t \\
        \mu_t &= \alpha \mu_{t-1} + (1 - \alpha) g_t^* \\
        \sigma_t^2 &= \alpha \sigma_{t-1}^2 + (1 - \alpha) (g_t^* - \mu_t)^2

    The coefficient is 1 if :math:`g_t^* = g_t`, else :math:`\min(1, g_t^* / (g_t + 10^{-6}))`.

    A norm that is NaN or infinite has the coefficient 1 and changes nothing; it does not count as a warm-up step. As
    long as :math:`\sigma = 0` (all norms were equal), no norm is clipped: the formula would clip all later norms to
    their mean, and a mean of 0 would stop training.

    With ``mode="reciprocal"`` and ``"mean"``, norms that rise suddenly and stay high are clipped to about the old mean
    for as long as they stay high, because the statistics contain only the clipped norms. ``mode="max"`` follows such a
    rise.

    The authors' implementation (github.com/bluorion-com/ZClip) has other names and defaults: ``mode="zscore"`` with
    ``clip_option="adaptive_scaling"`` is ``mode="reciprocal"`` here, ``clip_option="mean"`` is ``mode="mean"``,
    ``mode="percentile"`` is ``mode="max"``, and ``max_grad_norm`` is ``max_norm``. It differs from the paper: it also
    clips every norm to ``max_grad_norm=1.0`` by default, and after one NaN its mean remains NaN, so that it finds no
    further spike.

    Source: Kumar et al. 2025, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", arXiv:2504.02507.

    Args:
        alpha: Decay rate :math:`\alpha` of mean and variance, in [0, 1).
        z_thresh: Threshold :math:`z_\text{thres}`, > 0.
        warmup_steps: Number :math:`N` of norms that initialize mean and variance, at least 1. In these steps only
            ``max_norm`` clips.
        mode: ``"reciprocal"``: :math:`\xi(z) = z_\text{thres}^2 / z`. ``"mean"``: :math:`\xi(z) = 0`. ``"max"``:
            :math:`\xi(z) = z_\text{thres}`.
        max_norm: Upper bound of the clipped norm, > 0, in all steps; None for no bound. It does not affect the
            statistics.
        eps: :math:`\epsilon`, added to the standard deviation, at least 0. Norms that are not much larger than this are
            never spikes.

    Raises:
        TypeError: An argument is not a number, or ``warmup_steps`` is not an integer.
        ValueError: An argument is out of range.

    Example:
        >>> policy = onepass.ZClip(warmup_steps=4)
        >>> [policy.coefficient(norm) for norm in (1.0, 1.2, 0.8, 1.0)]
        [1.0, 1.0, 1.0, 1.0]
        >>> round(policy.coefficient(10.0), 3)  # a spike
        0.101
        >>> policy.coefficient(1.1)
        1.0
    """

    _name = "ZClip"
    _arguments = ("alpha", "z_thresh", "warmup_steps", "mode", "max_norm", "eps")
    _keys = ("warmup_norms", "mean", "std")

    def __init__(
        self,
        alpha: float = 0.97,
        z_thresh: float = 2.5,
        warmup_steps: int = 25,
        mode: Mode = "reciprocal",
        max_norm: float | None = None,
        eps: float = 1e-6,
    ) -> None:
        self.alpha = self._number("alpha", alpha)
        if not 0.0 <= self.alpha < 1.0:
            raise ValueError(f"ZClip: alpha must be in [0, 1), got {self.alpha}")
        self.z_thresh = self._positive("z_thresh", z_thresh)
        self.warmup_steps = whole_at_least("ZClip: warmup_steps", warmup_steps, 1)
        if mode not in get_args(Mode):
            raise ValueError(f"ZClip: mode must be one of {get_args(Mode)}, got {mode!r}")
        self.mode: Mode = mode
        self.max_norm = None if max_norm is None else self._positive("max_norm", max_norm)
        self.eps = self._number("eps", eps)
        if not 0.0 <= self.eps < math.inf:
            raise ValueError(f"ZClip: eps must be finite and >= 0, got {self.eps}")
        self._warmup_norms = array("d")  # empty after the warm-up
        self._mean: float | None = None  # None during the warm-up
        self._std = 0.0

    def _coefficient(self, norm: float) -> float:
        coefficient = 1.0
        if self._mean is None:
            self._warmup_norms.append(norm)
            if len(self._warmup_norms) >= self.warmup_steps:
                self._mean, self._std = _mean_and_std(self._warmup_norms, 0)
                self._warmup_norms = array("d")
        else:
            clipped = self._clipped(norm, self._mean)
            if clipped != norm:
                coefficient = _clip_coefficient(clipped, norm)
            mean = clipped - self.alpha * (clipped - self._mean)  # exact where both are equal
            deviation = clipped - mean
            std = math.hypot(math.sqrt(self.alpha) * self._std, math.sqrt(1.0 - self.alpha) * deviation)
            self._mean, self._std = mean, std
        if self.max_norm is not None:
            coefficient = min(coefficient, _clip_coefficient(self.max_norm, norm))
        return coefficient

    def _clipped(self, norm: float, mean: float) -> float:
        if self._std == 0.0 or (z := (norm - mean) / (self._std + self.eps)) <= self.z_thresh:
            return norm
        if self.mode == "mean":
            return mean
        adjusted = self.z_thresh if self.mode == "max" else self.z_thresh / z * self.z_thresh
        return mean + adjusted * self._std

    def _state(self) -> dict[str, Any]:
        return {"warmup_norms": self._warmup_norms.tolist(), "mean": self._mean, "std": self._std}

    def _load(self, state: Mapping[str, Any]) -> None:
        warmup_norms, mean, std = self._norms_of(state, "warmup_norms"), state["mean"], state["std"]
        if mean is not None and not _is_norm(mean):
            raise ValueError(f"ZClip: state_dict['mean'] must be None or a finite number >= 0, got {described(mean)}")
        if not _is_norm(std):
            raise ValueError(f"ZClip: state_dict['std'] must be a finite number >= 0, got {described(std)}")
        self._warmup_norms, self._std = warmup_norms, float(std)
        self._mean = None if mean is None else float(mean)


class AutoClip(_Policy):
    r"""Clip each norm to a percentile of the history of norms.

    With the norm :math:`g_t` of step :math:`t` and the history :math:`G_t = (g_1, \dots, g_t)`,

    .. math::
        c_t = \min\left(1, \frac{\operatorname{percentile}_p(G_t)}{g_t + 10^{-6}}\right)

    The history contains the norms before clipping, including that of this step. The percentile is interpolated
    linearly, as by ``numpy.percentile``. By default the history is that of the whole run, and takes 16 bytes per step.
    With a million norms, a step takes about 10 us.

    A norm that is NaN or infinite has the coefficient 1 and does not enter the history. Neither does a norm of 0: if a
    tenth of the norms were 0, the threshold would be 0.

    The authors' first implementation (autoclip.py of github.com/pseeth/autoclip) is the algorithm of the paper, and one
    NaN in its history makes all later gradients NaN. Their package ``autoclip`` differs from the paper: it clips each
    parameter by its own norm, to the 90th percentile of its last 1000 norms, without that of the current step.

    Source: Seetharaman et al. 2020, "AutoClip: Adaptive Gradient Clipping for Source Separation Networks",
    arXiv:2007.14469.

    Args:
        percentile: :math:`p`, in [0, 100].
        history: Number of last norms from which the percentile is computed, at least 1; None for all.

    Raises:
        TypeError: An argument is not a number, or ``history`` is not an integer.
        ValueError: An argument is out of range.

    Example:
        >>> policy = onepass.AutoClip(percentile=50.0)
        >>> [round(policy.coefficient(norm), 3) for norm in (1.0, 3.0, 2.0)]  # medians 1, 2 and 2
        [1.0, 0.667, 1.0]
    """

    _name = "AutoClip"
    _arguments = ("percentile", "history")
    _keys = ("norms",)

    def __init__(self, percentile: float = 10.0, history: int | None = None) -> None:
        self.percentile = self._number("percentile", percentile)
        if not 0.0 <= self.percentile <= 100.0:
            raise ValueError(f"AutoClip: percentile must be in [0, 100], got {self.percentile}")
        self.history = None if history is None else whole_at_least("AutoClip: history", history, 1)
        self._set(array("d"))

    def _set(self, norms: array[float]) -> None:
        self._norms = norms if self.history is None else norms[-self.history :]  # in order of arrival
        self._begin = 0  # the norms before this index have left the history
        self._sorted = SortedValues(self._norms)

    def _coefficient(self, norm: float) -> float:
        if norm == 0.0:
            return 1.0
        if len(self._sorted) != len(self._norms) - self._begin:  # an exception has interrupted the last call
            self._set(self._norms[self._begin :])
        self._norms.append(norm)
        self._sorted.add(norm)
        while self.history is not None and len(self._sorted) > self.history:  # twice after an interruption
            self._sorted.remove(self._norms[self._begin])
            self._begin += 1
            if self._begin > self.history:  # seldom, because it moves all norms
                self._norms, self._begin = self._norms[self._begin :], 0
        return _clip_coefficient(self._sorted.percentile(self.percentile), norm)

    def _state(self) -> dict[str, Any]:
        return {"norms": self._norms[self._begin :].tolist()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._set(self._norms_of(state, "norms"))

    # A pickle names no private class: the sorted values are made again.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_sorted": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._sorted = SortedValues(self._norms[self._begin :])


class SkipSpikes(_Policy):
    r"""Skip a step whose norm is far above the mean of the last norms, in units of their standard deviation.

    With the mean :math:`\mu` and the standard deviation :math:`\sigma` of the last :math:`n` norms before step
    :math:`t` (with the divisor :math:`n - 1`), the coefficient is

    .. math::
        c_t = \begin{cases}
            0 & \text{if } g_t > \mu + k \sigma \\
            \min\left(1, \text{max\_norm} / (g_t + 10^{-6})\right) & \text{otherwise}
        \end{cases}

    or 1 instead of the second line if ``max_norm`` is None. The step is skipped if the coefficient is 0: parameters,
    states and step counts are not changed.

    No step is skipped before there are :math:`n / 2 - 1` norms (63 by default), and at least 2. The norms of skipped
    steps enter the history, so that only a few steps are skipped if norms rise and stay high. A norm that is NaN or
    infinite has the coefficient 1 and does not enter the history; ``skip_nonfinite=True`` skips its step.

    Source: ``SkipStepOptimizer`` of OLMo-core (github.com/allenai/OLMo-core), which also applies this rule to the loss.
    There, after one NaN all steps are skipped until it has left the history.

    Args:
        sigma: :math:`k`, > 0.
        window: Number :math:`n` of norms, at least 2.
        max_norm: Number to which the norms of the other steps are clipped, > 0; None: they are not clipped.

    Raises:
        TypeError: An argument is not a number, or ``window`` is not an integer.
        ValueError: An argument is out of range.

    Example:
        >>> policy = onepass.SkipSpikes(window=4, max_norm=1.0)
        >>> [policy.coefficient(norm) for norm in (0.5, 0.7, 0.6, 0.8)]
        [1.0, 1.0, 1.0, 1.0]
        >>> policy.coefficient(5.0)  # a spike
        0.0
        >>> round(policy.coefficient(2.0), 3)  # clipped
        0.5
    """

    _name = "SkipSpikes"
    _arguments = ("sigma", "window", "max_norm")
    _keys = ("norms",)

    def __init__(self, sigma: float = 6.0, window: int = 128, max_norm: float | None = None) -> None:
        self.sigma = self._positive("sigma", sigma)
        self.window = whole_at_least("SkipSpikes: window", window, 2)
        self.max_norm = None if max_norm is None else self._positive("max_norm", max_norm)
        self._norms: deque[float] = deque(maxlen=self.window)

    def _coefficient(self, norm: float) -> float:
        is_spike = False
        if len(self._norms) >= max(2, self.window // 2 - 1):
            mean, std = _mean_and_std(self._norms, 1)
            is_spike = norm > mean + self.sigma * std
        self._norms.append(norm)
        if is_spike:
            return 0.0
        return 1.0 if self.max_norm is None else _clip_coefficient(self.max_norm, norm)

    def _state(self) -> dict[str, Any]:
        return {"norms": list(self._norms)}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._norms = deque(self._norms_of(state, "norms"), self.window)
