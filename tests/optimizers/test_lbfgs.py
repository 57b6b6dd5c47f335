"""LBFGS: against the textbook's two-loop recursion in long double, and against torch's class."""

import copy
import gc
import inspect
import io
import math
import pickle
import weakref

import numpy as np
import onepass
import pytest
import torch
from contract import assert_same
from reference import bits, numbers, only_kernels, params_of, real
from torch import Tensor
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import optim_db

LBFGS, TORCH = onepass.LBFGS, torch.optim.LBFGS
WOLFE = {"line_search_fn": "strong_wolfe"}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
VECTORS = ("d", "prev_flat_grad")
LISTS = ("old_dirs", "old_stps")
TORCH_MAXIMIZES = "maximize" in inspect.signature(TORCH).parameters

pytestmark = pytest.mark.usefixtures("one_thread")
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
with_and_without_search = pytest.mark.parametrize("search", [{}, WOLFE], ids=["fixed", "wolfe"])


# -- problems --------------------------------------------------------------------------------------------------------


class Problem:
    """Parameters, a loss, and an optimizer over them."""

    def __init__(self, cls, params, loss, **kwargs) -> None:
        self.params = params
        self.loss = loss
        self.calls = 0
        self.optimizer = cls(params, **kwargs)

    def closure(self):
        self.calls += 1
        self.optimizer.zero_grad()
        loss = self.loss(*self.params)
        loss.backward()
        return loss

    def step(self, steps=1):
        return [float(self.optimizer.step(self.closure).detach()) for _ in range(steps)]

    @property
    def state(self) -> dict:
        return self.optimizer.state[params_of(self.optimizer)[0]]

    def flat(self) -> Tensor:
        return torch.cat([real(p).reshape(-1) for p in self.params])


def leaves(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def quadratic(cls, dtype=torch.float64, shapes=((), (7,), (0,), (5, 4), (300,), (2, 3, 4)), **kwargs):
    params = leaves(*shapes, dtype=dtype)
    total = sum(p.numel() for p in params)
    scales = torch.logspace(0, 1.5, total, dtype=torch.float64)[torch.randperm(total, generator=seeded(1))].to(dtype)

    def loss(*params):
        flat = torch.cat([p.reshape(-1) for p in params])
        return (scales * (flat - 0.5) ** 2).sum() / 2 + flat.sum() ** 2 / 64

    return Problem(cls, params, loss, **kwargs)


def rosenbrock(cls, dtype=torch.float64, **kwargs):
    x = Parameter(torch.tensor([-1.2, 1.0], dtype=dtype))
    return Problem(cls, [x], lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2, **kwargs)


def logistic(cls, dtype=torch.float64, **kwargs):
    x = torch.randn(80, 12, generator=seeded(2), dtype=torch.float64).to(dtype)
    y = torch.randn(80, generator=seeded(3), dtype=torch.float64).to(dtype).sign()

    def loss(w, b):
        return torch.nn.functional.softplus(-y * (x @ w + b)).mean() + 0.01 * (w**2).sum()

    return Problem(cls, leaves((12,), (), dtype=dtype), loss, **kwargs)


def network(cls, dtype=torch.float64, **kwargs):
    x = torch.randn(32, 5, generator=seeded(4), dtype=torch.float64).to(dtype)
    y = torch.randn(32, 1, generator=seeded(5), dtype=torch.float64).to(dtype)

    def loss(w1, b1, w2, b2, w3, b3):
        return (((x @ w1 + b1).tanh() @ w2 + b2).tanh() @ w3 + b3 - y).pow(2).mean()

    return Problem(cls, leaves((5, 6), (6,), (6, 4), (4,), (4, 1), (1,), dtype=dtype), loss, **kwargs)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


PROBLEMS = {f.__name__: f for f in (quadratic, rosenbrock, logistic, network)}


# -- the two-loop recursion ------------------------------------------------------------------------------------------


def two_loop(all_s, all_y, g, weights=1.0):
    """-H g by Nocedal and Wright's algorithm 7.4, in long double, and the sizes of what it sums up."""
    all_s, all_y, g = ([x.astype(np.longdouble) for x in xs] for xs in (all_s, all_y, [g]))
    q, alphas = -g[0], []
    size = abs(q)
    for s, y in zip(all_s[::-1], all_y[::-1], strict=True):
        alphas.append(s.dot(q) / s.dot(y))
        q = q - alphas[-1] * y
        size = size + abs(alphas[-1] * y)
    gamma = all_s[-1].dot(all_y[-1]) / (all_y[-1] * weights).dot(all_y[-1]) if all_s else 1
    r, size = gamma * weights * q, gamma * weights * size
    for s, y, alpha in zip(all_s, all_y, alphas[::-1], strict=True):
        beta = y.dot(r) / s.dot(y)
        r = r + s * (alpha - beta)
        size = size + abs(s) * (abs(alpha) + abs(beta))
    return r, size


def history(state):
    return [[numbers(x) for x in state[name]] for name in ("old_stps", "old_dirs")]


@each_dtype
@pytest.mark.parametrize("size", [1, 4, 100])
def test_every_element_of_a_step(dtype, size):
    """Of the new pair, the direction and the parameters, in each of 20 iterations."""
    problem = quadratic(LBFGS, dtype, lr=0.5, max_iter=1, history_size=size, tolerance_change=0)
    eps = torch.finfo(dtype).eps
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    taken = 0
    for _ in range(20):
        before = {name: value for name, value in problem.state.items() if name in VECTORS} if problem.state else {}
        before = {name: value.clone() for name, value in before.items()}
        t, pairs, x = problem.state.get("t"), len(problem.state.get("old_dirs", [])), problem.flat()
        with only_kernels(len(problem.params)):
            problem.step()
        state = problem.state
        g = state["prev_flat_grad"]
        assert {v.dtype for name in LISTS for v in state[name]} | {state[name].dtype for name in VECTORS} == {dtype}
        if before:
            y, s = (g.to(arithmetic) - before["prev_flat_grad"].to(arithmetic)).to(dtype), (before["d"] * t).to(dtype)
            if y.double().dot(s.double()) > 1.001e-10:
                taken += 1
                assert len(state["old_dirs"]) == len(state["old_stps"]) == len(state["ro"]) == min(pairs + 1, size)
                assert_same(state["old_dirs"][-1], y)
                assert_same(state["old_stps"][-1], s)
        d, sizes = two_loop(*history(state), numbers(g))
        assert np.all(abs(numbers(state["d"]) - d) <= eps / 2 * abs(d) + 1e-12 * sizes + torch.finfo(dtype).tiny)
        moved = x.to(arithmetic) + torch.tensor(state["t"], dtype=arithmetic) * state["d"].to(arithmetic)
        assert_same(problem.flat(), moved.to(dtype))
        assert len(state["al"]) == size if pairs else True
    assert taken > (3 if dtype.itemsize == 2 else 15)


@pytest.mark.parametrize("problem", [quadratic, logistic, network])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_direction_is_never_farther_from_the_exact_one_than_torchs(problem, dtype):
    """From the same state, in each of 100 iterations. In float64 both are off by a rounding or two of what they sum."""
    ours = problem(LBFGS, dtype, lr=0.5, max_iter=1, history_size=10, tolerance_grad=0, tolerance_change=0)
    errors = []
    for _ in range(100):
        state_dict = copy.deepcopy(ours.optimizer.state_dict())
        theirs = Problem(TORCH, [Parameter(p.detach().clone()) for p in ours.params], ours.loss, max_iter=1, lr=0.5)
        theirs.optimizer.load_state_dict(state_dict)
        ours.step()
        theirs.step()
        d, sizes = two_loop(*history(ours.state), numbers(ours.state["prev_flat_grad"]))
        same = [numbers(theirs.state[name]) for name in VECTORS[1:]] + history(theirs.state)[0]
        for a, b in zip(same, [numbers(ours.state["prev_flat_grad"]), *history(ours.state)[0]], strict=True):
            assert np.array_equal(a, b)
        errors.append([float(abs(numbers(o.state["d"]) - d).max() / sizes.max()) for o in (theirs, ours)])
    theirs, ours = np.array(errors).T
    assert np.exp(np.log((ours + 1e-20) / (theirs + 1e-20)).mean()) <= (0.5 if dtype == torch.float32 else 1.6)
    assert ours.max() <= (theirs.max() if dtype == torch.float32 else 16 * 2.0**-53)


# -- beside torch ----------------------------------------------------------------------------------------------------

OPTIONS = {
    "default": {},
    "lr": {"lr": 0.3},
    "tensor_lr": {"lr": torch.tensor(0.3)},
    "tensor_lr_1d": {"lr": torch.tensor([0.3], dtype=torch.float64)},
    "max_iter": {"max_iter": 3},
    "one_iteration": {"max_iter": 1, "lr": 0.3},
    "max_eval": {"max_eval": 4},
    "single_eval": {"max_eval": 1},
    "tolerance_grad": {"tolerance_grad": 0.5},
    "tolerance_change": {"tolerance_change": 1e-3},
    "no_tolerance": {"tolerance_change": 0, "tolerance_grad": 0, "max_iter": 7},
    "history": {"history_size": 2},
    "short_history": {"history_size": 1, "max_iter": 9},
}


@with_and_without_search
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_as_torch(problem, options, search):
    """The same losses, counts and iterates, step by step, until nothing but rounding decides."""
    ours, theirs = (problem(cls, **copy.deepcopy({**options, **search})) for cls in (LBFGS, TORCH))
    losses = [math.inf]
    for _ in range(6):
        assert ours.step() == pytest.approx(theirs.step(), rel=1e-6, abs=1e-12, nan_ok=True)
        assert ours.calls == theirs.calls
        assert {n: ours.state[n] for n in ("n_iter", "func_evals")} == {
            n: theirs.state[n] for n in ("n_iter", "func_evals")
        }
        if not theirs.flat().isfinite().all() or theirs.flat().abs().max() > 1e3:
            assert search == {}, "a diverged run"
            return
        torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=1e-6, atol=1e-7)
        assert set(ours.state) == set(theirs.state)
        for name in LISTS:
            assert len(ours.state.get(name, [])) == len(theirs.state.get(name, []))
        losses.append(theirs.state.get("prev_loss", 0.0))
        if theirs.state["n_iter"] > 30 or abs(losses[-1] - losses[-2]) < 1e-8:
            return


