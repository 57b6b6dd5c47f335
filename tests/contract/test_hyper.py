"""Hyperparameters: each is read anew at each step, tensors count with what they hold then, autograd can follow."""

from fractions import Fraction

import numpy as np
import onepass
import pytest
import torch
from cases import ELEMENTWISE, ROW, each_of_torchs, each_row, for_rows
from contract import assert_same, leaves, numbers, run_both, snapshot, torch_path, train
from reference import params_of

# -- changed between steps -------------------------------------------------------------------------------------------

# Tried with every class that has all of these arguments: what it begins with, beside `full`, and what changes. Of the
# flags that bring a state with them, torch's classes take no news but that they are off.
CHANGES = [
    ({}, {"lr": 0.3}),
    ({}, {"lr": 0}),
    ({}, {"weight_decay": 0.3}),
    ({}, {"weight_decay": 0}),
    ({"weight_decay": 0}, {"weight_decay": 0.3}),
    ({}, {"maximize": True}),
    ({"maximize": True}, {"maximize": False}),
    ({}, {"foreach": True}),
    ({}, {"fused": True}),
    ({"foreach": True}, {"foreach": False, "lr": 0.2}),
    ({}, {"eps": 0.1}),
    ({}, {"betas": (0.5, 0.75)}),
    ({}, {"betas": [0.5, 0.75]}),
    ({}, {"amsgrad": False}),
    ({}, {"decoupled_weight_decay": True}),
    ({}, {"decoupled_weight_decay": False}),
    ({}, {"lr": 0.3, "eps": 0.1, "weight_decay": 0.3, "betas": (0.1, 0.2), "maximize": True}),
    ({}, {"momentum": 0.5}),
    ({"nesterov": False}, {"momentum": 0}),
    ({"momentum": 0, "nesterov": False}, {"momentum": 0.5}),
    ({"nesterov": False}, {"dampening": 0.5}),
    ({"nesterov": False}, {"nesterov": True}),
    ({}, {"nesterov": False}),
    ({"nesterov": False}, {"lr": 0.5, "momentum": 0.5, "dampening": 0.1, "weight_decay": 0.3, "maximize": True}),
    ({}, {"alpha": 0.5}),
    ({}, {"centered": False}),
    ({}, {"centered": False, "momentum": 0}),
    ({}, {"rho": 0.5}),
    ({}, {"lr_decay": 0.5}),
    ({}, {"initial_accumulator_value": 0.5}),
    ({}, {"momentum_decay": 0.5}),
    ({}, {"lambd": 0.5}),
    ({}, {"lambd": 0}),
    ({}, {"t0": 100}),
    ({}, {"alpha": 0.5, "lambd": 0.1, "t0": 0, "lr": 0.3}),
    ({}, {"etas": (0.7, 1.5)}),
    ({}, {"etas": [0.7, 1.5]}),
    ({}, {"step_sizes": (1e-3, 1e-2)}),
    ({}, {"betas": (0.5, 0.75, 0.6)}),
    ({}, {"lr": 0.3, "eps": 0.1, "weight_decay": 0.3, "betas": [0.1, 0.2, 0.3], "maximize": True}),
    ({}, {"alpha_warmup": 9, "beta3_warmup": 11}),
    ({"alpha_warmup": 9, "beta3_warmup": 11}, {"alpha_warmup": None, "beta3_warmup": None}),
    ({}, {"no_prox": True}),
    ({}, {"gamma": 0.5}),
    ({}, {"clip_correction": False}),
    ({}, {"grad_averaging": True}),
    ({}, {"beta3": 0.5}),
    ({"beta3": 0.5}, {"beta3": None}),
    ({}, {"d": 0.03, "d_max": 0.03}),
    ({}, {"d0": 0.03}),
    ({}, {"d_coef": 1e-8}),
    ({}, {"growth_rate": 1.5}),
    ({}, {"slice_p": 1}),
    ({}, {"decouple": False}),
    ({"use_bias_correction": False}, {"use_bias_correction": True}),
    ({}, {"safeguard_warmup": True}),
    ({}, {"trust_ratio": False}),
    ({}, {"trust_clip": True}),
    ({}, {"trust_coefficient": 0.1}),
    ({}, {"warmup_steps": 9}),
    ({}, {"r": 1.5}),
    ({}, {"weight_lr_power": 1.0}),
    ({}, {"silent_sgd_phase": False}),
    ({}, {"clip_exponent": None}),
    ({"clip_exponent": None}, {"clip_exponent": 0.5}),
]


