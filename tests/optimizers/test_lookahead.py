"""Lookahead: its formula over every optimizer's, the cycle through checkpoints and skipped steps, and its context."""

import copy
import dataclasses
import itertools
import math
import pickle
import re

import numpy as np
import onepass
import pytest
import torch
from cases import ELEMENTWISE, ROWS, copies, each_row, give, gradients, model
from contract import AroundOther, through_a_file
from machines import ISAS
from onepass import Lookahead
from reference import ROUNDING, bits, checked_step, numbers, only_kernels, params_of
from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

pytestmark = pytest.mark.usefixtures("one_thread")

each_k = pytest.mark.parametrize("k", [1, 2, 5])
each_alpha = pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8, 1.0])


def slow_of(lookahead, p) -> Tensor | None:
    return lookahead.state.get(p, {}).get("slow_param")


def step_of(lookahead) -> int:
    """The phase, as a checkpoint has it."""
    phases = {group["lookahead"]["step"] for group in lookahead.state_dict()["param_groups"]}
    assert len(phases) == 1
    return phases.pop()


def everything(optimizer) -> list:
    """Bits of all parameters and states, and where Lookahead is."""
    held = [group.get("lookahead") for group in optimizer.state_dict()["param_groups"]]
    for p in params_of(optimizer):
        state = optimizer.state.get(p, {})
        held += [bits(p), {name: bits(s) if isinstance(s, Tensor) else s for name, s in state.items()}]
    return held


def train(optimizer, steps, first=1):
    for t in range(first, first + steps):
        torch.manual_seed(t)
        give(optimizer, gradients(params_of(optimizer), t))
        optimizer.step()


@pytest.fixture
def by_torch(monkeypatch):
    """The slow weights that torch's operations have moved, not the kernels."""
    moved = []
    lerp_ = Tensor.lerp_

    def note(self, *args):
        moved.append(self)
        return lerp_(self, *args)

    monkeypatch.setattr(Tensor, "lerp_", note)
    return moved


def slow_and_lr(cls, params, **kwargs):
    return cls(params, **{"lr": 0.1, **kwargs})


# -- the formula -----------------------------------------------------------------------------------------------------


def with_lookahead(row, blend: float | None):
    """The row of Lookahead over a row's optimizer, in a step that ends a cycle (with its alpha) or does not (None)."""

    def formula(p, g, s, t, *, lookahead, **h):
        """Zhang et al. 2019, algorithm 1."""
        slow = s.get("slow_param", p)
        p, new = row.formula(p, g, {name: x for name, x in s.items() if name != "slow_param"}, t, **h)
        if blend is not None:
            p = slow = (1 - blend) * slow + blend * p
        return p, new | {"slow_param": slow}

    states, copies = (*row.states, "slow_param"), (*row.copies, "slow_param")
    return dataclasses.replace(row, formula=formula, states=states, copies=copies)


def checked_steps(row, optimizer, k, alpha, grads):
    for t, step in enumerate(grads, 1):
        for p, grad in zip(params_of(optimizer), step, strict=True):
            p.grad = grad
        checked_step(with_lookahead(row, alpha if t % k == 0 else None), optimizer)


@pytest.mark.slow
@each_alpha
@each_k
@each_row
def test_formula(row, k, alpha, by_torch):
    """Every element of every step; the kernels do it all."""
    for dtype in (torch.float32, torch.float64):
        params = model(dtype)
        optimizer = Lookahead(row.ours(params, **row.full), k=k, alpha=alpha)
        grads = [[torch.randn_like(p) for p in params] for _ in range(2 * k + 1)]
        checked_steps(row, optimizer, k, alpha, grads)
    assert not by_torch


def test_every_variant(by_torch):
    """Whatever states an optimizer's arguments make it use."""
    for row in ELEMENTWISE:
        for kwargs in row.variants.values():
            params = [torch.randn(1031, requires_grad=True), torch.randn(33, 65).t().requires_grad_()]
            optimizer = Lookahead(row.ours(params, **kwargs), k=2, alpha=0.4)
            checked_steps(row, optimizer, 2, 0.4, [[torch.randn_like(p) for p in params] for _ in range(4)])
    assert not by_torch


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("state_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_row
def test_dtypes(row, dtype, state_dtype, by_torch):
    """Slow weights have the parameter's dtype, whatever the states have."""
    params = [torch.randn(shape).to(dtype).requires_grad_() for shape in [(), (0,), (33, 41)]]
    optimizer = Lookahead(row.ours(params, **row.full, state_dtype=state_dtype), k=2, alpha=0.3)
    checked_steps(row, optimizer, 2, 0.3, [[torch.randn_like(p) for p in params] for _ in range(5)])
    assert all(slow_of(optimizer, p).dtype == dtype for p in params)
    assert not by_torch


@pytest.mark.parametrize("slow", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slow_weights_in_a_dtype_of_their_own(dtype, slow, by_torch):
    """Edited by hand, and of another layout besides."""
    row = ROWS[0]
    p = torch.randn(40, 30).to(dtype).requires_grad_()
    optimizer = Lookahead(row.ours([p], **row.full), k=2, alpha=0.3)
    for t in range(1, 7):
        p.grad = torch.randn(40, 30).to(dtype)
        checked_step(with_lookahead(row, 0.3 if t % 2 == 0 else None), optimizer)
        optimizer.state[p]["slow_param"] = slow_of(optimizer, p).detach().to(slow).t().contiguous().t()
    assert slow_of(optimizer, p).dtype == slow
    assert not by_torch


LAYOUTS = {
    "packed": lambda x: x.clone(),
    "permuted": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "sliced": lambda x: torch.zeros([n + 3 for n in x.shape], dtype=x.dtype)[1:-2, 2:-1, 1:-2].copy_(x),
    "odd offset": lambda x: torch.zeros([x.numel() + 9], dtype=x.dtype)[3:-6].view(x.shape).copy_(x),
}


@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=3)), ids="-".join)
def test_layouts(layouts, by_torch):
    """Parameter, gradient and slow weights each lie as they like: the bits are those of packed ones."""
    of_param, of_grad, of_slow = (LAYOUTS[name] for name in layouts)
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.randn(7, 11, 30).to(dtype)
        p, packed = of_param(values).requires_grad_(), values.clone().requires_grad_()
        one, expected = (Lookahead(onepass.AdamW([q], lr=0.1), k=2, alpha=0.4) for q in (p, packed))
        for t in range(4):
            grad = torch.randn(7, 11, 30).to(dtype)
            p.grad, packed.grad = of_grad(grad), grad
            with only_kernels(2):
                one.step()
                expected.step()
            if t == 0:
                one.state[p]["slow_param"] = of_slow(slow_of(one, p))
            assert bits(p) == bits(packed)
            assert bits(slow_of(one, p)) == bits(slow_of(expected, packed))
        assert p.stride() == of_param(values).stride()
    assert not by_torch


