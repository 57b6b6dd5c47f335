"""Errors: torch's words where torch has some, and at the step one exception that names the tensor, before any write."""

import copy
import re
import sys
from fractions import Fraction
from functools import partial

import numpy as np
import onepass
import pytest
import torch
from cases import ELEMENTWISE, ROW, ROWS, each_class, each_of_torchs, each_row, for_rows
from contract import assert_same, give_gradients, leaves, numbers, run_both, snapshot, torch_path, train
from reference import params_of
from torch.nn import Parameter

# -- constructors: the same exception as torch's own class, word for word --------------------------------------------


def two(value=0.5):
    return torch.full((2,), value)


def one(value=0.5):
    return torch.tensor(value)


# Tried with every class that has them. What one class refuses another may take, if torch's does.
ARGUMENTS = [
    {"lr": -1.0},
    {"lr": -1},
    {"lr": float("nan")},
    {"lr": "fast"},
    {"lr": None},
    {"lr": two()},
    {"lr": one(-0.5)},
    {"lr": one(), "foreach": True},
    {"lr": one(), "foreach": True, "capturable": False},
    {"fused": True, "foreach": True},
    {"fused": True, "differentiable": True},
    {"weight_decay": -0.5},
    {"weight_decay": float("nan")},
    {"eps": -1e-8},
    {"betas": (-0.1, 0.9)},
    {"betas": (1.0, 0.9)},
    {"betas": (0.9, -0.1)},
    {"betas": (0.9, 1.0)},
    {"betas": (0.9, float("nan"))},
    {"betas": (one(), 0.9)},
    {"betas": (0.9, one())},
    {"betas": (0, 0.9)},
    {"betas": (0.9,)},
    {"betas": 0.9},
    {"betas": (one(), one()), "foreach": True},
    {"betas": (two(), one())},
    {"betas": (one(), two())},
    {"momentum": -0.5},
    {"nesterov": True},
    {"nesterov": True, "momentum": 0.5, "dampening": 0.5},
    {"lr_decay": -0.5},
    {"initial_accumulator_value": -0.5},
    {"alpha": -0.5},
    {"rho": -0.5},
    {"rho": 1.5},
    {"momentum_decay": -0.5},
    {"beta2_decay": 0.5},
    {"beta2_decay": -0.5, "eps": (-0.1, 0.1)},
    {"beta2_decay": -0.5, "eps": (0.1, -0.1)},
    {"d": 0.5},
    {"adjust_lr_fn": "best"},
    {"etas": (0.0, 1.2)},
    {"etas": (1.0, 1.2)},
    {"etas": (0.5, 1.0)},
    {"etas": (1.2, 0.5)},
    {"etas": (0.5,)},
    {"etas": 0.5},
]
# What torch says of parameters, whichever the class.
PARAMETERS = {
    "none": list,
    "one tensor": lambda: torch.ones(2),
    "not a tensor": lambda: [1.0],
    "a set": lambda: [{"params": {Parameter(torch.ones(2))}}],
    "not a leaf": lambda: [Parameter(torch.ones(2)) * 2],
    "twice in a group": lambda: [Parameter(torch.ones(2))] * 2,
    "in two groups": lambda: [{"params": [ONE]}, {"params": [ONE]}],
    "named and not": lambda: [("a", Parameter(torch.ones(2))), Parameter(torch.ones(2))],
    "a named group and another": lambda: [{"params": [("a", ONE)]}, {"params": [Parameter(torch.ones(2))]}],
    "no params": lambda: [{"lr": 1.0}],
    "a number": lambda: 3,
}
ONE = Parameter(torch.ones(2))

TORCHS = [row for row in ROWS if issubclass(row.ours, row.theirs)]

BAD_CALLS = [
    *((row, partial(leaves, row.shapes), options) for row in TORCHS for options in ARGUMENTS if row.takes(options)),
    *((row, partial(leaves, row.shapes), {"no_such_argument": 1}) for row in TORCHS),
    *((row, params, {}) for row in ROWS for params in PARAMETERS.values()),
    # Both are bad: which of them is named.
    *((row, lambda: None, options) for row in TORCHS for options in ARGUMENTS if row.takes(options)),
]


def complaint(function):
    """The exception, or warning made one, that a call raises; None if it raises none."""
    try:
        function()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize(("row", "params", "options"), BAD_CALLS)
def test_bad_arguments_are_refused_in_torchs_words(row, params, options):
    assert complaint(lambda: row.ours(params(), **options)) == complaint(lambda: row.theirs(params(), **options))


def test_what_is_tried_above_is_bad():
    """In the eyes of one class of torch's at least; and each class refuses something."""

    def refused(row, params, options):
        return complaint(lambda: row.theirs(params(), **options)) is not None

    refusals = [call for call in BAD_CALLS if refused(*call)]
    tried = [options for options in ARGUMENTS if any(row.takes(options) for row in TORCHS)]
    assert all(any(options is refused for _, _, refused in refusals) for options in tried)
    assert all(any(row is tried for tried, _, options in refusals if options) for row in TORCHS)


@each_row
@pytest.mark.parametrize(
    "group",
    [
        lambda: [Parameter(torch.ones(2))],
        lambda: {"params": [ONE]},
        lambda: {"params": {ONE}},
        lambda: {"params": [3]},
        lambda: {"params": [("a", Parameter(torch.ones(2)))]},
        dict,
    ],
)
def test_bad_groups_are_refused_in_torchs_words(row, group):
    ours, stock = (cls([ONE], **row.full) for cls in (row.ours, row.theirs))
    assert complaint(lambda: ours.add_param_group(group())) == complaint(lambda: stock.add_param_group(group()))
    assert len(ours.param_groups) == 1


