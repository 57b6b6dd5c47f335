"""Muon: what is element-wise against its formula, and the whole step against torch's class."""

import copy
import itertools
import re

import onepass
import pytest
import reference
import torch
from cases import Row, copies, give
from contract import through_a_file
from factored import everything, run
from machines import ISAS
from parity import assert_as_exact_as_torch
from reference import ROUNDING, bits, numbers, only_kernels, params_of, stored
from torch.optim import _muon as torch_muon
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

ROW = Row(
    ours=onepass.Muon,
    theirs=torch.optim.Muon,
    flavours=({},),
    formula=reference.muon,
    states=("momentum_buffer",),
    scalars=(),
    full={"lr": 0.02, "weight_decay": 0.1},
    variants={
        "default": {},
        "lr": {"lr": 0.1},
        "no_lr": {"lr": 0.0},
        "no_decay": {"weight_decay": 0.0},
        "momentum": {"momentum": 0.5},
        "small_momentum": {"momentum": 0.3},
        "no_momentum": {"momentum": 0.0},
        "plain": {"nesterov": False},
        "plain_small": {"nesterov": False, "momentum": 0.2},
        "match_rms_adamw": {"adjust_lr_fn": "match_rms_adamw"},
        "original": {"adjust_lr_fn": "original"},
        "iterations": {"ns_steps": 2, "ns_coefficients": (3.0, -4.0, 2.0), "eps": 1e-3},
        "tensor_lr": {"lr": torch.tensor(0.01)},
    },
)
each_class = pytest.mark.parametrize("cls", [onepass.Muon, onepass.NorMuon])
each_variant = pytest.mark.parametrize("kwargs", ROW.variants.values(), ids=ROW.variants)


def model(dtype=torch.float32):
    params = [torch.randn(shape) for shape in [(1, 1), (4, 3), (1, 7), (7, 1), (33, 65), (70, 20)]]
    return [p.to(dtype).requires_grad_() for p in (*params, torch.randn(65, 33).t())]


def gradients(params, step):
    kept = [step == 1 or (7 * step + 3 * i) % 11 > 0 for i in range(len(params))]
    return [torch.randn_like(p) if k else None for p, k in zip(params, kept, strict=True)]