@pytest.mark.parametrize("problem", [quadratic, logistic, network, rosenbrock])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_state_as_torch(problem, dtype):
    ours, theirs = (problem(cls, dtype, max_iter=4, history_size=5, **WOLFE) for cls in (LBFGS, TORCH))
    for one in (ours, theirs):
        one.step(2)
    assert list(ours.state) == list(theirs.state) or set(ours.state) == set(theirs.state)
    for name, want in theirs.state.items():
        got = ours.state[name]
        if name == "t" or name == "prev_loss":
            assert math.isfinite(float(got))
        elif isinstance(want, list):
            assert isinstance(got, list)
            assert len(got) == len(want)
            for a, b in zip(got, want, strict=True):
                assert (a is None) == (b is None)
                if b is not None:
                    assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        elif isinstance(want, Tensor):
            assert (got.dtype, got.shape) == (want.dtype, want.shape), name
        else:
            assert type(got) is type(want)
    assert set(ours.optimizer.param_groups[0]) == set(theirs.optimizer.param_groups[0])


def test_inputs_of_torchs_table():
    (info,) = (info for info in optim_db if info.optim_cls is TORCH)
    cases = info.optim_inputs_func(device="cpu", dtype=torch.float32)
    assert cases
    for case in cases:
        ours, theirs = (logistic(cls, **copy.deepcopy(case.kwargs)) for cls in (LBFGS, TORCH))
        for problem in (ours, theirs) if case.kwargs.get("maximize") else ():
            problem.loss = lambda *params, loss=problem.loss: -loss(*params)
        for _ in range(2):
            assert ours.step() == pytest.approx(theirs.step(), rel=1e-6)
            torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=1e-5, atol=1e-7)


def test_errors_of_torchs_table():
    (info,) = (info for info in optim_db if info.optim_cls is TORCH)
    errors = info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
    assert errors
    refused = 0
    for error in errors:
        case = error.optimizer_error_input
        params = case.params if case.params is not None else leaves((3,))
        if "parameter groups" in error.error_regex:
            LBFGS(params, **case.kwargs)  # what torch refuses works
            continue
        refused += 1
        with pytest.raises(error.error_type, match=error.error_regex):
            LBFGS(params, **case.kwargs)
    assert refused


@with_and_without_search
def test_rate_zero(search):
    """Nothing moves; torch's line search divides by zero."""
    problem = quadratic(LBFGS, lr=0.0, **search)
    before = problem.flat().clone()
    problem.step(2)
    assert_same(problem.flat(), before)
    assert_good(problem)


