"""The steps, in torch operations, of classes that torch does not have: of parameters that no kernel covers."""

import numpy as np
import onepass
import pytest
import torch
from cases import CASES, ROWS, copies, for_rows, give, gradients, model
from reference import ROUNDING, Trajectory, bits
from torch.nn import Parameter

OWN = [row for row in ROWS if not hasattr(torch.optim, row.name)]
OWN_CASES = [case for case in CASES if case.values[0] in OWN]


@pytest.mark.parametrize(("row", "kwargs"), OWN_CASES)
def test_the_formula(row, kwargs):
    """After 10 steps in float64, each number is at most 1e-12 of the largest from the formula."""
    params = model(torch.float64)
    optimizer = row.theirs(copies(params), **kwargs)
    exact = Trajectory(row, optimizer)
    for step in range(1, 11):
        give(optimizer, gradients(params, step))
        optimizer.step()
        exact.step()
    for name in exact.names():
        want = exact.numbers(name)
        off = np.abs((exact.of(optimizer, name) - want).astype(np.float64))
        assert off.max() <= 1e4 * ROUNDING[torch.float64] * max(float(np.abs(want).max()), 1e-300), name


@for_rows(OWN)
def test_a_refused_parameter_leaves_all_as_they_were(row):
    """Also those that come before it."""
    first, sparse = torch.ones(4, 3), Parameter(torch.ones(4, 3))
    first = first.as_subclass(type("Subclass", (torch.Tensor,), {})).requires_grad_()
    optimizer = row.ours([first, sparse], **row.full)
    first.grad = torch.ones_like(first)
    sparse.grad = torch.ones(4, 3, dtype=torch.complex64).real.to_sparse()
    before = bits(first.detach())
    whole = torch.ones(4, 3).to(torch.int64)
    whole.grad = torch.ones_like(whole)
    optimizer.add_param_group({"params": [whole]})
    with pytest.raises((RuntimeError, ValueError)):
        optimizer.step()
    assert bits(first.detach()) == before
    assert not optimizer.state.get(first)


@for_rows(OWN)
def test_a_group_without_maximize(row):
    """Checkpoints of bitsandbytes have none. The kernels read its absence as False, and so do torch operations."""
    stepped = []
    for lacks in (False, True):
        p = torch.linspace(-1, 1, 12).reshape(4, 3).as_subclass(type("Subclass", (torch.Tensor,), {})).requires_grad_()
        optimizer = row.ours([p], **row.full)
        if lacks:
            optimizer.param_groups[0].pop("maximize", None)  # NorMuon has none
        for number in range(3):
            p.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(number)).as_subclass(type(p))
            optimizer.step()
        stepped.append(bits(p.detach()))
    assert stepped[0] == stepped[1] != bits(torch.linspace(-1, 1, 12).reshape(4, 3))


@for_rows(row for row in OWN if row.ours.copies)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_have_the_dtypes_that_kernels_give_them(row, dtype, state_dtype):
    plain = torch.ones(4, 3, dtype=dtype)
    params = [plain.clone(), plain.as_subclass(type("Subclass", (torch.Tensor,), {})).clone()]
    optimizer = row.ours([p.requires_grad_() for p in params], **{**row.full, "state_dtype": state_dtype})
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    by_kernels, by_torch = ({name: s.dtype for name, s in optimizer.state[p].items()} for p in params)
    assert by_torch == by_kernels


def test_the_classes():
    assert {row.ours for row in OWN} >= {onepass.Lion, onepass.Signum, onepass.Adan}


@pytest.mark.parametrize("state_dtype", [None, torch.float64])
def test_adagrads_states_of_what_was_added_later(state_dtype):
    """torch's own step creates them from 2.12 on."""
    first, added = (torch.tensor([1.0, -2.0], requires_grad=True) for _ in range(2))
    opt = onepass.Adagrad([first], lr=0.5, initial_accumulator_value=2.0, state_dtype=state_dtype)
    opt.add_param_group({"params": [added]})
    for p in (first, added):
        p.grad = torch.tensor([0.5, 3.0])
    opt.torch_step()
    for p in (first, added):
        assert opt.state[p]["step"] == 1
        assert opt.state[p]["sum"].dtype == (state_dtype or torch.float32)
        torch.testing.assert_close(opt.state[p]["sum"], torch.tensor([2.25, 11.0]).to(opt.state[p]["sum"].dtype))
        expected = torch.tensor([1.0, -2.0]) - 0.5 * torch.tensor([0.5 / 1.5, 3.0 / 11.0**0.5])
        torch.testing.assert_close(p.detach(), expected)
