"""cautious and cautious_weight_decay: what the table of cases does not have of them."""

import copy
import io
import math
import re

import numpy as np
import onepass
import pytest
import torch
from cases import OWN_CASES, ROWS, copies, give, gradients, model
from reference import ROUNDING, Trajectory, bits, numbers, only_kernels, params_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn import Parameter

NAMES = ("cautious", "cautious_weight_decay")
MASKED = [case for case in OWN_CASES if any(case.values[1].get(name) for name in NAMES)]
each_masked = pytest.mark.parametrize(("row", "kwargs"), MASKED)
WITHOUT_CAUTIOUS = [
    row
    for row in ROWS
    if "cautious" in row.own and not any(case.values[0] is row and "cautious" in case.values[1] for case in MASKED)
]


def leaf(values, dtype=torch.float64):
    return Parameter(torch.tensor(values, dtype=dtype))


def in_torch_operations(monkeypatch, optimizer):
    """Steps as if no kernel covered any parameter."""
    monkeypatch.setattr(optimizer, "_step_natively", lambda factor: optimizer._step_by_torch_alone("a test", factor))


# -- numbers ---------------------------------------------------------------------------------------------------------


@each_masked
def test_the_formula_in_torch_operations(row, kwargs, monkeypatch):
    """After 10 steps in float64, each number is at most 1e-12 of the largest from the formula."""
    torch.set_default_dtype(torch.float64)  # which the scalars then have, too
    params = model(torch.float64)
    optimizer = row.ours(copies(params), **kwargs)
    in_torch_operations(monkeypatch, optimizer)
    exact = Trajectory(row, optimizer)
    for step in range(1, 11):
        give(optimizer, gradients(params, step))
        optimizer.step()
        exact.step()
    for name in exact.names():
        want = exact.numbers(name)
        off = np.abs((exact.of(optimizer, name) - want).astype(np.float64))
        assert off.max() <= 1e4 * ROUNDING[torch.float64] * max(float(np.abs(want).max()), 1e-300), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64], ids=str)
@each_masked
def test_torch_operations_as_the_kernels(row, kwargs, dtype, monkeypatch):
    """After three steps they are at most some roundings of the parameter's dtype apart."""
    larger = {**kwargs, "lr": 0.1, "weight_decay": kwargs["weight_decay"] and 1.0}  # than the roundings
    optimizers = [row.ours(copies(model(dtype)), **larger, state_dtype=torch.float32) for _ in range(2)]
    for p, q in zip(*map(params_of, optimizers), strict=True):
        q.data.copy_(p.data)
    in_torch_operations(monkeypatch, optimizers[1])
    for _ in range(3):
        grads = [torch.randn_like(p) for p in params_of(optimizers[0])]
        for optimizer in optimizers:
            give(optimizer, grads)
            optimizer.step()
    off = 1e-5 if dtype.is_complex else 4 * ROUNDING[dtype]
    for p, q in zip(*map(params_of, optimizers), strict=True):
        np.testing.assert_allclose(numbers(p), numbers(q), rtol=off, atol=off)


