"""NorMuon: what follows the iterations against its formula, and what it does around them."""

import math

import numpy as np
import onepass
import pytest
import torch
from cases import ROW
from contract import through_a_file
from onepass.optimizers import muon
from reference import ROUNDING, bits, numbers, only_kernels
from torch.nn import Parameter

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = [(4, 3), (1, 7), (7, 1), (33, 65), (70, 20), (1, 1)]
VARIANTS = {
    "default": {},
    "original": {"adjust_lr_fn": "original"},
    "match": {"adjust_lr_fn": "match_rms_adamw", "lr": 0.1},
    "no_decay": {"weight_decay": 0.0},
    "momentum": {"momentum": 0.5},
    "plain": {"nesterov": False, "beta2": 0.5},
    "no_averages": {"momentum": 0.0, "beta2": 0.0},
    "tensor_lr": {"lr": torch.tensor(0.01)},
}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_variant = pytest.mark.parametrize("kwargs", VARIANTS.values(), ids=VARIANTS)


def model(dtype=torch.float32):
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in SHAPES]
    return [*params, torch.randn(65, 33).to(dtype).t().requires_grad_()]


def give(params):
    for p in params:
        p.grad = torch.randn_like(p)


def update(old, ortho, v, h):
    """Li et al. 2025, algorithm 1, from the orthogonalized matrix on: the parameter and the second moments."""
    v = h["beta2"] * v + (1 - h["beta2"]) * (ortho**2).mean(1, keepdims=True)
    normalized = ortho / (np.sqrt(v) + 1e-10)
    rows, columns = old.shape
    if h["adjust_lr_fn"] == "original":
        rate = math.sqrt(max(1, rows / columns)) * np.linalg.norm(ortho) / np.linalg.norm(normalized)
    else:
        rate = 0.2 * math.sqrt(rows * columns) / np.linalg.norm(normalized)
    lr = float(h["lr"])
    return old - lr * h["weight_decay"] * old - lr * rate * normalized, v


@each_dtype
@each_variant
def test_every_step(kwargs, dtype, monkeypatch):
    """From the matrices that the iterations have returned, every element follows the formula."""
    returned = []

    def noted(group, matrix):
        returned.append(original(group, matrix))
        return returned[-1]

    original = muon.orthogonalized
    monkeypatch.setattr(muon, "orthogonalized", noted)
    params = model(dtype)
    optimizer = onepass.NorMuon(params, **kwargs)
    momenta, seconds = ([np.zeros(p.shape) for p in params], [np.zeros((len(p), 1)) for p in params])
    rounding = max(ROUNDING[dtype], 2.0**-24)
    for _ in range(5):
        give(params)
        before = [numbers(p) for p in params]
        returned.clear()
        with only_kernels(len(params)):
            optimizer.step()
        h = optimizer.param_groups[0]
        for i, p in enumerate(params):
            want, seconds[i] = update(before[i], numbers(returned[i]), seconds[i], h)
            got = numbers(p)
            # The factor of a row is made in float32, of float64 in float64.
            close = 1e-12 if dtype == torch.float64 else 2e-6
            room = 2 * rounding * np.maximum(abs(want), torch.finfo(dtype).tiny) + close * abs(want - before[i])
            assert (abs(got - want) <= (room if dtype != torch.float64 else 1e-14)).all()
            held = numbers(optimizer.state[p]["second_momentum_buffer"])
            close = 4 * rounding if dtype != torch.float64 else 1e-12
            np.testing.assert_allclose(held, seconds[i], close, close * torch.finfo(dtype).tiny)
            seconds[i] = held
            momenta[i] = h["momentum"] * momenta[i] + (1 - h["momentum"]) * numbers(p.grad)
            error = abs(numbers(optimizer.state[p]["momentum_buffer"]) - momenta[i])
            assert (error <= 20 * ROUNDING[dtype]).all()


@pytest.mark.parametrize("adjust_lr_fn", [None, "match_rms_adamw"])
def test_the_size_of_an_update(adjust_lr_fn):
    """Its root mean square is 0.2 times the rate, as of AdamW's."""
    params = model()
    optimizer = onepass.NorMuon(params, lr=0.01, weight_decay=0.0, adjust_lr_fn=adjust_lr_fn)
    for _ in range(3):
        before = [p.detach().clone() for p in params]
        give(params)
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            assert float((p.detach() - old).square().mean().sqrt()) == pytest.approx(0.002, rel=1e-4)


def test_the_rows_are_evened_out():
    """With beta2 = 0 all rows of an update have one norm, however different those of the gradient are."""
    p = torch.randn(6, 40, requires_grad=True)
    before = p.detach().clone()
    p.grad = torch.randn(6, 40) * torch.tensor([1.0, 10.0, 1e-3, 5.0, 0.1, 1.0])[:, None]
    onepass.NorMuon([p], lr=0.01, weight_decay=0.0, beta2=0.0).step()
    norms = (p.detach() - before).norm(dim=1)
    torch.testing.assert_close(norms, norms[:1].expand(6), rtol=1e-4, atol=0)