def test_a_step_without_a_closure_has_torchs_message():
    for cls in (onepass.LBFGS, torch.optim.LBFGS):
        with pytest.raises(TypeError, match=r"LBFGS.step\(\) missing 1 required positional argument: 'closure'"):
            cls([torch.nn.Parameter(torch.ones(2))]).step()


def test_only_strong_wolfe():
    problem = quadratic(LBFGS, line_search_fn="armijo")
    before = problem.flat().clone()
    with pytest.raises(RuntimeError, match=r"^only 'strong_wolfe' is supported$"):
        problem.step()
    assert_same(problem.flat(), before)
    with pytest.raises(TypeError, match="closure"):
        problem.optimizer.step()


def test_empty_lists():
    for params in ([], iter([])):
        with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
            LBFGS(params)
    with pytest.raises(TypeError, match="params argument given to the optimizer should be an iterable"):
        LBFGS(torch.zeros(3))
    with pytest.raises(ValueError, match="Tensor lr must be 1-element"):
        LBFGS(leaves((3,)), lr=torch.ones(2))
    nothing = LBFGS([{"params": []}])
    assert nothing.step(lambda: 3.0) == 3.0
    later = LBFGS([{"params": []}, {"params": leaves((3,))}])
    Problem.step(_with(later, lambda p: (p**2).sum()), 2)


def _with(optimizer, loss):
    problem = Problem.__new__(Problem)
    problem.optimizer, problem.loss, problem.calls, problem.params = optimizer, loss, 0, params_of(optimizer)
    return problem


# -- tensors of all kinds --------------------------------------------------------------------------------------------


@with_and_without_search
def test_complex_parameters(search):
    def build(cls):
        params = [Parameter(torch.complex(*leaves((3, 4), (3, 4))).detach()), *leaves((5,))]
        return Problem(cls, params, lambda z, x: (z - (1 + 2j)).abs().pow(2).sum() + 3 * (x - 1).pow(2).sum(), **search)

    ours, theirs = build(LBFGS), build(TORCH)
    for _ in range(3):
        with only_kernels(2):
            assert ours.step() == pytest.approx(theirs.step(), rel=1e-5)
        torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=1e-5, atol=1e-7)


@with_and_without_search
def test_strides_of_parameters_and_gradients(search):
    """The vector's order is that of the shapes, wherever elements lie; torch's own fails on such gradients."""

    def build(cls, strided):
        params = leaves((6, 5), (2, 3, 4, 5), (4,))
        if strided:
            params[0].data = params[0].data.t().contiguous().t()
            params[1].data = params[1].data.to(memory_format=torch.channels_last)
            params[2].data = params[2].data.repeat_interleave(3)[::3]
        return Problem(cls, params, lambda a, b, c: sum(((x - 1) ** 2 * x.numel()).sum() for x in (a, b, c)), **search)

    ours, theirs = build(LBFGS, True), build(TORCH, False)
    plain = ours.closure

    def closure():
        loss = plain()
        ours.params[0].grad = ours.params[0].grad.contiguous()
        ours.params[2].grad = ours.params[2].grad.repeat_interleave(2)[::2]
        return loss

    for _ in range(3):
        ours.optimizer.step(closure)
        theirs.step()
        for p, q in zip(ours.params, theirs.params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_mixed_dtypes():
    params = [*leaves((9,), dtype=torch.bfloat16), *leaves((9,), dtype=torch.float32)]
    problem = Problem(LBFGS, params, lambda a, b: ((a.float() - 1) ** 2).sum() + ((b - 2) ** 2).sum(), lr=0.5)
    with only_kernels(6):
        problem.step(3)
    assert problem.state["d"].dtype == torch.float32
    assert problem.closure().item() < 1e-3
    again = copy.deepcopy(problem)
    again.optimizer.load_state_dict(copy.deepcopy(problem.optimizer.state_dict()))
    assert again.state["old_dirs"][0].dtype == torch.float32  # not the first parameter's
    assert_same(again.state["old_dirs"], problem.state["old_dirs"])
    params = [*leaves((9,), dtype=torch.float32), *leaves((9,), dtype=torch.float64)]
    problem = Problem(LBFGS, params, lambda a, b: ((a - 1) ** 2).sum() + ((b - 2) ** 2).sum(), lr=0.5)
    problem.step(3)
    assert problem.state["d"].dtype == torch.float64
    assert problem.closure().item() < 1e-6


def test_sparse_and_missing_gradients():
    def build(cls, sparse):
        table, absent, x = leaves((6, 3), (4,), (5,))
        index = torch.tensor([1, 4, 1])

        def loss(table, absent, x):
            rows = torch.nn.functional.embedding(index, table, sparse=sparse)
            return ((rows - 1) ** 2).sum() + (x**2).sum()

        return Problem(cls, [table, absent, x], loss, max_iter=4, lr=0.1)

    ours, theirs = build(LBFGS, True), build(TORCH, False)
    absent = ours.params[1].detach().clone()
    for _ in range(3):
        with only_kernels(3):
            assert ours.step() == pytest.approx(theirs.step(), rel=1e-10)
    assert_same(ours.params[1].detach(), absent)
    torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=1e-9, atol=1e-12)


def test_zero_gradient():
    problem = Problem(LBFGS, leaves((4,)), lambda x: (0 * x).sum())
    before = problem.flat().clone()
    assert problem.step(3) == [0.0] * 3
    assert problem.calls == 3
    assert problem.state == {"func_evals": 3, "n_iter": 0}
    assert_same(problem.flat(), before)


def test_lazy_gradients():
    z = Parameter(torch.complex(*leaves((4,), (4,))).detach())
    optimizer = LBFGS([z], max_iter=1)
    z.grad = torch.conj(torch.full((4,), 1 + 2j, dtype=torch.complex128))
    optimizer.step(lambda: 1.0)
    assert_same(optimizer.state[z]["prev_flat_grad"], torch.tensor([1.0, -2.0] * 4, dtype=torch.float64))


def test_versions_rise_and_gradients_are_not_written():
    problem = quadratic(LBFGS, **WOLFE)
    versions = [p._version for p in problem.params]
    problem.step()
    assert all(p._version > before for p, before in zip(problem.params, versions, strict=True))
    grads = [p.grad for p in problem.params]
    held = [(g._version, g.clone()) for g in grads]
    problem.optimizer.step(lambda: 1.0)
    for g, (version, values) in zip(grads, held, strict=True):
        assert g._version == version
        assert_same(g, values)


# -- maximize --------------------------------------------------------------------------------------------------------