LIKE_ADAMW = [
    ({"lr": -1.0}, "Invalid learning rate: -1.0"),
    ({"lr": two()}, "Tensor lr must be 1-element"),
    ({"eps": -1e-8}, "Invalid epsilon value: -1e-08"),
    ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
    ({"betas": (-0.1, 0.9)}, "Invalid beta parameter at index 0: -0.1"),
    ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
]

# Of the classes that torch does not have.
MESSAGES = {
    "Lion": [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"lr": two()}, "Tensor lr must be 1-element"),
        ({"betas": (-0.1, 0.9)}, "Invalid beta parameter at index 0: -0.1"),
        ({"betas": (0.9, 1.0)}, "Invalid beta parameter at index 1: 1.0"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
    ],
    "Signum": [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"lr": two()}, "Tensor lr must be 1-element"),
        ({"momentum": -0.1}, "Invalid momentum value: -0.1"),
        ({"momentum": 1.0}, "Invalid momentum value: 1.0"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
    ],
    "ScheduleFreeAdamW": [
        *LIKE_ADAMW,
        ({"betas": (0.0, 0.9)}, "Invalid beta parameter at index 0: 0.0; it must be above 0"),
        ({"warmup_steps": -1}, "Invalid warmup_steps value: -1"),
        ({"r": -1.0}, "Invalid r value: -1.0"),
        ({"weight_lr_power": -2.0}, "Invalid weight_lr_power value: -2.0"),
    ],
    "ScheduleFreeRAdam": [
        *LIKE_ADAMW,
        ({"betas": (0.0, 0.9)}, "Invalid beta parameter at index 0: 0.0; it must be above 0"),
        ({"r": -1.0}, "Invalid r value: -1.0"),
    ],
    "ScheduleFreeSGD": [
        *LIKE_ADAMW[:2],
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        ({"momentum": 0.0}, "Invalid momentum value: 0.0; it must be above 0"),
        ({"momentum": 1.0}, "Invalid momentum value: 1.0"),
        ({"warmup_steps": -1}, "Invalid warmup_steps value: -1"),
    ],
    "CAME": [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": two()}, "Tensor lr must be 1-element"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        ({"betas": (1.0, 0.9, 0.9)}, "Invalid beta parameter at index 0: 1.0"),
        ({"betas": (0.9, 0.9, -0.1)}, "Invalid beta parameter at index 2: -0.1"),
        ({"eps": (1e-30, -1.0)}, "Invalid epsilon value at index 1: -1.0"),
        ({"clip_threshold": 0.0}, "Invalid clip_threshold value: 0.0"),
        ({"clip_threshold": -1.0}, "Invalid clip_threshold value: -1.0"),
    ],
    "LAMB": LIKE_ADAMW,
    "LARS": [
        *LIKE_ADAMW[:4],
        ({"momentum": 1.0}, "Invalid momentum value: 1.0"),
        ({"trust_coefficient": -1.0}, "Invalid trust_coefficient value: -1.0"),
    ],
    "MARS": [*LIKE_ADAMW, ({"gamma": -1.0}, "Invalid gamma value: -1.0")],
    "NorMuon": [
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": two()}, "Tensor lr must be 1-element"),
        ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
        ({"momentum": -0.1}, "Invalid momentum value: -0.1"),
        ({"momentum": 1.0}, "Invalid momentum value: 1.0"),
        ({"beta2": 1.0}, "Invalid beta2 value: 1.0"),
        ({"beta2": -0.5}, "Invalid beta2 value: -0.5"),
        (
            {"adjust_lr_fn": "other"},
            'NorMuon: adjust_lr_fn must be "original", "match_rms_adamw" or None, got \'other\'',
        ),
    ],
    "NovoGrad": LIKE_ADAMW,
    "Prodigy": [
        *LIKE_ADAMW,
        ({"beta3": 1.0}, "Invalid beta3 value: 1.0"),
        ({"beta3": -0.5}, "Invalid beta3 value: -0.5"),
        ({"d0": 0.0}, "Invalid d0 value: 0.0"),
        ({"d0": float("inf")}, "Invalid d0 value: inf"),
        ({"d_coef": 0.0}, "Prodigy: d_coef must be above 0 and finite, got 0.0"),
        ({"growth_rate": 0.9}, "Prodigy: growth_rate must be >= 1, got 0.9"),
        ({"slice_p": 0}, "Prodigy: slice_p must be >= 1, got 0"),
    ],
    "StableAdamW": LIKE_ADAMW,
    "AdaBelief": LIKE_ADAMW,
    "LaProp": LIKE_ADAMW,
    "ADOPT": [*LIKE_ADAMW, ({"clip_exponent": -0.5}, "Invalid clip_exponent value: -0.5")],
    "AdEMAMix": [
        *LIKE_ADAMW[:4],
        ({"betas": (0.9, 0.9, 1.0)}, "Invalid beta parameter at index 2: 1.0"),
        ({"alpha": -1.0}, "Invalid alpha value: -1.0"),
        ({"alpha_warmup": -1}, "Invalid alpha_warmup value: -1"),
        ({"beta3_warmup": -1}, "Invalid beta3_warmup value: -1"),
    ],
    "Adan": [*LIKE_ADAMW[:4], ({"betas": (0.9, -0.5, 0.9)}, "Invalid beta parameter at index 1: -0.5")],
}


