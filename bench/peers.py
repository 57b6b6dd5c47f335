"""Peers: the optimizers of other packages, and torch's under torch.compile.

``makers(optimizer, arguments)`` returns a maker for every installed peer that computes the same as onepass's class of
that name with these arguments. ``compiled`` returns those that compile one function of the steps of all tensors:
torch's class under torch.compile, and heavyball. ``missing()`` returns why peers are missing: each peer is tried on a
small tensor first.

``pip install 'onepass[bench]'`` installs all peers. DeepSpeed compiles an extension for each of its optimizers at the
first use, which needs a C++ compiler and a minute or two; the extensions are kept in torch's folder of extensions. (If
the compilation is interrupted, remove the file ``lock`` in that folder, or torch waits for it forever.)

All contenders of a benchmark step repeatedly with the same gradients, so a peer that writes to them is left out.
``FORMULAS`` lists the peers that agree element by element, ``LEFT_OUT`` those that do not, with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import logging
import textwrap
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import onepass
import torch
from onepass.cli.timing import Maker, Run
from torch import Tensor
from torch.optim import Optimizer
from torchvision_on_cpu import import_torchvision

Options = dict[str, Any]

# peer -> the package that pip installs, the module that is imported
PACKAGES = {
    "DeepSpeed": ("deepspeed", "deepspeed"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "torchao": ("torchao", "torchao.optim"),
    "pytorch_optimizer": ("pytorch_optimizer", "pytorch_optimizer"),
    "lion-pytorch": ("lion-pytorch", "lion_pytorch"),
    "optimi": ("torch-optimi", "optimi"),
    "timm": ("timm", "timm.optim"),
    "prodigyopt": ("prodigyopt", "prodigyopt"),
    "schedulefree": ("schedulefree", "schedulefree"),
    "heavyball": ("heavyball", "heavyball"),
}


class Formula(NamedTuple):
    """A peer's class, and the arguments of onepass with which it computes the same."""

    constructor: str  # module:class
    passes: str  # arguments of the same name and meaning, passed to the peer; others must have onepass's defaults
    fixed: Options | None = None
    not_zero: str = ""  # arguments that must not be 0, where the peer has another class or none
    only: Options | None = None  # arguments that are passed, too, and must have these values
    foreach: str | Options | None = None  # for small tensors instead: another class, or more options
    compiles: bool = False  # whether torch.compile makes one function of the steps of all tensors


def _foreach(constructor: str, passes: str, **fixed: Any) -> Formula:
    return Formula(constructor, passes, {**fixed, "foreach": False}, foreach={"foreach": True})


def _heavyball(constructor: str, passes: str) -> Formula:
    kept = {"consume_grad": False}  # its default sets all gradients to None
    return Formula(constructor, passes, kept, only={"eps": 1e-15}, compiles=True)


LION = "lr betas weight_decay"
ADAM = "lr betas eps"
SCHEDULE_FREE = "warmup_steps r weight_lr_power"
LOOP = {"foreach": False, "triton": False}  # with foreach, optimi's Adam overwrites the gradients

