"""Adafactor, which is not element-wise: what support/cases.py holds the others to, for means over rows and columns."""

import itertools
import re

import factored
import onepass
import pytest
import reference
import torch
from cases import copies, give
from contract import through_a_file
from factored import DTYPES, everything, gradients, model, run
from parity import assert_as_exact_as_torch
from reference import ROUNDING, bits, numbers, only_kernels, params_of, stored
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

pytestmark = pytest.mark.usefixtures("one_thread")

STATES = ("row_var", "col_var", "variance")

ROW = factored.ADAFACTOR
each_variant = pytest.mark.parametrize("kwargs", ROW.variants.values(), ids=ROW.variants)


def explicit_eps(kwargs, dtype):
    """The same arguments with the numbers that None stands for."""
    eps1, eps2 = kwargs.get("eps", (None, 1e-3))
    return {**kwargs, "eps": (torch.finfo(dtype).eps if eps1 is None else eps1, eps2)}


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_variant
def test_parity(kwargs, dtype):
    with only_kernels():
        assert_as_exact_as_torch(ROW, explicit_eps(kwargs, dtype), dtype, model(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype):
    with only_kernels():
        assert_as_exact_as_torch(ROW, explicit_eps({"lr": 0.05, "weight_decay": 0.1}, dtype), dtype, model(dtype))


def checked_step(optimizer, roundings=12) -> None:
    """Steps, with the kernels alone, and holds every element to the formula, from what was in memory before.

    The variances must be what the formula makes of the old ones, and the parameters what it makes of the variances as
    they were stored; each within some roundings of the arithmetic, and the one of its own dtype.
    """
    before = reference.snapshot(ROW, optimizer)
    with only_kernels(len(before)):
        optimizer.step()
    for p, h, old_p, g, old_states, t in before:
        if old_p.size == 0:
            continue
        g = -g if h["maximize"] else g
        h = explicit_eps(h, p.dtype)
        held = {name: optimizer.state[p][name] for name in STATES if name in optimizer.state[p]}
        new = {name: numbers(value) for name, value in held.items()}
        want = reference.adafactor_variances(g, old_states, t, **h)
        assert want.keys() == new.keys()
        want[""] = reference.adafactor_update(old_p, g, new, t, **h)
        for name, exact in want.items():
            tensor = held[name] if name else p
            error = roundings * ROUNDING[torch.float64 if p.dtype == torch.float64 else torch.float32]
            old = {"": old_p, **old_states}.get(name, 0.0)
            room = error * (abs(exact) + abs(exact - old)) + torch.finfo(torch.float32).tiny
            low, high = stored(exact - room, tensor.dtype), stored(exact + room, tensor.dtype)
            got = numbers(tensor)
            assert ((low <= got) & (got <= high)).all(), (name, tuple(p.shape), tensor.dtype, t)


@pytest.mark.parametrize(("param", "grad", "state"), [*itertools.product(DTYPES, DTYPES, (None, *DTYPES))], ids=str)
def test_every_mix_of_dtypes(param, grad, state):
    """Each operand has its own dtype; states have the gradient's unless they are given another."""
    ours = onepass.Adafactor(model(param), **{**ROW.full, "eps": (None, 1e-3)}, state_dtype=state)
    for step in range(1, 4):
        for p, g in zip(params_of(ours), gradients(params_of(ours), step), strict=True):
            p.grad = None
            if g is not None:  # a gradient of another dtype than the parameter's, as frameworks make them
                p.grad_dtype = None
                p.grad = g.to(grad)
        checked_step(ours)
        for p in params_of(ours):
            for name in STATES:
                assert name not in ours.state[p] or ours.state[p][name].dtype == (state or grad)


def test_expanded_gradients_and_batches_in_any_order():
    params = [
        torch.randn(6, 70, 3),
        torch.randn(4, 5, 3, 3).permute(1, 0, 3, 2),
        torch.randn(3, 4, 5, 20).permute(2, 0, 3, 1),
    ]
    ours = onepass.Adafactor([p.requires_grad_() for p in params], **ROW.full)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape[-1]).expand(p.shape)
        checked_step(ours)


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


