"""Checkpoints of apex, in its layout: it needs a GPU. (Those of packages that run here are in tests/ecosystem.)"""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import onepass
import pytest
import torch
from reference import bits
from torch import nn


class Layout(NamedTuple):
    ours: type
    options: dict[str, Any]  # that both have
    more: Mapping[str, Any] = {}  # that only apex's groups have
    counts: bool = True  # whether apex's groups count the steps


ADAM = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
LAMB = {"bias_correction": True, "grad_averaging": True, "max_grad_norm": 1.0}
LAYOUTS = {
    "FusedAdam": Layout(onepass.AdamW, ADAM, {"bias_correction": True}),
    "FusedAdam, not decoupled": Layout(onepass.Adam, ADAM, {"bias_correction": True}),
    "FusedLAMB": Layout(onepass.LAMB, ADAM, LAMB),
    "FusedSGD": Layout(
        onepass.SGD, {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "nesterov": False}, counts=False
    ),
    "FusedAdagrad": Layout(onepass.Adagrad, {"eps": 1e-6, "weight_decay": 0.1}, counts=False),
}


def step(optimizer, params, numbers):
    for number in numbers:
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()


def as_apex(state_dict, layout, steps):
    """The state_dict that apex's optimizer would have."""
    made = copy.deepcopy(state_dict)
    for group in made["param_groups"]:
        own = {"lr": group["lr"], **layout.options, **layout.more, "params": group["params"]}
        group.clear()
        group.update(own | ({"step": steps} if layout.counts else {}))
    for state in made["state"].values():
        state.pop("step", None)
    return made


@pytest.mark.parametrize("steps", [3, 0])  # before the checkpoint
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_checkpoint_of_apex(layout, steps):
    """The bits of the run that goes on."""
    params = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(5))) for shape in [(5, 7), (9,)]]
    first = layout.ours([{"params": params[:1]}, {"params": params[1:], "lr": 0.02}], lr=0.01, **layout.options)
    step(first, params, range(steps))
    given = as_apex(first.state_dict(), layout, steps)
    if not steps:
        given["state"].clear()  # also Adagrad's, which ours has from the beginning
    before = str(given)
    own = [nn.Parameter(p.detach().clone()) for p in params]
    second = layout.ours([{"params": own[:1]}, {"params": own[1:]}])
    second.load_state_dict(onepass.convert_state_dict(given))
    assert str(given) == before
    for optimizer, held in ((first, params), (second, own)):
        step(optimizer, held, range(3, 6))
    for p, q in zip(params, own, strict=True):
        assert bits(p.detach()) == bits(q.detach())


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (
            Layout(onepass.AdamW, ADAM, {"bias_correction": False}),
            "bias_correction of apex's FusedAdam must be True, got False",
        ),
        (Layout(onepass.LAMB, ADAM, {**LAMB, "grad_averaging": False}), "grad_averaging of LAMB must be True"),
        (
            Layout(onepass.NovoGrad, ADAM, {"bias_correction": True, "grad_averaging": True, "init_zero": False}),
            "the averages of apex's FusedNovoGrad",
        ),
    ],
)
def test_options_without_counterpart(layout, message):
    p = nn.Parameter(torch.ones(3))
    optimizer = layout.ours([p], lr=0.01)
    step(optimizer, [p], range(3))
    with pytest.raises(ValueError, match=f"group 0: {message}"):
        onepass.convert_state_dict(as_apex(optimizer.state_dict(), layout, 3))


@pytest.mark.parametrize("name", ["Adafactor", "Adagrad", "AdamW", "Muon", "NovoGrad", "RMSprop", "SGD"])
def test_other_keys_of_groups_stay(name):
    """Also those that a package of this list has in its groups."""
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = getattr(onepass, name)([{"params": [p], "step": 5, "initial_lr": 0.1, "lr_scale": 0.5}])
    step(optimizer, [p], range(2))
    saved = optimizer.state_dict()
    converted = onepass.convert_state_dict(saved)
    assert converted["param_groups"] == saved["param_groups"]
    assert str(converted["state"]) == str(saved["state"])


def test_counts_do_not_depend_on_the_default_dtype():
    group = {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    saved = {
        "state": {0: {"exp_avg": torch.zeros(2, 8), "exp_avg_sq": torch.ones(2, 8)}},
        "param_groups": [{**group, "step": 1001, "params": [0]}],
    }
    torch.set_default_dtype(torch.bfloat16)
    try:
        step = onepass.convert_state_dict(saved)["state"][0]["step"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert step.dtype == torch.float32
    assert step == 1001