@pytest.fixture
def no_iterations(monkeypatch):
    """Newton-Schulz leaves its input as it is, but for what its dtype makes of it."""
    for module, name in ((torch_muon, "_zeropower_via_newtonschulz"), (onepass.optimizers.muon, "newton_schulz")):
        monkeypatch.setattr(module, name, lambda update, *_: update.bfloat16())


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_variant
@pytest.mark.usefixtures("no_iterations")
def test_parity_of_what_is_element_wise(kwargs, dtype):
    with only_kernels():
        assert_as_exact_as_torch(ROW, kwargs, dtype, model(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_variant
def test_whole_steps(kwargs, dtype):
    """As torch, but for a rounding of the iterations' input here and there, which they carry on.

    Without Nesterov momentum, torch's iterations work on a bfloat16 momentum buffer in place, and so destroy it.
    """
    if dtype == torch.bfloat16 and not kwargs.get("nesterov", True):
        kwargs = {**kwargs, "nesterov": True}
    params = model(dtype)
    ours, theirs = ROW.ours(copies(params), **kwargs), ROW.theirs(copies(params), **kwargs)
    for step in range(1, 6):
        grads = gradients(params, step)
        with only_kernels(sum(grad is not None for grad in grads)):
            run(ours, [grads])
        run(theirs, [grads])
    lr = float(kwargs.get("lr", 1e-3))
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        # O has entries of at most about 1, and is known to some roundings of bfloat16.
        rate = torch_muon._adjust_lr(lr, kwargs.get("adjust_lr_fn"), p.shape)
        rounding = ROUNDING[dtype]
        atol = 5 * rate * 8 * ROUNDING[torch.bfloat16] + 10 * rounding * float(p.detach().abs().max())
        torch.testing.assert_close(p, q, rtol=0, atol=atol)
        states = [optimizer.state[x]["momentum_buffer"] for optimizer, x in ((ours, p), (theirs, q))]
        torch.testing.assert_close(*states, rtol=16 * rounding, atol=16 * rounding)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_iterations_leave_the_momentum_buffer_alone(dtype):
    p = torch.ones(4, 3, dtype=dtype, requires_grad=True)
    ours = ROW.ours([p], nesterov=False, momentum=0.5)
    give(ours, [torch.full((4, 3), 8.0, dtype=dtype)])
    ours.step()
    assert (ours.state[p]["momentum_buffer"] == 4).all()


def test_the_same_update_as_torch_from_the_same_input():
    """Of a first step without Nesterov momentum, whose input to the iterations is rounded once by both."""
    params, kwargs = model(), {"nesterov": False, "weight_decay": 0.0, "lr": 0.5}
    ours, theirs = ROW.ours(copies(params), **kwargs), ROW.theirs(copies(params), **kwargs)
    for optimizer in (ours, theirs):
        torch.manual_seed(3)
        run(optimizer, [gradients(params, 1)])
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize(("param", "grad", "state"), [*itertools.product(DTYPES, DTYPES, (None, *DTYPES))], ids=str)
@pytest.mark.usefixtures("no_iterations")
def test_every_mix_of_dtypes(param, grad, state):
    """Each operand has its own dtype; the state has the gradient's unless it is given another."""
    ours = ROW.ours(model(param), **ROW.full, state_dtype=state)
    wide = param == torch.float64
    for step in range(1, 4):
        for p, g in zip(params_of(ours), gradients(params_of(ours), step), strict=True):
            p.grad = None
            if g is not None:
                p.grad_dtype = None
                p.grad = g.to(grad)
        before = reference.snapshot(ROW, ours)
        with only_kernels(len(before)):
            ours.step()
        for p, h, old_p, g, old, t in before:
            error = 8 * ROUNDING[torch.float64 if wide else torch.float32]
            want_p, new = reference.muon(old_p, g, old, t, **h)
            buffer = ours.state[p]["momentum_buffer"]
            assert buffer.dtype == (state or grad)
            room = error * (abs(new["momentum_buffer"]) + abs(g)) + torch.finfo(torch.float32).tiny
            low, high = (stored(new["momentum_buffer"] + r, buffer.dtype) for r in (-room, room))
            assert ((low <= numbers(buffer)) & (numbers(buffer) <= high)).all()
            # The update is rounded to bfloat16 on its way through the iterations.
            room = 1.01 * ROUNDING[torch.bfloat16] * abs(want_p - old_p) + 0.02 * ROUNDING[torch.bfloat16]
            room += error * abs(old_p)
            low, high = (stored(want_p + r, p.dtype) for r in (-room, room))
            assert ((low <= numbers(p)) & (numbers(p) <= high)).all()


def test_strides_change_no_bit():
    for rows, columns in [(20, 30), (30, 20)]:
        p, grad = torch.randn(rows, columns), torch.randn(rows, columns)
        plain = ROW.ours([p.clone().requires_grad_()], **ROW.full)
        every_second = torch.zeros(2 * rows, 2 * columns)[::2, ::2]
        q = every_second.copy_(p).requires_grad_()
        other = ROW.ours([q], **ROW.full)
        for _ in range(3):
            params_of(plain)[0].grad = grad
            q.grad = torch.cat([grad, grad], 1)[:, :columns]
            with only_kernels(2):
                plain.step()
                other.step()
            # The order of summation in a matrix product depends on strides: torch's affair.
            torch.testing.assert_close(q, params_of(plain)[0], rtol=0, atol=4e-4)
            assert bits(other.state[q]["momentum_buffer"]) == bits(plain.state[params_of(plain)[0]]["momentum_buffer"])


def test_empty_parameters():
    """torch divides by zero for some of them; here they stay."""
    params = [torch.ones(shape, requires_grad=True) for shape in [(0, 3), (3, 0), (0, 0), (2, 2)]]
    ours = ROW.ours(params)
    give(ours, [torch.ones_like(p) for p in params])
    with only_kernels(4):
        ours.step()
    assert [list(ours.state[p]) for p in params] == [["momentum_buffer"]] * 4
    assert (params[3] != 1).all()


@pytest.mark.parametrize("special", [float("nan"), float("inf"), 1e38, 0.0], ids=str)
def test_not_finite(special):
    params = [torch.ones(5, 4, requires_grad=True)]
    ours, theirs = ROW.ours(copies(params)), ROW.theirs(copies(params))
    grad = torch.ones(5, 4)
    grad[2, 3] = special
    for grads in ([grad], [torch.ones(5, 4)]):
        for optimizer in (ours, theirs):
            run(optimizer, [grads])
        (p,), (q,) = params_of(ours), params_of(theirs)
        torch.testing.assert_close(p, q, equal_nan=True, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"], equal_nan=True)


# -- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_iterations")
def test_instruction_sets_and_threads():
    """Of the kernels; the matrix products are torch's."""
    shapes = [(torch.float32, (700, 900)), (torch.bfloat16, (900, 1000)), (torch.float64, (300, 500))]
    params = [torch.randn(shape).to(dtype).requires_grad_() for dtype, shape in shapes]
    params += [*model(), torch.randn(900, 500).t().requires_grad_()]
    steps = [[torch.randn(p.shape).to(p.dtype) for p in params] for _ in range(3)]
    results = {}
    for isa, threads in itertools.product(ISAS, (1, 2, 3)):
        onepass._core.force_isa(isa)
        torch.set_num_threads(threads)
        optimizer = ROW.ours(copies(params), **ROW.full)
        with only_kernels(3 * len(params)):
            run(optimizer, steps)
        results[isa, threads] = everything(optimizer)
    expected = results[ISAS[0], 1]
    assert expected[0] != bits(params[0])
    assert [key for key, result in results.items() if result != expected] == []


def test_scratch_is_shared_out(monkeypatch):
    """Parameters go through the step in runs that fit the scratch, to the same bits."""
    params = model()
    steps = [gradients(params, step) for step in range(1, 4)]
    results = []
    for scratch in (onepass.optimizers.muon.SCRATCH, 100, 1):
        monkeypatch.setattr(onepass.optimizers.muon, "SCRATCH", scratch)
        optimizer = ROW.ours(copies(params), **ROW.full)
        run(optimizer, steps)
        results.append(everything(optimizer))
    assert results[0] == results[1] == results[2]


@each_variant
def test_resume_and_exchange_with_torch(kwargs):
    params = model()
    steps = [gradients(params, step) for step in range(1, 9)]
    straight = ROW.ours(copies(params), **kwargs)
    run(straight, steps)
    first = ROW.ours(copies(params), **kwargs)
    run(first, steps[:4])
    second = ROW.ours(copies(params_of(first)))
    second.load_state_dict(through_a_file(first.state_dict()))
    assert everything(second) == everything(first)
    run(second, steps[4:])
    assert everything(second) == everything(straight)

    for one, other in ((ROW.ours, ROW.theirs), (ROW.theirs, ROW.ours)):
        giver = one(copies(params), **kwargs)
        run(giver, steps[:4])
        taker = other(copies(params_of(giver)))
        taker.load_state_dict(through_a_file(giver.state_dict()))
        assert everything(taker) == everything(giver)
        run(giver, steps[4:6])
        run(taker, steps[4:6])
        for p, q in zip(params_of(giver), params_of(taker), strict=True):
            assert list(giver.state[p]) == list(taker.state[q])
            torch.testing.assert_close(giver.state[p], taker.state[q], rtol=1e-6, atol=1e-7)


# -- behavior -------------------------------------------------------------------------------------------------------


def test_states_as_torch_makes_them():
    params = model()
    ours, theirs = ROW.ours(copies(params)), ROW.theirs(copies(params))
    for optimizer in (ours, theirs):
        run(optimizer, [gradients(params, 1)])
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        assert list(ours.state[p]) == list(theirs.state[q]) == ["momentum_buffer"]
        value, other = ours.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"]
        assert (value.shape, value.dtype, value.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.usefixtures("no_iterations")
def test_groups_and_hyperparameters_are_read_anew_at_each_step():
    params = model()
    ours = ROW.ours([{"params": [p], "lr": torch.tensor(0.01 * (i + 1))} for i, p in enumerate(copies(params))])
    theirs = ROW.theirs([{"params": [p], "lr": torch.tensor(0.01 * (i + 1))} for i, p in enumerate(copies(params))])
    for step in range(1, 7):
        grads = gradients(params, step)
        for optimizer in (ours, theirs):
            for group in optimizer.param_groups[:4]:
                group["lr"].mul_(0.7)
                group["weight_decay"] = [0.1, 0, 0.3][step % 3]
                group["momentum"] = [0.9, 0.3][step % 2]
                group["nesterov"] = step % 3 > 0
                group["adjust_lr_fn"] = [None, "original", "match_rms_adamw"][step % 3]
            run(optimizer, [grads])
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(ours.state[p], theirs.state[q], rtol=1e-6, atol=1e-6)


def test_grad_scaler():
    params = model()
    plain, scaled = ROW.ours(copies(params), **ROW.full), ROW.ours(copies(params), **ROW.full)
    for step in range(1, 4):
        grads = gradients(params, step)
        run(plain, [grads])
        give(scaled, [grad * 1024 if grad is not None else None for grad in grads])
        scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        scaled.step()
    assert everything(scaled) == everything(plain)
    scaled.found_inf = torch.tensor(1.0)
    scaled.step()
    assert everything(scaled) == everything(plain)


class Marked(torch.Tensor):
    """A subclass that the kernels do not know."""


def test_explain_and_stats():
    params = [torch.randn(3, 4), torch.randn(2, 2).as_subclass(Marked), torch.randn(6, 1)]
    ours = ROW.ours([p.requires_grad_() for p in params])
    for p in params[:2]:
        p.grad = torch.randn(p.shape)
    rows = onepass.explain(ours)
    why = "tensor subclass Marked"
    assert [(r.path, r.reason) for r in rows] == [("kernel", ""), ("torch", why), ("kernel", "no gradient now")]
    assert not ours.state
    before = onepass.stats()
    ours.step()
    after = onepass.stats()
    assert sum(after["kernel"].values()) == sum(before["kernel"].values()) + 1
    assert after["torch"][why] == before["torch"].get(why, 0) + 1
    assert params[2] not in ours.state
    assert "momentum_buffer" in ours.state[params[1]]


def test_versions_rise_and_gradients_are_not_written():
    ours = ROW.ours(model(), **ROW.full)
    give(ours, gradients(params_of(ours), 1))
    before = [(p._version, p.grad._version, bits(p.grad)) for p in params_of(ours)]
    ours.step()
    assert [(p._version - 1, p.grad._version, bits(p.grad)) for p in params_of(ours)] == before


def test_negated_gradients():
    params = [torch.ones(3, 2)]
    ours, theirs = ROW.ours(copies(params)), ROW.theirs(copies(params))
    for optimizer in (ours, theirs):
        params_of(optimizer)[0].grad = torch._neg_view(torch.arange(6.0).view(3, 2))
        optimizer.step()
    torch.testing.assert_close(params_of(ours)[0], params_of(theirs)[0])


@pytest.mark.parametrize("change", [{"ns_steps": 100}, {"ns_coefficients": (1.0, 2.0)}], ids=str)
def test_iterations_that_torch_refuses_are_refused_before_anything_is_written(change):
    p, q = (torch.ones(3, 2, requires_grad=True) for _ in range(2))
    ours, theirs = ROW.ours([p], **change), ROW.theirs([q], **change)
    texts = []
    for optimizer in (ours, theirs):
        give(optimizer, [torch.ones(3, 2)])
        with pytest.raises(ValueError, match=r".") as caught:
            optimizer.step()
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert not ours.state
    assert (p == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ns_steps": 2.5}, "ns_steps must be an integer >= 0, got the float 2.5"),
        ({"ns_steps": "5"}, "ns_steps must be an integer >= 0, got the str '5'"),
        ({"ns_coefficients": (1.0, "2", 3.0)}, r"ns_coefficients\[1\] must be a number, got the str '2'"),
        ({"ns_coefficients": 1.0}, "ns_coefficients must be 3 numbers, got the float 1.0"),
    ],
    ids=str,
)
@each_class
def test_iterations_that_would_fail_in_the_middle_of_the_step(cls, change, message):
    p, q = (torch.ones(3, 2, requires_grad=True) for _ in range(2))
    ours = cls([{"params": [q]}, {"params": [p]}])
    run(ours, [[torch.ones(3, 2)] * 2])
    ours.param_groups[1].update(change)
    before = everything(ours)
    with pytest.raises((TypeError, ValueError), match=f"{cls.__name__}: group 1: {message}"):
        run(ours, [[torch.ones(3, 2)] * 2])
    assert everything(ours) == before


@each_class
def test_matrices_only(cls):
    words = f"{cls.__name__} only supports 2D parameters whereas we found a parameter with size: torch.Size"
    matrix = torch.ones(3, 2, requires_grad=True)
    with pytest.raises(ValueError, match=rf"{words}\(\[3\]\)"):
        cls([matrix, torch.ones(3, requires_grad=True)])
    ours = cls([matrix])
    for params in ([torch.ones(2, 2, 2, requires_grad=True)], torch.ones(3, requires_grad=True)):
        with pytest.raises(ValueError, match=words):
            ours.add_param_group({"params": params})
        assert len(ours.param_groups) == 1
    other = torch.ones(4, 2, requires_grad=True)
    ours.add_param_group({"params": [other]})
    run(ours, [[torch.ones(3, 2), torch.ones(4, 2)]])
    other.data = torch.ones(8)  # exchanged after it was checked
    give(ours, [torch.ones(3, 2), torch.ones(8)])
    before = bits(matrix), bits(ours.state[matrix]["momentum_buffer"])
    with pytest.raises(ValueError, match=words):
        ours.step()
    assert (bits(matrix), bits(ours.state[matrix]["momentum_buffer"])) == before


def test_a_state_that_does_not_fit():
    p, q = (torch.ones(3, 2, requires_grad=True) for _ in range(2))
    ours = ROW.ours([("v", p), ("w", q)])
    run(ours, [[torch.ones(3, 2)] * 2])
    ours.state[q]["momentum_buffer"] = torch.zeros(2, 3)
    before = bits(p), bits(q), bits(ours.state[p]["momentum_buffer"])
    why = "Muon: parameter 1 of group 0 'w' (shape [3, 2], torch.float32): its state momentum_buffer has shape [2, 3]"
    with pytest.raises(ValueError, match=re.escape(why)):
        ours.step()
    assert (bits(p), bits(q), bits(ours.state[p]["momentum_buffer"])) == before


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


def test_pickle_and_deepcopy_in_mid_training():
    one = ROW.ours(model(), **ROW.full)
    run(one, [gradients(params_of(one), 1)])
    other = copy.deepcopy(one)
    grads = gradients(params_of(one), 2)
    run(one, [grads])
    run(other, [grads])
    assert everything(one) == everything(other)


def test_slow_weights():
    """Lookahead over it moves them in torch's operations."""
    params = model()
    one = onepass.Lookahead(ROW.ours(copies(params), **ROW.full), k=2, alpha=0.5)
    other = onepass.Lookahead(ROW.theirs(copies(params), **ROW.full), k=2, alpha=0.5)
    for optimizer in (one, other):
        torch.manual_seed(1)
        run(optimizer, [gradients(params, step) for step in range(1, 6)])
    for p, q in zip(params_of(one), params_of(other), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-2)
        torch.testing.assert_close(one.state[p]["slow_param"], other.state[q]["slow_param"], rtol=0, atol=2e-2)


# -- torch's own cases -----------------------------------------------------------------------------------------------

(INFO,) = (info for info in optim_db if info.optim_cls is torch.optim.Muon)


@pytest.mark.parametrize("case", INFO.optim_inputs_func("cpu"), ids=lambda case: case.desc)
@pytest.mark.usefixtures("no_iterations")
def test_inputs_of_optim_db(case):
    params = model()
    ours, theirs = ROW.ours(copies(params), **case.kwargs), ROW.theirs(copies(params), **case.kwargs)
    for step in range(1, 11):
        grads = gradients(params, step)
        with only_kernels():
            run(ours, [grads])
        run(theirs, [grads])
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        rate = float(case.kwargs.get("lr", 1e-3)) * max(p.shape) ** 0.5
        torch.testing.assert_close(p, q, rtol=1e-6, atol=10 * rate * ROUNDING[torch.bfloat16])
        torch.testing.assert_close(ours.state[p], theirs.state[q], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "error", INFO.optim_error_inputs_func("cpu", torch.float32), ids=lambda e: e.optimizer_error_input.desc
)
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


@pytest.mark.parametrize(
    ("rule", "hyper", "tensors", "error", "text"),
    [
        ("lion", {}, [4, 4], ValueError, "lion: tensor 2 of row 0 is missing"),
        ("lion", {}, [4, 4, 5], ValueError, "lion: tensor 2 of row 0 has another shape than the first"),
        ("lion", {}, [4, 4, "one"], ValueError, "lion: tensor 2 of row 0 overlaps itself in memory"),
        ("lion", None, [4, 4, 4], ValueError, "apply: hyper of rule lion must have 6 numbers"),
        ("adamax", {"betas[0]": 1.0}, [4, 4, 4, 4], ZeroDivisionError, "adamax: 1 - betas[0] ** step is zero"),
        ("lamb", {}, [4, 4, 4, 4], ValueError, "apply: rule lamb has scalars or sums"),
        ("lion", {"cautious?": 1.0}, [4, 4, 4], ValueError, "apply: rule lion has scalars or sums"),
        ("sparse_adam", {}, [4, 4, 4, 4], ValueError, "apply: rule sparse_adam has scalars or sums, or takes only"),
    ],
)
def test_what_the_core_refuses_to_apply(rule, hyper, tensors, error, text):
    given = {"cautious?": 0.0, "cautious_weight_decay?": 0.0, **(hyper or {})}
    values = [] if hyper is None else [given.get(name, 0.5) for name in onepass._core.rules()[rule][0]]
    row = tuple(torch.ones(1).expand(4) if size == "one" else torch.ones(size) for size in tensors)
    with pytest.raises(error, match=f"^{re.escape(text)}"):
        onepass._core.apply(rule, values, 1.0, [row], 1.0, 1)
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in row)