@for_rows(row for row in ROWS if row not in TORCHS)
def test_messages_of_classes_that_torch_does_not_have(row):
    for options, text in MESSAGES[row.name]:
        assert complaint(lambda options=options: row.ours(leaves(row.shapes), **options)) == (ValueError, text)


@pytest.mark.parametrize("betas", [(0.9,), (0.9, 0.99), (0.9, 0.99, 0.999), (0.9,) * 4, 0.9, None])
@for_rows(row for row in ROWS if row not in TORCHS)
def test_a_wrong_number_of_betas(row, betas):
    if not row.takes(["betas"]):
        return
    wanted = 2 if row.has_pairs else 3
    if isinstance(betas, tuple) and len(betas) == wanted:
        row.ours(leaves(), betas=betas)
        return
    with pytest.raises((ValueError, TypeError), match=f"{row.name}: betas must be {wanted} numbers, got"):
        row.ours(leaves(), betas=betas)


@each_row
@pytest.mark.parametrize("bad", [torch.int8, torch.complex64, torch.float8_e5m2, "bfloat16", 16])
def test_a_state_dtype_that_there_is_not(row, bad):
    known = "(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn)"
    text = re.escape(f"{row.name}: state_dtype must be one of {known} or None, got {bad!r}") + "$"
    with pytest.raises(ValueError, match=f"^{text}"):
        row.ours(leaves(), **row.full, state_dtype=bad)
    with pytest.raises(ValueError, match=f"^{text}"):
        row.ours([{"params": leaves(), "state_dtype": bad}], **row.full)
    opt = row.ours(leaves(), **row.full)
    with pytest.raises(ValueError, match=f"^{text}"):
        opt.add_param_group({"params": leaves(), "state_dtype": bad})
    assert len(opt.param_groups) == 1


# -- what torch's words do not say: which argument, which group ------------------------------------------------------


def noted(function):
    """The exception that a call raises: type, text, notes."""
    with pytest.raises((IndexError, RuntimeError, TypeError, ValueError)) as caught:
        function()
    return caught.type, str(caught.value), getattr(caught.value, "__notes__", [])


UNNAMED = [
    ({"lr": "1e-3"}, "lr must be a number, got the str '1e-3': convert it by float()"),
    ({"lr": None}, "lr must be a number, got the NoneType None"),
    ({"lr": [0.1]}, "lr must be a number, got the list [0.1]"),
    ({"weight_decay": "0.1"}, "weight_decay must be a number, got the str '0.1': convert it by float()"),
    ({"eps": "1e-8"}, "eps must be a number, got the str '1e-8': convert it by float()"),
    ({"betas": (0.9,)}, "betas must be 2 numbers, got the tuple (0.9,)"),
    ({"betas": 0.9}, "betas must be 2 numbers, got the float 0.9"),
    ({"betas": ("0.9", 0.999)}, "betas[0] must be a number, got the str '0.9': convert it by float()"),
    ({"etas": (0.5,)}, "etas must be 2 numbers, got the tuple (0.5,)"),
    ({"betas": (two(), one())}, "betas[0] must be one number, got a tensor of shape [2]"),
    ({"momentum": "0.9"}, "momentum must be a number, got the str '0.9': convert it by float()"),
]


@each_class
@pytest.mark.parametrize(("options", "text"), UNNAMED)
def test_exceptions_that_do_not_name_the_argument_have_a_note_that_does(row, options, text):
    if not row.takes(options) or (row.has_means and "eps" in options):
        return
    if "betas" in options and not row.has_pairs:
        return
    kind, said, notes = noted(lambda: row.ours(leaves(row.shapes), **options))
    torchs = complaint(lambda: row.theirs(leaves(row.shapes), **options))
    if row not in TORCHS or torchs is None:
        assert said == f"{row.name}: {text}"
        return
    assert (kind, said) == torchs
    assert notes == ([f"{row.name}: {text}"] if sys.version_info >= (3, 11) else [])


@each_class
@pytest.mark.parametrize("options", [{"lr": -1.0}, {"no_such_argument": 1}])
def test_exceptions_that_name_the_argument_have_no_note(row, options):
    assert noted(lambda: row.ours(leaves(row.shapes), **options))[2] == []


# Hyperparameters that torch's constructors take, and of which its step, if it fails at all, does not say what is wrong.
USELESS = [
    ({"lr": 10**400}, ValueError, "lr must fit a float, got an int of 1329 bits"),
    ({"weight_decay": 10**400}, ValueError, "weight_decay must fit a float, got an int of 1329 bits"),
    ({"betas": (0.9, 0.999, 0.5)}, ValueError, "betas must be 2 numbers, got the tuple (0.9, 0.999, 0.5)"),
]
# And those which it takes in a group, as its constructors do not look at groups.
USELESS_IN_GROUPS = [
    *USELESS,
    ({"lr": "1e-3"}, TypeError, "lr must be a number, got the str '1e-3': convert it by float()"),
    ({"lr": two()}, ValueError, "lr must be one number, got a tensor of shape [2]"),
    ({"lr": {}}, TypeError, "lr must be a number, got the dict {}"),
    ({"weight_decay": [0.1]}, TypeError, "weight_decay must be a number, got the list [0.1]"),
    ({"betas": (0.9,)}, ValueError, "betas must be 2 numbers, got the tuple (0.9,)"),
    ({"betas": 0.9}, TypeError, "betas must be 2 numbers, got the float 0.9"),
    ({"betas": "0.9"}, TypeError, "betas must be 2 numbers, got the str '0.9'"),
    ({"betas": (0.9, "0.999")}, TypeError, "betas[1] must be a number, got the str '0.999': convert it by float()"),
    ({"betas": (two(), 0.9)}, ValueError, "betas[0] must be one number, got a tensor of shape [2]"),
    ({"momentum": "0.9"}, TypeError, "momentum must be a number, got the str '0.9': convert it by float()"),
]