def test_complex(by_torch):
    z = torch.randn(7, 9, 2, dtype=torch.complex64).transpose(0, 1).requires_grad_()
    pair = torch.view_as_real(z.detach()).clone().requires_grad_()
    one, expected = (Lookahead(onepass.AdamW([p], lr=0.1), k=2, alpha=0.3) for p in (z, pair))
    for _ in range(4):
        z.grad = torch.randn(9, 7, 2, dtype=torch.complex64)
        pair.grad = torch.view_as_real(z.grad).clone()
        with only_kernels(2):
            one.step()
            expected.step()
    assert bits(z) == bits(pair)
    assert bits(slow_of(one, z)) == bits(slow_of(expected, pair))
    assert not by_torch


@pytest.mark.slow
@each_alpha
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_on_every_instruction_set_and_number_of_threads(dtype, alpha):
    params = [torch.randn(shape).to(dtype) for shape in [(900_001,), (257, 311), *[(n,) for n in range(40)]]]
    params.append(torch.randn(257, 311).to(dtype).t())
    grads = [[torch.randn(p.shape).to(dtype) for p in params] for _ in range(4)]
    results = {}
    for isa, threads in itertools.product(ISAS, (1, 3)):
        onepass._core.force_isa(isa)
        torch.set_num_threads(threads)
        optimizer = Lookahead(onepass.Lion(copies(params), lr=0.1), k=2, alpha=alpha)
        for step in grads:
            give(optimizer, step)
            optimizer.step()
        results[isa, threads] = everything(optimizer)
    expected = results[ISAS[0], 1]
    assert [key for key, result in results.items() if result != expected] == []


@each_alpha
@each_row
def test_kernels_and_torchs_operations_agree(row, alpha):
    """Beside the same optimizer with the slow weights moved by hand.

    Promised to the bit: steps between; the end of a cycle at alpha 0 and 1. Else torch may contract a product and a
    sum, which moves the slow weights by a rounding or two (and by those of the 16-bit parameter that we do not round).
    """
    for dtype in DTYPES:
        params = [torch.randn(1031).to(dtype), torch.randn(33, 65).to(dtype)]
        ours = Lookahead(row.ours(copies(params), **row.full), k=3, alpha=alpha)
        plain = row.ours(copies(params), **row.full)
        for _ in range(2):
            slow = [p.detach().clone() for p in params_of(plain)]
            for t in range(1, 4):
                give(ours, [torch.randn_like(p) for p in params])
                give(plain, [p.grad for p in params_of(ours)])
                ours.step()
                plain.step()
                if t < 3:
                    assert [bits(p) for p in params_of(ours)] == [bits(p) for p in params_of(plain)]
            for p, q, s in zip(params_of(ours), params_of(plain), slow, strict=True):
                fast = numbers(q)
                room = 4 * ROUNDING[dtype] * (abs(numbers(s)) + abs(fast - numbers(s)))
                s.lerp_(q.detach(), alpha)
                assert (abs(numbers(p) - numbers(s)) <= (room if 0 < alpha < 1 else 0)).all()
                with torch.no_grad():
                    q.copy_(p)  # go on from the same place


def test_training_gets_there():
    """On a quadratic whose gradients are noisy, the slow weights end nearer to the minimum than those without."""
    ends = []
    for wrap in (lambda opt: opt, lambda opt: Lookahead(opt, k=5, alpha=0.5)):
        torch.manual_seed(0)
        p = torch.full((4096,), 3.0, requires_grad=True)
        optimizer = wrap(onepass.SGD([p], lr=0.2))
        for _ in range(200):
            p.grad = p.detach() + torch.randn(4096)
            optimizer.step()
        ends.append(p.detach().norm())
    assert ends[1] < 0.8 * ends[0]


# -- over torch's optimizers, and those that kernels do not step -----------------------------------------------------


def rosenbrock(params):
    """Something to minimize: the gradients of some parameters depend on others."""
    x = torch.cat([p.reshape(-1) for p in params])
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


INNER = {
    "SGD": lambda ps: torch.optim.SGD(ps, lr=1e-4, momentum=0.9),
    "SGD without states": lambda ps: torch.optim.SGD(ps, lr=1e-3),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.01),
    "AdamW fused": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps),
    "Muon": lambda ps: torch.optim.Muon([p for p in ps if p.ndim == 2]),
    "LBFGS": lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=4),
    "LBFGS strong_wolfe": lambda ps: torch.optim.LBFGS(ps, max_iter=4, line_search_fn="strong_wolfe"),
    "onepass.Adafactor": lambda ps: onepass.Adafactor(ps),
    "onepass.CAME": lambda ps: onepass.CAME(ps),
    "onepass.Muon": lambda ps: onepass.Muon([p for p in ps if p.ndim == 2]),
    "onepass.NorMuon": lambda ps: onepass.NorMuon([p for p in ps if p.ndim == 2]),
    "onepass.LBFGS": lambda ps: onepass.LBFGS(ps, lr=0.1, max_iter=4),
    "onepass.AdamW": lambda ps: onepass.AdamW(ps, lr=0.01),
    "onepass.SGD": lambda ps: onepass.SGD(ps, lr=1e-3),
}


