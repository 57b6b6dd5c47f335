"""Optimizers that a step is compared with, beyond torch's own default, foreach and fused.

``makers(optimizer, arguments)`` has a maker for every installed peer that computes what onepass's class of that name
computes with these arguments; ``compiled`` has torch's class under torch.compile. ``missing()`` says of the others why
they are not there, as far as it was found out: a peer is tried on a small tensor before it is offered.

``pip install 'onepass[bench]'`` installs all. DeepSpeed compiles an extension for each of its optimizers when it is
first asked for, which takes a minute or two and a C++ compiler; they stay in torch's folder of extensions.
(If that is interrupted, torch waits for ever for the file ``lock`` that it left there: remove it.)

All contenders of a benchmark step on the same gradients, again and again. So a peer that writes to them is left out.
``FORMULAS`` is what was found to agree, element by element, ``LEFT_OUT`` what was not, and why.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
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

Options = dict[str, Any]

# peer -> the package that pip installs, the module that is imported
PACKAGES = {
    "DeepSpeed": ("deepspeed", "deepspeed"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "torchao": ("torchao", "torchao.optim"),
    "pytorch_optimizer": ("pytorch_optimizer", "pytorch_optimizer"),
    "lion-pytorch": ("lion-pytorch", "lion_pytorch"),
    "optimi": ("torch-optimi", "optimi"),
}


class Formula(NamedTuple):
    """A peer's class, and with which of onepass's arguments it computes the same."""

    constructor: str  # module:class
    passes: str  # arguments of the same name and meaning, all given to the peer; others must have onepass's defaults
    fixed: Options | None = None
    not_zero: str = ""  # arguments without which the peer has another class, or none
    foreach: str | Options | None = None  # for small tensors instead: another class, or options beside the fixed ones


def _foreach(constructor: str, passes: str, **fixed: Any) -> Formula:
    return Formula(constructor, passes, {**fixed, "foreach": False}, foreach={"foreach": True})


LION = "lr betas weight_decay"
ADAM = "lr betas eps"
LOOP = {"foreach": False, "triton": False}  # optimi's Adam has the gradients for its scratch if foreach is on

FORMULAS: dict[str, dict[str, Formula]] = {
    "DeepSpeed": {
        "Adam": Formula("deepspeed.ops.adam:DeepSpeedCPUAdam", ADAM + " weight_decay", {"adamw_mode": False}),
        "AdamW": Formula("deepspeed.ops.adam:DeepSpeedCPUAdam", ADAM + " weight_decay", {"adamw_mode": True}),
        "Lion": Formula("deepspeed.ops.lion:DeepSpeedCPULion", LION),
    },
    "bitsandbytes": {  # torch's operations, one after the other; states in float32
        "SGD": Formula("bitsandbytes.optim:SGD32bit", "lr momentum weight_decay", not_zero="momentum"),
        "Adam": Formula("bitsandbytes.optim:Adam32bit", ADAM),  # its weight decay is AdamW's
        "AdamW": Formula("bitsandbytes.optim:AdamW32bit", ADAM + " weight_decay"),
        "Lion": Formula("bitsandbytes.optim:Lion32bit", LION),
        "Adagrad": Formula("bitsandbytes.optim:Adagrad32bit", "lr eps weight_decay"),
        "RMSprop": Formula("bitsandbytes.optim:RMSprop32bit", "lr alpha eps weight_decay"),
    },
    "torchao": {  # what its optimizers of few bits are derived from: a compiled function, called for each parameter
        "AdamW": Formula("torchao.optim:_AdamW", ADAM + " weight_decay"),
    },
    "pytorch_optimizer": {  # a coupled weight decay is added to the gradients in place
        "SGD": _foreach("pytorch_optimizer:SGDW", "lr momentum dampening", weight_decouple=False),
        "Lion": _foreach("pytorch_optimizer:Lion", LION),
        "Adadelta": _foreach("pytorch_optimizer:AdaDelta", "lr rho eps"),
        "Adamax": _foreach("pytorch_optimizer:AdaMax", ADAM),
        # Without rectification torch takes a step of plain momentum.
        "RAdam": _foreach("pytorch_optimizer:RAdam", ADAM, degenerated_to_sgd=True),
        # Its bound of beta2 would be reached at step 5,600. No momentum; the relative step is bounded by 1e-2.
        "Adafactor": _foreach("pytorch_optimizer:AdaFactor", "", lr=1e-2, betas=(None, 1 - 1e-12)),
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
}

# torch's classes that were found to compile, to agree, and not to compile again at later steps or other rates.
# (Of Adafactor it compiles nothing. Muon's products in bfloat16 come out otherwise, which its iterations magnify.)
COMPILABLE = ("SGD", "Adam", "AdamW", "Adagrad", "RMSprop", "Adadelta", "Adamax", "NAdam", "RAdam", "ASGD", "Rprop")

# What is in a peer by that name and no contender here. All of it was tried.
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
        "Muon": "writes Nesterov's momentum into the gradients",
    },
    "optimi": {"RAdam": "adds eps to the root after its correction, not before: 4e-5 off after ten steps"},
}

# A loop over the tensors keeps each in the cache, foreach saves calls. On the machines that were tried, foreach is the
# faster one up to some 16,000 elements, by up to 3 times, and slower beyond, by up to 2.
SMALL = 1 << 14

_failures: dict[str, str] = {}  # peer, or peer and class -> what it said when it was tried


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what peers print, log and warn of when they are imported or first used."""
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
    """An error and its causes in one line: the beginning of each, as a failed build tells the whole command."""
    line = f"{type(error).__name__}: {error}".splitlines()[0]
    cause = f" ({_told(error.__cause__)})" if error.__cause__ else ""
    return textwrap.shorten(line, 120) + cause


