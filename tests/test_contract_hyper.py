"""Hyperparameters: each is read anew at each step, tensors count with what they hold then, autograd can follow."""

from fractions import Fraction

import numpy as np
import onepass
import pytest
import torch
from contract import (
    ADAM,
    ADAMW,
    KINDS,
    LION,
    SGD,
    assert_same,
    every_kind,
    leaves,
    numbers,
    params_of,
    run_both,
    snapshot,
    torch_path,
    train,
)

# -- changed between steps -------------------------------------------------------------------------------------------

ADAM_CHANGES = [
    ({}, {"lr": 0.3}),
    ({}, {"lr": 0}),
    ({}, {"betas": (0.5, 0.75)}),
    ({}, {"betas": [0.5, 0.75]}),
    ({}, {"eps": 0.1}),
    ({}, {"weight_decay": 0.3}),
    ({"weight_decay": 0.3}, {"weight_decay": 0}),
    ({"amsgrad": True}, {"amsgrad": False}),
    ({}, {"maximize": True}),
    ({"maximize": True}, {"maximize": False}),
    ({}, {"foreach": True}),
    ({}, {"fused": True}),
    ({"foreach": True}, {"foreach": False, "lr": 0.2}),
    ({}, {"lr": 0.3, "eps": 0.1, "weight_decay": 0.3, "betas": (0.1, 0.2), "maximize": True}),
]
CHANGES = {
    SGD: [
        ({}, {"lr": 1.5}),
        ({}, {"lr": 0}),
        ({}, {"momentum": 0.5}),
        ({}, {"momentum": 0}),
        ({"momentum": 0}, {"momentum": 0.5}),
        ({}, {"dampening": 0.5}),
        ({}, {"weight_decay": 0.3}),
        ({"weight_decay": 0.3}, {"weight_decay": 0}),
        ({}, {"nesterov": True}),
        ({"nesterov": True}, {"nesterov": False}),
        ({}, {"maximize": True}),
        ({}, {"foreach": True}),
        ({}, {"lr": 1.5, "momentum": 0.5, "dampening": 0.1, "weight_decay": 0.3, "maximize": True}),
    ],
    ADAM: [*ADAM_CHANGES, ({"weight_decay": 0.3}, {"decoupled_weight_decay": True})],
    ADAMW: [*ADAM_CHANGES, ({"weight_decay": 0.3}, {"decoupled_weight_decay": False})],
    LION: [
        ({}, {"lr": 1.5}),
        ({}, {"lr": 0}),
        ({}, {"betas": (0.5, 0.75)}),
        ({}, {"weight_decay": 0.5}),
        ({}, {"weight_decay": 0}),
        ({}, {"maximize": True}),
    ],
}


@pytest.mark.parametrize(("kind", "options", "change"), [(k, o, c) for k, rows in CHANGES.items() for o, c in rows])
def test_a_change_counts_at_the_next_step(kind, options, change):
    def script(opt):
        opt.add_param_group({"params": leaves([(3,), (2, 2)], seed=7)})
        train(opt, 2)
        opt.param_groups[1].update(change)  # of one group, beside one that stays
        train(opt, 2, first=2)
        opt.param_groups[0].update(change)
        opt.param_groups[1].update({key: opt.defaults[key] for key in change})
        train(opt, 2, first=4)

    run_both(kind, script, **options)


def test_every_key_of_a_group_is_changed_above():
    indifferent = {"params", "state_dtype", "capturable", "differentiable", "fused", "foreach"}
    for kind in KINDS:
        keys = set(kind.ours(leaves(), **kind.options).param_groups[0]) - indifferent
        assert keys == {key for _, change in CHANGES[kind] for key in change} - indifferent


@pytest.mark.parametrize("kind", [ADAM, ADAMW, LION])
def test_betas_in_a_list_that_is_changed_in_place(kind):
    def script(opt):
        betas = opt.param_groups[0]["betas"] = [0.8, 0.9]
        train(opt, 2)
        betas[0] = 0.3
        train(opt, 2, first=2)
        betas[1] = 0.6
        train(opt, 2, first=4)

    run_both(kind, script)


class Number:
    """Something that only knows how to become a float."""

    def __init__(self, value):
        self.value = value

    def __float__(self):
        return self.value