@with_and_without_search
@each_dtype
def test_to_maximize_is_to_minimize_the_negative(dtype, search):
    """To the bit, but for the loss that is returned."""
    down = quadratic(LBFGS, dtype, max_iter=5, **search)
    up = quadratic(LBFGS, dtype, max_iter=5, maximize=True, **search)
    up.loss = lambda *params, loss=up.loss: -loss(*params)
    for _ in range(4):
        assert up.step() == [-loss for loss in down.step()]
        assert bits(up.flat()) == bits(down.flat())
        assert_same(up.state, down.state)


@with_and_without_search
def test_maximizing_as_torch(search):
    """torch before 2.14 minimizes the negative."""
    ours = quadratic(LBFGS, max_iter=5, maximize=True, **search)
    theirs = quadratic(TORCH, max_iter=5, **({"maximize": True} if TORCH_MAXIMIZES else {}), **search)
    for problem in (ours, theirs) if TORCH_MAXIMIZES else (ours,):
        problem.loss = lambda *params, loss=problem.loss: -loss(*params)
    for problem in (ours, theirs):
        problem.step(3)
    torch.testing.assert_close(ours.flat(), theirs.flat())


def test_maximize_in_checkpoints():
    """A checkpoint has the argument. One of a torch whose class does not have it minimizes.

    Nor does one of ours have it there, unless it maximizes.
    """
    assert ("maximize" in quadratic(LBFGS).optimizer.state_dict()["param_groups"][0]) == TORCH_MAXIMIZES
    up, down = quadratic(LBFGS, maximize=True), quadratic(LBFGS)
    down.optimizer.load_state_dict(up.optimizer.state_dict())
    assert down.optimizer.param_groups[0]["maximize"] is True
    old = up.optimizer.state_dict()
    del old["param_groups"][0]["maximize"]
    up.optimizer.load_state_dict(old)
    assert not up.optimizer.param_groups[0].get("maximize")
    other = quadratic(LBFGS)
    up.step()
    other.step()
    assert bits(up.flat()) == bits(other.flat())


def test_maximize_of_a_group_and_changed_later():
    """A group's own value counts. The history of the other sign is forgotten."""
    assert not LBFGS([{"params": leaves((3,)), "maximize": False}], maximize=True).param_groups[0]["maximize"]
    problem = quadratic(LBFGS, max_iter=3)
    problem.step(2)
    other = quadratic(LBFGS, max_iter=3)
    for p, q in zip(other.params, problem.params, strict=True):
        p.data.copy_(q.data)
    for each in (problem, other):
        each.optimizer.param_groups[0]["maximize"] = True
        each.loss = lambda *params, loss=each.loss: -loss(*params)
        each.step()
    assert bits(problem.flat()) == bits(other.flat())


def test_maximizing_what_kernels_do_not_cover():
    """torch's class steps it, if it can maximize. One that cannot is not asked to."""
    p = torch.ones(3).as_subclass(Tagged).requires_grad_()
    up = Problem(LBFGS, [p], lambda p: -(p * p).sum(), maximize=True, lr=0.1, max_iter=2)
    [row] = onepass.explain(up.optimizer)
    if TORCH_MAXIMIZES:
        assert row.path == "torch"
        up.step()
        assert (p < 1).all()
        return
    assert row.path == "error"
    with pytest.raises(ValueError, match=r"maximize=True needs torch 2\.14 or the kernels, which cannot take"):
        up.step()
    assert (p == 1).all()


# -- several groups --------------------------------------------------------------------------------------------------


def grouped(rates, **kwargs):
    params = leaves(*[(7,)] * len(rates), dtype=torch.float64)
    problem = Problem.__new__(Problem)
    problem.params, problem.calls = params, 0
    scale = torch.linspace(1, 5, 7 * len(rates), dtype=torch.float64)

    def loss(*params):
        flat = torch.cat(params)
        return (scale * flat**2).sum() / 2 + 0.1 * flat.sum() ** 2

    problem.loss = loss
    problem.optimizer = LBFGS([{"params": [p], "lr": lr} for p, lr in zip(params, rates, strict=True)], **kwargs)
    return problem


@with_and_without_search
def test_groups_of_one_rate_are_one_group(search):
    together = grouped([0.5, 0.5, 0.5], **search)
    alone = Problem(TORCH, leaves((7,), (7,), (7,)), together.loss, lr=0.5, **search)
    for _ in range(4):
        assert together.step() == pytest.approx(alone.step(), rel=1e-9)
        assert together.calls == alone.calls
        torch.testing.assert_close(together.flat(), alone.flat(), rtol=1e-8, atol=1e-10)


def test_groups_with_rates_of_their_own():
    """Every direction is that of the recursion which begins with gamma D."""
    rates = [0.5, 0.125, 0.25]
    problem = grouped(rates, max_iter=1, tolerance_change=0)
    weights = np.repeat(np.array(rates) / max(rates), 7)
    for step in range(12):
        problem.step()
        d, sizes = two_loop(*history(problem.state), numbers(problem.state["prev_flat_grad"]), weights)
        assert np.all(abs(numbers(problem.state["d"]) - d) <= 1e-13 * sizes)
        assert problem.state["t"] == pytest.approx(0.5 / float(abs(d).sum()) if step == 0 else 0.5, rel=1e-14)
        assert d @ numbers(problem.state["prev_flat_grad"]) < 0
        problem.optimizer.param_groups[1]["lr"] = rates[1] = 0.125 + step / 40  # a schedule
        weights = np.repeat(np.array(rates) / max(rates), 7)
    assert problem.step()[0] < 1e-2


@with_and_without_search
def test_a_group_of_rate_zero_is_left_out(search):
    with_it = grouped([0.5, 0.0, 0.25], **search)
    still = with_it.params[1].detach().clone()
    a, c = (p.detach().clone().requires_grad_() for p in with_it.params[::2])
    optimizer = LBFGS([{"params": [a]}, {"params": [c], "lr": 0.25}], lr=0.5, **search)
    without = _with(optimizer, lambda a, c: with_it.loss(a, still, c))
    for _ in range(4):
        assert with_it.step() == without.step()
        assert_same([p.detach() for p in with_it.params], [a.detach(), still, c.detach()])
    # Thawed, it moves; the others may be frozen in turn, with a history in which they moved.
    for group, lr in zip(with_it.optimizer.param_groups, (0.0, 0.5, 0.25), strict=True):
        group["lr"] = lr
    frozen = with_it.params[0].detach().clone()
    losses = with_it.step(5)
    assert losses == sorted(losses, reverse=True)
    assert_same(with_it.params[0].detach(), frozen)
    assert not torch.equal(with_it.params[1].detach(), still)