@each_class
@pytest.mark.parametrize(("options", "kind", "text"), USELESS)
def test_arguments_with_which_no_step_can_be_made(row, options, kind, text):
    if row.takes(options) and (row.has_pairs or "betas" not in options):
        assert complaint(lambda: row.ours(leaves(row.shapes), **options)) == (kind, f"{row.name}: {text}")


@each_class
@pytest.mark.parametrize(("options", "kind", "text"), USELESS_IN_GROUPS)
def test_groups_with_which_no_step_can_be_made(row, options, kind, text):
    if not row.takes(options) or ("betas" in options and not row.has_pairs):
        return
    wanted = kind, f"{row.name}: group 1: {text}"
    groups = [{"params": leaves(row.shapes)}, {"params": leaves(row.shapes, seed=1), **options}]
    assert complaint(lambda: row.ours(groups, **row.full)) == wanted
    opt = row.ours(groups[:1], **row.full)
    more = {"params": leaves(row.shapes, seed=1), **options}
    assert complaint(lambda: opt.add_param_group(more)) == wanted
    assert len(opt.param_groups) == 1
    assert more.keys() == {"params", *options}


@pytest.mark.parametrize("cls", [onepass.Muon, onepass.NorMuon, onepass.LBFGS])
@pytest.mark.parametrize(("options", "kind", "text"), [row for row in USELESS_IN_GROUPS if "lr" in row[0]])
def test_rates_set_later_with_which_no_step_can_be_made(cls, options, kind, text):
    """Of the classes whose steps read their groups in Python; the others are tried with the plan's readers."""
    opt = cls([{"params": leaves([(2, 2)])}, {"params": leaves([(2, 2)], seed=1)}])
    train(opt)
    before = snapshot(opt)
    opt.param_groups[1].update(options)
    assert complaint(lambda: train(opt, first=1)) == (kind, f"{cls.__name__}: group 1: {text}")
    assert_same(snapshot(opt), before)


@each_class
def test_flags_may_be_none_as_with_torch(row):
    for name in ("amsgrad", "centered", "nesterov"):
        if row.takes([name]):
            assert row.ours(leaves(row.shapes), **{**row.full, name: None}).param_groups[0][name] is None


@each_class
def test_numbers_of_other_libraries_are_numbers(row):
    for lr in (np.float32(0.5), np.array(0.5), np.array([0.5]), Fraction(1, 2), torch.tensor([0.5]), True, 1):
        opt = row.ours([{"params": leaves(row.shapes), "lr": lr}], **row.full)
        assert opt.param_groups[0]["lr"] is lr


MODULES = {
    "Linear": lambda: torch.nn.Linear(2, 3),
    "Sequential": lambda: torch.nn.Sequential(torch.nn.Linear(2, 3)),
    "ModuleList": lambda: torch.nn.ModuleList([torch.nn.Linear(2, 3)]),
    "ParameterDict": lambda: torch.nn.ParameterDict({"a": Parameter(torch.ones(2))}),
}


@each_class
@pytest.mark.parametrize("name", MODULES)
def test_a_module_in_place_of_its_parameters(row, name):
    text = f"params must be parameters or groups of them, got the module {name}: pass its parameters()"
    assert complaint(lambda: row.ours(MODULES[name](), **row.full)) == (TypeError, f"{row.name}: {text}")
    wanted = TypeError, f"{row.name}: group 0: {text}"
    assert complaint(lambda: row.ours([{"params": MODULES[name]()}], **row.full)) == wanted
    opt = row.ours(leaves(row.shapes), **row.full)
    wanted = TypeError, f"{row.name}: group 1: {text}"
    assert complaint(lambda: opt.add_param_group({"params": MODULES[name]()})) == wanted
    assert len(opt.param_groups) == 1


OWN = [
    ({"norm_type": 3}, ValueError, "norm_type must be 2 or inf, got the int 3"),
    ({"norm_type": "2"}, ValueError, "norm_type must be 2 or inf, got the str '2'"),
    ({"zero_grad": "False"}, TypeError, "zero_grad must be True or False, got the str 'False'"),
    ({"zero_grad": 1}, TypeError, "zero_grad must be True or False, got the int 1"),
    ({"skip_nonfinite": "no"}, TypeError, "skip_nonfinite must be True or False, got the str 'no'"),
    ({"skip_nonfinite": None}, TypeError, "skip_nonfinite must be True or False, got the NoneType None"),
    ({"stochastic_rounding": "no"}, TypeError, "stochastic_rounding must be True or False, got the str 'no'"),
]


@pytest.mark.parametrize(("options", "error", "message"), OWN)
@pytest.mark.parametrize("cls", [onepass.AdamW, onepass.Lion, onepass.Muon])
def test_arguments_that_torchs_classes_do_not_have(cls, options, error, message):
    """Also where no other argument asks for a norm, or for anything else beside the update."""
    with pytest.raises(error, match=f"^{cls.__name__}: {message}"):
        cls([Parameter(torch.ones(2, 2))], **options)