@each_dtype
@each_variant
def test_as_in_torch_operations(kwargs, dtype):
    """Ours and the step without kernels; bfloat16 iterations amplify what differs before them."""
    params = model(dtype)
    twins = [p.detach().clone().requires_grad_() for p in params]
    row = ROW["NorMuon"]
    ours, theirs = row.ours(params, **kwargs), row.theirs(twins, **kwargs)
    lr = float(ours.param_groups[0]["lr"])
    for _ in range(3):
        give(params)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=8 * ROUNDING[dtype], atol=0.05 * lr + 8 * ROUNDING[dtype])
        assert {n: (s.dtype, s.shape) for n, s in ours.state[p].items()} == {
            n: (s.dtype, s.shape) for n, s in theirs.state[q].items()
        }


@pytest.mark.parametrize("adjust_lr_fn", [None, "original"])
def test_gradients_that_are_zero_or_not_finite(adjust_lr_fn):
    p, q = torch.ones(3, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    optimizer = onepass.NorMuon([p, q], weight_decay=0.0, adjust_lr_fn=adjust_lr_fn)
    p.grad, q.grad = torch.zeros(3, 4), torch.full((3, 4), math.nan)
    optimizer.step()
    assert torch.equal(p, torch.ones(3, 4))
    assert q.isnan().all()
    p.grad, q.grad = torch.randn(3, 4), None
    optimizer.step()
    assert p.isfinite().all()


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16], ids=str)
@each_dtype
def test_a_checkpoint_goes_on(dtype, state_dtype):
    params = model(dtype)
    optimizer = onepass.NorMuon(params, lr=0.01, state_dtype=state_dtype)
    for _ in range(3):
        give(params)
        optimizer.step()
    twins = [p.detach().clone().requires_grad_() for p in params]
    second = onepass.NorMuon(twins, state_dtype=state_dtype)
    second.load_state_dict(through_a_file(optimizer.state_dict()))
    for _ in range(3):
        give(params)
        for p, q in zip(params, twins, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        second.step()
    for p, q in zip(params, twins, strict=True):
        assert bits(p) == bits(q)
        for state in (optimizer.state[p], second.state[q]):
            assert state["momentum_buffer"].dtype == (state_dtype or dtype)
            assert state["second_momentum_buffer"].dtype == (state_dtype or dtype)
            assert state["second_momentum_buffer"].shape == (len(p), 1)


@pytest.mark.parametrize("change", ["complex", "sparse"])
def test_what_it_does_not_support(change):
    p = Parameter(torch.ones(3, 3, dtype=torch.complex64 if change == "complex" else None))
    other = Parameter(torch.ones(3, 3))
    optimizer = onepass.NorMuon([other, p])
    other.grad = torch.ones(3, 3)
    p.grad = torch.ones_like(p) if change == "complex" else torch.ones(3, 3).to_sparse()
    with pytest.raises(RuntimeError, match=f"NorMuon does not support {change}"):
        optimizer.step()
    assert torch.equal(other, torch.ones(3, 3))
    assert not optimizer.state


def test_explain():
    p, q = Parameter(torch.ones(3, 3)), Parameter(torch.ones(3, 3, dtype=torch.complex64))
    optimizer = onepass.NorMuon([p, q])
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    assert [(path, reason) for _, _, path, reason in optimizer._explain()] == [
        ("kernel", ""),
        ("torch", "complex parameter"),
    ]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_empty_parameters(shape):
    """They stay, and the others are stepped as without them, also from states that are there."""
    stepped = []
    for shapes in ([shape, (2, 4)], [(2, 4)]):
        params = [torch.ones(each, requires_grad=True) for each in shapes]
        optimizer = onepass.NorMuon(params)
        for number in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            with only_kernels(len(params)):
                optimizer.step()
        stepped.append(bits(params[-1].detach()))
    assert stepped[0] == stepped[1] != bits(torch.ones(2, 4))


def test_a_state_that_does_not_fit_is_refused_before_anything_is_written():
    p, q = torch.ones(3, 4, requires_grad=True), torch.ones(2, 5, requires_grad=True)
    optimizer = onepass.NorMuon([p, q])
    give([p, q])
    optimizer.step()
    optimizer.state[q]["second_momentum_buffer"] = torch.ones(5, 1)
    before = [bits(t) for x in (p, q) for t in (x, *optimizer.state[x].values())]
    with pytest.raises(ValueError, match=r"second_momentum_buffer of a parameter of shape \(2, 5\) on cpu must have"):
        optimizer.step()
    assert [bits(t) for x in (p, q) for t in (x, *optimizer.state[x].values())] == before


def test_another_adjust_lr_fn_in_a_group_is_refused():
    p = Parameter(torch.ones(4, 3))
    message = 'group 0: adjust_lr_fn must be "original", "match_rms_adamw" or None, got \'orignal\''
    with pytest.raises(ValueError, match=message):
        onepass.NorMuon([{"params": [p], "adjust_lr_fn": "orignal"}])
    optimizer = onepass.NorMuon([p])
    p.grad = torch.ones(4, 3)
    optimizer.param_groups[0]["adjust_lr_fn"] = "orignal"
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(p, torch.ones(4, 3))
    assert not optimizer.state