@pytest.mark.slow
@each_alpha
@each_k
@pytest.mark.parametrize("inner", INNER)
def test_any_optimizer(inner, k, alpha):
    """With a closure; beside the optimizer alone, whose parameters algorithm 1 then moves in NumPy's float64."""
    start = [torch.randn(5, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)]
    ours, plain = Lookahead(INNER[inner](copies(start)), k=k, alpha=alpha), INNER[inner](copies(start))
    begin = [numbers(p) for p in params_of(plain)]
    slow = [p.copy() for p in begin]
    for t in range(1, 2 * k + 2):
        losses = []
        for optimizer in (ours, plain):

            def closure(optimizer=optimizer):
                optimizer.zero_grad()
                loss = rosenbrock(params_of(optimizer))
                loss.backward()
                return loss

            losses.append(optimizer.step(closure).item())
        assert losses[0] == losses[1]
        for p, q, s in zip(params_of(ours), params_of(plain), slow, strict=True):
            fast = numbers(q)
            room = 4 * ROUNDING[torch.float64] * (abs(s) + abs(fast)) if t % k == 0 else 0.0
            if t % k == 0:
                s += alpha * (fast - s)
            assert (abs(numbers(p) - (s if t % k == 0 else fast)) <= room).all()
            assert (abs(numbers(slow_of(ours, p)) - s) <= room).all()
            assert t % k > 0 or bits(p) == bits(slow_of(ours, p))
            with torch.no_grad():
                q.copy_(p)
            s[...] = numbers(slow_of(ours, p))
    assert alpha == 0 or all((numbers(p) != q).all() for p, q in zip(params_of(ours), begin, strict=True))


@each_k
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # within torch's own steps
def test_sparse_gradients(k):
    """All rows follow at the end of a cycle, those without a gradient in the last step, too."""
    for kind in (torch.optim.SparseAdam, torch.optim.Adagrad, torch.optim.SGD, onepass.SparseAdam, onepass.SGD):
        start = torch.randn(9, 3)
        p, q = start.clone().requires_grad_(), start.clone().requires_grad_()
        ours, plain = Lookahead(kind([p], lr=0.1), k=k, alpha=0.5), kind([q], lr=0.1)
        slow = numbers(start)
        for t in range(1, 2 * k + 2):
            rows = torch.randint(9, (4,))
            p.grad = torch.sparse_coo_tensor(rows[None], torch.randn(4, 3), (9, 3), check_invariants=True)
            q.grad = p.grad.clone()
            ours.step()
            plain.step()
            if t % k == 0:
                slow = slow + 0.5 * (numbers(q) - slow)
                np.testing.assert_allclose(numbers(p), slow, rtol=0, atol=1e-6)
                with torch.no_grad():
                    q.copy_(p)
                slow = numbers(slow_of(ours, p))
            else:
                assert bits(p) == bits(q)


def test_an_optimizer_whose_step_takes_no_closure():
    class Plain(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self):
            for p in params_of(self):
                p.sub_(p.grad)

    p = torch.zeros(3, requires_grad=True)
    optimizer = Lookahead(Plain([p], {}), k=2, alpha=0.5)
    for want in (-1.0, -1.0, -2.0, -2.0):
        p.grad = torch.ones(3)
        optimizer.step()
        assert p.tolist() == [want] * 3


def test_lookahead_over_lookahead():
    """Cycles within cycles, with slow weights of both; the innermost are the kernels'."""
    p = torch.zeros(3, requires_grad=True)
    inner = Lookahead(onepass.SGD([p], lr=1.0), k=2, alpha=0.5)
    outer = Lookahead(inner, k=4, alpha=0.25)
    seen = []
    for t in range(1, 9):
        p.grad = -torch.ones(3)
        outer.step()
        seen.append(p[0].item())
        if t == 3:
            clone = copy.deepcopy(outer)
            fresh = Lookahead(Lookahead(onepass.SGD([p.detach().clone().requires_grad_()], lr=1.0), k=3), k=7)
            fresh.load_state_dict(copy.deepcopy(outer.state_dict()))
    assert seen == [1, 1, 2, 0.5, 1.5, 2.25, 3.25, 1.1875]
    for optimizer in (clone, fresh):
        (q,) = params_of(optimizer)
        for want in seen[3:]:
            q.grad = -torch.ones(3)
            optimizer.step()
            assert q[0].item() == want


@pytest.mark.parametrize("depth", [1, 2])
def test_a_step_that_the_optimizer_skips_changes_no_slow_weight(depth):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = onepass.SGD([p], lr=0.5, skip_nonfinite=True)
    for _ in range(depth):
        optimizer = Lookahead(optimizer, k=2)
    for step in range(4):
        p.grad = torch.full((3,), math.nan if step == 1 else 1.0)
        before, state = p.detach().clone(), copy.deepcopy(optimizer.state_dict())
        optimizer.step()
        assert optimizer.last_step.skipped == (step == 1)
        if step == 1:
            assert bits(p) == bits(before)
            assert str(optimizer.state_dict()) == str(state)
    # Three steps: at the second, 0 becomes 0.5 and, with a second Lookahead, 0.75.
    assert p.tolist() == [{1: 0.0, 2: 0.25}[depth]] * 3