def test_integers_of_numpy():
    """Every integer argument takes them."""
    opt = onepass.SGD(leaves())
    with onepass.log_to(Recorder(), opt, interval=np.int64(2), first_step=np.int32(3)) as log:
        assert log.step == 3
    with pytest.raises(ValueError, match=r"^log_to: interval must be >= 1, got 0$"):
        onepass.log_to(Recorder(), opt, interval=0)
    for wrong in (2.5, True, "2"):
        kind = type(wrong).__name__
        with pytest.raises(TypeError, match=f"^log_to: interval must be an integer >= 1, got the {kind} {wrong!r}"):
            onepass.log_to(Recorder(), opt, interval=wrong)


class Recorder:
    """A writer for log_to."""

    def add_scalar(self, tag, value, step):
        pass


# -- at the step -----------------------------------------------------------------------------------------------------

# Damage to parameter 1 of group 1, a (4, 3) matrix of float64, and what the message says of it.
DAMAGE = {}
STATE_DAMAGE = {}


def damage(text, table=DAMAGE):
    def register(function):
        table[function.__name__] = (function, text)
        return function

    return register


@damage("its gradient has shape [5] and dtype torch.float64")
def gradient_of_another_shape(opt, p, row):
    p.grad.data = numbers(5)


@damage("its gradient has shape [3, 4] and dtype torch.float64")
def gradient_transposed(opt, p, row):
    p.grad.data = numbers(3, 4)


@damage("its gradient has shape [1, 4, 3] and dtype torch.float64")
def gradient_of_one_more_dimension(opt, p, row):
    p.grad.data = numbers(1, 4, 3)


@damage("its gradient has shape [1] and dtype torch.float64")
def gradient_that_would_broadcast(opt, p, row):
    p.grad.data = numbers(1)


@damage("its gradient has shape [4, 3] and dtype torch.complex128")
def gradient_complex(opt, p, row):
    p.grad.data = numbers(4, 3, dtype=torch.complex128)


@damage("several of its elements share the same memory (it is expanded)")
def parameter_expanded(opt, p, row):
    p.data = numbers(3).expand(4, 3)


@damage("its state STATE has shape [4, 2] and dtype torch.float64", STATE_DAMAGE)
def state_of_another_shape(opt, p, row):
    opt.state[p][row.states[-1]] = numbers(4, 2)


@damage("its state STATE has shape [3, 4] and dtype torch.float64", STATE_DAMAGE)
def state_resized_in_place(opt, p, row):
    opt.state[p][row.states[-1]].data = numbers(3, 4)


@damage("its state STATE has shape [] and dtype torch.float64", STATE_DAMAGE)
def state_that_would_broadcast(opt, p, row):
    opt.state[p][row.states[-1]] = numbers()


@damage("its state STATE has shape [4, 3] and dtype torch.complex128", STATE_DAMAGE)
def state_complex(opt, p, row):
    opt.state[p][row.states[-1]] = numbers(4, 3, dtype=torch.complex128)


@damage("its state STATE has dtype torch.int64", STATE_DAMAGE)
def state_of_integers(opt, p, row):
    opt.state[p][row.states[-1]] = torch.ones(4, 3, dtype=torch.int64)


@damage("its state STATE has no strided memory (layout torch.strided, device meta)", STATE_DAMAGE)
def state_on_another_device(opt, p, row):
    opt.state[p][row.states[-1]] = torch.ones(4, 3, dtype=torch.float64, device="meta")


@damage("its state STATE is not a tensor", STATE_DAMAGE)
def state_that_is_a_number(opt, p, row):
    opt.state[p][row.states[-1]] = 0.5


@damage("its state STATE has several elements that share the same memory", STATE_DAMAGE)
def state_expanded(opt, p, row):
    opt.state[p][row.states[-1]] = numbers(3).expand(4, 3)


@damage("its own tensors (parameter, states, step) overlap in memory", STATE_DAMAGE)
def state_that_is_the_parameter(opt, p, row):
    opt.state[p][row.states[-1]] = p.data


@damage("its own tensors (parameter, states, step) overlap in memory", STATE_DAMAGE)
def state_that_overlaps_the_parameter(opt, p, row):
    buffer = numbers(20)
    p.data, opt.state[p][row.states[-1]] = buffer[:12].view(4, 3), buffer[8:].view(4, 3)


@damage("its state is not a dict", STATE_DAMAGE)
def state_that_is_no_dict(opt, p, row):
    opt.state[p] = [1, 2]


def groups(row):
    opt = row.ours([{"params": leaves([(2,), (4, 3)])}, {"params": leaves([(3,), (4, 3)], seed=1)}], **row.full)
    return opt, opt.param_groups[1]["params"][1]


def everything(opt):
    """All memory that a step could write, and the versions that tell of writes."""
    states = [dict(opt.state[p]) if isinstance(opt.state.get(p), dict) else opt.state.get(p) for p in params_of(opt)]
    values = [state.values() if isinstance(state, dict) else () for state in states]
    tensors = [p.detach() for p in params_of(opt)] + [v for vs in values for v in vs if isinstance(v, torch.Tensor)]
    names = [list(state) if isinstance(state, dict) else type(state) for state in states]
    real = [t for t in tensors if not t.is_meta]
    return copy.deepcopy(real), [t._version for t in tensors], names


def assert_refused(opt, p, row, what):
    before = everything(opt)
    where = f"{row.name}: parameter 1 of group 1 (shape [4, 3], torch.float64): "
    what = what.replace("STATE", row.states[-1])
    for _ in range(2):  # the second time as the first
        with pytest.raises(ValueError, match="^" + re.escape(where + what)):
            opt.step()
        after = everything(opt)
        assert_same(after[0], before[0])
        assert after[1:] == before[1:]
    told = onepass.explain(opt)[3]
    assert (told.path, told.reason.startswith(where + what)) == ("error", True)
    assert everything(opt)[1:] == before[1:]


