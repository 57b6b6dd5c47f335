"""Schedule-Free: the point to train at, the point to evaluate at, and the way back.

The numbers of its steps are tested with those of all optimizers.
"""

import io

import numpy as np
import onepass
import pytest
import torch
from cases import ROW, for_rows, model
from reference import bits, numbers, only_kernels, params_of
from torch import nn

ROWS = [ROW["ScheduleFreeAdamW"], ROW["ScheduleFreeRAdam"], ROW["ScheduleFreeSGD"]]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
MASTERS = [(torch.bfloat16, "split"), (torch.bfloat16, "float32"), (torch.float16, "float32")]

each_row = for_rows(ROWS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def start(dtype):
    torch.manual_seed(0)
    return model(dtype)


def trained(row, dtype=torch.float32, steps=4, **kwargs):
    """An optimizer after some steps."""
    optimizer = row.ours(start(dtype), **{**row.full, **kwargs})
    train(optimizer, range(1, 1 + steps))
    return optimizer


def grads(params, step):
    """After the first step, some are missing."""
    return [None if step > 1 and i % 5 == step % 5 else torch.randn_like(p) for i, p in enumerate(params)]


def train(optimizer, steps):
    params = params_of(optimizer)
    for step in steps:
        torch.manual_seed(step)
        for p, grad in zip(params, grads(params, step), strict=True):
            p.grad = grad
        with only_kernels(None):
            optimizer.step()


def everything(optimizer):
    """The bits of all parameters and states."""
    return [(bits(p), {name: bits(x) for name, x in optimizer.state[p].items()}) for p in params_of(optimizer)]


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def momentum_of(optimizer):
    group = optimizer.param_groups[0]
    return group["momentum"] if "momentum" in group else group["betas"][0]


@each_row
@pytest.mark.parametrize("kwargs", [{}, {"r": 1.0, "weight_lr_power": 0.5}], ids=["", "weights"])
def test_evaluates_at_the_weighted_mean(row, kwargs):
    """Every element is the mean of all z, weighted by the step and the largest learning rate so far."""
    kwargs = {**row.full, **kwargs}
    optimizer = row.ours(start(torch.float64), **kwargs)
    params = params_of(optimizer)
    means, sums = [numbers(p) for p in params], [0.0] * len(params)
    for step in range(1, 8):
        torch.manual_seed(step)
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        for i, p in enumerate(params):
            state = optimizer.state[p]
            weight = step ** kwargs.get("r", 0.0) * float(state["lr_max"]) ** kwargs.get("weight_lr_power", 2.0)
            sums[i] += weight
            means[i] = means[i] + weight / sums[i] * (numbers(state["z"]) - means[i])
            assert float(state["weight_sum"]) == pytest.approx(sums[i], rel=1e-6)
    at_y = [numbers(p) for p in params]
    optimizer.eval()
    for p, mean, y in zip(params, means, at_y, strict=True):
        z = numbers(optimizer.state[p]["z"])
        # weight_sum is a float32, and each mean is off by its rounding.
        np.testing.assert_allclose(numbers(p), mean, rtol=0, atol=1e-6 * max(np.abs(z).max(initial=0.0), 1.0))
        momentum = momentum_of(optimizer)
        np.testing.assert_allclose((1 - momentum) * z + momentum * numbers(p), y, rtol=1e-14, atol=1e-14)


@each_row
@each_dtype
def test_there_and_back_to_the_bit(row, dtype):
    optimizer = trained(row, dtype)
    before = everything(optimizer)
    given = [None if p.grad is None else bits(p.grad) for p in params_of(optimizer)]
    for _ in range(3):
        optimizer.eval()
        optimizer.eval()
        assert any(bits(p) != b for p, (b, _) in zip(params_of(optimizer), before, strict=True))
        optimizer.train()
        optimizer.train()
        assert everything(optimizer) == before
    assert [None if p.grad is None else bits(p.grad) for p in params_of(optimizer)] == given
    straight = trained(row, dtype)
    for each in (optimizer, straight):
        train(each, range(5, 7))
    assert everything(optimizer) == everything(straight)


@each_row
@pytest.mark.parametrize(("dtype", "master"), MASTERS, ids=str)
def test_masters_there_and_back(row, dtype, master):
    """The parameters are rounded copies of what float32 parameters would be, at both points."""
    optimizer = trained(row, dtype, master=master)
    params = params_of(optimizer)
    wide = [nn.Parameter(p.detach().float()) for p in start(dtype)]
    twin = row.ours(wide, **row.full)
    for step in range(1, 5):
        torch.manual_seed(step)
        for q, grad in zip(wide, grads(params, step), strict=True):
            q.grad = None if grad is None else grad.float()
        twin.step()
    before = everything(optimizer)
    for each in (optimizer, twin):
        each.eval()
    for p, q in zip(params, wide, strict=True):
        assert bits(p) == bits(q.to(dtype))
    for each in (optimizer, twin):
        each.train()
    assert everything(optimizer) == before
    straight = trained(row, dtype, master=master)
    for each in (optimizer, straight):
        train(each, range(5, 7))
    assert everything(optimizer) == everything(straight)


@each_row
@pytest.mark.parametrize("saved_in", ["train", "eval"])
@pytest.mark.parametrize("loaded_in", ["train", "eval"])
@pytest.mark.parametrize(("dtype", "master"), [(torch.float32, None), (torch.bfloat16, None), *MASTERS], ids=str)
def test_a_checkpoint_brings_its_mode(row, saved_in, loaded_in, dtype, master):
    optimizer = trained(row, dtype, master=master)
    getattr(optimizer, saved_in)()
    other = trained(row, dtype, steps=2, master=master)
    getattr(other, loaded_in)()
    saved = through_a_file([[p.detach() for p in params_of(optimizer)], optimizer.state_dict()])
    with torch.no_grad():
        for p, q in zip(params_of(other), saved[0], strict=True):
            p.copy_(q)
    other.load_state_dict(saved[1])
    assert everything(other) == everything(optimizer)
    for each in (optimizer, other):
        each.train()
    assert everything(other) == everything(optimizer)
    for each in (optimizer, other):
        train(each, range(5, 7))
    assert everything(other) == everything(optimizer)


@each_row
def test_a_step_in_the_other_mode_is_refused(row):
    optimizer = trained(row)
    optimizer.eval()
    before = everything(optimizer)
    for closure in ((), (lambda: torch.zeros(()),)):
        with pytest.raises(RuntimeError, match=f"^{row.name}: .* call optimizer.train\\(\\) before"):
            optimizer.step(*closure)
        assert everything(optimizer) == before


def test_a_step_within_the_backward_pass_is_refused():
    p = nn.Parameter(torch.ones(3))
    optimizer = onepass.ScheduleFreeSGD([p], lr=0.1)
    handle = onepass.step_in_backward(optimizer)
    (p * p).sum().backward()
    optimizer.eval()
    with pytest.raises(RuntimeError, match="point to evaluate at"):
        (p * p).sum().backward()
    handle.remove()


@each_row
def test_a_parameter_that_is_changed_at_the_other_point(row):
    """The changed elements are new means, the others go back to the bit."""
    optimizer = trained(row)
    params = params_of(optimizer)
    before = [p.detach().clone() for p in params]
    optimizer.eval()
    chosen = [torch.rand_like(p) < 0.5 for p in params]
    with torch.no_grad():
        for p, here in zip(params, chosen, strict=True):
            p.add_(here.to(p.dtype))
    changed = [p.detach().clone() for p in params]
    optimizer.train()
    momentum = momentum_of(optimizer)
    for p, old, x, here in zip(params, before, changed, chosen, strict=True):
        assert bits(p.detach()[~here]) == bits(old[~here])
        wanted = (1 - momentum) * optimizer.state[p]["z"] + momentum * x
        torch.testing.assert_close(p.detach()[here], wanted[here], rtol=1e-6, atol=1e-6)


@each_row
def test_before_the_first_step_and_with_new_groups(row):
    p, q = (nn.Parameter(torch.randn(4)) for _ in range(2))
    optimizer = row.ours([p], **row.full)
    start = bits(p)
    optimizer.eval()
    assert bits(p) == start
    assert not optimizer.state
    optimizer.add_param_group({"params": [q]})
    for each in (p, q):
        each.grad = torch.ones(4)
    optimizer.step()  # all points are the same, so no train() is missing
    assert set(optimizer.state) == {p, q}
    assert all(group["train_mode"] for group in optimizer.param_groups)
    optimizer.eval()
    optimizer.add_param_group({"params": [nn.Parameter(torch.randn(4))]})
    with pytest.raises(RuntimeError, match=r"call optimizer\.train"):
        optimizer.step()


@each_row
def test_a_momentum_of_zero_in_a_group(row):
    """The mean does not follow from the two points then: nothing is changed."""
    optimizer = trained(row)
    group = optimizer.param_groups[0]
    group.update({"momentum": 0.0} if "momentum" in group else {"betas": (0.0, 0.9)})
    before = everything(optimizer)
    with pytest.raises(ValueError, match=rf"{row.name}: group 0: (momentum|betas\[0\]) must be above 0 and below 1"):
        optimizer.eval()
    assert everything(optimizer) == before
    assert group["train_mode"]


@pytest.mark.parametrize("momentum", [0.0, 1.0])
@each_row
def test_a_momentum_of_zero_or_one_is_refused_where_it_is_given(row, momentum):
    """As by the constructor."""
    optimizer = trained(row)
    wrong = {"momentum": momentum} if "momentum" in optimizer.param_groups[0] else {"betas": (momentum, 0.9)}
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=rf"{row.name}: group 1: (momentum|betas\[0\]) must be above 0 and below 1"):
        optimizer.add_param_group({"params": [p], **wrong})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match=rf"{row.name}: group 0: (momentum|betas\[0\]) must be above 0 and below 1"):
        row.ours([{"params": [p], **wrong}], **row.full)
    with pytest.raises(ValueError, match="Invalid"):
        row.ours([p], **{**row.full, **wrong})


@each_row
def test_loaded_scalars_have_the_dtype_in_which_they_were_saved(row):
    """torch casts them to the parameter's, in which sums of weights would stop to grow."""
    optimizer = trained(row, torch.bfloat16)
    other = trained(row, torch.bfloat16, steps=1)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, q in zip(params_of(optimizer), params_of(other), strict=True):
        for name in ("lr_max", "weight_sum"):
            assert other.state[q][name].dtype == torch.float32
            assert bits(other.state[q][name]) == bits(optimizer.state[p][name])