def test_groups_must_agree():
    for name, value in [
        ("max_iter", 3),
        ("history_size", 5),
        ("line_search_fn", "strong_wolfe"),
        ("max_eval", 9),
        ("maximize", True),
    ]:
        a, b = leaves((3,), (3,))
        with pytest.raises(ValueError, match=f"same {name}, but group 1 has {value!r}"):
            LBFGS([{"params": [a]}, {"params": [b], name: value}])
        optimizer = LBFGS([{"params": [a]}, {"params": [b]}])
        optimizer.param_groups[1][name] = value
        before = a.detach().clone()
        with pytest.raises(ValueError, match=f"same {name}"):
            optimizer.step(lambda: 1.0)
        assert_same(a.detach(), before)
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        LBFGS([{"params": [a]}, {"params": [a]}])


COUNTS = [
    ("history_size", 0, "must be >= 1, got 0"),
    ("history_size", -1, "must be >= 1, got -1"),
    ("history_size", "5", "must be an integer >= 1, got the str '5'"),
    ("max_iter", -1, "must be >= 0, got -1"),
    ("max_iter", 2.5, "must be an integer >= 0, got the float 2.5"),
    ("max_iter", None, "must be an integer >= 0, got the NoneType None"),
    ("max_eval", -1, "must be >= 0, got -1"),
    ("max_eval", math.nan, "must be >= 0, got nan"),
    ("max_eval", "9", "must be a number, got the str '9'"),
]


@pytest.mark.parametrize(("name", "value", "message"), COUNTS)
def test_counts_out_of_range(name, value, message):
    """Refused where they are given and, if they are set or loaded later, by a step before its closure is called."""
    a, b = leaves((3,), (3,))
    with pytest.raises((TypeError, ValueError), match=f"^LBFGS: {name} {message}"):
        LBFGS([a], **{name: value})
    with pytest.raises((TypeError, ValueError), match=f"^LBFGS: group 0: {name} {message}"):
        LBFGS([{"params": [a], name: value}])
    optimizer = LBFGS([a])
    with pytest.raises((TypeError, ValueError), match=f"^LBFGS: group 1: {name} {message}"):
        optimizer.add_param_group({"params": [b], name: value})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0][name] = value
    with pytest.raises((TypeError, ValueError), match=f"^LBFGS: group 0: {name} {message}"):
        optimizer.step(lambda: pytest.fail("the closure was called"))
    assert [path for _, _, path, _ in optimizer._explain()] == ["error"]


@with_and_without_search
def test_counts_of_other_types(search):
    """torch only compares max_eval, so there it may have a fraction, or be infinite."""
    wanted = quadratic(LBFGS, lr=0.5, max_iter=5, history_size=2, max_eval=9, **search)
    given = quadratic(LBFGS, lr=0.5, max_iter=5.0, history_size=np.int64(2), max_eval=8.5, **search)
    assert given.step(3) == wanted.step(3)
    given.optimizer.param_groups[0].update(max_iter=5.0, max_eval=math.inf)
    wanted.optimizer.param_groups[0].update(max_eval=10**9)
    assert given.step(3) == wanted.step(3)


def test_a_group_with_a_line_search_that_there_is_not_is_not_added():
    a, b = leaves((3,), (3,))
    optimizer = LBFGS([a], line_search_fn="armijo")  # torch, too, refuses it at the step
    with pytest.raises(RuntimeError, match="only 'strong_wolfe' is supported"):
        optimizer.add_param_group({"params": [b]})
    assert len(optimizer.param_groups) == 1


@with_and_without_search
def test_a_group_added_later(search):
    problem = grouped([0.5, 0.5], max_iter=3, **search)
    problem.step(2)
    evaluations = problem.state["func_evals"]
    new = Parameter(torch.ones(4, dtype=torch.float64))
    with pytest.raises(ValueError, match="same max_iter"):
        problem.optimizer.add_param_group({"params": [new], "max_iter": 8})
    assert len(problem.optimizer.param_groups) == 2
    assert problem.state["n_iter"] > 0
    problem.optimizer.add_param_group({"params": [new], "lr": 0.25})
    assert problem.state == {"func_evals": evaluations, "n_iter": 0}
    old = problem.loss
    problem.loss = lambda *params: old(*params[:2]) + (params[2] ** 2).sum()
    problem.params = params_of(problem.optimizer)
    losses = problem.step(6)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.2 * losses[0]


# -- losses that are not finite --------------------------------------------------------------------------------------

BAD = [math.nan, math.inf, -math.inf]


def tensors_of(state):
    for value in state.values():
        for item in value if isinstance(value, list) else [value]:
            if item is not None:
                yield torch.as_tensor(item)


def assert_good(problem):
    assert problem.flat().isfinite().all()
    assert all(x.isfinite().all() for x in tensors_of(problem.state))


class Fault:
    """Spoils the loss, or the gradients, of some evaluations."""

    def __init__(self, problem, what, spoils) -> None:
        self.problem, self.what, self.spoils = problem, what, spoils
        self.points = []

    def __call__(self):
        loss = self.problem.closure()
        self.points.append(self.problem.flat().clone())
        if not self.spoils(self.problem):
            return loss
        if self.what == "gradient":
            self.problem.params[1].grad[3] = math.nan
            return loss
        return loss.detach() * 0 + self.what


@pytest.mark.parametrize("what", [*BAD, "gradient"])
@with_and_without_search
def test_bad_at_the_first_evaluation(what, search):
    problem = quadratic(LBFGS, max_iter=2, **search)
    fault = Fault(problem, what, lambda p: p.calls == 1)
    before = problem.flat().clone()
    first = problem.optimizer.step(fault)
    assert problem.calls == 1
    assert what == "gradient" or torch.equal(first, torch.full_like(first, what)) or math.isnan(what)
    assert_same(problem.flat(), before)
    assert problem.state == {"func_evals": 1, "n_iter": 0}
    problem.optimizer.step(fault)
    twin = quadratic(LBFGS, max_iter=2, **search)
    twin.step()
    assert_same(problem.flat(), twin.flat())


@pytest.mark.parametrize("what", [*BAD, "gradient"])
def test_bad_after_a_fixed_step(what):
    """At the n-th evaluation the step ends where the one before it was made."""
    for n in range(2, 7):
        problem = quadratic(LBFGS, lr=0.3, max_iter=8, max_eval=100, tolerance_change=0)
        fault = Fault(problem, what, lambda p, n=n: p.calls == n)
        problem.optimizer.step(fault)
        assert problem.calls == n
        assert_same(problem.flat(), fault.points[n - 2])
        assert_good(problem)
        assert problem.state == {"func_evals": n, "n_iter": 0}
        losses = problem.step(4)
        assert losses == sorted(losses, reverse=True)
        assert_good(problem)