@each_row
@pytest.mark.parametrize(("hurt", "what"), [pytest.param(*hurt, id=name) for name, hurt in DAMAGE.items()])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_that_cannot_be_made_writes_nothing(row, hurt, what, steps):
    opt, p = groups(row)
    twin, _ = groups(row)
    train(opt, steps)
    train(twin, steps)
    give_gradients(params_of(opt), steps)
    whole = p.data
    hurt(opt, p, row)
    assert_refused(opt, p, row, what)
    # Once it is mended, it goes on as if nothing had happened.
    p.data = whole
    train(opt, 2, first=steps)
    train(twin, 2, first=steps)
    assert_same(snapshot(opt), snapshot(twin))


@each_row
@pytest.mark.parametrize(("hurt", "what"), [pytest.param(*hurt, id=name) for name, hurt in STATE_DAMAGE.items()])
def test_a_step_with_a_state_that_does_not_fit_writes_nothing(row, hurt, what):
    opt, p = groups(row)
    twin, _ = groups(row)
    train(opt, 2)
    train(twin, 2)
    give_gradients(params_of(opt), 2)
    whole, state = p.data, opt.state[p]
    opt.state[p] = dict(state)
    values = {name: value.data for name, value in state.items()}
    hurt(opt, p, row)
    assert_refused(opt, p, row, what)
    p.data, opt.state[p] = whole, state
    for name, value in state.items():
        value.data = values[name]
    train(opt, 2, first=2)
    train(twin, 2, first=2)
    assert_same(snapshot(opt), snapshot(twin))


TWO_STATES = [(row, name) for row in ELEMENTWISE for name in (*row.scalars, *row.states[:-1])]


@pytest.mark.parametrize(("row", "name"), TWO_STATES)
def test_two_states_in_the_same_memory(row, name):
    opt, p = groups(row)
    train(opt, 2)
    state = opt.state[p]
    other = state[row.states[-1]] = numbers(12).view(4, 3)
    state[name] = other[2, 1] if name in row.scalars else other
    assert_refused(opt, p, row, "its own tensors (parameter, states, step) overlap in memory")


def group_without_numbers(opt):
    opt.param_groups[0] = {"params": opt.param_groups[0]["params"]}


def group_without_parameters(opt):
    del opt.param_groups[0]["params"]


def group_with_a_flag_that_is_neither(opt):
    opt.param_groups[0]["maximize"] = torch.ones(2)


@each_row
@pytest.mark.parametrize(
    ("hurt", "error", "text"),
    [
        (group_without_numbers, KeyError, "group 0 has no "),
        (group_without_parameters, TypeError, "group 0 has no list of params"),
        (group_with_a_flag_that_is_neither, RuntimeError, "Boolean value of Tensor with more than one value"),
    ],
)
def test_a_group_that_cannot_be_read_is_refused_at_every_step(row, hurt, error, text):
    opt, _ = groups(row)
    train(opt, 2)
    before = snapshot(opt)
    group = dict(opt.param_groups[0])
    give_gradients(params_of(opt), 2)
    hurt(opt)
    for _ in range(2):
        with pytest.raises(error, match=text):
            opt.step()
    opt.param_groups[0] = group
    assert_same(snapshot(opt), before)


@each_row
def test_the_message_has_the_name_of_a_named_parameter(row):
    model = torch.nn.Linear(3, 4)
    opt = row.ours(model.named_parameters(), **row.full)
    give_gradients(params_of(opt), 0)
    model.bias.grad.data = torch.ones(5)
    text = f"{row.name}: parameter 1 of group 0 'bias' (shape [4], torch.float32): its gradient has shape [5]"
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        opt.step()


@each_row
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn])
def test_a_dtype_that_no_optimizer_steps(row, dtype, steps):
    """torch's code says so in its own words, which depend on the class; ours has written nothing by then."""
    opt = row.ours([{"params": leaves([(2,), (4, 3)])}], **row.full)
    train(opt, steps)
    before = snapshot(opt)
    odd = torch.ones(4).to(dtype)
    opt.add_param_group({"params": [odd]})
    give_gradients(params_of(opt)[:2], steps)
    odd.grad = torch.ones(4).to(dtype)
    with pytest.raises((RuntimeError, NotImplementedError, ValueError)):
        opt.step()
    del opt.param_groups[1]
    assert_same(snapshot(opt), before)
    assert_same(odd.float(), torch.ones(4))


# -- hyperparameters that are set later --------------------------------------------------------------------------------

# What is put into a group between steps, the exception's type, and what its text has after "NAME: group 1: ".
SET_LATER = [
    ("betas", (0.9, 0.999, 0.5), ValueError, "betas must be 2 numbers, got"),
    ("betas", (0.9,), ValueError, "betas must be 2 numbers, got"),
    ("betas", 0.9, TypeError, "betas must be 2 numbers, got"),
    ("betas", None, TypeError, "betas must be 2 numbers, got"),
    ("betas", (0.9, "0.999"), TypeError, "betas[1] must be a number, "),
    ("betas", (0.9, two()), ValueError, "betas[1] must be one number, got a tensor"),
    ("etas", (0.5,), ValueError, "etas must be 2 numbers, got"),
    ("lr", 10**400, ValueError, "lr must fit a float"),
    ("weight_decay", 10**400, ValueError, "weight_decay must fit a float"),
    ("lr", two(), ValueError, "lr must be one number, got a tensor"),
    ("lr", "1e-3", TypeError, "lr must be a number, "),
    ("lr", None, TypeError, "lr must be a number, "),
]