def fits(row, change):
    """Whether a class has these hyperparameters, and as many numbers in each."""
    defaults = row.theirs(leaves()).defaults
    return all(
        name in defaults and (not isinstance(value, list | tuple) or len(value) == len(defaults[name]))
        for name, value in change.items()
    )


KNOWN = [(row, o, c) for row in ELEMENTWISE for o, c in CHANGES if row.takes(o) and fits(row, c)]


@pytest.mark.parametrize(("row", "options", "change"), KNOWN)
def test_a_change_counts_at_the_next_step(row, options, change):
    def script(opt):
        opt.add_param_group({"params": leaves([(3,), (2, 2)], seed=7)})
        train(opt, 2)
        opt.param_groups[1].update(change)  # of one group, beside one that stays
        train(opt, 2, first=2)
        opt.param_groups[0].update(change)
        opt.param_groups[1].update({key: opt.defaults[key] for key in change})
        train(opt, 2, first=4)

    run_both(row, script, **options)


def test_every_key_of_a_group_is_changed_above():
    indifferent = {"params", "capturable", "differentiable", "fused", "foreach", "train_mode"}
    for row in ELEMENTWISE:
        keys = set(row.ours(leaves(), **row.full).param_groups[0]) - indifferent
        assert keys == {key for known, _, change in KNOWN if known is row for key in change} - indifferent


PAIRS = {"betas": ([0.8, 0.9], [0.3, 0.6]), "etas": ([0.5, 1.2], [0.8, 1.5]), "step_sizes": ([1e-6, 50], [1e-3, 0.1])}


@pytest.mark.parametrize(
    ("row", "name"),
    [(row, name) for row in ELEMENTWISE for name, (pair, _) in PAIRS.items() if fits(row, {name: pair})],
)
def test_a_pair_in_a_list_that_is_changed_in_place(row, name):
    before, after = PAIRS[name]

    def script(opt):
        pair = opt.param_groups[0][name] = list(before)
        train(opt, 2)
        pair[0] = after[0]
        train(opt, 2, first=2)
        pair[1] = after[1]
        train(opt, 2, first=4)

    run_both(row, script)


@each_of_torchs
@pytest.mark.parametrize("flag", ["maximize", "amsgrad", "nesterov", "centered", "decoupled_weight_decay"])
def test_a_flag_that_is_a_tensor_counts_with_what_it_holds_at_the_step(row, flag):
    if not row.takes([flag]):
        return

    def script(opt):
        held = opt.param_groups[0][flag] = torch.tensor(True)
        train(opt, 2)
        held.fill_(False)
        train(opt, 2, first=2)
        held.fill_(True)
        train(opt, 2, first=4)

    run_both(row, script)


class Number:
    """Something that only knows how to become a float."""

    def __init__(self, value):
        self.value = value

    def __float__(self):
        return self.value


@each_row
@pytest.mark.parametrize("number", [np.float64, np.float32, Fraction, Number])
def test_numbers_of_other_types(row, number):
    lr = number(0.25)
    opt, plain = (row.ours(leaves(), **row.full) for _ in range(2))
    for optimizer, value in ((opt, lr), (plain, 0.25)):
        optimizer.param_groups[0]["lr"] = value
        train(optimizer, 2)
    if isinstance(lr, Number):
        lr.value = plain.param_groups[0]["lr"] = 0.125
    train(opt, 2, first=2)
    train(plain, 2, first=2)
    assert_same(snapshot(opt), snapshot(plain))


@for_rows(row for row in ELEMENTWISE if row.name != "Rprop")  # whose lr is read at the first step only
@pytest.mark.parametrize("bad", ["fast", None, (1, 2)])
def test_what_is_not_a_number_is_an_error_that_names_it(row, bad):
    opt = row.ours(leaves(), **row.full)
    train(opt)
    opt.param_groups[0]["lr"] = bad
    with pytest.raises(TypeError, match=f"^{row.name}: group 0: lr must be a number, got the {type(bad).__name__} "):
        opt.step()
    del opt.param_groups[0]["lr"]
    with pytest.raises(KeyError, match=f"{row.name}: group 0 has no lr"):
        opt.step()


# -- tensors ---------------------------------------------------------------------------------------------------------


def scalar(value, *shape, **kw):
    return torch.full(shape, value, dtype=torch.float64, **kw)