@pytest.mark.parametrize("what", [*BAD, "gradient"])
def test_bad_within_the_line_search(what):
    """The search goes back halfway, and ends at a point that fulfils the conditions."""
    for n in range(2, 8):
        problem = quadratic(LBFGS, max_iter=6, **WOLFE)
        fault = Fault(problem, what, lambda p, n=n: p.calls == n)
        first = problem.optimizer.step(fault).item()
        assert problem.calls > n
        assert_good(problem)
        assert any(torch.equal(problem.flat(), point) for i, point in enumerate(fault.points) if i != n - 1)
        assert problem.step(1)[0] < first


@pytest.mark.parametrize("what", [*BAD, "gradient"])
def test_a_wall_in_the_line_search(what):
    """All beyond a wall is bad; the minimum is before it."""
    x = Parameter(torch.tensor([3.0], dtype=torch.float64))
    problem = Problem(LBFGS, [x], lambda x: (-x + 10 / (12 - x)).sum() + 0.001 * (x**4).sum(), lr=50, **WOLFE)

    def closure():
        loss = problem.closure()
        if x.item() < 6.5:
            return loss
        if what == "gradient":
            x.grad.fill_(math.inf)
            return loss
        return torch.tensor(what)

    for _ in range(3):
        problem.optimizer.step(closure)
        assert x.item() < 6.5
        assert_good(problem)
    assert abs(x.grad.item()) < 1e-3


@pytest.mark.parametrize("what", [*BAD, "gradient"])
@with_and_without_search
def test_bad_everywhere_else(what, search):
    """The step ends exactly where it began, and the next one begins anew."""
    problem = quadratic(LBFGS, max_iter=5, lr=0.5, **search)
    problem.step(2)
    here = problem.flat().clone()
    calls = problem.calls
    problem.optimizer.step(Fault(problem, what, lambda p: p.calls > calls + 1))
    assert_same(problem.flat(), here)
    assert_good(problem)
    assert problem.state["n_iter"] == 0
    assert "d" not in problem.state
    losses = problem.step(3)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("what", [*BAD, "gradient"])
def test_bad_where_the_last_fixed_step_led(what):
    problem = quadratic(LBFGS, max_iter=1, lr=0.5)
    problem.step(3)
    before = problem.flat().clone()
    problem.step()
    assert not torch.equal(problem.flat(), before)
    calls = problem.calls
    problem.optimizer.step(Fault(problem, what, lambda p: p.calls == calls + 1))
    assert_same(problem.flat(), before)
    assert problem.state["n_iter"] == 0
    losses = problem.step(3)
    assert losses == sorted(losses, reverse=True)


def test_what_the_user_has_written_since_is_not_undone():
    problem = quadratic(LBFGS, max_iter=1, lr=0.5)
    problem.step(3)
    problem.params[4].data.neg_()
    here = problem.flat().clone()
    calls = problem.calls
    problem.optimizer.step(Fault(problem, math.nan, lambda p: p.calls == calls + 1))
    assert_same(problem.flat(), here)
    assert_good(problem)


@each_dtype
@with_and_without_search
@pytest.mark.parametrize("mixed", [False, True])
def test_denormals_and_signed_zeros_come_back(search, dtype, mixed):
    x = Parameter(torch.tensor([1e-40, -0.0, 0.0, 1.0, -1e-44]).repeat(20).to(dtype))
    before = bits(x)
    wide = Parameter(torch.ones(3, dtype=torch.float64))  # so that the vector has another dtype
    optimizer = LBFGS([x, wide][: 2 if mixed else 1], **search)
    calls = []

    def closure():
        x.grad = torch.ones_like(x)
        calls.append(1)
        return torch.tensor(1.0 if len(calls) == 1 else math.nan)

    optimizer.step(closure)
    assert len(calls) > 1
    assert bits(x) == before


def test_huge_gradients():
    """Products that overflow float32 do not overflow the sums."""
    x = Parameter(torch.full((2000,), 2.0))
    optimizer = LBFGS([x], max_iter=2, tolerance_change=0)

    def closure():
        x.grad = 1e30 * x.detach()
        return (1e30 * x.detach() ** 2).sum() / 2

    optimizer.step(closure)
    assert x.isfinite().all()
    assert x.abs().max() < 2.0


@with_and_without_search
def test_an_exception_in_the_closure(search):
    """The parameters are at the last good point, and the next step goes on from there."""
    for n in range(2, 6):
        problem = quadratic(LBFGS, max_iter=5, lr=0.3, **search)

        points = []

        def closure(problem=problem, n=n, points=points):
            loss = problem.closure()
            if problem.calls == n:
                raise KeyboardInterrupt
            points.append((float(loss.detach()), problem.flat().clone()))
            return loss

        with pytest.raises(KeyboardInterrupt):
            problem.optimizer.step(closure)
        assert any(torch.equal(problem.flat(), point) for _, point in points)
        assert_good(problem)
        losses = problem.step(5)
        assert losses[-1] < losses[0]


# -- bits ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_every_instruction_set_and_number_of_threads(dtype):
    shapes = [(150_000,), (), (301, 777), (12_345,), (3,)]
    scales = [torch.rand(s, generator=seeded(i), dtype=torch.float64).add(0.1).to(dtype) for i, s in enumerate(shapes)]
    seen = set()
    for isa in [name for name, supported in onepass._core.isas().items() if supported]:
        onepass._core.force_isa(isa)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            params = leaves(*shapes, dtype=dtype)
            groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.25}]
            optimizer = LBFGS(groups, lr=0.5, history_size=3, max_iter=5, tolerance_change=0)

            def closure(params=params):
                for p, scale in zip(params, scales, strict=True):
                    p.grad = scale * p.detach()
                return sum(float((p.detach().double() ** 2).sum()) for p in params)

            optimizer.step(closure)
            optimizer.param_groups[0]["line_search_fn"] = optimizer.param_groups[1]["line_search_fn"] = "strong_wolfe"
            optimizer.step(closure)
            state = optimizer.state[params[0]]
            seen.add(b"".join(map(bits, [*params, state["d"], *state["old_dirs"], *state["old_stps"], *state["ro"]])))
    assert len(seen) == 1
    assert len(state["old_dirs"]) == 3


# -- checkpoints -----------------------------------------------------------------------------------------------------


