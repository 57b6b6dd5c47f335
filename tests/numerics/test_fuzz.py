"""Random models, layouts, dtypes, hyperparameters and gaps in the gradients, against one step of the formula each."""

import math

import onepass
import pytest
import torch
from cases import ELEMENTWISE, for_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import checked_step

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple) | st.integers(0, 2500).map(lambda n: (n,))


@st.composite
def layouts(draw, shape):
    """Places a tensor of this shape in a larger memory: dimensions in any order, with steps, gaps and an offset."""
    order = draw(st.permutations(range(len(shape))))
    strides, span = [0] * len(shape), 1
    for d in order:
        strides[d] = span * draw(st.sampled_from([1, 1, 1, 2, 3]))
        span = strides[d] * max(shape[d], 1) + draw(st.sampled_from([0, 0, 0, 1, 4]))
    return tuple(strides), draw(st.integers(0, 5))


def lay(values, layout):
    strides, offset = layout
    last = sum((n - 1) * stride for n, stride in zip(values.shape, strides, strict=True)) if values.numel() else -1
    memory = torch.zeros(offset + last + 1, dtype=values.dtype)
    return memory.as_strided(values.shape, strides, offset).copy_(values)


@st.composite
def parameters(draw):
    shape = draw(shapes)
    grad_layout, offset = draw(layouts(shape))
    expanded = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    return {
        "shape": shape,
        "dtype": draw(st.sampled_from(DTYPES)),
        "layout": draw(layouts(shape)),
        "grad_dtype": draw(st.sampled_from(DTYPES)),
        "grad_layout": (grad_layout, offset),
        "grad_expanded": expanded if draw(st.integers(0, 3)) == 0 else [False] * len(shape),
        "steps": draw(st.lists(st.booleans(), min_size=4, max_size=4)),  # those at which it has a gradient
        "magnitude": 10.0 ** draw(st.integers(-6, 2)),
    }


betas = st.just(0.0) | st.floats(0.001, 0.9999)
numbers_of = {
    "lr": st.floats(1e-5, 0.5) | st.sampled_from([0.0, 1, 1e-3]) | st.floats(1e-4, 0.1).map(torch.tensor),
    "weight_decay": st.sampled_from([0, 0.0]) | st.floats(1e-4, 0.5),
    "momentum": st.sampled_from([0, 0.9]) | st.floats(0.01, 0.999),
    "dampening": st.just(0) | st.floats(0.0, 0.9),
    "nesterov": st.booleans(),
    "betas": st.tuples(betas, betas) | st.just((0.9, 0.999)),
    "eps": st.sampled_from([1e-8, 1e-3]) | st.floats(1e-10, 1.0),
    "amsgrad": st.booleans(),
    "maximize": st.booleans(),
    "decoupled_weight_decay": st.booleans(),
    "alpha": st.sampled_from([0.0, 1.0, 0.99]) | st.floats(0.001, 0.9999),
    "centered": st.booleans(),
    "rho": st.sampled_from([0.0, 1.0, 0.9]) | st.floats(0.001, 0.9999),
    "lr_decay": st.just(0) | st.floats(0.001, 1.0),
    "initial_accumulator_value": st.just(0) | st.floats(1e-6, 10.0),
    "momentum_decay": st.just(0) | st.floats(1e-4, 1.0),
    "lambd": st.just(0) | st.floats(1e-5, 1.0),
    "t0": st.sampled_from([0, 1, 2, 1e6]),
    "etas": st.tuples(st.floats(0.01, 0.99), st.floats(1.01, 10.0)),
    "step_sizes": st.tuples(st.floats(0.0, 0.01), st.floats(0.01, 100.0)),
    "no_prox": st.booleans(),
    "gamma": st.just(0.0) | st.floats(0.001, 1.0),
    "clip_correction": st.booleans(),
    "grad_averaging": st.booleans(),
    "beta3": st.none() | betas,
    "d_coef": st.floats(1e-3, 10.0),
    "growth_rate": st.floats(1.0, 2.0),
    "decouple": st.booleans(),
    "use_bias_correction": st.booleans(),
    "safeguard_warmup": st.booleans(),
    "trust_ratio": st.booleans(),
    "trust_clip": st.booleans(),
    "trust_coefficient": st.floats(0.0, 0.1),
    "warmup_steps": st.integers(0, 20),
    "r": st.floats(0.0, 2.0),
    "weight_lr_power": st.floats(0.0, 3.0),
    "silent_sgd_phase": st.booleans(),
    "clip_exponent": st.none() | st.floats(0.0, 1.0),
    "alpha_warmup": st.none() | st.floats(0.0, 10.0),
    "beta3_warmup": st.none() | st.floats(0.0, 10.0),
}