@every_kind
@pytest.mark.parametrize("number", [np.float64, np.float32, Fraction, Number])
def test_numbers_of_other_types(kind, number):
    lr = number(0.25)
    opt, plain = (kind.ours(leaves(), **kind.options) for _ in range(2))
    for optimizer, value in ((opt, lr), (plain, 0.25)):
        optimizer.param_groups[0]["lr"] = value
        train(optimizer, 2)
    if isinstance(lr, Number):
        lr.value = plain.param_groups[0]["lr"] = 0.125
    train(opt, 2, first=2)
    train(plain, 2, first=2)
    assert_same(snapshot(opt), snapshot(plain))


@every_kind
@pytest.mark.parametrize("bad", ["fast", None, (1, 2)])
def test_what_is_not_a_number_is_an_error_that_names_it(kind, bad):
    opt = kind.ours(leaves(), **kind.options)
    train(opt)
    opt.param_groups[0]["lr"] = bad
    with pytest.raises(TypeError, match=f"^{kind.name}: group 0: lr must be a number, but is a {type(bad).__name__}"):
        opt.step()
    del opt.param_groups[0]["lr"]
    with pytest.raises(KeyError, match=f"{kind.name}: group 0 has no lr"):
        opt.step()


# -- tensors ---------------------------------------------------------------------------------------------------------


def scalar(value, *shape, **kw):
    return torch.full(shape, value, dtype=torch.float64, **kw)


@every_kind
@pytest.mark.parametrize("shape", [(), (1,)], ids=["no dimension", "one element"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_tensor_lr_counts_with_what_it_holds_at_the_step(kind, shape, requires_grad):
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

    run_both(kind, script, lr=scalar(0.5, *shape, requires_grad=requires_grad))


@pytest.mark.parametrize("kind", [ADAM, ADAMW])
@pytest.mark.parametrize("shape", [(), (1,)], ids=["no dimension", "one element"])
def test_tensor_betas(kind, shape):
    def script(opt):
        train(opt, 2)
        for beta, value in zip(opt.param_groups[0]["betas"], (0.5, 0.6), strict=True):
            beta.fill_(value)
        train(opt, 2, first=2)
        return opt.param_groups[0]["betas"]

    run_both(kind, script, lr=scalar(0.1), betas=(scalar(0.8, *shape), scalar(0.9, *shape)))


def test_tensor_weight_decay_of_sgd():
    def script(opt):
        train(opt, 2)
        opt.param_groups[0]["weight_decay"].fill_(0.6)
        train(opt, 2, first=2)

    run_both(SGD, script, weight_decay=scalar(0.3))


# -- differentiable --------------------------------------------------------------------------------------------------

LEARNT = {
    SGD: [{"lr"}, {"lr", "weight_decay"}, set()],
    ADAM: [{"lr"}, {"lr", "weight_decay"}, {"lr", "betas"}, set()],
    ADAMW: [{"lr"}, {"lr", "weight_decay"}, {"lr", "betas"}, set()],
}


@pytest.mark.parametrize(("kind", "learnt"), [(kind, keys) for kind, rows in LEARNT.items() for keys in rows])
def test_gradients_flow_through_a_differentiable_step(kind, learnt):
    """Three steps of training, and what the loss after them says of where it began, of lr, weight_decay and betas."""

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
        options = {"lr": 0.1, **({"momentum": 0.9, "nesterov": True} if kind is SGD else {}), **hyper}
        opt = cls([p], differentiable=True, **options)
        for _ in range(3):
            (grad,) = torch.autograd.grad((p.clone() ** 3).sum(), p, create_graph=True)
            p.grad = grad
            opt.step()
        loss = (p**2).sum()
        return [loss.detach(), *torch.autograd.grad(loss, learned)]

    expected = trained(kind.stock)
    before = onepass.stats()
    actual = trained(kind.ours)
    assert torch_path(before) == {"differentiable=True"}
    assert onepass.stats()["kernel"] == before["kernel"]
    assert all(grad.abs().sum() > 0 for grad in actual)
    assert_same(actual, expected)


@pytest.mark.parametrize("kind", LEARNT)
def test_one_group_can_be_marked_differentiable(kind):
    """Without the argument of the same name torch runs its own code for it, but lets no gradients through."""

    def script(opt):
        opt.add_param_group({"params": leaves([(3,)], seed=7), "differentiable": True})
        train(opt, 3)
        return [p.grad_fn for p in params_of(opt)]

    run_both(kind, script, path={"differentiable=True"})
