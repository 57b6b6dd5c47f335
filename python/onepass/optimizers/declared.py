"""The constructors of optimizers that torch does not have: their arguments, defaults and checks.

They take the place of torch's classes among the bases of onepass's, which add their own arguments and the step.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from .arguments import HyperTypes, check_hyperparameters, check_number, hyper_types, number, whole_at_least

PRODIGY_ESTIMATE = ("d", "d_max")  # keys that all of Prodigy's groups have alike

CAME_TYPES: HyperTypes = {
    "lr": False,
    "eps": (False, False),
    "clip_threshold": False,
    "betas": (False, False, False),
    "weight_decay": False,
}

_WORDS = {"lr": "learning rate", "eps": "epsilon value"}  # torch's, for messages


class Declared(Optimizer):
    """An optimizer that torch does not have. A subclass declares its arguments."""

    def _declare(self, rule: "str | HyperTypes", params: ParamsT, **defaults: Any) -> None:
        """Check the hyperparameters of a rule, or of these types, and construct the optimizer with these defaults.

        Raises:
            TypeError: A hyperparameter is not a number, or not a sequence of numbers.
            ValueError: A hyperparameter is negative or, if it is a decay rate, not below 1.
        """
        if isinstance(defaults["lr"], Tensor) and defaults["lr"].numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        known = hyper_types(rule) if isinstance(rule, str) else rule
        types = {name: optional for name, optional in known.items() if name in defaults}
        check_hyperparameters(type(self).__name__, types, defaults)
        for name in types:
            value = defaults[name]
            if name == "betas":
                for index, beta in enumerate(value):
                    if not 0.0 <= beta < 1.0:
                        raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
            elif name == "eps" and isinstance(types[name], tuple):
                for index, eps in enumerate(value):
                    if not eps >= 0.0:
                        raise ValueError(f"Invalid epsilon value at index {index}: {eps}")
            elif isinstance(value, bool) or value is None:
                continue
            elif not value >= 0.0 or (name == "momentum" and not value < 1.0):
                raise ValueError(f"Invalid {_WORDS.get(name, f'{name} value')}: {value}")
        super().__init__(params, defaults)


def _check_interpolation(what: str, momentum: float) -> None:
    """Check Schedule-Free's momentum: with 0, the mean would not follow from the points that are stored."""
    if momentum == 0:
        raise ValueError(f"Invalid {what}: {momentum}; it must be above 0")


class AdaBelief(Declared):
    """The arguments of AdaBelief."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        self._declare(
            "adabelief",
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            capturable=capturable,
        )


class Adan(Declared):
    """The arguments of Adan."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        no_prox: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        self._declare(
            "adan",
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            no_prox=no_prox,
            maximize=maximize,
            capturable=capturable,
        )


class AdEMAMix(Declared):
    """The arguments of AdEMAMix."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        beta3_warmup: float | None = None,
        alpha_warmup: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        self._declare(
            "ademamix",
            params,
            lr=lr,
            betas=betas,
            alpha=alpha,
            beta3_warmup=beta3_warmup,
            alpha_warmup=alpha_warmup,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            capturable=capturable,
        )


class ADOPT(Declared):
    """The arguments of ADOPT."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        clip_exponent: float | None = 0.25,
        decoupled_weight_decay: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        self._declare(
            "adopt",
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            clip_exponent=clip_exponent,
            decoupled_weight_decay=decoupled_weight_decay,
            maximize=maximize,
            capturable=capturable,
        )


class CAME(Declared):
    """The arguments of CAME."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-4,
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        check_number("CAME: clip_threshold", clip_threshold)
        if not clip_threshold > 0.0:
            raise ValueError(f"Invalid clip_threshold value: {clip_threshold}")
        self._declare(
            CAME_TYPES,
            params,
            lr=lr,
            eps=eps,
            clip_threshold=clip_threshold,
            betas=betas,
            weight_decay=weight_decay,
            maximize=maximize,
        )


class LAMB(Declared):
    """The arguments of LAMB."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        trust_ratio: bool = True,
        trust_clip: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        self._declare(
            "lamb",
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            trust_ratio=trust_ratio,
            trust_clip=trust_clip,
            maximize=maximize,
            capturable=capturable,
        )


class LaProp(Declared):
    """The arguments of LaProp."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 4e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        self._declare(
            "laprop",
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            capturable=capturable,
        )


class LARS(Declared):
    """The arguments of LARS."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        nesterov: bool = False,
        trust_ratio: bool = True,
        *,
        maximize: bool = False,
    ) -> None:
        self._declare(
            "lars",
            params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            trust_coefficient=trust_coefficient,
            eps=eps,
            nesterov=nesterov,
            trust_ratio=trust_ratio,
            maximize=maximize,
        )


class Lion(Declared):
    """The arguments of Lion."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        self._declare("lion", params, lr=lr, betas=betas, weight_decay=weight_decay, maximize=maximize)


class MARS(Declared):
    """The arguments of MARS."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        gamma: float = 0.025,
        clip_correction: bool = True,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        self._declare(
            "mars",
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            gamma=gamma,
            clip_correction=clip_correction,
            maximize=maximize,
            capturable=capturable,
        )