def test_which_elements_remain(kernels_only):
    """Three of four have the gradient's sign: 4/3 of their updates remain. A gradient of zero has no sign."""
    p = leaf([1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    optimizer = onepass.SGD([p], lr=1.0, momentum=1.0, cautious=True)
    p.grad = torch.tensor([4.0, 4.0, 4.0, -4.0, 1.0, -1.0], dtype=torch.float64)
    optimizer.step()
    assert p.tolist() == [-3.0, -3.0, -3.0, 5.0, 0.0, 2.0]
    p.grad = torch.tensor([1.0, -1.0, 0.0, -1.0, 1.0, 2.0], dtype=torch.float64)
    optimizer.step()  # the buffer becomes 5, 3, 4, -5, 2, 1, of which 5, -5, 2 and 1 have the gradient's sign
    assert p.tolist() == pytest.approx([-3 - 7.5, -3, -3, 5 + 7.5, 0 - 3, 2 - 1.5], rel=1e-15)


def test_if_none_remain(kernels_only):
    """Nothing is divided by zero; a decoupled weight decay stays."""
    p = leaf([1.0, -1.0])
    optimizer = onepass.Lion([p], lr=0.5, betas=(0.99, 0.5), weight_decay=0.1, cautious=True)
    p.grad = torch.tensor([1.0, -1.0], dtype=torch.float64)
    optimizer.step()
    before = p.tolist()
    p.grad = torch.tensor([-1e-9, 1e-9], dtype=torch.float64)
    optimizer.step()
    assert p.tolist() == [x - 0.5 * 0.1 * x for x in before]


@pytest.mark.parametrize("tiny", [1e-30, 1e-38, 1e-45])
def test_products_that_would_be_rounded_to_zero(tiny, kernels_only):
    p = Parameter(torch.ones(2))
    optimizer = onepass.SGD([p], lr=1.0, momentum=0.5, cautious=True)
    p.grad = torch.tensor([2.0, tiny])
    optimizer.step()
    is_normal = tiny >= torch.finfo(torch.float32).tiny
    assert p[0].item() == (-1.0 if is_normal else -3.0)  # a denormal gradient is zero, so one of two remains


@pytest.mark.parametrize("where", ["kernels", "torch operations"])
def test_nan_stays_visible(where, monkeypatch):
    p = leaf([1.0, 1.0, 1.0])
    optimizer = onepass.AdamW([p], cautious=True, cautious_weight_decay=True)
    if where == "torch operations":
        in_torch_operations(monkeypatch, optimizer)
    p.grad = torch.tensor([math.nan, 1.0, 0.0], dtype=torch.float64)
    optimizer.step()
    assert torch.isnan(p).tolist() == [True, False, False]


def test_where_weights_decay(kernels_only):
    """Where update and parameter have the same sign, or either is zero."""
    p = leaf([2.0, -2.0, 2.0, -2.0, 2.0, 0.0])
    optimizer = onepass.Lion([p], lr=0.5, weight_decay=0.5, cautious_weight_decay=True)
    p.grad = torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    optimizer.step()
    assert p.tolist() == [2 - 0.5 - 0.5, -2 + 0.5 + 0.5, 2 + 0.5, -2 - 0.5, 2 - 0.5, -0.5]


@pytest.mark.parametrize("kwargs", [{}, {"adjust_lr_fn": "match_rms_adamw"}], ids=str)
@pytest.mark.parametrize("cls", [onepass.Muon, onepass.NorMuon])
def test_matrices(cls, kwargs):
    """What a step without decay does, and the decay where it has the parameter's sign."""
    values = torch.randn(33, 20, dtype=torch.float64)
    masked, bare = (Parameter(values.clone()) for _ in range(2))
    ours = cls([masked], lr=0.1, weight_decay=0.5, cautious_weight_decay=True, **kwargs)
    other = cls([bare], lr=0.1, weight_decay=0.0, **kwargs)
    for step in range(3):
        masked.grad = torch.randn(33, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        bare.grad = masked.grad.clone()
        before = masked.detach().clone()
        bare.data.copy_(before)
        ours.step()
        other.step()
        u = before - bare.detach()
        wanted = bare.detach() - torch.where(u * before >= 0, 0.05 * before, 0.0)
        torch.testing.assert_close(masked.detach(), wanted, rtol=1e-14, atol=1e-15)


# -- with the rest ---------------------------------------------------------------------------------------------------


def test_every_instruction_set_and_number_of_threads_has_the_same_bits(all_threads):
    """Tensors of several blocks of sums, with 8-bit states whose rows are no whole blocks."""
    found = set()
    for isa in onepass._core.isas():
        for threads in (1, 2, 3):
            onepass._core.force_isa(isa)
            torch.set_num_threads(threads)
            params = [
                Parameter(torch.randn(s, generator=torch.Generator().manual_seed(1))) for s in ((300, 301), (7, 3))
            ]
            optimizer = onepass.AdamW(params, lr=0.1, state_dtype=torch.float8_e4m3fn, cautious=True)
            with only_kernels(6):
                for step in range(3):
                    give(
                        optimizer, [torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) for p in params]
                    )
                    optimizer.step()
            found.add(b"".join(bits(p.detach()) for p in params))
    onepass._core.force_isa("")
    assert len(found) == 1


def test_clipped_gradients():
    """The factor of a norm does not change signs; clamped gradients have the same."""
    one, other = (leaf([1.0, 2.0, 3.0]) for _ in range(2))
    ours = onepass.AdamW([one], cautious=True, max_norm=0.1, clip_value=0.05)
    plain = onepass.AdamW([other], cautious=True)
    for grad in ([3.0, -4.0, 0.0], [-1.0, -1.0, 2.0], [0.01, 0.0, 0.02]):
        one.grad = torch.tensor(grad, dtype=torch.float64)
        factor = min(1.0, 0.1 / (one.grad.norm().item() + 1e-6))
        other.grad = (factor * one.grad).clamp(-0.05, 0.05)
        ours.step()
        plain.step()
    torch.testing.assert_close(one, other, rtol=1e-14, atol=0)


def test_sparse_gradients():
    """A step of some rows is not defined for `cautious`; cautious weight decay is of the rows that have entries."""
    p, q = (Parameter(torch.ones(4, 3)) for _ in range(2))
    p.grad = torch.eye(4, 3).to_sparse(1)
    with pytest.raises(RuntimeError, match="AdamW with cautious does not support this sparse gradient"):
        onepass.AdamW([p], cautious=True).step()
    assert p.eq(1).all()
    q.grad = torch.eye(4, 3)
    ours, dense = (onepass.AdamW([x], lr=0.1, weight_decay=0.5, cautious_weight_decay=True) for x in (p, q))
    ours.step()
    dense.step()
    torch.testing.assert_close(p[:3], q[:3])
    assert p[3].eq(1).all()


def test_a_refused_sparse_gradient_leaves_all_as_they_were():
    """Also parameters that come before it, which need no conversion."""
    first = torch.ones(3).as_subclass(type("Subclass", (torch.Tensor,), {})).requires_grad_()
    second = Parameter(torch.ones(4, 3, dtype=torch.bfloat16))
    first.grad, second.grad = torch.ones_like(first), torch.ones(4, 3, dtype=torch.bfloat16).to_sparse(1)
    optimizer = onepass.AdamW([first, second], cautious=True)
    with pytest.raises(RuntimeError, match="AdamW with cautious does not support this sparse gradient"):
        optimizer.step()
    assert first.eq(1).all()
    assert not optimizer.state


def test_adopts_decay_in_float64(monkeypatch):
    """The first step does not decay; the later ones do, in the parameter's precision."""
    optimizers = [onepass.ADOPT([leaf([1.0, -2.0, 3.0])], lr=0.1, weight_decay=0.1, **ADOPTS) for _ in range(2)]
    in_torch_operations(monkeypatch, optimizers[1])
    for step in range(4):
        for optimizer in optimizers:
            for p in params_of(optimizer):
                p.grad = torch.tensor([1.0, -1.0, 0.5 - step], dtype=torch.float64)
            optimizer.step()
    for p, q in zip(*map(params_of, optimizers), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=0)


ADOPTS = {"decoupled_weight_decay": True, "cautious": True, "cautious_weight_decay": True}


def spread(name):
    """Two processes, each with a part of a tensor: the elements that remain are counted in both."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(3)
    values = [torch.randn(6, 5), torch.randn(3)]
    whole = [Parameter(v.clone()) for v in values]
    parts = [
        Parameter(distribute_tensor(v, mesh, [place])) for v, place in zip(values, (Shard(0), Replicate()), strict=True)
    ]
    arguments = {"lr": 0.1, "weight_decay": 0.1, "cautious": True, "cautious_weight_decay": True}
    if name == "ADOPT":
        arguments["decoupled_weight_decay"] = True
    alone, ours = (getattr(onepass, name)(p, **arguments) for p in (whole, parts))
    for _ in range(4):
        for p, q in zip(whole, parts, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = distribute_tensor(p.grad, mesh, q.placements)
        alone.step()
        ours.step()
    for p, q in zip(whole, parts, strict=True):
        torch.testing.assert_close(q.full_tensor(), p, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["AdamW", "Lion", "ADOPT", "Adan"])
def test_dtensors(processes, name):
    processes(2, spread, name)


def test_converted_checkpoints():
    """They stay cautious: a conversion of the states' dtype concerns no other option."""
    p = leaf([1.0, 2.0])
    p.grad = torch.ones_like(p)
    optimizer = onepass.AdamW([p], cautious=True, cautious_weight_decay=True)
    optimizer.step()
    for dtype in (None, torch.float32):
        group = onepass.convert_state_dict(optimizer.state_dict(), dtype)["param_groups"][0]
        assert group["cautious"]
        assert group["cautious_weight_decay"]


def test_groups_and_checkpoints():
    """A group's own value holds, is saved and is loaded; torch's checkpoints leave an argument as it was."""
    p, q = leaf([1.0, 2.0]), leaf([3.0])
    optimizer = onepass.AdamW([{"params": [p], "cautious": False}, {"params": [q]}], cautious=True)
    assert [group["cautious"] for group in optimizer.param_groups] == [False, True]
    assert "cautious_weight_decay" not in optimizer.param_groups[0]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = onepass.AdamW([{"params": [leaf([1.0, 2.0])]}, {"params": [leaf([3.0])]}])
    other.load_state_dict(torch.load(file, weights_only=True))
    assert [group["cautious"] for group in other.param_groups] == [False, True]
    torchs = torch.optim.AdamW([leaf([1.0, 2.0])])
    one = onepass.AdamW([leaf([1.0, 2.0])], cautious=True)
    one.load_state_dict(torchs.state_dict())
    assert one.param_groups[0]["cautious"] is True
    assert copy.deepcopy(one).param_groups[0]["cautious"] is True
    torchs.load_state_dict(one.state_dict())


def test_switched_on_between_steps(kernels_only):
    p, q = leaf([1.0, 2.0]), leaf([1.0, 2.0])
    ours, plain = onepass.Lion([p]), onepass.Lion([q])
    for optimizer, x in ((ours, p), (plain, q)):
        x.grad = torch.ones_like(x)
        optimizer.step()
    assert bits(p.detach()) == bits(q.detach())
    ours.param_groups[0]["cautious"] = True
    p.grad = torch.tensor([1.0, -1e-9], dtype=torch.float64)
    before = p.tolist()
    ours.step()
    assert p.tolist() == [before[0] - 2e-4, before[1]]


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", WITHOUT_CAUTIOUS, ids=lambda row: row.name)
def test_optimizers_that_do_not_have_it(row):
    params = [torch.ones(shape).requires_grad_() for shape in row.shapes]
    named = re.escape(f"{row.name}: cautious must be False")
    with pytest.raises(ValueError, match=named):
        row.ours(params, **row.full, cautious=True)
    optimizer = row.ours(params, **row.full)
    with pytest.raises(ValueError, match=named):
        optimizer.add_param_group({"params": [torch.ones(2, 2).requires_grad_()], "cautious": True})
    assert len(optimizer.param_groups) == 1
    row.ours(params, **row.full, cautious=False)


@pytest.mark.parametrize("cls", [onepass.SGD, onepass.RMSprop, onepass.Adamax])
def test_a_coupled_decay_has_no_mask(cls):
    with pytest.raises(ValueError, match=f"cautious_weight_decay must be False, because {cls.__name__} does not have"):
        cls([leaf([1.0])], cautious_weight_decay=True)


@pytest.mark.parametrize("cls", [onepass.Adam, onepass.NAdam, onepass.RAdam, onepass.ADOPT])
def test_a_decay_that_may_be_coupled(cls):
    with pytest.raises(ValueError, match="group 0: cautious_weight_decay must be False, got True, because decoupled"):
        cls([leaf([1.0])], weight_decay=0.1, cautious_weight_decay=True)
    optimizer = cls([leaf([1.0])])
    with pytest.raises(ValueError, match="group 1: cautious_weight_decay must be False, got True, because decoupled"):
        optimizer.add_param_group({"params": [leaf([1.0])], "cautious_weight_decay": True})
    cls([leaf([1.0])], weight_decay=0.1, cautious_weight_decay=True, decoupled_weight_decay=True)


@pytest.mark.parametrize("value", ["yes", 1, 0.5, torch.tensor(True)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_other_types(name, value):
    with pytest.raises(TypeError, match=f"AdamW: {name} must be True or False, got the"):
        onepass.AdamW([leaf([1.0])], **{name: value})
    optimizer = onepass.AdamW([leaf([1.0])])
    with pytest.raises(TypeError, match=f"AdamW: group 1: {name} must be True or False, got the"):
        optimizer.add_param_group({"params": [leaf([1.0])], name: value})


def test_differentiable_steps():
    p = leaf([1.0])
    optimizer = onepass.AdamW([p], differentiable=True, cautious=True)
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="AdamW: group 0: cautious cannot be given with differentiable=True"):
        optimizer.step()
    assert p.tolist() == [1.0]
    assert not optimizer.state[p]