def test_a_subclass_that_overrides_the_step(by_torch):
    """Whatever it does within one step, the slow weights move once, at its end."""

    class Twice(onepass.SGD):
        def step(self, closure=None):
            super().step(closure)
            super().step(closure)

    p = torch.zeros(3, requires_grad=True)
    optimizer = Lookahead(Twice([p], lr=1.0), k=2, alpha=0.5)
    for want in (2.0, 2.0, 4.0, 4.0):
        p.grad = -torch.ones(3)
        optimizer.step()
        assert p.tolist() == [want] * 3
    assert len(by_torch) == 2


def test_parameters_that_torchs_code_steps(by_torch):
    """Beside others, which the kernels step: memory that two parameters share, and differentiable=True."""
    memory = torch.zeros(6)
    params = [memory[:4].requires_grad_(), memory[2:].detach().requires_grad_(), torch.zeros(3, requires_grad=True)]
    optimizer = Lookahead(onepass.SGD(params, lr=1.0), k=2, alpha=0.5)
    before = onepass.stats()
    for want in ([1, 1, 2, 2, 1, 1], [1, 1, 2, 2, 1, 1]):
        for p in params:
            p.grad = -torch.ones_like(p)
        optimizer.step()
        assert memory.tolist() == want
    assert params[2].tolist() == [1, 1, 1]
    after = onepass.stats()
    shared = "memory shared with another parameter"
    assert after["torch"][shared] - before["torch"].get(shared, 0) == 4
    assert sum(after["kernel"].values()) - sum(before["kernel"].values()) == 2
    assert {id(s) for s in by_torch} == {id(slow_of(optimizer, p)) for p in params[:2]}


# -- who has slow weights, and since when ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [onepass.SGD, torch.optim.SGD])
def test_a_gradient_that_is_missing_in_the_last_step(kind):
    """Its parameter has moved since the cycle began, and goes back like the others."""
    p, q = (torch.zeros(3, requires_grad=True) for _ in range(2))
    optimizer = Lookahead(kind([p, q], lr=1.0), k=3, alpha=0.5)
    for t in range(1, 7):
        p.grad = -torch.ones(3)
        q.grad = None if t % 3 == 0 else -torch.ones(3)
        optimizer.step()
        if t == 2:
            assert p.tolist() == q.tolist() == [2.0] * 3
    assert p.tolist() == slow_of(optimizer, p).tolist() == [3.0] * 3
    assert q.tolist() == slow_of(optimizer, q).tolist() == [2.0] * 3
    versions = q._version
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(3):
        optimizer.step()
    assert q._version > versions  # torch's operations have told autograd


@pytest.mark.parametrize("kind", [onepass.AdamW, torch.optim.AdamW, torch.optim.Adagrad, onepass.Adagrad, onepass.SGD])
def test_late_frozen_and_new_parameters(kind):
    """Slow weights begin with the first gradient, and no earlier, or torch's classes would not find their states."""
    early, late, frozen = (torch.randn(5, requires_grad=True) for _ in range(3))
    optimizer = Lookahead(slow_and_lr(kind, [early, late, frozen]), k=3, alpha=0.5)
    start = {p: p.detach().clone() for p in (early, late, frozen)}

    def go(*params):
        for p in params_of(optimizer):
            p.grad = torch.ones(5) if any(p is q for q in params) else None
        optimizer.step()

    go(early, frozen)
    assert slow_of(optimizer, late) is None
    assert torch.equal(late, start[late])
    assert torch.equal(slow_of(optimizer, early), start[early])
    frozen.requires_grad_(False)
    moved = frozen.clone()
    go(early, late)
    assert torch.equal(slow_of(optimizer, late), start[late])
    assert torch.equal(frozen, moved)
    go(early, late)
    for p in (early, late, frozen):
        assert torch.equal(p, slow_of(optimizer, p))
    torch.testing.assert_close(frozen, (start[frozen] + moved) / 2)

    frozen.requires_grad_(True)
    new = torch.zeros(5, requires_grad=True)
    optimizer.add_param_group({"params": [new], "lr": 0.5})
    assert optimizer.param_groups[1]["lookahead"] is optimizer.param_groups[0]["lookahead"]
    was = [slow_of(optimizer, p).clone() for p in (early, frozen)] + [new.detach().clone()]
    for t in range(3):
        go(early, frozen, new)
        if t == 1:
            fast = new.detach().clone()
            assert fast.abs().min() > 0
    for p, slow in zip((early, frozen, new), was, strict=True):
        assert torch.equal(p, slow_of(optimizer, p))
        assert not torch.equal(p, slow)


def test_slow_weights_that_are_removed_begin_anew(by_torch):
    """As the optimizer's own states do; and those of a rule that does not count its steps are not taken for new."""
    p = torch.zeros(3, requires_grad=True)
    optimizer = Lookahead(onepass.SGD([p], lr=1.0, momentum=0.5, dampening=0.5), k=2, alpha=0.5)
    plain = onepass.SGD([torch.zeros(3, requires_grad=True)], lr=1.0, momentum=0.5, dampening=0.5)
    for t in range(5):
        if t == 2:
            (q,) = params_of(plain)
            with torch.no_grad():
                q.copy_(p)
            del optimizer.state[p]["slow_param"]
        for each in (optimizer, plain):
            for q in params_of(each):
                q.grad = -torch.ones(3) * t
            each.step()
        if t in (0, 2):
            assert bits(p) == bits(params_of(plain)[0])
    assert not by_torch


# -- checkpoints -----------------------------------------------------------------------------------------------------


def copied(optimizer):
    return copy.deepcopy(optimizer)


def pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


def loaded(optimizer):
    kind = type(optimizer.optimizer)
    other = Lookahead(slow_and_lr(kind, copies(params_of(optimizer))), k=7, alpha=1.0)
    train(other, 3)  # it has slow weights and a phase of its own, which are replaced
    for p, q in zip(params_of(other), params_of(optimizer), strict=True):
        p.data = q.detach().clone()
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    return other