FORMULAS: dict[str, dict[str, Formula]] = {
    "DeepSpeed": {
        "Adam": Formula("deepspeed.ops.adam:DeepSpeedCPUAdam", ADAM + " weight_decay", {"adamw_mode": False}),
        "AdamW": Formula("deepspeed.ops.adam:DeepSpeedCPUAdam", ADAM + " weight_decay", {"adamw_mode": True}),
        "Lion": Formula("deepspeed.ops.lion:DeepSpeedCPULion", LION),
    },
    "bitsandbytes": {  # a sequence of torch's operations; states in float32
        "SGD": Formula("bitsandbytes.optim:SGD32bit", "lr momentum weight_decay", not_zero="momentum"),
        "Adam": Formula("bitsandbytes.optim:Adam32bit", ADAM),  # its weight decay is AdamW's
        "AdamW": Formula("bitsandbytes.optim:AdamW32bit", ADAM + " weight_decay"),
        "Lion": Formula("bitsandbytes.optim:Lion32bit", LION),
        "Adagrad": Formula("bitsandbytes.optim:Adagrad32bit", "lr eps weight_decay"),
        "RMSprop": Formula("bitsandbytes.optim:RMSprop32bit", "lr alpha eps weight_decay"),
    },
    "torchao": {  # the base of its low-bit optimizers: a compiled function, called for each parameter
        "AdamW": Formula("torchao.optim:_AdamW", ADAM + " weight_decay"),
    },
    "pytorch_optimizer": {  # a coupled weight decay is added to the gradients in place
        "SGD": _foreach("pytorch_optimizer:SGDW", "lr momentum dampening", weight_decouple=False),
        "Lion": _foreach("pytorch_optimizer:Lion", LION),
        "Adadelta": _foreach("pytorch_optimizer:AdaDelta", "lr rho eps"),
        "Adamax": _foreach("pytorch_optimizer:AdaMax", ADAM),
        # Where RAdam does not rectify, torch makes a step of plain momentum.
        "RAdam": _foreach("pytorch_optimizer:RAdam", ADAM, degenerated_to_sgd=True),
        # Its bound of beta2 would be reached at step 5,600. No momentum; the relative step is bounded by 1e-2.
        "Adafactor": _foreach("pytorch_optimizer:AdaFactor", "", lr=1e-2, betas=(None, 1 - 1e-12)),
        "CAME": Formula("pytorch_optimizer:CAME", "lr clip_threshold weight_decay"),
        "AdaBelief": _foreach("pytorch_optimizer:AdaBelief", ADAM + " weight_decay"),
        "AdEMAMix": _foreach("pytorch_optimizer:AdEMAMix", ADAM + " alpha weight_decay", weight_decouple=True),
        "Signum": _foreach("pytorch_optimizer:SignSGD", "lr momentum weight_decay"),
        "StableAdamW": _foreach("pytorch_optimizer:StableAdamW", ADAM + " weight_decay", kahan_sum=False),
    },
    "lion-pytorch": {
        "Lion": Formula("lion_pytorch:Lion", LION, foreach="lion_pytorch.foreach:Lion"),
    },
    "optimi": {  # a coupled weight decay is added to the gradients in place
        "SGD": _foreach("optimi:SGD", "lr momentum", triton=False, torch_init=True),
        "Adam": Formula("optimi:Adam", ADAM, LOOP),
        "AdamW": Formula("optimi:AdamW", ADAM + " weight_decay", LOOP),
        "Lion": _foreach("optimi:Lion", LION, triton=False),
    },
    "timm": {
        "AdaBelief": Formula("timm.optim:AdaBelief", ADAM + " weight_decay", {"rectify": False}),
        "Adan": _foreach("timm.optim:Adan", ADAM + " weight_decay no_prox"),
        "ADOPT": _foreach("timm.optim:Adopt", ADAM + " weight_decay", clip_exp=0.25),
        "LAMB": Formula("timm.optim:Lamb", ADAM + " weight_decay trust_clip", {"max_grad_norm": None}),
        "LaProp": Formula("timm.optim:LaProp", "lr betas"),
        "LARS": Formula("timm.optim:Lars", "lr momentum weight_decay nesterov"),
        "Lion": _foreach("timm.optim:Lion", LION),
        "MARS": Formula("timm.optim:Mars", ADAM + " weight_decay gamma", {"optimize_1d": True}),
        "NovoGrad": Formula("timm.optim:NvNovoGrad", ADAM + " weight_decay grad_averaging"),
    },
    "prodigyopt": {
        "Prodigy": Formula("prodigyopt:Prodigy", ADAM + " d0 growth_rate weight_decay use_bias_correction"),
    },
    "schedulefree": {  # SGD's weight decay is added to the gradients in place
        "ScheduleFreeAdamW": Formula("schedulefree:AdamWScheduleFreeReference", f"{ADAM} weight_decay {SCHEDULE_FREE}"),
        "ScheduleFreeSGD": Formula("schedulefree:SGDScheduleFreeReference", f"lr momentum {SCHEDULE_FREE}"),
    },
    "heavyball": {  # max(root, eps) instead of root + eps, so only a small eps gives the same where gradients are small
        "AdEMAMix": _heavyball("heavyball:AdEMAMix", "lr betas alpha weight_decay"),
        "NAdam": _heavyball("heavyball:NAdam", "lr betas momentum_decay"),
    },
}