def test_empty_one_element_and_no_dimension():
    """torch divides by zero for an empty parameter; here it stays, its states too, and the counter rises."""
    shapes = [(0,), (3, 0), (0, 3), (2, 0, 4), (0, 2, 3), (), (1,), (1, 1), (1, 1, 1)]
    ours = onepass.Adafactor([torch.ones(shape, requires_grad=True) for shape in shapes])
    for _ in range(2):
        give(ours, [torch.ones(shape) for shape in shapes])
        checked_step(ours)
    for p, shape in zip(params_of(ours), shapes, strict=True):
        assert ours.state[p]["step"] == 2
        for name, reduced in (("row_var", -1), ("col_var", -2)):
            if len(shape) > 1:
                want = list(shape)
                want[reduced] = 1
                assert list(ours.state[p][name].shape) == want
                if p.numel() == 0:
                    assert (ours.state[p][name] == 0).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 0, 4)])
def test_empty_beside_one_that_torch_steps(shape):
    """torch's implementation steps both, because kernels do not clamp Adafactor's gradients."""
    full, empty, alone = torch.ones(4, 4), torch.ones(shape), torch.ones(4, 4)
    ours, twin = onepass.Adafactor(leaves(full, empty), clip_value=0.5), torch.optim.Adafactor(leaves(alone))
    for _ in range(2):
        give(ours, [torch.ones(4, 4), torch.ones(shape)])
        give(twin, [torch.full((4, 4), 0.5)])
        ours.step()
        twin.step()
    p, e = params_of(ours)
    assert bits(p) == bits(params_of(twin)[0])
    assert ours.state[e]["step"] == 2
    assert sorted(ours.state[e]) == (["col_var", "row_var", "step"] if len(shape) > 1 else ["step", "variance"])


def test_machine_epsilon_of_each_parameter():
    """torch gives all of a group the epsilon of its first parameter."""
    together = onepass.Adafactor([*model(torch.bfloat16), *model(torch.float64), *model(torch.float32)])
    grads = [torch.randn_like(p) * 1e-3 for p in params_of(together)]
    params = copies(params_of(together))
    run(together, [grads])
    for p, q, grad in zip(params_of(together), params, grads, strict=True):
        alone = torch.optim.Adafactor([q])
        run(alone, [[grad]])
        # torch rounds every operation to bfloat16.
        rtol, atol = (0.05, 1e-5) if p.dtype == torch.bfloat16 else (1e-5, 1e-7)
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol)


SPECIAL = [float("nan"), float("inf"), -float("inf"), 1e20, 3e38, 1e-30, 0.0, -0.0]


@pytest.mark.parametrize("special", SPECIAL, ids=str)
@pytest.mark.parametrize("shape", [(9,), (6, 5), (30, 20), (4, 3, 3), (3, 30, 20), (100, 2)], ids=str)
def test_not_finite(shape, special):
    """NaN, infinities, overflows and nothing spread as in torch."""
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
                torch.testing.assert_close(ours.state[p][name], theirs.state[q][name], equal_nan=True)


@pytest.mark.parametrize("special", [float("nan"), float("inf")], ids=str)
def test_not_finite_parameter(special):
    params = [torch.ones(30, 20), torch.ones(7)]
    for p in params:
        p.view(-1)[3] = special
    ours, theirs = ROW.ours(copies(params), **ROW.full), ROW.theirs(copies(params), **ROW.full)
    for optimizer in (ours, theirs):
        run(optimizer, [[torch.ones_like(p) for p in params]])
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, equal_nan=True)


# -- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["to_torch", "from_torch"])
@each_variant
def test_exchange_with_torch(kwargs, direction):
    """A checkpoint goes over without a changed bit, and both go on to the same numbers."""
    params = model()
    steps = [gradients(params, step) for step in range(1, 11)]
    classes = (ROW.ours, ROW.theirs) if direction == "to_torch" else (ROW.theirs, ROW.ours)
    one = classes[0](copies(params), **kwargs)
    run(one, steps[:5])
    other = classes[1](copies(params_of(one)))
    other.load_state_dict(through_a_file(one.state_dict()))
    assert everything(other) == everything(one)
    run(one, steps[5:])
    run(other, steps[5:])
    for p, q in zip(params_of(one), params_of(other), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)
        assert list(one.state[p]) == list(other.state[q])
        for name in one.state[p]:
            torch.testing.assert_close(one.state[p][name], other.state[q][name], rtol=2e-5, atol=1e-9)