@pytest.mark.slow
@pytest.mark.parametrize("way", [copied, pickled, loaded])
@pytest.mark.parametrize("phase", range(5))
@pytest.mark.parametrize("kind", [onepass.AdamW, torch.optim.AdamW, onepass.SGD])
def test_checkpoints_at_every_phase(kind, phase, way):
    """Going on from a checkpoint is to the bit the same as not stopping."""
    params = [*model(), *model(torch.bfloat16), *model(torch.float64)]
    straight = Lookahead(slow_and_lr(kind, params), k=4, alpha=0.3)
    train(straight, 4 + phase)
    stopped = way(straight)
    assert step_of(stopped) == phase % 4
    assert (stopped.k, stopped.alpha) == (4, 0.3)
    assert everything(stopped) == everything(straight)
    for one in (straight, stopped):
        assert all(group["lookahead"] is one.param_groups[0]["lookahead"] for group in one.param_groups)
        train(one, 5, first=5 + phase)
    assert everything(stopped) == everything(straight)
    assert params_of(stopped)[0] is not params_of(straight)[0]


@pytest.mark.parametrize("kind", [onepass.AdamW, torch.optim.AdamW])
def test_a_checkpoint_of_the_plain_optimizer_begins_a_cycle(kind):
    plain = slow_and_lr(kind, model())
    train(plain, 3)
    optimizer = Lookahead(slow_and_lr(kind, copies(params_of(plain))), k=3, alpha=0.5)
    train(optimizer, 2)
    for p, q in zip(params_of(optimizer), params_of(plain), strict=True):
        p.data = q.detach().clone()
    optimizer.load_state_dict(through_a_file(plain.state_dict()))
    assert step_of(optimizer) == 0
    assert all(slow_of(optimizer, p) is None for p in params_of(optimizer))
    start = [p.detach().clone() for p in params_of(optimizer)]
    for t in range(3):
        for p in params_of(optimizer):
            p.grad = torch.ones_like(p)
        optimizer.step()
        if t < 2:
            slow = [slow_of(optimizer, p) for p in params_of(optimizer)]
            assert [bits(s) for s in slow] == [bits(s) for s in start]
    assert all(bits(p) == bits(slow_of(optimizer, p)) for p in params_of(optimizer))


@pytest.mark.parametrize("kind", [onepass.AdamW, torch.optim.AdamW])
def test_a_checkpoint_before_the_first_gradient(kind):
    straight = Lookahead(slow_and_lr(kind, model()), k=3, alpha=0.5)
    stopped = Lookahead(slow_and_lr(kind, copies(params_of(straight))), k=3, alpha=0.5)
    for _ in range(2):
        straight.step()
    stopped.load_state_dict(through_a_file(straight.state_dict()))
    assert step_of(stopped) == step_of(straight) == 2
    for one in (straight, stopped):
        train(one, 4)
    assert everything(stopped) == everything(straight)