@pytest.mark.parametrize(
    ("row", "name", "value", "kind", "text"),
    # Rprop reads its lr only to make new states.
    [
        (row, *case)
        for row in ELEMENTWISE
        for case in SET_LATER
        if row.takes(case[:1]) and (row.name, case[0]) != ("Rprop", "lr") and (row.has_pairs or case[0] != "betas")
    ],
)
def test_hyperparameters_set_later_with_which_no_step_can_be_made(row, name, value, kind, text):
    opt = row.ours([{"params": leaves(row.shapes)}, {"params": leaves(row.shapes, seed=1)}], **row.full)
    train(opt, 1)
    before = snapshot(opt)
    opt.param_groups[1][name] = value
    for _ in range(2):
        with pytest.raises(kind, match="^" + re.escape(f"{row.name}: group 1: {text}")):
            train(opt, 1, first=1)
        assert_same(snapshot(opt), before)


@pytest.mark.parametrize(
    ("row", "name"),
    [(row, name) for row in ELEMENTWISE for name in ("amsgrad", "nesterov", "centered") if row.takes([name])],
)
def test_a_flag_that_is_none_is_false(row, name):
    ends = []
    for value in (None, False):
        opt = row.ours(leaves(row.shapes), **{**row.full, name: value})
        train(opt, 3)
        ends.append(snapshot(opt))
    assert_same(*ends)


# -- divisions by zero -----------------------------------------------------------------------------------------------


def betas(*values):
    return lambda opt: opt.param_groups[0].update(betas=values)


def count(steps):
    def change(opt):
        for state in opt.state.values():
            state["step"] = steps if isinstance(state["step"], int) else torch.tensor(float(steps))

    return change


def change_group(**values):
    return lambda opt: opt.param_groups[0].update(values)


ADAMS = ["Adam", "AdamW", "RAdam", "SparseAdam"]
ZERO_DIVISORS = [
    *((name, t, betas(1.0, 0.9), "1 - betas[0] ** step") for name in [*ADAMS, "Adamax"] for t in (0, 2)),
    *((name, t, betas(0.9, 1.0), "1 - betas[1] ** step") for name in [*ADAMS, "NAdam"] for t in (0, 2)),
    *((name, 2, count(-1), "1 - betas[0] ** step") for name in [*ADAMS, "Adamax"]),
    ("NAdam", 0, change_group(betas=(2.0, 0.9), momentum_decay=0.0), "1 - mu_product"),
    ("Adagrad", 2, change_group(lr_decay=-0.5), "1 + (step - 1) * lr_decay"),
    ("ASGD", 2, change_group(lr=0.5, lambd=-2 / 3), "(1 + lambd * lr * step) ** alpha"),
    ("Adafactor", 2, change_group(d=0.0), "d"),
    ("Adafactor", 2, count(-1), "step ** 0.5"),
]
# There torch divides tensors, and writes NaN.
SILENT_IN_TORCH = {(name, "1 - betas[1] ** step") for name in [*ADAMS, "NAdam"]} | {("RAdam", "1 - betas[0] ** step")}


@pytest.mark.parametrize(("name", "steps", "hurt", "divisor"), ZERO_DIVISORS)
def test_a_division_by_zero_is_refused_before_anything_is_written(name, steps, hurt, divisor):
    row = ROW[name]
    opt, stock = (cls(leaves([(4, 3)]), **row.full) for cls in (row.ours, row.theirs))
    for each in (opt, stock):
        train(each, steps)
        hurt(each)
    before = snapshot(opt)
    text = re.escape(f"{name}: parameter 0 of group 0 (shape [4, 3], torch.float64): {divisor} is zero")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError, match=f"^{text}$"):
            train(opt, 1, first=steps)
        assert_same(snapshot(opt), before)
    if steps:
        ((path, reason),) = [(row.path, row.reason) for row in onepass.explain(opt)]
        assert path == "error"
        assert re.fullmatch(text, reason)
    if (name, divisor) not in SILENT_IN_TORCH:
        with pytest.raises(ZeroDivisionError):
            train(stock, 1, first=steps)


# -- memory that is shared -------------------------------------------------------------------------------------------

SHARED = {
    "the same": lambda x: (x[:12], x[:12]),
    "overlapping": lambda x: (x[:12], x[6:18]),
    "a row and a column": lambda x: (x.view(3, 6)[1], x.view(3, 6)[:, 4]),
    "columns of which some touch": lambda x: (x.view(3, 6)[:, :4], x.view(3, 6)[:, 3:]),
    "one inside the other": lambda x: (x[:12], x[4:6]),
    "a matrix and a row": lambda x: (x[:12].view(3, 4), x[4:8]),
    "two inside one": lambda x: (x[10:12], x[:16], x[2:4]),
}
APART = {
    "touching": lambda x: (x[:12], x[12:]),
    "even and odd": lambda x: (x[0:12:2], x[1:12:2]),
    "columns": lambda x: x.view(3, 6).split([1, 3, 2], 1),
    "columns, transposed": lambda x: x.view(3, 6).t().split(2),
    "real and imaginary parts": lambda x: torch.view_as_real(torch.view_as_complex(x.view(9, 2))).unbind(1),
    "blocks": lambda x: (x.view(3, 2, 3)[:, :, :2], x.view(3, 2, 3)[:, 0, 2], x.view(3, 2, 3)[:, 1, 2]),
}