# -- behavior -------------------------------------------------------------------------------------------------------


def test_states_as_torch_makes_them():
    params = model()
    ours, theirs = ROW.ours(copies(params)), ROW.theirs(copies(params))
    for optimizer in (ours, theirs):
        run(optimizer, [gradients(params, 1)])
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert list(ours.state[p]) == list(theirs.state[q])
        for name, value in ours.state[p].items():
            other = theirs.state[q][name]
            assert (value.shape, value.dtype, value.stride()) == (other.shape, other.dtype, other.stride())


def test_hyperparameters_are_read_anew_at_each_step():
    ours = ROW.ours(model(), **{**ROW.full, "lr": torch.tensor(0.04)})
    (group,) = ours.param_groups
    for step in range(1, 7):
        group["lr"].mul_(0.5)
        group["weight_decay"] = [0.1, 0, 0.3][step % 3]
        group["maximize"] = step % 3 == 2
        group["eps"] = [(None, 1e-3), (0.1, 0.5), (1e-20, 0)][step % 3]
        group["d"] = [1, 2.0][step % 2]
        group["beta2_decay"] = [-0.8, -0.1][step % 2]
        give(ours, gradients(params_of(ours), step))
        checked_step(ours)


def test_grad_scaler():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    p = torch.ones(70, 3, requires_grad=True)
    ours = ROW.ours([p])
    scaler.scale((p * 2).sum()).backward()
    scaler.step(ours)
    q = torch.ones(70, 3, requires_grad=True)
    run(ROW.ours([q]), [[torch.full((70, 3), 2.0)]])
    assert bits(p) == bits(q)


class Marked(torch.Tensor):
    """A subclass that the kernels do not know."""


def test_explain_and_stats():
    params = [torch.randn(3, 4), torch.randn(5), torch.randn(2, 2).as_subclass(Marked), torch.randn(6)]
    ours = ROW.ours([{"params": [p.requires_grad_() for p in params[:3]]}, {"params": [params[3].requires_grad_()]}])
    for p in params[:3]:
        p.grad = torch.randn(p.shape)
    rows = onepass.explain(ours)
    assert [(r.group, r.index, r.path) for r in rows] == [
        (0, 0, "kernel"),
        (0, 1, "kernel"),
        (0, 2, "torch"),
        (1, 0, "kernel"),
    ]
    assert rows[2].reason == "tensor subclass Marked"
    assert rows[3].reason == "no gradient now"
    assert not ours.state
    before = onepass.stats()
    ours.step()
    after = onepass.stats()
    assert sum(after["kernel"].values()) == sum(before["kernel"].values()) + 2
    why = "tensor subclass Marked"
    assert after["torch"][why] == before["torch"].get(why, 0) + 1
    assert list(ours.state[params[2]]) == ["step", "row_var", "col_var"]


def test_versions_rise_and_gradients_are_not_written():
    ours = ROW.ours(model(), **ROW.full)
    give(ours, gradients(params_of(ours), 1))
    before = [(p._version, p.grad._version, bits(p.grad)) for p in params_of(ours)]
    ours.step()
    assert [(p._version - 1, p.grad._version, bits(p.grad)) for p in params_of(ours)] == before