# torch's classes that compile, agree, and do not compile again at later steps or other learning rates. (torch compiles
# nothing of Adafactor. Muon's products in bfloat16 differ, and its iterations amplify the differences.)
COMPILABLE = ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop")

# Classes of peers that are not contenders, with the reason. All were tried.
LEFT_OUT = {
    "DeepSpeed": {
        "Adagrad": "writes its update over the gradients (the last elements of a tensor, those beyond whole vectors)",
    },
    "torchao": {
        "Adam8bit, AdamW8bit, Adam4bit, AdamW4bit, AdamFp8, AdamWFp8": "states of few bits, so other results",
        "CPUOffloadOptimizer": "torch's optimizer on the CPU, for parameters on a GPU, which it needs",
    },
    "pytorch_optimizer": {
        "Adam, NAdam, RMSprop": "torch's own classes",
        "AdamW": "torch's own class",
        "ASGD": "accelerated SGD, another algorithm",
        "LaProp": "three elements in 100,000 differ by more than rounding",
        "Muon": "writes Nesterov's momentum into the gradients",
    },
    "schedulefree": {
        "AdamWScheduleFree, RAdamScheduleFree, SGDScheduleFree": "write their updates over the gradients",
    },
    "heavyball": {
        "SGD, AdamW": "torch.compile's of torch's formula, as `compiled`",
        "ADOPT": "other betas in the first steps, and no clipping",
        "LaProp": "among 64M elements, some differ by more than rounding",
        "RMSprop": "another beta2 in the first steps",
        "SFAdamW": "keeps y and z only, and computes x",
    },
    "optimi": {"RAdam": "adds eps to the root after its correction, not before: 4e-5 off after ten steps"},
}

# A loop over the tensors keeps each in the cache; foreach saves calls. On the machines measured, foreach is up to 3
# times as fast up to some 16,000 elements, and takes up to twice as long above.
SMALL = 1 << 14

_failures: dict[str, str] = {}  # peer, or peer and class -> the message when it was tried


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the output, logs and warnings of peers when they are imported or first used."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _told(error: BaseException) -> str:
    """Return an error and its causes in one line, each shortened, because a failed build quotes its whole command."""
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    cause = f" ({_told(error.__cause__)})" if error.__cause__ else ""
    return textwrap.shorten(line, 120) + cause


def _import_error(peer: str) -> str | None:
    """Return why a peer cannot be imported; None if it can."""
    package, module = PACKAGES[peer]
    try:
        with _quiet():
            if peer == "timm" and importlib.util.find_spec("timm") is not None:
                import_torchvision()
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            return f"not installed: pip install {package}"
        return f"cannot be imported: {_told(error)}"
    except Exception as error:  # a broken package may raise anything
        return f"cannot be imported: {_told(error)}"
    return None


def _class(constructor: str) -> Callable[..., Optimizer]:
    module, _, name = constructor.partition(":")
    found: Callable[..., Optimizer] = getattr(importlib.import_module(module), name)
    return found


def _options(formula: Formula, optimizer: str, arguments: Options) -> Options | None:
    """Return the peer's arguments for these; None if it computes something else with them."""
    signature = inspect.signature(getattr(onepass, optimizer)).parameters
    defaults = {name: p.default for name, p in signature.items() if p.default is not p.empty}
    given = defaults | arguments
    passed = formula.passes.split()
    only = formula.only or {}
    if any(given[name] != (defaults | only)[name] for name in given if name not in passed):
        return None
    if any(not given[name] for name in formula.not_zero.split()):
        return None
    return {name: given[name] for name in passed} | only | (formula.fixed or {})


