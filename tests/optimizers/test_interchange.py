"""Checkpoints in the layout of apex, which needs a GPU: its groups count the steps, and its options are fewer."""

import copy

import onepass
import pytest
import torch
from reference import bits
from torch import nn

BETAS = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}

# Name -> ours, its arguments, the keys that apex's group has of them, those that it has beside them, and whether its
# group counts the steps.
OF_APEX = {
    "FusedAdam": (onepass.AdamW, BETAS, {"bias_correction": True}, True),
    "FusedAdam, not decoupled": (onepass.Adam, BETAS, {"bias_correction": True}, True),
    "FusedLAMB": (
        onepass.LAMB,
        BETAS,
        {"bias_correction": True, "grad_averaging": True, "max_grad_norm": 1.0},
        True,
    ),
    "FusedSGD": (
        onepass.SGD,
        {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "nesterov": False},
        {},
        False,
    ),
    "FusedAdagrad": (onepass.Adagrad, {"eps": 1e-6, "weight_decay": 0.1}, {}, False),
}


def step(optimizer, params, numbers):
    for number in numbers:
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()


def as_apex(state_dict, kwargs, extra, counts):
    """The state_dict that apex's optimizer would have after three steps."""
    made = copy.deepcopy(state_dict)
    for group in made["param_groups"]:
        own = {"lr": group["lr"], **kwargs, **extra, "params": group["params"]}
        group.clear()
        group.update(own | ({"step": 3} if counts else {}))
    for state in made["state"].values():
        state.pop("step", None)
    return made


@pytest.mark.parametrize("name", OF_APEX)
def test_a_checkpoint_of_apex(name):
    """The bits of the run that goes on."""
    ours, kwargs, extra, counts = OF_APEX[name]
    params = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(5))) for shape in [(5, 7), (9,)]]
    first = ours(params, lr=0.01, **kwargs)
    step(first, params, range(3))
    given = as_apex(first.state_dict(), kwargs, extra, counts)
    before = copy.deepcopy(given)
    own = [nn.Parameter(p.detach().clone()) for p in params]
    second = ours(own)
    second.load_state_dict(onepass.convert_state_dict(given))
    assert str(given) == str(before)
    for optimizer, held in ((first, params), (second, own)):
        step(optimizer, held, range(3, 6))
    for p, q in zip(params, own, strict=True):
        assert bits(p.detach()) == bits(q.detach())


@pytest.mark.parametrize(
    ("ours", "options", "message"),
    [
        (onepass.AdamW, {"bias_correction": False}, "group 0: bias_correction=False has no counterpart"),
        (
            onepass.LAMB,
            {"bias_correction": True, "grad_averaging": False, "max_grad_norm": 1.0},
            "group 0: grad_averaging=False has no counterpart",
        ),
        (
            onepass.NovoGrad,
            {"bias_correction": True, "grad_averaging": True, "norm_type": 2, "init_zero": False},
            "FusedNovoGrad",
        ),
    ],
)
def test_options_without_counterpart(ours, options, message):
    p = nn.Parameter(torch.ones(3))
    optimizer = ours([p], lr=0.01)
    step(optimizer, [p], range(3))
    with pytest.raises(ValueError, match=message):
        onepass.convert_state_dict(as_apex(optimizer.state_dict(), BETAS, options, True))