@each_row
@pytest.mark.parametrize("how", [*SHARED, *APART])
@pytest.mark.parametrize("groups", [1, 2])
def test_parameters_that_share_memory_are_stepped_as_torch_does(row, how, groups):
    def script(opt):
        first, *others = (Parameter(x) for x in {**SHARED, **APART}[how](numbers(18)))
        opt.add_param_group({"params": [first, *others] if groups == 1 else [first]})
        if groups == 2:
            opt.add_param_group({"params": others, "lr": 0.2})
        train(opt, 3)

    path = set() if how in APART else {"memory shared with another parameter"}
    run_both(row, script, path=path, **row.having(weight_decay=0.5))  # a decay makes their order count


@pytest.mark.slow
@each_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_columns_of_one_matrix_in_several_threads(row, dtype):
    """None writes into the gaps that are the others'."""
    matrix = numbers(4000, 33).to(dtype)
    columns = [Parameter(x) for x in matrix.split([1, 7, 16, 9], 1)]
    alone = [Parameter(x.detach().clone()) for x in columns]
    opts = [row.ours(params, **row.full) for params in (columns, alone)]
    before = onepass.stats()
    for opt in opts:
        train(opt, 3)
    assert torch_path(before) == set()
    assert_same(snapshot(opts[0]), snapshot(opts[1]))


@each_of_torchs
def test_a_gradient_in_the_gaps_of_its_parameter(row):
    def script(opt):
        halves = numbers(4, 6).clone()
        p = Parameter(halves[:, :3])
        opt.add_param_group({"params": [p]})
        p.grad = halves[:, 3:]
        opt.step()
        opt.step()

    run_both(row, script)


@each_row
@pytest.mark.parametrize("leaves_by", ["its gradient", "its group"])
def test_memory_that_is_no_longer_shared(row, leaves_by):
    """The kernels take the parameter that is left."""
    first, second = Parameter(numbers(4)), Parameter(torch.zeros(4))
    second.data = first.data
    opt = row.ours([first, second], **row.full)
    train(opt, 2)
    if leaves_by == "its gradient":
        second.grad = None
    else:
        del opt.param_groups[0]["params"][1]
    first.grad = numbers(4)
    before = onepass.stats()
    opt.step()
    after = onepass.stats()
    assert after["torch"] == before["torch"]
    assert after["kernel"]["cpu"] == before["kernel"]["cpu"] + 1


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@each_row
def test_a_parameter_that_is_listed_twice_is_stepped_twice(row):
    def script(opt):
        p = Parameter(numbers(4))
        opt.add_param_group({"params": [p, p]})
        train(opt, 3)
        return opt.state[p]["step"].item() if row.counts_steps else None

    run_both(row, script, path={"memory shared with another parameter"})


@each_row
def test_a_parameter_that_shares_memory_with_anothers_state(row):
    def script(opt):
        train(opt, 2)
        p, q = params_of(opt)[2:4]
        q.data.abs_().add_(1)  # whatever the state is, it may be this
        opt.state[p][row.states[0]] = q.data
        train(opt, 2, first=2)

    run_both(row, script, shapes=[(3,), (), (4, 3), (4, 3)], path={"memory shared with another parameter"})


@for_rows(row for row in ELEMENTWISE if row.counts_steps)
def test_one_step_tensor_for_all_parameters_counts_once_for_each(row):
    def script(opt):
        train(opt, 2)
        shared = torch.tensor(2.0)
        for p in params_of(opt):
            opt.state[p]["step"] = shared
        train(opt, 2, first=2)
        return shared.item()

    opt, _ = run_both(row, script, path={"memory shared with another parameter"})
    assert {row.reason for row in onepass.explain(opt)} == {"memory shared with another parameter"}


@each_of_torchs
@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (4, 3)], ids=["windows", "wide windows", "interleaved"])
def test_a_parameter_whose_elements_may_share_memory(row, strides):
    """torch steps these, whatever the sense; where no two elements share any, the result is the plain one."""

    def script(opt):
        p = Parameter(numbers(40).as_strided((3, 4), strides))
        opt.add_param_group({"params": [p]})
        train(opt, 3)

    run_both(row, script, path={"parameter with interleaved strides"})


@each_of_torchs
def test_a_gradient_that_overlaps_its_parameter(row):
    def script(opt):
        p = Parameter(numbers(4, 4))
        opt.add_param_group({"params": [p]})
        for grad in (p.data.t(), p.data[:1].expand(4, 4), p.data[1, 2].expand(4, 4)):
            p.grad = grad
            opt.step()

    run_both(row, script, path={"gradient that overlaps its parameter or states"})


@each_of_torchs
def test_a_gradient_that_is_its_state(row):
    def script(opt):
        train(opt)
        p = params_of(opt)[0]
        for name in row.states:
            p.grad = opt.state[p][name]
            opt.step()

    run_both(row, script, shapes=[(4, 3)], path={"gradient that overlaps its parameter or states"})


@each_row
def test_a_gradient_that_is_its_parameter(row):
    ours, plain = (row.ours([Parameter(numbers(4, 4))], **row.full) for _ in range(2))
    for opt in (ours, plain):
        for _ in range(2):
            (p,) = params_of(opt)
            p.grad = p.data if opt is ours else p.data.clone()
            opt.step()
    assert_same(snapshot(ours)["params"], snapshot(plain)["params"])


@each_row
def test_gradients_may_share_memory(row):
    def script(opt):
        buffer = numbers(5)
        a, b = Parameter(numbers(3)), Parameter(numbers(3) + 1)
        opt.add_param_group({"params": [a, b]})
        a.grad, b.grad = buffer[:3], buffer[2:]
        opt.step()
        opt.step()
        assert_same(buffer, numbers(5))

    run_both(row, script)