@pytest.mark.parametrize("to", [onepass.AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("kind", [onepass.AdamW, torch.optim.AdamW])
def test_a_checkpoint_goes_into_the_plain_optimizer(kind, to):
    optimizer = Lookahead(slow_and_lr(kind, model()), k=3, alpha=0.5)
    train(optimizer, 4)
    plain, expected = (slow_and_lr(cls, copies(params_of(optimizer))) for cls in (to, to))
    plain.load_state_dict(through_a_file(optimizer.state_dict()))
    state = optimizer.state_dict()["state"]
    for held in state.values():
        held.pop("slow_param")
    expected.load_state_dict({"state": state, "param_groups": optimizer.optimizer.state_dict()["param_groups"]})
    for one in (plain, expected):
        train(one, 4, first=5)
    assert [bits(p) for p in params_of(plain)] == [bits(p) for p in params_of(expected)]


def test_slow_weights_stay_in_the_parameters_dtype():
    """Where state_dtype is forced on a checkpoint of torch's."""
    optimizer = Lookahead(torch.optim.AdamW(model()), k=3)
    train(optimizer, 2)
    other = Lookahead(onepass.AdamW(copies(params_of(optimizer)), state_dtype=torch.bfloat16), k=3)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(params_of(optimizer), params_of(other), strict=True):
        assert other.state[q]["exp_avg"].dtype == torch.bfloat16
        assert bits(slow_of(other, q)) == bits(slow_of(optimizer, p))


def test_a_new_lookahead_forgets_an_old_one():
    """Stale slow weights, of a cycle that was not continued, would pull the parameters back."""
    inner = onepass.SGD([torch.zeros(3, requires_grad=True)], lr=1.0)
    (p,) = params_of(inner)
    p.grad = -torch.ones(3)
    Lookahead(inner, k=5).step()
    inner.step()
    optimizer = Lookahead(inner, k=2, alpha=0.5)
    assert step_of(optimizer) == 0
    for want in (3.0, 3.0):
        optimizer.step()
        assert p.tolist() == [want] * 3


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", [onepass.AdamW, torch.optim.AdamW])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_distributed_checkpoints(kind, flat):
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def make():
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
        return net, Lookahead(slow_and_lr(kind, net.parameters()), k=4, alpha=0.3)

    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, optimizer = make()
    untouched = [bits(p) for p in net.parameters()]
    get_optimizer_state_dict(net, optimizer, options=options)  # it steps once, to make all states
    assert [bits(p) for p in net.parameters()] == untouched
    train(optimizer, 5)
    assert step_of(optimizer) == 1  # that step does not count, although it does for Adam's bias correction
    saved = through_a_file(get_optimizer_state_dict(net, optimizer, options=options))
    other_net, other = make()
    other_net.load_state_dict(net.state_dict())
    set_optimizer_state_dict(other_net, other, saved, options=options)
    assert everything(other) == everything(optimizer)
    for one in (optimizer, other):
        train(one, 3, first=6)
    assert everything(other) == everything(optimizer)


def test_state_dict_hooks():
    """Lookahead's own, and those of the wrapped optimizer within."""
    events = []

    def note(name, result=None):
        def hook(this, *args):
            events.append((name, type(this).__name__))
            return result(*args) if result else None

        return hook

    optimizer = Lookahead(onepass.SGD([torch.zeros(3, requires_grad=True)], lr=1.0))
    for one in (optimizer, optimizer.optimizer):
        one.register_state_dict_pre_hook(note("save"))
        one.register_state_dict_post_hook(note("saved"))
        one.register_load_state_dict_pre_hook(note("load"))
        one.register_load_state_dict_post_hook(note("loaded"))
    optimizer.register_state_dict_post_hook(note("more", lambda saved: {**saved, "extra": 3}))
    saved = optimizer.state_dict()
    assert saved["extra"] == 3
    optimizer.load_state_dict(saved)
    assert events == [
        ("save", "Lookahead"),
        ("save", "SGD"),
        ("saved", "SGD"),
        ("saved", "Lookahead"),
        ("more", "Lookahead"),
        ("load", "Lookahead"),
        ("load", "SGD"),
        ("loaded", "SGD"),
        ("loaded", "Lookahead"),
    ]


def test_a_saved_state_dict_does_not_change_with_the_next_step():
    optimizer = Lookahead(onepass.SGD([torch.zeros(3, requires_grad=True)], lr=1.0))
    saved = optimizer.state_dict()
    train(optimizer, 3)
    assert [group["lookahead"]["step"] for group in saved["param_groups"]] == [0]


# -- what is built around optimizers ---------------------------------------------------------------------------------


def scaler_at(scale):
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    scaler.scale(torch.zeros(()))  # what brings its scale into being
    return scaler


SCALED = [onepass.AdamW, torch.optim.AdamW, onepass.SGD, lambda ps, lr: torch.optim.AdamW(ps, lr=lr, fused=True)]


@pytest.mark.parametrize("kind", SCALED, ids=["onepass.AdamW", "AdamW", "onepass.SGD", "AdamW fused"])
def test_grad_scaler(kind):
    """Steps that it skips do not count, and make no slow weights; the others see gradients without the scale."""
    scaled, plain = (Lookahead(kind([torch.ones(5, requires_grad=True)], lr=0.1), k=3, alpha=0.5) for _ in range(2))
    (p,), (q,) = params_of(scaled), params_of(plain)
    assert getattr(scaled, "_step_supports_amp_scaling", False) == getattr(
        scaled.optimizer, "_step_supports_amp_scaling", False
    )
    scaler = scaler_at(1024.0)
    for t in range(1, 10):
        q.grad = torch.full((5,), float(t))
        p.grad = q.grad * 1024.0
        if t in (1, 4, 6):
            p.grad[2] = math.inf
            before = bits(p), step_of(scaled), copy.copy(slow_of(scaled, p))
        scaler.step(scaled)
        scaler.update(1024.0)
        if t in (1, 4, 6):
            assert (bits(p), step_of(scaled)) == before[:2]
            assert slow_of(scaled, p) is None if t == 1 else slow_of(scaled, p).equal(before[2])
        else:
            plain.step()
            assert everything(scaled) == everything(plain)
    assert not hasattr(scaled, "grad_scale")
    assert not hasattr(scaled, "found_inf")


SCHEDULERS = {
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3, 0.5),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.001, 0.1, step_size_up=3, cycle_momentum=True),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=1),
    "SWALR": lambda opt: onepass.swa_utils.SWALR(opt, 0.001, anneal_epochs=4),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt, [lr_scheduler.LinearLR(opt, 0.25, total_iters=4), lr_scheduler.CosineAnnealingLR(opt, 6)], milestones=[4]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", [onepass.AdamW, torch.optim.AdamW, onepass.SGD])
@pytest.mark.filterwarnings("error")  # a scheduler warns if it does not see the steps
def test_schedulers(kind, name):
    """As on the wrapped optimizer itself."""
    extra = {"momentum": 0.9} if kind is onepass.SGD else {}
    optimizers = [kind(copies(model()), lr=0.1, **extra) for _ in range(2)]
    optimizer = Lookahead(optimizers[0], k=3)
    rates = []
    for one in (optimizer, optimizers[1]):
        scheduler = SCHEDULERS[name](one)
        rates.append([])
        for t in range(8):
            train(one, 1, first=t + 1)
            scheduler.step(*([math.cos(t)] if name == "ReduceLROnPlateau" else []))
            group = one.param_groups[0]
            rates[-1].append([group.get(key) for key in ("lr", "momentum", "betas", "initial_lr")])
    assert rates[0] == rates[1]
    assert len({str(rate) for rate in rates[0]}) > 1


@pytest.mark.parametrize("kind", [onepass.SGD, torch.optim.SGD])
def test_hooks_fire_once(kind):
    events = []

    def note(name):
        return lambda this, args, kwargs: events.append((name, type(this).__name__))

    optimizer = Lookahead(kind([torch.zeros(3, requires_grad=True)], lr=1.0), k=2)
    for one in (optimizer, optimizer.optimizer):
        one.register_step_pre_hook(note("pre"))
        one.register_step_post_hook(note("post"))
    handles = [register_optimizer_step_pre_hook(note("global pre"))]
    handles += [register_optimizer_step_post_hook(note("global post"))]
    try:
        train(optimizer, 1)
    finally:
        for handle in handles:
            handle.remove()
    own, inner = "Lookahead", "SGD"
    assert events == [
        ("global pre", own),
        ("pre", own),
        ("global pre", inner),
        ("pre", inner),
        ("post", inner),
        ("global post", inner),
        ("post", own),
        ("global post", own),
    ]
    events.clear()
    train(optimizer, 1)
    assert events == [("pre", own), ("pre", inner), ("post", inner), ("post", own)]


