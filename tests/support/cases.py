"""The table of cases: one row for each optimizer. What is tested for one is tested for all.

To add an optimizer, write its formula in reference.py and a row here; hyperparameters of a new name get a strategy in
numerics/test_fuzz.py, values to change to in contract/test_hyper.py and to refuse in contract/test_errors.py. For a
class that torch does not have, MESSAGES there also needs its messages.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import onepass
import pytest
import reference
import torch
from onepass.optimizers.base import Native
from onepass.optimizers.muon import Orthogonalizing
from onepass.optimizers.prodigy import adapt
from torch import Tensor
from torch.optim import Optimizer


def plain(ours: type[Optimizer], after: Callable[[Optimizer], None] | None = None) -> type[Optimizer]:
    """A class in torch's operations, for want of one in torch: ours without its kernels.

    ``after``: what a step does after the updates of all parameters.
    """
    declared = ours.__mro__[ours.__mro__.index(Native) + 1]

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ours.torch_step(self)
        if after:
            after(self)
        return loss

    return type(f"Plain{ours.__name__}", (declared,), {"step": step, "__module__": __name__})


PlainAdaBelief = plain(onepass.AdaBelief)
PlainAdan = plain(onepass.Adan)
PlainAdEMAMix = plain(onepass.AdEMAMix)
PlainADOPT = plain(onepass.ADOPT)
PlainCAME = plain(onepass.CAME)
PlainLAMB = plain(onepass.LAMB)
PlainLARS = plain(onepass.LARS)
PlainLaProp = plain(onepass.LaProp)
PlainLion = plain(onepass.Lion)
PlainMARS = plain(onepass.MARS)
PlainNorMuon = plain(onepass.NorMuon)
PlainNovoGrad = plain(onepass.NovoGrad)
PlainProdigy = plain(onepass.Prodigy, adapt)
PlainScheduleFreeAdamW = plain(onepass.ScheduleFreeAdamW)
PlainScheduleFreeRAdam = plain(onepass.ScheduleFreeRAdam)
PlainScheduleFreeSGD = plain(onepass.ScheduleFreeSGD)
PlainSignum = plain(onepass.Signum)
PlainStableAdamW = plain(onepass.StableAdamW)

# The arguments of every onepass class but LBFGS, and their defaults.
OWN = {
    "state_dtype": None,
    "master": None,
    "max_norm": None,
    "norm_type": 2.0,
    "clip_value": None,
    "skip_nonfinite": False,
    "average": None,
    "copy_to": None,
    "zero_grad": False,
    "stochastic_rounding": False,
    "rounding_seed": None,
    "cautious": False,
    "cautious_weight_decay": False,
}

SHAPES = ((), (5,), (4, 3), (2, 0), (2, 3, 4, 5))


@dataclass(frozen=True, kw_only=True, eq=False)
class Row:
    """An optimizer, and all that the tests need to know of it."""

    ours: type[Optimizer]
    theirs: type[Optimizer]  # torch's class; a plain one above where torch has none
    flavours: tuple[dict[str, Any], ...] = ({"foreach": False}, {"foreach": True})  # of torch's code
    # Of one element, in reference.py. A class whose elements depend on each other has none: its numbers have tests of
    # their own, and of those here it is in the ones for each class.
    formula: Callable | None = None
    doubt: Callable | None = None  # where the formula jumps, which elements may fall on either side
    states: tuple[str, ...]  # all that it can have of one number for each element
    scalars: tuple[str, ...] = ("step",)  # states of one number for each parameter
    first: Callable = lambda **_: {}  # hyperparameters -> what states begin with where that is not zero
    copies: tuple[str, ...] = ()  # states that begin as the parameter; all are then float32 for 16-bit parameters
    sums: bool = False  # whether a step depends on sums over the whole tensor
    eager: bool = False  # whether the states are there from the beginning, not from the first gradient on
    sparse: str = "neither"  # who takes sparse gradients: "both" ours and torch's, "ours" alone, or "neither"
    wants_sparse: bool = False  # whether it takes no others
    wants_closure: bool = False
    shapes: tuple[tuple[int, ...], ...] = SHAPES  # of parameters that it takes
    own: dict[str, Any] = field(default_factory=lambda: dict(OWN))  # arguments that torch's class has not
    full: dict[str, Any]  # keyword arguments with which it uses all states and terms, and learns
    # Name -> keyword arguments; with a formula, every flag and argument of torch's occurs.
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    own_variants: dict[str, dict[str, Any]] = field(default_factory=dict)  # and with arguments that torch has not

    @property
    def name(self) -> str:
        return self.ours.__name__

    __name__ = name  # by which pytest calls the tests of a table

    def new_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of the new states of a parameter of this dtype."""
        return torch.float32 if self.copies and dtype.itemsize == 2 else dtype

    @property
    def counts_steps(self) -> bool:
        return "step" in self.scalars

    @property
    def held(self) -> tuple[str, ...]:
        """What the formula reads and writes beside the parameter."""
        return tuple(name for name in (*self.scalars, *self.states) if name != "step")

    @property
    def arguments(self) -> list[str]:
        return list(inspect.signature(self.theirs).parameters)[1:]

    def takes(self, kwargs: Iterable[str]) -> bool:
        """Whether it has all of these arguments."""
        return {*kwargs} <= {*self.arguments}

    @property
    def has_means(self) -> bool:
        """Whether its second moments are means over rows and columns."""
        return self.ours in (onepass.Adafactor, onepass.CAME)

    @property
    def takes_matrices(self) -> bool:
        """Whether it steps matrices alone, and orthogonalizes their updates, in bfloat16."""
        return issubclass(self.ours, Orthogonalizing)

    @property
    def has_pairs(self) -> bool:
        """Whether its betas, if it has any, are two."""
        betas = inspect.signature(self.theirs).parameters.get("betas")
        return betas is None or len(betas.default) == 2

    def having(self, **kwargs: Any) -> dict[str, Any]:
        """Those of these arguments that it has."""
        return {name: value for name, value in kwargs.items() if name in self.arguments}

    @property
    def undecayed(self) -> dict[str, Any]:
        """`full`, but for what pulls at a parameter without a gradient: with these it stays."""
        return {**self.full, **self.having(weight_decay=0.0, lambd=0.0)}

    def flavours_for(self, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Those that accept these arguments: foreach takes no tensors."""
        values = [v[0] if isinstance(v, tuple) else v for v in kwargs.values()]
        tensors = any(isinstance(v, Tensor) for v in values)
        return (flavour for flavour in self.flavours if not (tensors and flavour.get("foreach")))


FUSED_TOO = ({"foreach": False}, {"foreach": True}, {"fused": True})

ADAM_VARIANTS = {
    "default": {},
    "lr": {"lr": 0.03},
    "no_lr": {"lr": 0.0, "weight_decay": 0.1},
    "betas": {"betas": (0.5, 0.75)},
    "zero_betas": {"betas": (0.0, 0.0)},
    "eps": {"eps": 0.1},
    "no_decay": {"weight_decay": 0.0},
    "weight_decay": {"lr": 0.01, "weight_decay": 0.3},
    "maximize": {"maximize": True, "weight_decay": 0.1},
    "amsgrad": {"amsgrad": True, "lr": 0.01},
    "amsgrad_maximize": {"amsgrad": True, "maximize": True, "weight_decay": 0.1, "betas": (0.8, 0.9)},
    "tensor_lr": {"lr": torch.tensor(0.01)},
    "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1, "amsgrad": True},
    "tensor_betas": {"betas": (torch.tensor(0.8), torch.tensor(0.95)), "lr": torch.tensor(0.01)},
}


def cautious_variants(decoupled: bool = True, **kwargs: Any) -> dict[str, dict[str, Any]]:
    """Variants with masks; those with "cautious" in their names depend on sums. ``kwargs`` include a weight decay."""
    found = {
        "cautious": {**kwargs, "cautious": True},
        "cautious_maximize": {**kwargs, "cautious": True, "maximize": True, "weight_decay": 0.0},
    }
    if decoupled:
        found["agreeing_decay"] = {**kwargs, "cautious_weight_decay": True}
        found["cautious_agreeing_decay"] = {**kwargs, "cautious": True, "cautious_weight_decay": True}
    return found


ROWS = [
    Row(
        ours=onepass.SGD,
        theirs=torch.optim.SGD,
        flavours=FUSED_TOO,
        formula=reference.cautious(reference.sgd, decoupled=False),
        states=("momentum_buffer",),
        scalars=(),
        sparse="both",
        full={"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.1},
            "weight_decay": {"lr": 0.01, "weight_decay": 0.3},
            "momentum": {"lr": 0.01, "momentum": 0.9},
            "momentum_decay": {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1},
            "dampening": {"lr": 0.01, "momentum": 0.8, "dampening": 0.4},
            "dampening_all": {"lr": 0.01, "momentum": 0.8, "dampening": 0.4, "weight_decay": 0.1, "maximize": True},
            "nesterov": {"lr": 0.01, "momentum": 0.9, "nesterov": True},
            "nesterov_all": {"lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "maximize": True},
            "maximize": {"lr": 0.01, "maximize": True},
            "tensor_lr": {"lr": torch.tensor(0.01), "momentum": 0.9},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64)},
            "tensor_weight_decay": {"lr": 0.01, "weight_decay": torch.tensor(0.1)},
        },
        own_variants=cautious_variants(decoupled=False, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    ),
    Row(
        ours=onepass.Adam,
        theirs=torch.optim.Adam,
        flavours=FUSED_TOO,
        formula=reference.cautious(reference.adam),
        states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        full={"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
        variants={
            **ADAM_VARIANTS,
            "decoupled": {"lr": 0.01, "weight_decay": 0.1, "decoupled_weight_decay": True},
            "decoupled_amsgrad_maximize": {
                "lr": 0.01,
                "weight_decay": 0.1,
                "decoupled_weight_decay": True,
                "amsgrad": True,
                "maximize": True,
            },
        },
        own_variants=cautious_variants(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)
        | {"cautious_coupled": {"lr": 0.01, "weight_decay": 0.1, "cautious": True}},
    ),
    Row(
        ours=onepass.AdamW,
        theirs=torch.optim.AdamW,
        flavours=FUSED_TOO,
        sparse="ours",
        formula=reference.cautious(reference.adam),
        states=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
        full={"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
        variants=ADAM_VARIANTS,
        own_variants=cautious_variants(lr=0.01, weight_decay=0.1, amsgrad=True),
    ),
    Row(
        ours=onepass.Adagrad,
        theirs=torch.optim.Adagrad,
        flavours=FUSED_TOO,
        formula=reference.adagrad,
        states=("sum",),
        first=lambda initial_accumulator_value, **_: {"sum": initial_accumulator_value},
        eager=True,
        sparse="both",
        own={"decoupled_weight_decay": False, **OWN},
        full={"lr": 0.05, "lr_decay": 0.01, "weight_decay": 0.1, "initial_accumulator_value": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.1},
            "lr_decay": {"lr_decay": 0.1},
            "weight_decay": {"weight_decay": 0.3},
            "initial_accumulator_value": {"initial_accumulator_value": 0.5},
            "eps": {"eps": 0.1},
            "maximize": {"maximize": True, "weight_decay": 0.1, "lr_decay": 0.01},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
        },
        own_variants={
            "decoupled": {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.3, "decoupled_weight_decay": True},
            "decoupled_maximize": {"weight_decay": 0.3, "decoupled_weight_decay": True, "maximize": True},
        },
    ),
    Row(
        ours=onepass.RMSprop,
        theirs=torch.optim.RMSprop,
        formula=reference.cautious(reference.rmsprop, decoupled=False),
        states=("square_avg", "momentum_buffer", "grad_avg"),
        full={"lr": 0.002, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.001},
            "alpha": {"alpha": 0.7},
            "zero_alpha": {"alpha": 0.0},
            "eps": {"eps": 0.1},
            "weight_decay": {"weight_decay": 0.3},
            "momentum": {"momentum": 0.8},
            "centered": {"centered": True, "alpha": 0.9},
            "centered_momentum": {"centered": True, "momentum": 0.5, "weight_decay": 0.1, "lr": 0.001},
            "maximize": {"maximize": True, "weight_decay": 0.1, "momentum": 0.5},
            "maximize_centered": {"maximize": True, "centered": True},
            "tensor_lr": {"lr": torch.tensor(0.01), "momentum": 0.5},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "centered": True},
        },
        own_variants=cautious_variants(decoupled=False, lr=0.002, momentum=0.9, weight_decay=0.1),
    ),
    Row(
        ours=onepass.Adadelta,
        theirs=torch.optim.Adadelta,
        formula=reference.adadelta,
        states=("square_avg", "acc_delta"),
        full={"lr": 1.0, "rho": 0.8, "eps": 1e-4, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.1},
            "rho": {"rho": 0.5},
            "zero_rho": {"rho": 0.0},
            "rho_of_one": {"rho": 1.0},
            "eps": {"eps": 0.1},
            "weight_decay": {"weight_decay": 0.3},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.5)},
            "tensor_lr_1d": {"lr": torch.tensor([0.5], dtype=torch.float64), "weight_decay": 0.1},
        },
    ),
    Row(
        ours=onepass.Adamax,
        theirs=torch.optim.Adamax,
        formula=reference.cautious(reference.adamax, decoupled=False),
        states=("exp_avg", "exp_inf"),
        full={"lr": 0.01, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.03},
            "betas": {"betas": (0.5, 0.75)},
            "zero_betas": {"betas": (0.0, 0.0)},
            "eps": {"eps": 0.1},
            "weight_decay": {"weight_decay": 0.3},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
        },
        own_variants=cautious_variants(decoupled=False, lr=0.01, weight_decay=0.1),
    ),
    Row(
        ours=onepass.NAdam,
        theirs=torch.optim.NAdam,
        formula=reference.cautious(reference.nadam),
        states=("exp_avg", "exp_avg_sq"),
        scalars=("step", "mu_product"),
        first=lambda **_: {"mu_product": 1.0},
        full={"lr": 0.01, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.03},
            "betas": {"betas": (0.5, 0.75)},
            "zero_betas": {"betas": (0.0, 0.0)},
            "eps": {"eps": 0.1},
            "weight_decay": {"weight_decay": 0.3},
            "momentum_decay": {"momentum_decay": 0.1, "weight_decay": 0.1},
            "no_momentum_decay": {"momentum_decay": 0},
            "decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "maximize_decoupled": {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": True, "lr": 0.01},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
        },
        own_variants=cautious_variants(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)
        | {"cautious_coupled": {"lr": 0.01, "weight_decay": 0.1, "cautious": True}},
    ),
    Row(
        ours=onepass.RAdam,
        theirs=torch.optim.RAdam,
        formula=reference.cautious(reference.radam),
        states=("exp_avg", "exp_avg_sq"),
        full={"lr": 0.01, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.03},
            "betas": {"betas": (0.5, 0.75)},
            "zero_betas": {"betas": (0.0, 0.0)},
            "long": {"betas": (0.9, 0.9999)},
            "eps": {"eps": 0.1},
            "weight_decay": {"weight_decay": 0.3},
            "decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True, "lr": 0.01},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "maximize_decoupled": {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
        },
        own_variants=cautious_variants(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)
        | {"cautious_coupled": {"lr": 0.01, "weight_decay": 0.1, "cautious": True}},
    ),
    Row(
        ours=onepass.ASGD,
        theirs=torch.optim.ASGD,
        formula=reference.asgd,
        states=("ax",),
        scalars=("step", "eta", "mu"),
        first=lambda lr, **_: {"eta": lr, "mu": 1.0},
        full={"lr": 0.05, "lambd": 0.01, "alpha": 0.6, "t0": 1, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.05},
            "lambd": {"lambd": 0.3},
            "no_lambd": {"lambd": 0},
            "alpha": {"alpha": 0.5, "lambd": 0.1},
            "t0": {"t0": 20},
            "t0_zero": {"t0": 0, "lr": 0.1},
            "weight_decay": {"weight_decay": 0.3},
            "maximize": {"maximize": True, "weight_decay": 0.1, "t0": 5},
            "tensor_lr": {"lr": torch.tensor(0.01), "t0": 5},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
        },
    ),
    Row(
        ours=onepass.Rprop,
        theirs=torch.optim.Rprop,
        formula=reference.rprop,
        states=("prev", "step_size"),
        first=lambda lr, **_: {"step_size": lr},
        full={"lr": 0.002},
        variants={
            "default": {},
            "lr": {"lr": 0.1},
            "etas": {"etas": (0.3, 1.7)},
            "step_sizes": {"step_sizes": (0.004, 0.02)},
            "maximize": {"maximize": True},
            "maximize_all": {"maximize": True, "etas": (0.8, 1.1), "step_sizes": (0.0, 1.0)},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64)},
        },
    ),
    Row(
        ours=onepass.Lion,
        theirs=PlainLion,
        sparse="ours",
        flavours=({},),
        formula=reference.cautious(reference.lion),
        doubt=reference.lion_doubt,
        states=("exp_avg",),
        scalars=(),
        full={"lr": 0.01, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.01},
            "betas": {"betas": (0.5, 0.75)},
            "zero_betas": {"betas": (0.0, 0.0)},
            "weight_decay": {"lr": 0.01, "weight_decay": 0.3},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.01), "weight_decay": 0.1},
        },
        own_variants=cautious_variants(lr=0.01, weight_decay=0.1),
    ),
    Row(
        ours=onepass.AdaBelief,
        theirs=PlainAdaBelief,
        flavours=({},),
        formula=reference.cautious(reference.adabelief),
        states=("exp_avg", "exp_avg_var"),
        full={"lr": 0.01, "weight_decay": 0.1, "eps": 1e-8},
        variants={
            "default": {},
            "lr": {"lr": 0.03},
            "eps": {"eps": 1e-4},  # a larger one would make all elements of exp_avg_var, and their roundings, alike
            "weight_decay": {"weight_decay": 0.3, "lr": 0.01},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
            "capturable": {"capturable": True},
            "betas": {"betas": (0.5, 0.75)},
            "zero_betas": {"betas": (0.0, 0.0)},
        },
        own_variants=cautious_variants(lr=0.01, weight_decay=0.1, eps=1e-08),
    ),
    Row(
        ours=onepass.LaProp,
        theirs=PlainLaProp,
        flavours=({},),
        formula=reference.cautious(reference.laprop),
        states=("exp_avg", "exp_avg_sq"),
        full={"lr": 0.01, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.03},
            "eps": {"eps": 0.1},
            "weight_decay": {"weight_decay": 0.3, "lr": 0.01},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
            "capturable": {"capturable": True},
            "betas": {"betas": (0.5, 0.75)},
            "zero_betas": {"betas": (0.0, 0.0)},
        },
        own_variants=cautious_variants(lr=0.01, weight_decay=0.1),
    ),
    Row(
        ours=onepass.ADOPT,
        theirs=PlainADOPT,
        flavours=({},),
        formula=reference.cautious(reference.adopt),
        states=("exp_avg", "exp_avg_sq"),
        full={"lr": 0.01, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.03},
            "eps": {"eps": 0.1},
            "weight_decay": {"weight_decay": 0.3, "lr": 0.01},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
            "capturable": {"capturable": True},
            "betas": {"betas": (0.5, 0.75)},
            "zero_betas": {"betas": (0.0, 0.0)},
            "no_clip": {"clip_exponent": None, "eps": 1e-3},
            "clip": {"clip_exponent": 0.0},
            "decoupled": {"weight_decay": 0.3, "decoupled_weight_decay": True, "lr": 0.01},
        },
        own_variants=cautious_variants(lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)
        | {"cautious_coupled": {"lr": 0.01, "weight_decay": 0.1, "cautious": True}},
    ),
    Row(
        ours=onepass.AdEMAMix,
        theirs=PlainAdEMAMix,
        flavours=({},),
        formula=reference.cautious(reference.ademamix),
        states=("exp_avg", "exp_avg_slow", "exp_avg_sq"),
        full={"lr": 0.01, "weight_decay": 0.1, "alpha": 2.0},
        variants={
            "default": {},
            "lr": {"lr": 0.03},
            "eps": {"eps": 0.1},
            "weight_decay": {"weight_decay": 0.3, "lr": 0.01},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
            "capturable": {"capturable": True},
            "betas": {"betas": (0.5, 0.75, 0.6)},
            "zero_betas": {"betas": (0.0, 0.0, 0.0)},
            "alpha": {"alpha": 1.5},
            "warmups": {"alpha_warmup": 7, "beta3_warmup": 9},
            "long_warmups": {"alpha_warmup": 1000, "beta3_warmup": 1000, "betas": (0.9, 0.99, 0.9999)},
        },
        own_variants=cautious_variants(lr=0.01, weight_decay=0.1, alpha=2.0),
    ),
    Row(
        ours=onepass.Adan,
        theirs=PlainAdan,
        flavours=({},),
        formula=reference.cautious(reference.adan),
        states=("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad"),
        full={"lr": 0.01, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.03},
            "eps": {"eps": 0.1},
            "weight_decay": {"weight_decay": 0.3, "lr": 0.01},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
            "capturable": {"capturable": True},
            "betas": {"betas": (0.5, 0.75, 0.6)},
            "zero_betas": {"betas": (0.0, 0.0, 0.0)},
            "no_prox": {"no_prox": True, "weight_decay": 0.3, "lr": 0.01},
        },
        own_variants=cautious_variants(lr=0.01, weight_decay=0.1)
        | {
            "cautious_no_prox": {
                "lr": 0.01,
                "weight_decay": 0.1,
                "no_prox": True,
                "cautious": True,
                "cautious_weight_decay": True,
            }
        },
    ),
    Row(
        ours=onepass.LAMB,
        theirs=PlainLAMB,
        flavours=({},),
        formula=reference.lamb,
        sums=True,
        states=("exp_avg", "exp_avg_sq"),
        full={"lr": 0.01, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.03},
            "eps": {"eps": 0.1},
            "no_decay": {"weight_decay": 0.0},
            "weight_decay": {"weight_decay": 0.3, "lr": 0.01},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
            "capturable": {"capturable": True},
            "betas": {"betas": (0.5, 0.75)},
            "zero_betas": {"betas": (0.0, 0.0)},
            "no_ratio": {"trust_ratio": False},
            "clip": {"trust_clip": True},
        },
    ),
    Row(
        ours=onepass.LARS,
        theirs=PlainLARS,
        flavours=({},),
        formula=reference.lars,
        sums=True,
        states=("momentum_buffer",),
        scalars=(),
        full={"lr": 1.0, "weight_decay": 0.01, "trust_coefficient": 0.02, "nesterov": True},
        variants={
            "default": {},
            "lr": {"lr": 0.1},
            "momentum": {"momentum": 0.5},
            "no_momentum": {"momentum": 0.0},
            "nesterov": {"nesterov": True, "weight_decay": 0.1},
            "weight_decay": {"weight_decay": 0.3},
            "trust_coefficient": {"trust_coefficient": 0.1},
            "eps": {"eps": 0.1},
            "no_ratio": {"trust_ratio": False, "lr": 0.01},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.5)},
            "tensor_lr_1d": {"lr": torch.tensor([0.5], dtype=torch.float64), "weight_decay": 0.1},
        },
    ),
    Row(
        ours=onepass.StableAdamW,
        theirs=PlainStableAdamW,
        flavours=({},),
        formula=reference.stable_adamw,
        sums=True,
        states=("exp_avg", "exp_avg_sq"),
        full={"lr": 0.01, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.03},
            "eps": {"eps": 0.1},
            "no_decay": {"weight_decay": 0.0},
            "weight_decay": {"weight_decay": 0.3, "lr": 0.01},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
            "capturable": {"capturable": True},
            "betas": {"betas": (0.5, 0.75)},
            "zero_betas": {"betas": (0.0, 0.0)},
        },
    ),
    Row(
        ours=onepass.MARS,
        theirs=PlainMARS,
        flavours=({},),
        formula=reference.mars,
        sums=True,
        states=("exp_avg", "exp_avg_sq", "last_grad"),
        full={"lr": 0.01, "weight_decay": 0.1, "gamma": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.03},
            "eps": {"eps": 0.1},
            "weight_decay": {"weight_decay": 0.3, "lr": 0.01},
            "gamma": {"gamma": 0.5},
            "not_clipped": {"clip_correction": False},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
            "capturable": {"capturable": True},
            "betas": {"betas": (0.5, 0.75)},
            "zero_betas": {"betas": (0.0, 0.0)},
        },
    ),
    Row(
        ours=onepass.NovoGrad,
        theirs=PlainNovoGrad,
        flavours=({},),
        formula=reference.novograd,
        sums=True,
        states=("exp_avg",),
        scalars=("step", "exp_avg_norm_sq"),
        full={"lr": 0.01, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.03},
            "eps": {"eps": 0.1},
            "weight_decay": {"weight_decay": 0.3, "lr": 0.01},
            "averaging": {"grad_averaging": True, "weight_decay": 0.1},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
            "capturable": {"capturable": True},
            "betas": {"betas": (0.5, 0.75)},
            "zero_betas": {"betas": (0.0, 0.0)},
        },
    ),
    Row(  # with the estimate held at its first value, by d_coef; optimizers/test_prodigy.py has it grow
        ours=onepass.Prodigy,
        theirs=PlainProdigy,
        flavours=({},),
        formula=reference.prodigy,
        sums=True,
        states=("exp_avg", "exp_avg_sq", "s", "p0"),
        scalars=("step", "d_numerator", "d_denom"),
        copies=("p0",),
        full={"d0": 0.01, "d_coef": 1e-9, "weight_decay": 0.1, "use_bias_correction": True},
        variants={
            "default": {"d0": 0.01, "d_coef": 1e-9},
            "lr": {"d0": 0.01, "d_coef": 1e-9, "lr": 3.0},
            "beta3": {"d0": 0.01, "d_coef": 1e-9, "beta3": 0.5},
            "eps": {"d0": 0.01, "d_coef": 1e-9, "eps": 0.1},
            "weight_decay": {"d0": 0.01, "d_coef": 1e-9, "weight_decay": 0.3},
            "coupled": {"d0": 0.01, "d_coef": 1e-9, "weight_decay": 0.1, "decouple": False},
            "corrected": {"d0": 0.01, "d_coef": 1e-9, "use_bias_correction": True},
            "safeguarded": {"d0": 0.01, "d_coef": 1e-9, "safeguard_warmup": True},
            # Without effect here: every argument has to occur.
            "growth_rate": {"d0": 0.01, "d_coef": 1e-9, "growth_rate": 1.02, "slice_p": 1},
            "maximize": {"d0": 0.01, "d_coef": 1e-9, "maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"d0": 0.01, "d_coef": 1e-9, "lr": torch.tensor(0.5)},
            "tensor_lr_1d": {"d0": 0.01, "d_coef": 1e-9, "lr": torch.tensor([0.5], dtype=torch.float64)},
            "betas": {"d0": 0.01, "d_coef": 1e-9, "betas": (0.5, 0.75)},
            "zero_betas": {"d0": 0.01, "d_coef": 1e-9, "betas": (0.0, 0.0)},
        },
    ),
    Row(
        ours=onepass.ScheduleFreeAdamW,
        theirs=PlainScheduleFreeAdamW,
        flavours=({},),
        formula=reference.schedule_free_adamw,
        states=("z", "exp_avg_sq"),
        scalars=("step", "lr_max", "weight_sum"),
        copies=("z",),
        full={"lr": 0.03, "weight_decay": 0.1, "warmup_steps": 5},
        variants={
            "default": {},
            "lr": {"lr": 0.03},
            "no_lr": {"lr": 0.0, "weight_decay": 0.1},
            "eps": {"eps": 0.1},
            "weight_decay": {"weight_decay": 0.3, "lr": 0.01},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
            "capturable": {"capturable": True},
            "betas": {"betas": (0.5, 0.75)},
            "zero_beta": {"betas": (0.9, 0.0)},
            "weights": {"r": 1.0, "weight_lr_power": 0.5},
            "warmup": {"warmup_steps": 7},
        },
    ),
    Row(
        ours=onepass.ScheduleFreeRAdam,
        theirs=PlainScheduleFreeRAdam,
        flavours=({},),
        formula=reference.schedule_free_radam,
        states=("z", "exp_avg_sq"),
        scalars=("step", "lr_max", "weight_sum"),
        copies=("z",),
        full={"lr": 0.03, "weight_decay": 0.1, "silent_sgd_phase": False},
        variants={
            "default": {},
            "lr": {"lr": 0.03},
            "eps": {"eps": 0.1},
            "weight_decay": {"weight_decay": 0.3, "lr": 0.01},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
            "capturable": {"capturable": True},
            "betas": {"betas": (0.5, 0.75)},
            "weights": {"r": 1.0, "weight_lr_power": 0.5},
            "not_silent": {"silent_sgd_phase": False, "weight_decay": 0.1},
        },
    ),
    Row(
        ours=onepass.ScheduleFreeSGD,
        theirs=PlainScheduleFreeSGD,
        flavours=({},),
        formula=reference.schedule_free_sgd,
        states=("z",),
        scalars=("step", "lr_max", "weight_sum"),
        copies=("z",),
        full={"lr": 0.1, "weight_decay": 0.1, "warmup_steps": 5},
        variants={
            "default": {"lr": 0.1},
            "lr": {"lr": 0.03},
            "no_lr": {"lr": 0.0, "weight_decay": 0.1},
            "momentum": {"momentum": 0.5},
            "weight_decay": {"weight_decay": 0.3, "lr": 0.1},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64), "weight_decay": 0.1},
            "capturable": {"capturable": True},
            "weights": {"r": 1.0, "weight_lr_power": 0.5},
            "warmup": {"warmup_steps": 7},
        },
    ),
    Row(
        ours=onepass.Signum,
        theirs=PlainSignum,
        flavours=({},),
        formula=reference.cautious(reference.signum),
        sparse="ours",
        doubt=reference.signum_doubt,
        states=("momentum_buffer",),
        scalars=(),
        full={"lr": 0.01, "weight_decay": 0.1},
        variants={
            "default": {},
            "lr": {"lr": 0.01},
            "momentum": {"momentum": 0.5},
            "no_momentum": {"momentum": 0.0},
            "weight_decay": {"lr": 0.01, "weight_decay": 0.3},
            "maximize": {"maximize": True, "weight_decay": 0.1},
            "tensor_lr": {"lr": torch.tensor(0.01), "weight_decay": 0.1},
        },
        own_variants=cautious_variants(lr=0.01, weight_decay=0.1),
    ),
    Row(
        ours=onepass.SparseAdam,
        theirs=torch.optim.SparseAdam,
        flavours=({},),
        states=("exp_avg", "exp_avg_sq"),
        sparse="both",
        wants_sparse=True,
        shapes=((5,), (4, 3), (2, 3, 4)),
        full={"lr": 0.01, "betas": (0.8, 0.9)},
        variants={
            "default": {},
            "lr": {"lr": 0.1},
            "betas": {"betas": (0.5, 0.75)},
            "zero_betas": {"betas": (0.0, 0.0)},
            "eps": {"eps": 0.1},
            "maximize": {"maximize": True},
            "tensor_lr": {"lr": torch.tensor(0.01)},
            "tensor_lr_1d": {"lr": torch.tensor([0.01], dtype=torch.float64)},
        },
    ),
    Row(
        ours=onepass.Adafactor,
        theirs=torch.optim.Adafactor,
        states=("row_var", "col_var", "variance"),
        shapes=((), (5,), (4, 3), (2, 3, 4, 5)),
        full={"lr": 0.01, "weight_decay": 0.1},
    ),
    Row(
        ours=onepass.CAME,
        theirs=PlainCAME,
        flavours=({},),
        states=("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "exp_avg", "exp_avg_res_row", "exp_avg_res_col"),
        scalars=(),
        shapes=((), (5,), (4, 3), (2, 3, 4, 5)),
        full={"lr": 0.01, "weight_decay": 0.1},
    ),
    Row(
        ours=onepass.Muon,
        theirs=torch.optim.Muon,
        flavours=({},),
        states=("momentum_buffer",),
        scalars=(),
        shapes=((5, 1), (4, 3), (2, 7)),
        full={"lr": 0.01, "weight_decay": 0.1},
    ),
    Row(
        ours=onepass.NorMuon,
        theirs=PlainNorMuon,
        flavours=({},),
        states=("momentum_buffer", "second_momentum_buffer"),
        scalars=(),
        shapes=((5, 1), (4, 3), (2, 7)),
        full={"lr": 0.01, "weight_decay": 0.1},
    ),
    Row(
        ours=onepass.LBFGS,
        theirs=torch.optim.LBFGS,
        flavours=({},),
        states=(),
        scalars=(),
        wants_closure=True,
        own={} if "maximize" in inspect.signature(torch.optim.LBFGS).parameters else {"maximize": False},
        full={"lr": 0.1, "max_iter": 3},
    ),
]

ELEMENTWISE = [row for row in ROWS if row.formula]
# Whose elements do not depend on each other at all: they have the CPU's bits on GPUs, and those of whole tensors when
# they are DTensors.
ALONE = [row for row in ELEMENTWISE if not row.sums]
CASES = [pytest.param(row, kw, id=f"{row.name}-{name}") for row in ELEMENTWISE for name, kw in row.variants.items()]
OWN_CASES = [
    pytest.param(row, kw, id=f"{row.name}-{name}") for row in ELEMENTWISE for name, kw in row.own_variants.items()
]

ROW = {row.name: row for row in ROWS}
SCALARS = {name for row in ROWS for name in row.scalars}


def for_rows(rows: Iterable[Row]) -> pytest.MarkDecorator:
    """Runs a test for each of these rows."""
    return pytest.mark.parametrize("row", list(rows))


each_class = for_rows(ROWS)
each_row = for_rows(ELEMENTWISE)
each_row_alone = for_rows(ALONE)
each_of_torchs = for_rows(row for row in ELEMENTWISE if issubclass(row.ours, row.theirs))
each_case = pytest.mark.parametrize(("row", "kwargs"), CASES)
each_own_case = pytest.mark.parametrize(("row", "kwargs"), OWN_CASES)
each_case_and_own_case = pytest.mark.parametrize(("row", "kwargs"), CASES + OWN_CASES)


# -- models and gradients --------------------------------------------------------------------------------------------


def model(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Parameters of every kind of shape, packed in several orders."""
    params = [torch.randn(shape) for shape in [(), (0,), (3, 0, 2), (1,), (1, 1), (7,), (33, 65), (1031,)]]
    params.append(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    params.append(torch.randn(5, 9, 2).permute(2, 0, 1))
    return [p.to(dtype).requires_grad_() for p in params]


def copies(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in params]


def gradients(params: list[Tensor], step: int) -> list[Tensor | None]:
    """Fresh gradients, with exact zeros among them; after the first step some are missing."""
    kept = [step == 1 or (7 * step + 3 * i) % 11 > 0 for i in range(len(params))]
    return [torch.randn_like(p) * (torch.rand_like(p) > 0.02) if k else None for p, k in zip(params, kept, strict=True)]


def give(optimizer: torch.optim.Optimizer, grads: list[Tensor | None]) -> None:
    """Copies of the gradients to the optimizer's parameters."""
    for p, grad in zip(reference.params_of(optimizer), grads, strict=True):
        p.grad = None if grad is None else grad.clone()