def test_parameters_in_the_same_memory_are_left_to_torch():
    base = torch.randn(6, 5)
    params = [base.requires_grad_(), base.detach()[:3].requires_grad_()]
    twins = torch.randn(6, 5).copy_(base.detach())
    others = [twins.requires_grad_(), twins.detach()[:3].requires_grad_()]
    ours, theirs = ROW.ours(params), ROW.theirs(others)
    for optimizer in (ours, theirs):
        run(optimizer, [[torch.ones(6, 5), torch.ones(3, 5)]])
    assert {r.reason for r in onepass.explain(ours)} == {"memory shared with another parameter"}
    torch.testing.assert_close(base, twins)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(row_var=torch.zeros(4, 3)), "its state row_var has shape [4, 3] and dtype torch.float32"),
        (lambda s: s.update(row_var=torch.zeros(1, 3)), "its state row_var has shape [1, 3] and dtype torch.float32"),
        (lambda s: s.update(col_var=torch.zeros(3)), "its state col_var has shape [3] and dtype torch.float32"),
        (lambda s: s.update(col_var=torch.zeros(1, 3).int()), "its state col_var has dtype torch.int32"),
        (lambda s: s.update(col_var=torch.zeros(1, 1).expand(1, 3)), "its state col_var has several elements"),
        (lambda s: s.update(col_var=3), "its state col_var is not a tensor"),
        (lambda s: s.update(row_var=s["step"].expand(4, 1)), "its state row_var has several elements"),
        (lambda s: s.update(row_var=torch.zeros(7)[:4, None], col_var=None), None),
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
        assert ours.state[q]["col_var"].shape == (1, 3)
        return
    before = bits(p), bits(q), bits(ours.state[p]["step"])
    with pytest.raises(
        ValueError, match=re.escape(f"parameter 0 of group 1 'w' (shape [4, 3], torch.float32): {message}")
    ):
        ours.step()
    assert (bits(p), bits(q), bits(ours.state[p]["step"])) == before
    assert onepass.explain(ours)[1].path == "error"


def test_a_variance_in_the_parameters_own_memory():
    p = torch.randn(4, 3, requires_grad=True)
    ours = ROW.ours([p])
    run(ours, [[torch.ones(4, 3)]])
    ours.state[p]["row_var"] = p.detach()[:, :1]
    with pytest.raises(ValueError, match=re.escape("its own tensors (parameter, states, step) overlap in memory")):
        ours.step()


def test_torchs_errors():
    for p, grad in (
        (torch.randn(3, 2, dtype=torch.complex64), torch.randn(3, 2, dtype=torch.complex64)),
        (torch.randn(3, 2), torch.randn(3, 2).to_sparse()),
    ):
        texts = []
        for kind in (ROW.ours, ROW.theirs):
            q = p.clone().requires_grad_()
            q.grad = grad
            with pytest.raises(RuntimeError) as caught:
                kind([q]).step()
            texts.append(str(caught.value))
        assert texts[0] == texts[1]


@pytest.mark.parametrize("state_dtype", [torch.int32, "float32"], ids=str)
def test_a_state_dtype_that_cannot_be(state_dtype):
    with pytest.raises(ValueError, match="Adafactor: state_dtype must be one of"):
        ROW.ours(model(), state_dtype=state_dtype)


# -- torch's own cases -----------------------------------------------------------------------------------------------

(INFO,) = (info for info in optim_db if info.optim_cls is torch.optim.Adafactor)


@pytest.mark.parametrize("case", INFO.optim_inputs_func("cpu"), ids=lambda case: case.desc)
def test_inputs_of_optim_db(case):
    params = model()
    ours, theirs = ROW.ours(copies(params), **case.kwargs), ROW.theirs(copies(params), **case.kwargs)
    for step in range(1, 11):
        grads = gradients(params, step)
        with only_kernels():
            run(ours, [grads])
        run(theirs, [grads])
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)
        for name in ours.state[p]:
            torch.testing.assert_close(ours.state[p][name], theirs.state[q][name], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("error", INFO.optim_error_inputs_func("cpu", torch.float32))
def test_errors_of_optim_db(error):
    given = error.optimizer_error_input
    params = given.params if given.params is not None else [torch.nn.Parameter(torch.randn(2, 3))]

    def provoke(kind):
        optimizer = kind(params, **given.kwargs)
        if error.error_on is OptimizerErrorEnum.STEP_ERROR:
            optimizer.step()

    texts = []
    for kind in (ROW.ours, ROW.theirs):
        with pytest.raises(error.error_type, match=error.error_regex) as caught:
            provoke(kind)
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