def _maker(formula: Formula, options: Options) -> Maker:
    def make(params: list[Tensor]) -> Run:
        constructor, chosen = formula.constructor, options
        if formula.foreach is not None and sum(p.numel() for p in params) < SMALL * len(params):
            if isinstance(formula.foreach, str):
                constructor = formula.foreach
            else:
                chosen = options | formula.foreach
        with _quiet():
            made = _class(constructor)(params, **chosen)
            if callable(train := getattr(made, "train", None)):  # Schedule-Free classes begin with eval's point
                train()
            return made.step

    return make


@functools.cache
def _trial(peer: str, optimizer: str) -> bool:
    """Return whether a peer's class can make a step on this machine. (DeepSpeed compiles here.)"""
    formula = FORMULAS[peer][optimizer]
    arguments = dict.fromkeys(formula.not_zero.split(), 0.5) | (formula.only or {})
    options = _options(formula, optimizer, arguments)
    assert options is not None
    p = torch.nn.Parameter(torch.ones(16))
    p.grad = torch.ones(16)
    try:
        run = _maker(formula, options)([p])
        with _quiet():
            for _ in range(6):  # the first steps of some change nothing
                run()
        if not (p < 1).all():
            raise ArithmeticError("a step against the gradient left a parameter where it was")
    except Exception as error:  # a compiler, a loader or a package may raise anything
        _failures[f"{peer} {optimizer}"] = f"cannot make a step on this machine: {_told(error)}"
        return False
    return True


def makers(optimizer: str, arguments: Options) -> dict[str, Maker]:
    """Return makers of every installed peer that computes the same as onepass's class of that name."""
    return _installed(optimizer, arguments, compiles=False)


def compiled(optimizer: str, arguments: Options) -> dict[str, Maker]:
    """Return makers of the peers that compile: torch's class with its step under torch.compile, and heavyball.

    The first call compiles: a minute for 200 parameters on two cores, more than four for 1,000.
    """
    found = {"compiled": _compiled(optimizer, arguments)} if optimizer in COMPILABLE else {}
    return found | _installed(optimizer, arguments, compiles=True)


def every(optimizer: str, arguments: Options) -> dict[str, Maker]:
    """Return all peers, the compiled ones first, because they reset Dynamo."""
    return compiled(optimizer, arguments) | makers(optimizer, arguments)


def _installed(optimizer: str, arguments: Options, compiles: bool) -> dict[str, Maker]:
    """Return makers of the installed peers that compile, or of those that do not."""
    found: dict[str, Maker] = {}
    for peer, formulas in FORMULAS.items():
        formula = formulas.get(optimizer)
        if formula is None or formula.compiles != compiles:
            continue
        options = _options(formula, optimizer, arguments)
        if options is not None and _import_error(peer) is None and _trial(peer, optimizer):
            found[peer] = _maker(formula, options)
    return found


def _compiled(optimizer: str, arguments: Options) -> Maker:
    """Return a maker of torch's class with its step under torch.compile.

    The learning rate is a tensor, as torch recommends, so that a schedule does not compile the step again. Dynamo keeps
    compiled code for a few sets of parameters per ``step`` and then silently stops compiling, so each maker resets it.
    """
    torchs = getattr(torch.optim, optimizer)
    lr = arguments.get("lr", inspect.signature(torchs).parameters["lr"].default)

    def make(params: list[Tensor]) -> Run:
        torch._dynamo.reset()
        # torch logs at every start that it ignores the profiler's scope.
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
        made = torchs(params, **arguments | {"foreach": False, "lr": torch.as_tensor(lr)})
        with _quiet():  # the compiler is imported here
            run: Run = torch.compile(made.step)
        return run

    return make


def missing() -> dict[str, str]:
    """Return the peers that are not measured, with the reason: they cannot be imported, or failed in ``makers``."""
    errors = {peer: error for peer in PACKAGES if (error := _import_error(peer)) is not None}
    return errors | _failures


def versions() -> dict[str, str]:
    """Return the versions of the peers that can be imported."""
    return {
        peer: importlib.metadata.version(package)
        for peer, (package, _) in PACKAGES.items()
        if _import_error(peer) is None
    }
