"""SAM: the two steps against float64, the parameters set back to the bit, and the contract of a wrapper."""

import copy
import io
import pickle

import numpy as np
import onepass
import pytest
import torch
from cases import copies, gradients, model
from reference import ROUNDING, bits, numbers
from torch.nn import Parameter

SHAPES = [(64, 33), (7,), (), (0, 3), (1,), (3, 5, 2), (20_000,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def at(p, g, rho, adaptive, norm):
    """The nearby point of Foret et al. and Kwon et al., in float64."""
    return p + rho * (p**2 if adaptive else 1.0) * g / (norm + 1e-12)


def params_with_gradients(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]
    strided = torch.randn(9, 8, generator=generator).to(dtype).t()[::2]
    params += [Parameter(strided), Parameter(torch.randn(5, generator=generator).to(dtype))]
    for p in params[:-1]:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    params[0].grad = params[0].grad.t().contiguous().t()
    return params


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_first_step(dtype, adaptive, threads):
    """Each element is at most 4 roundings from the formula; a parameter without a gradient stays."""
    params = params_with_gradients(dtype)
    optimizer = onepass.SAM(onepass.SGD(params, lr=0.1), rho=0.5, adaptive=adaptive)
    before = [numbers(p).astype(np.float64) for p in params]
    grads = [
        numbers(p.grad).astype(np.float64) if p.grad is not None else 0 * q for p, q in zip(params, before, strict=True)
    ]
    norm = np.sqrt(sum(np.sum((p * g if adaptive else g) ** 2) for p, g in zip(before, grads, strict=True)))
    torch.set_num_threads(threads)
    optimizer.first_step()
    rounding = ROUNDING[dtype]
    norms = 1 + 20 * rounding if adaptive else 1.0  # the products are rounded before they are measured
    for p, was, g in zip(params, before, grads, strict=True):
        want = at(was, g, 0.5, adaptive, norm)
        room = (
            4 * rounding * (abs(want) + abs(want - was))
            + (norms - 1) * abs(want - was)
            + 1e-8 * (dtype == torch.float16)
        )
        assert (abs(numbers(p) - want) <= room).all()
    assert params[-1].grad is None


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
def test_everything_is_set_back_to_the_bit(dtype, adaptive):
    params = params_with_gradients(dtype)
    with torch.no_grad():
        params[1].copy_(torch.tensor([0.0, -0.0, 1e-40, float("inf"), float("-inf"), float("nan"), 6e-5]))
    optimizer = onepass.SAM(onepass.SGD(params, lr=0.1), rho=2.0, adaptive=adaptive)
    before = [bits(p) for p in params]
    optimizer.first_step()
    assert bits(params[0]) != before[0] or adaptive
    optimizer.restore()
    assert [bits(p) for p in params] == before
    optimizer.restore()
    assert [bits(p) for p in params] == before


INNER = {
    "SGD": lambda p: onepass.SGD(p, lr=0.1, momentum=0.9),
    "torch.SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: onepass.AdamW(p, lr=0.01, max_norm=0.1),
    "LAMB": lambda p: onepass.LAMB(p, lr=0.01),
    "Lookahead": lambda p: onepass.Lookahead(onepass.Adam(p, lr=0.01), k=2),
}


def quadratic(params, target):
    return sum((p - t).square().sum() * (k + 1) for k, (p, t) in enumerate(zip(params, target, strict=True)))


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("name", INNER)
def test_whole_steps(name, adaptive):
    """The wrapped optimizer sees the gradients of the nearby point, and the parameters of before."""
    params = model()
    target = [torch.ones_like(p) for p in params]
    ours, plain = copies(params), copies(params)
    sam = onepass.SAM(INNER[name](ours), rho=0.05, adaptive=adaptive)
    inner = INNER[name](plain)
    closures = 0

    def closure():
        nonlocal closures
        closures += 1
        sam.zero_grad()
        loss = quadratic(ours, target)
        loss.backward()
        return loss

    for step in range(5):
        grads = torch.autograd.grad(quadratic(plain, target), plain)
        norm = np.sqrt(
            sum(
                np.sum((numbers(p.detach()) * numbers(g) if adaptive else numbers(g)).astype(np.float64) ** 2)
                for p, g in zip(plain, grads, strict=True)
            )
        )
        expected_loss = quadratic(plain, target)
        for k, (p, g, t) in enumerate(zip(plain, grads, target, strict=True)):
            there = at(p.detach().double(), g.double(), 0.05, adaptive, norm)
            p.grad = (2 * (k + 1) * (there - t.double())).float()
        inner.step()
        assert sam.step(closure).item() == pytest.approx(expected_loss.item(), rel=1e-5)
        assert closures == 2 * (step + 1)
        for p, q in zip(ours, plain, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_groups_that_maximize_move_against_their_gradient(adaptive):
    params, twins = params_with_gradients(), params_with_gradients()
    half = len(params) // 2
    start = [numbers(p) for p in params[half:]]
    groups = [{"params": params[:half]}, {"params": params[half:], "maximize": True}]
    for q in twins[half:]:
        if q.grad is not None:
            q.grad.neg_()
    for one in (onepass.SGD(groups, lr=0.1), onepass.SGD(twins, lr=0.1)):
        onepass.SAM(one, rho=0.5, adaptive=adaptive).first_step()
    assert [bits(p) for p in params] == [bits(q) for q in twins]
    assert any((numbers(p) != was).any() for p, was in zip(params[half:], start, strict=True))


def test_in_two_parts():
    """first_step and step, also with the names that other implementations have, are the step with a closure."""
    start, results = model(), []
    for way in ("closure", "parts", "second_step"):
        params = copies(start)
        target = [torch.ones_like(p) for p in params]
        sam = onepass.SAM(onepass.AdamW(params, lr=0.01), rho=0.1)

        def closure(sam=sam, params=params, target=target):
            sam.zero_grad()
            loss = quadratic(params, target)
            loss.backward()
            return loss

        for _ in range(3):
            if way == "closure":
                sam.step(closure)
                sam.zero_grad()
                continue
            closure()
            sam.first_step(zero_grad=True)
            assert all(p.grad is None for p in params)
            closure()
            if way == "parts":
                sam.step()
                sam.zero_grad()
            else:
                sam.second_step(zero_grad=True)
            assert all(p.grad is None for p in params)
        results.append([bits(p) for p in params])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("call", [1, 2])
def test_an_exception_in_the_closure(call):
    """Leaves the parameters where they were, and the next step as if nothing had been."""
    params = copies(model())
    sam = onepass.SAM(onepass.SGD(params, lr=0.1))
    before = [bits(p) for p in params]
    calls = 0

    def closure():
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        for p, grad in zip(params, gradients(params, 1), strict=True):
            p.grad = grad
        return torch.tensor(1.0)

    with pytest.raises(KeyboardInterrupt):
        sam.step(closure)
    assert [bits(p) for p in params] == before
    with pytest.raises(RuntimeError, match="needs a closure"):
        sam.step()
    assert not sam.state


def test_a_skipped_step_is_set_back_by_the_next():
    params = params_with_gradients()
    sam = onepass.SAM(torch.optim.SGD(params, lr=0.1))
    before = [bits(p) for p in params]
    sam.first_step()
    moved = [bits(p) for p in params]
    sam.first_step()
    assert [bits(p) for p in params] == moved
    sam.restore()
    assert [bits(p) for p in params] == before


@pytest.mark.parametrize("overflow", [None, "first", "second"])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"max_norm": 1.0}])
@pytest.mark.parametrize("inner", [onepass.SGD, torch.optim.SGD])
def test_with_a_scaler(inner, options, overflow):
    """Steps as without a scale; an overflow in either part skips the step, and nothing else."""
    if inner is torch.optim.SGD and "max_norm" in options:
        options = {"foreach": False}
    net = torch.nn.Linear(5, 3)
    twin = copy.deepcopy(net)
    x = torch.randn(7, 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    sam = onepass.SAM(inner(net.parameters(), lr=0.1, **options), rho=0.1)
    plain = onepass.SAM(inner(twin.parameters(), lr=0.1, **options), rho=0.1)
    for step in range(4):
        scale, before = scaler.get_scale(), [bits(p) for p in net.parameters()]
        for part in ("first", "second"):
            loss = scaler.scale(net(x).square().mean())
            loss.backward()
            if step == 1 and part == overflow:
                net.weight.grad[0, 0] = float("inf")
            if part == "first":
                sam.first_step(zero_grad=True)
        scaler.step(sam)
        scaler.update()
        sam.zero_grad()
        sam.state_dict()
        if step == 1 and overflow == "second":
            assert scaler.get_scale() == scale / 2
            assert [bits(p) for p in net.parameters()] == before
            continue
        if step == 1 and overflow == "first":  # the second gradient is that of the parameters themselves
            twin(x).square().mean().backward()
            plain.optimizer.step()
        else:
            for part in ("first", "second"):
                twin(x).square().mean().backward()
                if part == "first":
                    plain.first_step(zero_grad=True)
            plain.step()
        plain.zero_grad()
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert not hasattr(sam.optimizer, "found_inf")


def test_float16_products_do_not_overflow():
    p = Parameter(torch.full((1000,), 2.0).half())
    p.grad = torch.full((1000,), 40000.0).half()
    onepass.SAM(onepass.SGD([p], lr=0.1), rho=1.0, adaptive=True).first_step()
    want = 2 + 4 * 40000 / (1000**0.5 * 80000)
    assert p.detach().float().numpy() == pytest.approx(want, rel=1e-3)


def test_weights_that_were_loaded_meanwhile_stay():
    """Also those of a model that is loaded after an interrupted step."""
    net, other = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    sam = onepass.SAM(onepass.AdamW(net.parameters()), rho=0.5)
    saved = sam.state_dict()
    net(torch.ones(2, 5)).sum().backward()
    sam.first_step()
    net.load_state_dict(other.state_dict())
    for restore in (lambda: sam.load_state_dict(saved), sam.restore, sam.first_step, sam.restore):
        restore()
        if restore != sam.first_step:
            assert all(map(torch.equal, net.parameters(), other.parameters()))


def test_distributed_checkpoints_of_a_new_optimizer():
    """torch calls a step, without a closure, to create the states."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    net = torch.nn.Linear(5, 3)
    for wrap in (onepass.SAM, lambda o: onepass.Combined([o])):
        trained = wrap(onepass.AdamW(net.parameters(), lr=0.5))
        net(torch.ones(2, 5)).sum().backward()
        trained.optimizers[0].step() if isinstance(trained, onepass.Combined) else trained.optimizer.step()
        saved = get_optimizer_state_dict(net, trained)
        before = [bits(p) for p in net.parameters()]
        fresh = wrap(onepass.AdamW(net.parameters()))
        net.zero_grad()
        set_optimizer_state_dict(net, fresh, saved)
        assert [bits(p) for p in net.parameters()] == before
        for p in net.parameters():
            assert bits(fresh.state[p]["exp_avg"]) == bits(trained.state[p]["exp_avg"])
        assert fresh.param_groups[0]["lr"] == 0.5


def test_meta_and_missing_gradients():
    p = Parameter(torch.ones(3, device="meta"))
    p.grad = torch.ones(3, device="meta")
    sam = onepass.SAM(onepass.SGD([p], lr=0.1))
    sam.first_step()
    sam.step()
    q = Parameter(torch.ones(3))
    sam = onepass.SAM(onepass.SGD([q], lr=0.1))
    sam.first_step()
    sam.step()
    assert torch.equal(q, torch.ones(3))


@pytest.mark.parametrize("master", ["split", "float32"])
def test_masters_keep_their_low_bits(master):
    """With the same gradients, a step is one of the wrapped optimizer alone, to the bit."""
    start = [p.to(torch.bfloat16) for p in model()]
    plain, ours = copies(start), copies(start)
    inner = onepass.AdamW(plain, lr=0.01, master=master)
    sam = onepass.SAM(onepass.AdamW(ours, lr=0.01, master=master), rho=0.5)
    for step in range(4):
        for p, q, grad in zip(plain, ours, gradients(plain, step), strict=True):
            p.grad, q.grad = grad, grad
        inner.step()
        before = bits(ours[-1])
        sam.first_step()
        assert bits(ours[-1]) != before or ours[-1].grad is None
        sam.step()
    for p, q in zip(plain, ours, strict=True):
        assert bits(p) == bits(q)
        assert {name: bits(x) for name, x in inner.state[p].items()} == {
            name: bits(x) for name, x in sam.state[q].items()
        }


def test_checkpoints():
    """Of both classes, by all ways; with rho."""
    params = params_with_gradients()
    sam = onepass.SAM(onepass.AdamW(params, lr=0.01), rho=0.25, adaptive=True)
    sam.first_step()
    for call in (sam.state_dict, lambda: copy.deepcopy(sam), lambda: pickle.dumps(sam)):
        with pytest.raises(RuntimeError, match="between first_step"):
            call()
    sam.step()
    file = io.BytesIO()
    torch.save(sam.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = onepass.SAM(onepass.AdamW(copies(params), lr=0.5))
    other.load_state_dict(saved)
    assert (other.rho, other.adaptive, other.param_groups[0]["lr"]) == (0.25, True, 0.01)
    assert other.param_groups[0]["sam"] is other.param_groups[-1]["sam"]
    plain = onepass.AdamW(copies(params))
    plain.load_state_dict(saved)
    other.load_state_dict(plain.state_dict())
    fresh = onepass.SAM(onepass.AdamW(copies(params)), rho=0.125)
    fresh.load_state_dict(onepass.AdamW(copies(params)).state_dict())
    assert fresh.rho == 0.125
    for clone in (copy.deepcopy(sam), pickle.loads(pickle.dumps(sam))):
        assert (clone.rho, clone.adaptive) == (0.25, True)
        for p, q in zip(clone.param_groups[0]["params"], params, strict=True):
            assert bits(p) == bits(q)


def test_as_an_optimizer():
    """Schedulers, groups, hooks, explain and last_step."""
    params = params_with_gradients()
    sam = onepass.SAM(onepass.AdamW(params[:3], lr=0.01, max_norm=1.0))
    sam.add_param_group({"params": params[3:], "lr": 0.5})
    assert sam.param_groups[1]["sam"] is sam.param_groups[0]["sam"]
    scheduler = onepass.ScheduleLR(sam, "linear(4, end=0)")
    called = []
    sam.register_step_post_hook(lambda *_: called.append(True))
    sam.first_step()
    sam.step()
    scheduler.step()
    assert called == [True]
    assert sam.param_groups[0]["lr"] == pytest.approx(0.0075)
    assert sam.last_step.grad_norm > 0
    assert {row.path for row in onepass.explain(sam)} <= {"kernel", "no gradient"}
    assert onepass.SAM(torch.optim.SGD(params)).last_step is None
    sam.rho = 0.5
    assert sam.param_groups[0]["sam"]["rho"] == 0.5
    with pytest.raises(TypeError, match="all parameters together"):
        onepass.step_in_backward(sam)


class Subclass(torch.Tensor):
    """A tensor that no kernel takes."""


def test_tensors_that_no_kernel_takes():
    plain = params_with_gradients()
    others = [Parameter(p.detach().clone().as_subclass(Subclass)) for p in plain]
    for p, q in zip(plain, others, strict=True):
        q.grad = p.grad
    for adaptive in (False, True):
        first = onepass.SAM(onepass.SGD(plain, lr=0.1), rho=0.5, adaptive=adaptive)
        second = onepass.SAM(torch.optim.SGD(others, lr=0.1), rho=0.5, adaptive=adaptive)
        first.first_step()
        second.first_step()
        for p, q in zip(plain, others, strict=True):
            torch.testing.assert_close(p.detach(), q.detach().as_subclass(torch.Tensor), rtol=1e-6, atol=1e-7)
        first.restore()
        second.restore()


def test_errors():
    params = params_with_gradients()
    with pytest.raises(TypeError, match=r"^SAM: optimizer must be a torch.optim.Optimizer, got the list"):
        onepass.SAM(params)
    for needs in (onepass.SAM(onepass.SGD(params)), onepass.LBFGS(params), torch.optim.LBFGS(params)):
        with pytest.raises(TypeError, match=f"SAM cannot wrap {type(needs).__name__}, whose step needs a closure"):
            onepass.SAM(needs)
    with pytest.raises(ValueError, match=r"Lookahead cannot wrap SAM: use SAM\(Lookahead\(optimizer\)\)"):
        onepass.Lookahead(onepass.SAM(onepass.SGD(params)))
    for rho in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"^SAM: rho must be >= 0 and finite"):
            onepass.SAM(onepass.SGD(params), rho=rho)
    with pytest.raises(TypeError, match=r"^SAM: rho must be a number"):
        onepass.SAM(onepass.SGD(params), rho="1")
    with pytest.raises(TypeError, match=r"^SAM: adaptive must be True or False, got the str 'no'"):
        onepass.SAM(onepass.SGD(params), adaptive="no")
    sam = onepass.SAM(onepass.SGD(params))
    with pytest.raises(ValueError, match="rho must be"):
        sam.rho = -1.0
    assert sam.rho == 0.05
    for wrong in ({"rho": 1.0}, 3):
        saved = sam.state_dict()
        saved["param_groups"][0] |= {"sam": wrong, "lr": 0.875}
        with pytest.raises(
            ValueError, match=r"^SAM: the state_dict's 'sam' must be a dict with the keys rho, adaptive"
        ):
            sam.load_state_dict(saved)
        assert sam.param_groups[0]["lr"] != 0.875
    saved = sam.state_dict()
    saved["param_groups"][0]["params"].pop()
    sam.first_step()
    moved = [bits(p) for p in params]
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        sam.load_state_dict(saved)
    assert all(bits(p) == was for p, was in zip(params, moved, strict=True))  # so that step() can still follow
    sam.restore()
    params[4].grad = torch.ones(1).to_sparse()
    before = [bits(p) for p in params]
    with pytest.raises(RuntimeError, match="sparse"):
        sam.first_step()
    assert [bits(p) for p in params] == before