def _import_error(peer: str) -> str | None:
    """Why a peer cannot be imported; None if it can."""
    package, module = PACKAGES[peer]
    try:
        with _quiet():
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            return f"not installed: pip install {package}"
        return f"cannot be imported: {_told(error)}"
    except Exception as error:  # whatever a broken package raises
        return f"cannot be imported: {_told(error)}"
    return None


def _class(constructor: str) -> Callable[..., Optimizer]:
    module, _, name = constructor.partition(":")
    found: Callable[..., Optimizer] = getattr(importlib.import_module(module), name)
    return found


def _options(formula: Formula, optimizer: str, arguments: Options) -> Options | None:
    """What to give the peer for these arguments; None if it then computes something else."""
    signature = inspect.signature(getattr(onepass, optimizer)).parameters
    defaults = {name: p.default for name, p in signature.items() if p.default is not p.empty}
    given = defaults | arguments
    passed = formula.passes.split()
    if any(given[name] != defaults[name] for name in given if name not in passed):
        return None
    if any(not given[name] for name in formula.not_zero.split()):
        return None
    return {name: given[name] for name in passed} | (formula.fixed or {})


def _maker(formula: Formula, options: Options) -> Maker:
    def make(params: list[Tensor]) -> Run:
        constructor, chosen = formula.constructor, options
        if formula.foreach is not None and sum(p.numel() for p in params) < SMALL * len(params):
            if isinstance(formula.foreach, str):
                constructor = formula.foreach
            else:
                chosen = options | formula.foreach
        with _quiet():
            return _class(constructor)(params, **chosen).step

    return make


@functools.cache
def _trial(peer: str, optimizer: str) -> bool:
    """Whether a peer's class can make a step on this machine. (This is where DeepSpeed compiles.)"""
    formula = FORMULAS[peer][optimizer]
    arguments = dict.fromkeys(formula.not_zero.split(), 0.5)
    options = _options(formula, optimizer, arguments)
    assert options is not None
    p = torch.nn.Parameter(torch.ones(16))
    p.grad = torch.ones(16)
    try:
        run = _maker(formula, options)([p])
        with _quiet():
            run()
        if not (p < 1).all():
            raise ArithmeticError("a step against the gradient left a parameter where it was")
    except Exception as error:  # whatever a compiler, a loader or a package raises
        _failures[f"{peer} {optimizer}"] = f"cannot make a step on this machine: {_told(error)}"
        return False
    return True


def makers(optimizer: str, arguments: Options) -> dict[str, Maker]:
    """Every installed peer that computes the same as onepass's class of that name with these arguments."""
    found: dict[str, Maker] = {}
    for peer, formulas in FORMULAS.items():
        if optimizer not in formulas or (options := _options(formulas[optimizer], optimizer, arguments)) is None:
            continue
        if _import_error(peer) is None and _trial(peer, optimizer):
            found[peer] = _maker(formulas[optimizer], options)
    return found


def compiled(optimizer: str, arguments: Options) -> dict[str, Maker]:
    """torch's class, its step under torch.compile; empty where that gains nothing or is something else.

    The learning rate is a tensor, as torch recommends: then a schedule does not compile the step anew. Compiling falls
    in the first call: a minute for 200 parameters on two cores, more than four for 1,000. Dynamo keeps what it compiled
    by the code of ``step``, for a few sets of parameters, and then gives up in silence; so each maker makes it forget
    all.
    """
    if optimizer not in COMPILABLE:
        return {}
    torchs = getattr(torch.optim, optimizer)
    lr = arguments.get("lr", inspect.signature(torchs).parameters["lr"].default)

    def make(params: list[Tensor]) -> Run:
        torch._dynamo.reset()
        # It logs at every start that it leaves the profiler's scope out.
        logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
        made = torchs(params, **arguments | {"foreach": False, "lr": torch.as_tensor(lr)})
        with _quiet():  # the compiler is imported here
            run: Run = torch.compile(made.step)
        return run

    return {"compiled": make}


def every(optimizer: str, arguments: Options) -> dict[str, Maker]:
    """All of them; first what makes Dynamo forget what it has compiled, before others use it."""
    return compiled(optimizer, arguments) | makers(optimizer, arguments)


def missing() -> dict[str, str]:
    """Peers that are not measured here, and why: not to be imported, or failed when ``makers`` tried them."""
    errors = {peer: error for peer in PACKAGES if (error := _import_error(peer)) is not None}
    return errors | _failures


def versions() -> dict[str, str]:
    """The versions of those that can be imported."""
    return {
        peer: importlib.metadata.version(package)
        for peer, (package, _) in PACKAGES.items()
        if _import_error(peer) is None
    }