def test_the_profiler_and_torch_compile_see_a_step():
    optimizer = Lookahead(onepass.SGD([torch.zeros(3, requires_grad=True)], lr=1.0), k=2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(optimizer, 2)
    names = {event.key: event.count for event in profile.key_averages()}
    assert names["Optimizer.step#Lookahead.step"] == names["Optimizer.step#SGD.step"] == 2
    (p,) = params_of(optimizer)
    was = p.detach().clone()
    p.grad = torch.ones(3)
    torch.compile(optimizer.step, backend="eager")()
    assert torch.equal(p, was - 1)
    assert step_of(optimizer) == 1


@pytest.mark.parametrize("kind", [onepass.AdamW, torch.optim.AdamW])
def test_closures(kind):
    """Run once, with gradients enabled; the slow weights begin before the step that it belongs to."""
    p = torch.ones(3, requires_grad=True)
    optimizer = Lookahead(slow_and_lr(kind, [p]), k=2)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3.0
        assert optimizer.step(closure=closure).item() < 3.0
    assert calls == [True, True]
    optimizer.zero_grad()
    assert p.grad is None
    assert slow_of(optimizer, p).equal(p)


@pytest.mark.parametrize("kind", [onepass.SGD, torch.optim.SGD])
def test_a_step_that_fails_does_not_count(kind):
    def closure():
        raise ArithmeticError("no")

    optimizer = Lookahead(kind(model(), lr=0.1), k=3)
    train(optimizer, 2)
    before = everything(optimizer)
    with pytest.raises(ArithmeticError):
        optimizer.step(closure)
    assert everything(optimizer) == before
    assert step_of(optimizer) == 2
    if kind is onepass.SGD:  # and nothing is left of it
        assert "_slow_weight_update" not in vars(optimizer.optimizer)


def test_it_is_an_optimizer_with_the_wrapped_ones_parts():
    inner = onepass.AdamW(model(), lr=0.1)
    optimizer = Lookahead(inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert (optimizer.k, optimizer.alpha) == (5, 0.5)
    assert optimizer.optimizer is inner
    train(optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())  # replaces the wrapped optimizer's own
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    assert "lookahead" not in inner.defaults
    assert repr(optimizer).startswith("Lookahead (")
    inner.param_groups = inner.param_groups[:]
    assert optimizer.param_groups is inner.param_groups


def test_explain_and_stats():
    inner = onepass.AdamW([torch.ones(3, requires_grad=True)])
    optimizer = Lookahead(inner, k=1)
    train(optimizer, 1)
    assert [row.path for row in onepass.explain(optimizer)] == ["kernel"]
    assert str(onepass.explain(optimizer)) == str(onepass.explain(inner))
    assert [row.path for row in onepass.explain(Lookahead(torch.optim.SGD(model())))] == ["torch"] * len(model())
    with only_kernels(1):
        train(optimizer, 1)


# -- the context -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [onepass.AdamW, torch.optim.AdamW])
def test_slow_weights_are_lent(kind):
    optimizer = Lookahead(slow_and_lr(kind, model()), k=3, alpha=0.5)
    with optimizer.slow_weights():  # there are none yet
        assert [bits(p) for p in params_of(optimizer)] == [bits(p) for p in params_of(optimizer)]
    train(optimizer, 4)
    params = params_of(optimizer)
    with torch.no_grad():
        params[5][0] = math.nan
        params[6][0, 0] = -0.0
    fast = [bits(p) for p in params]
    slow = [bits(slow_of(optimizer, p)) for p in params]
    assert fast != slow
    saved = everything(optimizer)
    with optimizer.slow_weights():
        assert [bits(p) for p in params] == slow
        assert [bits(slow_of(optimizer, p)) for p in params] == slow
    assert everything(optimizer) == saved

    def fail():
        with optimizer.slow_weights():
            params[6].data.zero_()
            raise ArithmeticError("no")

    with pytest.raises(ArithmeticError):
        fail()
    assert everything(optimizer) == saved
    train(optimizer, 2)


def test_within_slow_weights_there_is_no_step():
    optimizer = Lookahead(onepass.AdamW(model()), k=3)
    train(optimizer, 2)
    before = everything(optimizer)
    with optimizer.slow_weights():
        with pytest.raises(RuntimeError, match=r"step\(\) was called within slow_weights\(\)"):
            optimizer.step()
        with (
            pytest.raises(RuntimeError, match=r"slow_weights\(\) was entered within slow_weights\(\)"),
            optimizer.slow_weights(),
        ):
            pass
        assert copy.deepcopy(optimizer)._lent is False
    assert everything(optimizer) == before


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -1])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=f"^Lookahead: k must be >= 1, got {k}$"):
        Lookahead(onepass.SGD(model()), k=k)


@pytest.mark.parametrize("k", [2.5, "5", None, True])
def test_k_that_is_no_integer(k):
    with pytest.raises(TypeError, match=f"^Lookahead: k must be an integer >= 1, got the {type(k).__name__} {k!r}$"):
        Lookahead(onepass.SGD(model()), k=k)


@pytest.mark.parametrize("k", [3, 3.0, np.int64(3), torch.tensor(3)])
def test_k_of_any_type(k):
    optimizer = Lookahead(onepass.SGD(model()), k=k)
    assert type(optimizer.state_dict()["param_groups"][0]["lookahead"]["k"]) is int
    assert optimizer.k == 3


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, math.inf])
def test_alpha_that_is_none(alpha):
    with pytest.raises(ValueError, match=re.escape(f"Lookahead: alpha must be in [0, 1], got {alpha}")):
        Lookahead(onepass.SGD(model()), alpha=alpha)