# What chooses an implementation, what Prodigy and Schedule-Free keep in a group or have tests of their own for, and d0,
# which has to be the same in all groups.
NOT_DRAWN = {"capturable", "differentiable", "foreach", "fused", "d", "d_max", "d0", "slice_p", "train_mode"}


@for_rows(ELEMENTWISE)
def test_every_hyperparameter_is_drawn(row):
    assert set(row.ours([torch.zeros(1)]).defaults) - numbers_of.keys() <= NOT_DRAWN


@st.composite
def groups(draw, row):
    """A parameter group, with some of the hyperparameters that this optimizer has."""
    known = row.ours([torch.zeros(1)]).defaults
    chosen = draw(st.sets(st.sampled_from(sorted(known.keys() & numbers_of.keys()))))
    group = {name: draw(numbers_of[name]) for name in sorted(chosen)}
    if len(group.get("betas", known.get("betas", ()))) != len(known.get("betas", ())):
        group["betas"] = draw(st.tuples(betas, betas, betas))
    if group.get("nesterov"):
        group["momentum"], group["dampening"] = max(group.get("momentum", 0), 0.5), 0
    if "train_mode" in known:  # Schedule-Free: the momentum is a divisor
        if "betas" in group:
            group["betas"] = (group["betas"][0] or 0.5, group["betas"][1])
        elif "momentum" in group:
            group["momentum"] = group["momentum"] or 0.5
    return {
        **group,
        "state_dtype": draw(st.sampled_from([None, None, *DTYPES])),
        "params": draw(st.lists(parameters(), min_size=1, max_size=4)),
    }


@pytest.fixture(autouse=True)
def tuning(row, machine):
    """Another tuning for each row; not drawn in the test, where it would change the examples that hypothesis draws."""
    names = list(onepass._core.tunings())
    onepass._core.force_tuning(names[ELEMENTWISE.index(row) % len(names)])


@pytest.mark.slow
@settings(derandomize=True, max_examples=60, deadline=None, database=None)
@given(st.data())
@pytest.mark.parametrize("row", ELEMENTWISE, ids=lambda row: row.name)
def test_fuzz(row, data):
    drawn = data.draw(st.lists(groups(row), min_size=1, max_size=3))
    onepass._core.force_isa(data.draw(st.sampled_from([name for name, has in onepass._core.isas().items() if has])))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plan, described = [], []
    for group in drawn:
        params = []
        for d in group["params"]:
            p = lay(torch.randn(d["shape"]).to(d["dtype"]), d["layout"]).requires_grad_()
            p.grad_dtype = None
            params.append(p)
            described.append((p, d))
        plan.append({**group, "params": params})
    optimizer = row.ours(plan)
    for step in range(4):
        for p, d in described:
            p.grad = None
            if d["steps"][step]:
                grad = (torch.randn(d["shape"]) * d["magnitude"]).to(d["grad_dtype"])
                grad = lay(grad, d["grad_layout"])
                for dim, expanded in enumerate(d["grad_expanded"]):
                    if expanded and math.prod(grad.shape):
                        grad = grad.narrow(dim, 0, 1).expand(d["shape"])
                p.grad = grad
        checked_step(row, optimizer)