TENSOR_LR = [(row, requires_grad) for row in ELEMENTWISE for requires_grad in (False, True)]
TENSOR_LR.remove((ROW["Rprop"], True))  # torch refuses it


@pytest.mark.parametrize(("row", "requires_grad"), TENSOR_LR)
@pytest.mark.parametrize("shape", [(), (1,)], ids=["no dimension", "one element"])
def test_a_tensor_lr_counts_with_what_it_holds_at_the_step(row, requires_grad, shape):
    def script(opt):
        lr = opt.param_groups[0]["lr"]
        opt.add_param_group({"params": leaves([(3,)], seed=7), "lr": 0.5})
        train(opt, 2)
        with torch.no_grad():
            lr.fill_(0.25)
        train(opt, 2, first=2)
        lr.data = scalar(0.125, *shape)
        train(opt, 2, first=4)
        assert opt.param_groups[0]["lr"] is lr
        return lr.item(), lr._version

    run_both(row, script, lr=scalar(0.5, *shape, requires_grad=requires_grad))


@for_rows(row for row in ELEMENTWISE if "tensor_betas" in row.variants)
@pytest.mark.parametrize("shape", [(), (1,)], ids=["no dimension", "one element"])
def test_tensor_betas(row, shape):
    def script(opt):
        train(opt, 2)
        for beta, value in zip(opt.param_groups[0]["betas"], (0.5, 0.6), strict=True):
            beta.fill_(value)
        train(opt, 2, first=2)
        return opt.param_groups[0]["betas"]

    run_both(row, script, lr=scalar(0.1), betas=(scalar(0.8, *shape), scalar(0.9, *shape)))


def test_tensor_weight_decay_of_sgd():
    def script(opt):
        train(opt, 2)
        opt.param_groups[0]["weight_decay"].fill_(0.6)
        train(opt, 2, first=2)

    run_both(ROW["SGD"], script, weight_decay=scalar(0.3))


# -- differentiable --------------------------------------------------------------------------------------------------

# Beside the parameter itself: torch has tensors for them in some classes only. Of the others, most write to what
# autograd needs of the step before, so they have one step.
LEARNT = {
    "SGD": [{"lr"}, {"lr", "weight_decay"}],
    "Adam": [{"lr"}, {"lr", "weight_decay"}, {"lr", "betas"}],
    "AdamW": [{"lr"}, {"lr", "weight_decay"}, {"lr", "betas"}],
}
DIFFERENTIABLE = [row for row in ELEMENTWISE if "differentiable" in row.arguments]


@pytest.mark.parametrize(
    ("row", "learnt"), [(row, keys) for row in DIFFERENTIABLE for keys in [set(), *LEARNT.get(row.name, [])]]
)
def test_gradients_flow_through_a_differentiable_step(row, learnt):
    """Some steps of training, and what the loss after them says of where it began, of lr, weight_decay and betas."""

    def trained(cls):
        start = numbers(4).requires_grad_()
        hyper = {"lr": scalar(0.1), "weight_decay": scalar(0.3), "betas": (scalar(0.8), scalar(0.9))}
        hyper = {key: hyper[key] for key in sorted(learnt)}
        learned = [start]
        for value in hyper.values():
            learned += value if isinstance(value, tuple) else [value]
        for value in learned:
            value.requires_grad_()
        p = start.clone()
        p.retain_grad()
        opt = cls([p], differentiable=True, **{**row.full, **row.having(amsgrad=False), **hyper})
        for _ in range(3 if row.name in LEARNT else 1):
            (grad,) = torch.autograd.grad((p.clone() ** 3).sum(), p, create_graph=True)
            p.grad = grad
            opt.step()
        loss = (p**2).sum()
        return [loss.detach(), *torch.autograd.grad(loss, learned)]

    expected = trained(row.theirs)
    before = onepass.stats()
    actual = trained(row.ours)
    assert torch_path(before) == {"differentiable=True"}
    assert onepass.stats()["kernel"] == before["kernel"]
    assert all(grad.abs().sum() > 0 for grad in actual)
    assert_same(actual, expected)


@for_rows(DIFFERENTIABLE)
def test_one_group_can_be_marked_differentiable(row):
    """Without the argument of the same name torch runs its own code for it, but lets no gradients through."""

    def script(opt):
        opt.add_param_group({"params": leaves([(3,)], seed=7), "differentiable": True})
        train(opt, 3)
        return [p.grad_fn for p in params_of(opt)]

    run_both(row, script, path={"differentiable=True"})