@pytest.mark.parametrize("argument", ["average", "copy_to"])
def test_followers_that_could_not_follow_are_refused(argument):
    """Lookahead wraps the optimizer itself: a wrapper between them would update its average too early."""
    model = torch.nn.Linear(2, 2)
    given = {"average": onepass.swa_utils.AveragedModel(model, decay=0.9)}
    if argument == "copy_to":
        given = {"copy_to": [p.detach().bfloat16() for p in model.parameters()]}
    inner = onepass.Lookahead(onepass.AdamW(model.parameters(), **given))
    with pytest.raises(ValueError, match="cannot wrap Lookahead if its AdamW has average or copy_to"):
        onepass.Lookahead(inner)

    with pytest.raises(ValueError, match="cannot wrap AroundOther if its AdamW has average or copy_to"):
        onepass.Lookahead(AroundOther(onepass.AdamW(model.parameters(), **given)))


def test_what_is_no_optimizer():
    with pytest.raises(TypeError, match=r"^Lookahead: optimizer must be a torch\.optim\.Optimizer, got the list"):
        Lookahead(model())


def test_an_alpha_that_is_no_number():
    for alpha, got in (("0.5", "the str '0.5'"), (None, "the NoneType None")):
        with pytest.raises(TypeError, match=f"^Lookahead: alpha must be a number, got {got}"):
            Lookahead(onepass.AdamW(model()), alpha=alpha)


def test_a_checkpoint_that_is_wrong_is_not_loaded():
    optimizer = Lookahead(onepass.AdamW(model()), k=3)
    train(optimizer, 2)
    before = everything(optimizer)
    for wrong, message in (
        ({"k": 0, "alpha": 0.5, "step": 0}, "^Lookahead: k must be >= 1, got 0"),
        ({"k": 3, "alpha": 2.0, "step": 0}, r"^Lookahead: alpha must be in \[0, 1\], got 2.0"),
        ({"k": 3, "alpha": 0.5, "step": 3}, "^Lookahead: step must be >= 0 and < k = 3, got 3"),
        ({"k": 3, "alpha": 0.5, "step": "1"}, "^Lookahead: step must be an integer >= 0, got the str '1'"),
        (
            {"k": 3, "alpha": 0.5},
            "^Lookahead: the state_dict's 'lookahead' must be a dict with the keys k, alpha, step",
        ),
        (3, "^Lookahead: the state_dict's 'lookahead' must be a dict with the keys k, alpha, step, got the int 3"),
    ):
        saved = optimizer.state_dict()
        saved["param_groups"][0]["lookahead"] = wrong
        with pytest.raises((TypeError, ValueError), match=message):
            optimizer.load_state_dict(saved)
        assert everything(optimizer) == before
    saved = optimizer.state_dict()
    saved["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(saved)
    assert everything(optimizer) == before


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kind", [onepass.AdamW, torch.optim.AdamW])
def test_a_checkpoint_whose_slow_weights_do_not_fit_is_not_loaded(kind, depth):
    optimizer = kind(model())
    for _ in range(depth):
        optimizer = Lookahead(optimizer, k=3)
    train(optimizer, 2)
    before, groups = everything(optimizer), str(optimizer.param_groups)
    saved = copy.deepcopy(optimizer.state_dict())
    group = saved["param_groups"][0]
    group["lr"] = 0.875
    group["lookahead"] |= {"k": 5, "step": 4}
    saved["state"][1]["slow_param"] = torch.zeros(77)
    with pytest.raises(
        ValueError, match=r"Lookahead: the state slow_param has shape \[77\], its parameter 1 of group 0"
    ):
        optimizer.load_state_dict(saved)
    assert everything(optimizer) == before
    assert str(optimizer.param_groups) == groups


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(4), r"its slow weights \(slow_param\) has shape \[4\] and dtype torch.float32"),
        (torch.zeros(3, dtype=torch.int32), r"its slow weights \(slow_param\) has dtype torch.int32"),
        (torch.zeros(1).expand(3), r"its slow weights \(slow_param\) has several elements that share the same memory"),
        (torch.zeros(3, device="meta"), r"its slow weights \(slow_param\) has no strided memory"),
        (7.0, r"its slow weights \(slow_param\) is not a tensor"),
    ],
    ids=["shape", "dtype", "expanded", "device", "number"],
)
def test_slow_weights_that_do_not_fit(wrong, message):
    params = [torch.zeros(2, requires_grad=True), torch.zeros(3, requires_grad=True)]
    optimizer = Lookahead(onepass.SGD(params, lr=1.0), k=3)
    train(optimizer, 1)
    optimizer.state[params[1]]["slow_param"] = wrong
    give(optimizer, [torch.ones(2), torch.ones(3)])
    before = [bits(p) for p in params]
    with pytest.raises(ValueError, match=r"SGD: parameter 1 of group 0 \(shape \[3\], torch.float32\): " + message):
        optimizer.step()
    assert [bits(p) for p in params] == before
    assert step_of(optimizer) == 1


def test_slow_weights_in_the_memory_of_their_parameter():
    p = torch.zeros(3, requires_grad=True)
    optimizer = Lookahead(onepass.SGD([p], lr=1.0), k=3)
    train(optimizer, 1)
    optimizer.state[p]["slow_param"] = p.detach()
    with pytest.raises(ValueError, match=r"its own tensors .* overlap in memory"):
        train(optimizer, 1)


def test_slow_weights_of_torchs_optimizer_that_do_not_fit():
    p = torch.zeros(3, requires_grad=True)
    optimizer = Lookahead(torch.optim.SGD([p], lr=1.0), k=1)
    train(optimizer, 1)
    before = bits(p)
    optimizer.state[p]["slow_param"] = torch.zeros(1)
    message = "the state slow_param has shape [1], its parameter 0 of group 0 has shape [3] and dtype torch.float32"
    with pytest.raises(ValueError, match=re.escape(message)):
        train(optimizer, 1)
    assert bits(p) == before