def check_adjust_lr_fn(where: str, name: object) -> None:
    """Raise ValueError if NorMuon has no such ``adjust_lr_fn``. The message begins with ``where``."""
    if name not in (None, "original", "match_rms_adamw"):
        raise ValueError(f'{where}: adjust_lr_fn must be "original", "match_rms_adamw" or None, got {name!r}')


class NorMuon(Declared):
    """The arguments of NorMuon."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        beta2: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
    ) -> None:
        check_number("NorMuon: beta2", beta2)
        if not 0.0 <= beta2 < 1.0:
            raise ValueError(f"Invalid beta2 value: {beta2}")
        check_adjust_lr_fn("NorMuon", adjust_lr_fn)
        self._declare(
            "muon_momentum",
            params,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            beta2=beta2,
            nesterov=nesterov,
            ns_coefficients=ns_coefficients,
            eps=eps,
            ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )


class NovoGrad(Declared):
    """The arguments of NovoGrad."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        grad_averaging: bool = False,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        self._declare(
            "novograd",
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            grad_averaging=grad_averaging,
            maximize=maximize,
            capturable=capturable,
        )


def check_estimate(where: str, group: Mapping[str, Any]) -> None:
    """Check those hyperparameters of Prodigy's estimate that a group has.

    Raises:
        TypeError: A value is not a number. The message begins with ``where``.
        ValueError: A value is out of range.
    """
    ranges: dict[str, tuple[str, Callable[[float], bool]]] = {
        "d_coef": ("above 0 and finite", lambda value: 0.0 < value < math.inf),
        "growth_rate": (">= 1", lambda value: value >= 1.0),
        "d_max": (">= 0", lambda value: value >= 0.0),
    }
    for name, (wanted, is_valid) in ranges.items():
        if name in group:
            check_number(f"{where}: {name}", group[name])
            if not is_valid(value := number(group[name])):
                raise ValueError(f"{where}: {name} must be {wanted}, got {value}")


class Prodigy(Declared):
    """The arguments of Prodigy."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        d_coef: float = 1.0,
        growth_rate: float = math.inf,
        slice_p: int = 1,
        *,
        maximize: bool = False,
    ) -> None:
        for name, value in {"beta3": 0.0 if beta3 is None else beta3, "d0": d0}.items():
            check_number(f"Prodigy: {name}", value)
        slice_p = whole_at_least("Prodigy: slice_p", slice_p, 1)
        if beta3 is not None and not beta3 < 1.0:
            raise ValueError(f"Invalid beta3 value: {beta3}")
        if not 0.0 < d0 < math.inf:
            raise ValueError(f"Invalid d0 value: {d0}")
        check_estimate("Prodigy", {"d_coef": d_coef, "growth_rate": growth_rate})
        self._declare(
            "prodigy",
            params,
            lr=lr,
            betas=betas,
            beta3=beta3,
            eps=eps,
            weight_decay=weight_decay,
            decouple=decouple,
            use_bias_correction=use_bias_correction,
            safeguard_warmup=safeguard_warmup,
            d=d0,
            d0=d0,
            d_max=d0,
            d_coef=d_coef,
            growth_rate=growth_rate,
            slice_p=slice_p,
            maximize=maximize,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as torch does. It takes the estimate of the others; the first has its own ``d0``."""
        given = set(param_group) if isinstance(param_group, dict) else set()
        super().add_param_group(param_group)
        first, added = self.param_groups[0], self.param_groups[-1]
        for name in PRODIGY_ESTIMATE:
            if name not in given:
                added[name] = added["d0"] if added is first else first[name]


class ScheduleFreeAdamW(Declared):
    """The arguments of ScheduleFreeAdamW."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        self._declare(
            "schedule_free_adamw",
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            r=r,
            weight_lr_power=weight_lr_power,
            train_mode=True,
            maximize=maximize,
            capturable=capturable,
        )
        _check_interpolation("beta parameter at index 0", betas[0])


class ScheduleFreeRAdam(Declared):
    """The arguments of ScheduleFreeRAdam."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2.5e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        silent_sgd_phase: bool = True,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        self._declare(
            "schedule_free_radam",
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            r=r,
            weight_lr_power=weight_lr_power,
            silent_sgd_phase=silent_sgd_phase,
            train_mode=True,
            maximize=maximize,
            capturable=capturable,
        )
        _check_interpolation("beta parameter at index 0", betas[0])


class ScheduleFreeSGD(Declared):
    """The arguments of ScheduleFreeSGD."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        self._declare(
            "schedule_free_sgd",
            params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            warmup_steps=warmup_steps,
            r=r,
            weight_lr_power=weight_lr_power,
            train_mode=True,
            maximize=maximize,
            capturable=capturable,
        )
        _check_interpolation("momentum value", momentum)


class Signum(Declared):
    """The arguments of Signum."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ) -> None:
        self._declare("signum", params, lr=lr, momentum=momentum, weight_decay=weight_decay, maximize=maximize)


class StableAdamW(Declared):
    """The arguments of StableAdamW."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        self._declare(
            "stable_adamw",
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            maximize=maximize,
            capturable=capturable,
        )