def twin(problem, cls):
    """The same in the middle of its run, with its own copies of the parameters and of the state."""
    params = [Parameter(p.detach().clone()) for p in problem.params]
    options = {k: v for k, v in problem.optimizer.param_groups[0].items() if k not in ("params", "param_names")}
    other = Problem(cls, params, problem.loss, **options)
    other.optimizer.load_state_dict(copy.deepcopy(problem.optimizer.state_dict()))
    return other


@with_and_without_search
@pytest.mark.parametrize("problem", [quadratic, logistic, network])
@pytest.mark.parametrize("first", [LBFGS, TORCH])
def test_state_dicts_go_both_ways(problem, first, search):
    run = problem(first, max_iter=3, history_size=4, lr=0.5, **search)
    run.step(3)
    other = twin(run, TORCH if first is LBFGS else LBFGS)
    for name in (*VECTORS, *LISTS, "func_evals", "n_iter", "prev_loss", "t"):
        assert_same(other.state[name], run.state[name])
    for _ in range(3):
        assert run.step() == pytest.approx(other.step(), rel=1e-8)
        assert run.state["func_evals"] == other.state["func_evals"]
        torch.testing.assert_close(run.flat(), other.flat(), rtol=1e-7, atol=1e-9)


@with_and_without_search
@each_dtype
def test_a_run_goes_on_to_the_bit(dtype, search):
    """From a state_dict, a pickle and a deepcopy."""
    run = quadratic(LBFGS, dtype, max_iter=3, history_size=4, lr=0.5, **search)
    run.step(3)
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    others = [twin(run, LBFGS), twin(run, LBFGS)]
    others[1].optimizer.load_state_dict(torch.load(file, weights_only=True))
    for copied in (copy.deepcopy(run.optimizer), pickle.loads(pickle.dumps(run.optimizer))):
        others.append(_with(copied, run.loss))
    run.step(3)
    for other in others:
        other.step(3)
        assert bits(other.flat()) == bits(run.flat())
        assert {k: v for k, v in other.state.items() if k != "al"}.keys() >= set(VECTORS)
        assert_same([other.state[k] for k in (*VECTORS, *LISTS, "t")], [run.state[k] for k in (*VECTORS, *LISTS, "t")])


def test_two_optimizers_that_share_a_state_dict():
    """Loading takes tensors as they are, without copies: neither run may write to what the other holds."""
    run = quadratic(LBFGS, max_iter=2, history_size=3, lr=0.5)
    run.step(4)
    other = Problem(
        LBFGS, [Parameter(p.detach().clone()) for p in run.params], run.loss, max_iter=2, history_size=3, lr=0.5
    )
    alone = twin(run, LBFGS)
    other.optimizer.load_state_dict(run.optimizer.state_dict())
    other.state["old_dirs"], other.state["old_stps"] = list(run.state["old_dirs"]), list(run.state["old_stps"])
    assert other.state["old_dirs"][0] is run.state["old_dirs"][0]
    for _ in range(4):
        run.step()
    alone.step(4)
    other.step(4)
    assert bits(run.flat()) == bits(alone.flat()) == bits(other.flat())


def test_views_of_states_that_a_user_has_kept():
    """They share the memory of a vector that is no longer in the state: nobody writes there."""
    run = quadratic(LBFGS, max_iter=1, history_size=2, lr=0.5)
    run.step(3)
    kept = [run.state["d"].detach(), run.state["old_dirs"][0][5:], run.state["old_stps"][0].view(2, -1)]
    values = [view.clone() for view in kept]
    run.step(8)
    assert_same(kept, values)


def test_history_that_was_changed_from_outside():
    run = quadratic(LBFGS, max_iter=1, history_size=3, lr=0.5)
    run.step(5)
    run.state["old_dirs"][0].mul_(2)
    run.state["old_stps"][1] = run.state["old_stps"][1] * 3
    run.step()
    d, sizes = two_loop(*history(run.state), numbers(run.state["prev_flat_grad"]))
    assert np.all(abs(numbers(run.state["d"]) - d) <= 1e-13 * sizes)


def test_states_that_do_not_fit():
    run = quadratic(LBFGS, max_iter=1, lr=0.5)
    run.step(2)
    before = run.flat().clone()
    run.state["old_dirs"] = [torch.zeros(3, dtype=torch.float64)]
    with pytest.raises(ValueError, match=r"its state old_dirs has shape \[3\], but there are 352 parameters"):
        run.step()
    assert_same(run.flat(), before)


def test_histories_of_different_lengths():
    run = quadratic(LBFGS, max_iter=1, lr=0.5)
    run.step(3)
    before = run.flat().clone()
    del run.state["old_dirs"][0]
    with pytest.raises(ValueError, match="its states old_dirs and old_stps differ in length: 1 and 2"):
        run.step()
    assert_same(run.flat(), before)


def test_nothing_of_ours_in_a_state_dict():
    run = quadratic(LBFGS, **WOLFE)
    run.step(2)
    saved = run.optimizer.state_dict()
    assert set(saved) == {"state", "param_groups"}
    assert set(saved["state"]) == {0}
    assert set(run.optimizer.__getstate__()) == {"defaults", "state", "param_groups"}


def test_freed_with_the_optimizer():
    run = quadratic(LBFGS, history_size=2)
    run.step(2)
    refs = [weakref.ref(run.state["d"]), weakref.ref(run.optimizer)]
    del run
    gc.collect()
    assert [ref() for ref in refs] == [None, None]


def test_memory_is_recycled():
    """However long it runs: two vectors for a pair, and a few more."""
    run = quadratic(LBFGS, max_iter=20, history_size=3, tolerance_change=0, tolerance_grad=0, **WOLFE)
    seen = set()
    for _ in range(8):
        run.step()
        seen |= {x.data_ptr() for name in LISTS for x in run.state[name]} | {run.state[n].data_ptr() for n in VECTORS}
    assert len(seen) <= 2 * 3 + 9


# -- the class -------------------------------------------------------------------------------------------------------


def test_grad_mode_of_the_closure():
    problem = quadratic(LBFGS, **WOLFE)
    modes = []

    def closure():
        modes.append(torch.is_grad_enabled())
        return problem.closure()

    with torch.no_grad():
        loss = problem.optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert set(modes) == {True}
    assert len(modes) > 1
    assert isinstance(loss, Tensor)
    problem.optimizer.step(closure)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("stock_first", [False, True])
