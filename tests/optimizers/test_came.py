"""CAME, which is not element-wise: what support/cases.py holds the others to, for means over rows and columns."""

import itertools
import re

import factored
import onepass
import pytest
import reference
import torch
from cases import copies, give
from factored import DTYPES, everything, gradients, model, run
from parity import assert_as_exact_as_torch
from reference import ROUNDING, bits, numbers, only_kernels, params_of, stored

pytestmark = pytest.mark.usefixtures("one_thread")

OF_VECTOR = ("exp_avg_sq", "exp_avg")
OF_MATRIX = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg", "exp_avg_res_row", "exp_avg_res_col")
MEANS = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col")

ROW = factored.CAME
each_variant = pytest.mark.parametrize("kwargs", ROW.variants.values(), ids=ROW.variants)


def checked_step(optimizer, roundings=16) -> None:
    """Steps, with the kernels alone, and holds every element to the formula, from what was in memory before.

    Each state must be what the formula makes of the old one and of the other new states as they were stored, and so
    must the parameter; within some roundings of the arithmetic, and the one of its own dtype. Where a residual is a
    difference of nearly equal numbers, these are roundings of the numbers.
    """
    before = reference.snapshot(ROW, optimizer)
    with only_kernels(len(before)):
        optimizer.step()
    for p, h, old_p, g, old_states, _ in before:
        names = OF_MATRIX if p.ndim > 1 else OF_VECTOR
        assert optimizer.state[p].keys() == {*names}
        if old_p.size == 0:
            continue
        g = -g if h["maximize"] else g
        new = {name: numbers(optimizer.state[p][name]) for name in names}
        updated, want = reference.came(old_p, g, old_states, 1, **h, held=new)
        assert want.keys() == new.keys()
        for name, exact in {**want, "": updated}.items():
            tensor = optimizer.state[p][name] if name else p
            error = roundings * ROUNDING[torch.float64 if p.dtype == torch.float64 else torch.float32]
            old = {"": old_p, **old_states}.get(name, 0.0)
            size = abs(exact) + abs(exact - old)
            if name.startswith("exp_avg_res"):
                axis = -1 if name.endswith("row") else -2
                size = size + (1 - h["betas"][2]) * (new["exp_avg"] ** 2).mean(axis, keepdims=True)
            room = error * size + torch.finfo(torch.float32).tiny
            low, high = stored(exact - room, tensor.dtype), stored(exact + room, tensor.dtype)
            got = numbers(tensor)
            assert ((low <= got) & (got <= high)).all(), (name, tuple(p.shape), tensor.dtype)


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_variant
def test_parity(kwargs, dtype):
    """After 40 steps, as exact as torch operations."""
    with only_kernels():
        assert_as_exact_as_torch(ROW, kwargs, dtype, model(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_variant
def test_every_step(kwargs, dtype):
    ours = ROW.ours(model(dtype), **kwargs)
    for step in range(1, 6):
        give(ours, gradients(params_of(ours), step))
        checked_step(ours)


@pytest.mark.parametrize(("param", "grad", "state"), [*itertools.product(DTYPES, DTYPES, (None, *DTYPES))], ids=str)
def test_every_mix_of_dtypes(param, grad, state):
    """The momentum has the parameter's dtype, unless it is given another; second moments are never narrower."""
    ours = ROW.ours(model(param), **ROW.full, state_dtype=state)
    moments = torch.float64 if param == torch.float64 else torch.float32
    for step in range(1, 4):
        for p, g in zip(params_of(ours), gradients(params_of(ours), step), strict=True):
            p.grad = None
            if g is not None:  # a gradient of another dtype than the parameter's, as frameworks make them
                p.grad_dtype = None
                p.grad = g.to(grad)
        checked_step(ours)
        for p in params_of(ours):
            for name, held in ours.state[p].items():
                assert held.dtype == ((state or param) if name == "exp_avg" else moments)


def test_empty_one_element_and_no_dimension():
    shapes = [(0,), (3, 0), (0, 3), (2, 0, 4), (0, 2, 3), (), (1,), (1, 1), (1, 1, 1)]
    ours = ROW.ours([torch.ones(shape, requires_grad=True) for shape in shapes])
    for _ in range(2):
        give(ours, [torch.ones(shape) for shape in shapes])
        checked_step(ours)
    for p, shape in zip(params_of(ours), shapes, strict=True):
        for name in MEANS if len(shape) > 1 else ():
            want = list(shape)
            want[-1 if name.endswith("_row") else -2] = 1
            assert list(ours.state[p][name].shape) == want
            if p.numel() == 0:
                assert (ours.state[p][name] == 0).all()


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf"), 1e20, 3e38, 1e-30, 0.0], ids=str)
@pytest.mark.parametrize("shape", [(9,), (6, 5), (30, 20), (4, 3, 3), (3, 30, 20), (100, 2)], ids=str)
def test_not_finite(shape, special):
    """NaN, infinities, overflows and nothing spread as in torch operations."""
    params = [torch.ones(shape, requires_grad=True)]
    grads = [torch.ones(shape), torch.ones(shape), torch.ones(shape)]
    grads[0].view(-1)[-1] = special
    for kwargs in ({}, ROW.full):
        ours, theirs = ROW.ours(copies(params), **kwargs), ROW.theirs(copies(params), **kwargs)
        for grad in grads:
            run(ours, [[grad]])
            run(theirs, [[grad]])
            (p,), (q,) = params_of(ours), params_of(theirs)
            torch.testing.assert_close(p, q, equal_nan=True)
            for name in ours.state[p]:
                torch.testing.assert_close(
                    ours.state[p][name], theirs.state[q][name], equal_nan=True, atol=1e-12, rtol=1e-4
                )


# -- behavior -------------------------------------------------------------------------------------------------------


def test_hyperparameters_are_read_anew_at_each_step():
    ours = ROW.ours(model(), **{**ROW.full, "lr": torch.tensor(0.04)})
    (group,) = ours.param_groups
    for step in range(1, 7):
        group["lr"].mul_(0.5)
        group["weight_decay"] = [0.1, 0, 0.3][step % 3]
        group["maximize"] = step % 3 == 2
        group["eps"] = [(1e-30, 1e-16), (0.1, 0.5), (1e-20, 1e-3)][step % 3]
        group["clip_threshold"] = [1, 2.0][step % 2]
        group["betas"] = [(0.9, 0.99, 0.999), [0.5, 0.6, 0.7]][step % 2]
        give(ours, gradients(params_of(ours), step))
        checked_step(ours)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(exp_avg_res_row=torch.zeros(4, 3)), "its state exp_avg_res_row has shape [4, 3]"),
        (lambda s: s.update(exp_avg_res_row=torch.zeros(1, 3)), "its state exp_avg_res_row has shape [1, 3]"),
        (lambda s: s.update(exp_avg_res_col=torch.zeros(4, 1)), "its state exp_avg_res_col has shape [4, 1]"),
        (lambda s: s.update(exp_avg_sq_row=torch.zeros(1, 3)), "its state exp_avg_sq_row has shape [1, 3]"),
        (lambda s: s.update(exp_avg_sq_col=torch.zeros(4)), "its state exp_avg_sq_col has shape [4]"),
        (lambda s: s.update(exp_avg=torch.zeros(4, 1)), "its state exp_avg has shape [4, 1]"),
        (
            lambda s: s.update(exp_avg_res_col=torch.zeros(1, 3).int()),
            "its state exp_avg_res_col has dtype torch.int32",
        ),
        (lambda s: s.update(exp_avg_sq_row=3), "its state exp_avg_sq_row is not a tensor"),
        (lambda s: s.update(exp_avg_res_col=s["exp_avg_sq_col"]), "its own tensors (parameter, states, step) overlap"),
        (lambda s: s.pop("exp_avg_res_col"), None),
    ],
)
def test_states_that_do_not_fit(change, message):
    """The message names the parameter, and nothing has been written."""
    p, q = torch.randn(5, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    ours = ROW.ours([{"params": [("v", p)]}, {"params": [("w", q)]}])
    run(ours, [[torch.ones(5), torch.ones(4, 3)]])
    change(ours.state[q])
    if message is None:  # a state that is missing is made anew
        ours.step()
        assert ours.state[q]["exp_avg_res_col"].shape == (1, 3)
        return

    def written():
        return [bits(t) for t in (p, q, *ours.state[p].values())]

    before = written()
    with pytest.raises(
        ValueError, match=re.escape(f"parameter 0 of group 1 'w' (shape [4, 3], torch.float32): {message}")
    ):
        ours.step()
    assert written() == before
    assert onepass.explain(ours)[1].path == "error"


class Marked(torch.Tensor):
    """A subclass that the kernels do not know."""


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda group, state: group.update(clip_threshold=0.0), ZeroDivisionError, "clip_threshold is zero"),
        (
            lambda group, state: state.update(exp_avg_res_row=torch.zeros(4, 3)),
            ValueError,
            "the state exp_avg_res_row of a parameter of shape (4, 3) must have shape (4, 1), got (4, 3)",
        ),
    ],
)
def test_torch_operations_check_before_they_write(change, error, message):
    p = torch.randn(4, 3).as_subclass(Marked).requires_grad_()
    ours = ROW.ours([p])
    run(ours, [[torch.ones(4, 3)]])
    change(ours.param_groups[0], ours.state[p])
    before = everything(ours)
    with pytest.raises(error, match=re.escape(message)):
        run(ours, [[torch.ones(4, 3)]])
    assert everything(ours) == before


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("saved", [torch.float32, torch.float16])
def test_second_moments_are_never_narrow(saved, device):
    """Neither those that a checkpoint has in 16 bits, nor where torch's load_state_dict would make them so."""
    ours = ROW.ours([torch.ones(shape, dtype=torch.float16).requires_grad_() for shape in [(4, 3), (5,)]])
    run(ours, [[torch.ones_like(p) for p in params_of(ours)]])
    checkpoint = ours.state_dict()
    for state in checkpoint["state"].values():
        state.update({name: value.to(saved) for name, value in state.items() if name != "exp_avg"})
    other = ROW.ours([p.detach().to(device).requires_grad_() for p in params_of(ours)], state_dtype=torch.float16)
    other.load_state_dict(checkpoint)
    for p in params_of(other):
        held = {name: value.dtype for name, value in other.state[p].items()}
        assert held.pop("exp_avg") == torch.float16
        assert {*held.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_converted_checkpoints(dtype):
    """Only the momentum is converted; it cannot have 8 bits."""
    ours = ROW.ours([torch.ones(80, 80).requires_grad_(), torch.ones(5).requires_grad_()], **ROW.full)
    run(ours, [gradients(params_of(ours), 1)])
    converted = onepass.convert_state_dict(ours.state_dict(), dtype)
    for number, p in enumerate(params_of(ours)):
        for name, value in converted["state"][number].items():
            wanted = torch.float16 if name == "exp_avg" and dtype == torch.float16 else torch.float32
            assert value.dtype == wanted
            assert bits(value) == bits(ours.state[p][name].to(wanted))
    other = ROW.ours(copies(params_of(ours)))
    other.load_state_dict(converted)
    with pytest.raises(ValueError, match="layout='bitsandbytes' needs the states of Adam or Lion"):
        onepass.convert_state_dict(ours.state_dict(), layout="bitsandbytes")


def test_a_clip_threshold_of_zero():
    p = torch.ones(4, 3, requires_grad=True)
    ours = ROW.ours([p])
    ours.param_groups[0]["clip_threshold"] = 0.0
    with pytest.raises(ZeroDivisionError, match="clip_threshold is zero"):
        run(ours, [[torch.ones(4, 3)]])
    assert (p == 1).all()


@pytest.mark.parametrize(
    ("param", "grad", "message"),
    [
        (torch.randn(3, 2, dtype=torch.complex64), torch.randn(3, 2, dtype=torch.complex64), "complex parameters"),
        (torch.randn(3, 2), torch.randn(3, 2).to_sparse(), "sparse gradients"),
    ],
)
def test_what_it_refuses(param, grad, message):
    p = param.requires_grad_()
    p.grad = grad
    with pytest.raises(RuntimeError, match=f"CAME does not support {message}"):
        ROW.ours([p]).step()