def test_hooks_fire_once(stock_first):
    if stock_first:
        quadratic(TORCH).step()
    problem = quadratic(LBFGS)
    fired = []
    problem.optimizer.register_step_pre_hook(lambda *_: fired.append("pre"))
    problem.optimizer.register_step_post_hook(lambda *_: fired.append("post"))
    problem.step(2)
    assert fired == ["pre", "post"] * 2


def test_profiler_name():
    problem = quadratic(LBFGS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        problem.step()
    names = [event.name for event in profile.events()]
    assert names.count("Optimizer.step#LBFGS.step") == 1


def test_schedulers():
    ours, theirs = (quadratic(cls, lr=0.5, max_iter=2) for cls in (LBFGS, TORCH))
    for one in (ours, theirs):
        schedule = torch.optim.lr_scheduler.ExponentialLR(one.optimizer, 0.7)
        for _ in range(4):
            one.step()
            schedule.step()
    torch.testing.assert_close(ours.flat(), theirs.flat(), rtol=1e-8, atol=1e-10)


def test_is_torchs():
    optimizer = LBFGS(leaves((3,)))
    assert isinstance(optimizer, TORCH)
    assert optimizer.defaults == TORCH(leaves((3,))).defaults
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)


def test_explain_and_stats():
    problem = quadratic(LBFGS)
    with only_kernels(len(problem.params)):
        problem.step()
    rows = onepass.explain(problem.optimizer)
    assert [row.path for row in rows] == ["kernel"] * len(problem.params)
    assert "LBFGS" in rows.title


class Tagged(Tensor):
    pass


def tagged(*shape):
    return leaves(shape)[0].detach().clone().as_subclass(Tagged).requires_grad_()


def test_tensor_subclasses_go_to_torch():
    def build(cls):
        return Problem(cls, [tagged(4), *leaves((3,))], lambda a, b: ((a - 1) ** 2).sum() + (b**2).sum(), **WOLFE)

    ours, theirs = build(LBFGS), build(TORCH)
    before = onepass.stats()
    assert ours.step(2) == theirs.step(2)
    assert_same(ours.flat(), theirs.flat())
    reason = "tensor subclass Tagged"
    rows = onepass.explain(ours.optimizer)
    assert [(row.path, row.reason) for row in rows] == [
        ("torch", reason),
        ("torch", f"beside a parameter with {reason}"),
    ]
    after = onepass.stats()
    assert after["kernel"] == before["kernel"]
    for row in rows:
        assert after["torch"][row.reason] - before["torch"].get(row.reason, 0) == 2
    ours.optimizer = pickle.loads(pickle.dumps(LBFGS([p.detach().as_subclass(Tensor) for p in ours.params])))
    ours.optimizer.step(lambda: 1.0)


def test_several_groups_need_the_kernels():
    a, b = tagged(4), leaves((3,))[0]
    optimizer = LBFGS([{"params": [b]}, {"params": [a]}])
    with pytest.raises(ValueError, match="cannot take parameter 0 of group 1: tensor subclass Tagged"):
        optimizer.step(lambda: 1.0)
    assert {row.path for row in onepass.explain(optimizer)} == {"error"}


def test_shared_memory_goes_to_torch():
    base = torch.randn(8, dtype=torch.float64)

    def build(cls):
        memory = base.clone()
        params = [Parameter(memory[:5]), Parameter(memory[3:])]
        return Problem(cls, params, lambda a, b: (a**2).sum() + (b**2).sum(), lr=0.1, max_iter=3)

    ours, theirs = build(LBFGS), build(TORCH)
    assert ours.step(2) == theirs.step(2)
    assert_same(ours.flat(), theirs.flat())
    assert "memory shared with another parameter" in {row.reason for row in onepass.explain(ours.optimizer)}


def test_meta_parameters():
    """torch's code looks at values, and raises."""
    for cls in (LBFGS, torch.optim.LBFGS):
        p = Parameter(torch.empty(3, device="meta"))
        p.grad = torch.empty_like(p)
        with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
            cls([p]).step(lambda: torch.tensor(1.0))


def test_parameters_that_change_within_the_step():
    problem = quadratic(LBFGS)

    def closure():
        loss = problem.closure()
        if problem.calls == 2:
            problem.params[1].data = torch.zeros(8, dtype=torch.float64)
            problem.params[1].grad = None
        return loss

    with pytest.raises(ValueError, match="sizes have changed within the step"):
        problem.optimizer.step(closure)


@with_and_without_search
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_whose_dtype_changes_within_the_step(dtype, search):
    """Where the line search goes back to, their values stand in the dtype that they had."""
    problem = quadratic(LBFGS, max_iter=4, tolerance_change=0, **search)

    def closure():
        loss = problem.closure()
        if problem.calls == 2:
            for p in problem.params:
                grad, p.grad, p.data = p.grad, None, p.data.to(dtype)
                p.grad = grad.to(dtype)
        return loss

    with pytest.raises(ValueError, match="dtypes have changed within the step"):
        problem.optimizer.step(closure)


def test_compile_leaves_the_step_alone():
    problem = quadratic(LBFGS, max_iter=2)
    expected = quadratic(LBFGS, max_iter=2)
    torch.compile(lambda: problem.optimizer.step(problem.closure), backend="eager")()
    expected.step()
    assert_same(problem.flat(), expected.flat())


@pytest.mark.parametrize("line_search_fn", [None, "strong_wolfe"])
@pytest.mark.parametrize("made_within", [False, True])
def test_inference_mode(line_search_fn, made_within):
    """Its tensors count no versions."""

    def run(context):
        with torch.inference_mode(made_within and context):
            p = Parameter(torch.linspace(-1.0, 1.0, 6), requires_grad=False)
        optimizer = onepass.LBFGS([p], lr=0.5, max_iter=3, line_search_fn=line_search_fn)
        factors = torch.arange(1.0, 7.0)

        def closure():
            p.grad = 2 * p.detach() * factors
            return (p.detach().square() * factors).sum()

        with torch.inference_mode(context):
            losses = [float(optimizer.step(closure)) for _ in range(4)]
        return losses, bits(p)

    assert run(True) == run(False)


def test_numbers_are_on_the_parameters_device():
    p = Parameter(torch.linspace(-1.0, 1.0, 6))
    optimizer = onepass.LBFGS([p], lr=0.5, max_iter=3)

    def closure():
        p.grad = 2 * p.detach()
        return p.detach().square().sum()

    with torch.device("meta"):
        for _ in range(3):
            optimizer.step(closure)
    state = optimizer.state[p]
    assert state["H_diag"].device.type == "cpu"
    assert {x.device.type for name in ("ro", "al") for x in state[name] if x is not None} == {"cpu"}
