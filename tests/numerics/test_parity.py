"""Ours against the formulas in float64 and against torch: 40 steps, every element of every tensor."""

import numpy as np
import pytest
import torch
from cases import ROW, copies, each_case, each_own_case, each_row, give, gradients, model
from parity import assert_as_exact_as_torch
from reference import ROUNDING, Trajectory, bits, checked_step, only_kernels, params_of
from torch.nn import Parameter

pytestmark = pytest.mark.usefixtures("kernels_only", "one_thread")


@each_case
def test_float32(row, kwargs):
    assert_as_exact_as_torch(row, kwargs, torch.float32)


@pytest.mark.slow
@each_case
def test_float64(row, kwargs):
    assert_as_exact_as_torch(row, kwargs, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@each_own_case
def test_what_torch_has_not(row, kwargs, dtype):
    ours = row.ours(model(dtype), **kwargs)
    for step in range(1, 31):
        give(ours, gradients(params_of(ours), step))
        checked_step(row, ours)


# Where the variance is the small difference of two averages, torch's loses digits in it.
@pytest.mark.parametrize("alpha", [0.03125, 0.2, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("noise", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_centered_rmsprop_is_no_further_off_than_torch(alpha, noise, momentum):
    row = ROW["RMSprop"]
    generator = torch.Generator().manual_seed(7)
    params = [Parameter(torch.randn(4000, generator=generator) / 100)]
    kwargs = {"lr": 0.01, "centered": True, "alpha": alpha, "momentum": momentum, "eps": 1e-3}
    ours, theirs = (cls(copies(params), **kwargs) for cls in (row.ours, row.theirs))
    exact = Trajectory(row, ours)
    mean = torch.randn(4000, generator=generator)
    for _ in range(12):
        grads = [mean + noise * torch.randn(4000, generator=generator)]
        for optimizer in (ours, theirs):
            give(optimizer, grads)
            optimizer.step()
        exact.step()
    off, torchs = (abs(exact.of(optimizer, "") - exact.numbers("")) for optimizer in (ours, theirs))
    assert not np.isnan(off).any()
    # torch's is NaN for elements whose variance came out below zero.
    assert np.sqrt((off**2).mean()) <= 1.1 * np.sqrt((torchs[~np.isnan(torchs)] ** 2).mean())
    if alpha <= 0.5:
        assert off.max() <= 0.8 * np.nanmax(torchs)


def test_the_rounding_of_rmsprops_momentum_does_not_add_up():
    row = ROW["RMSprop"]
    ours = row.ours(copies([Parameter(torch.ones(4096))]), lr=0.01, momentum=0.99)
    exact = Trajectory(row, ours)
    generator = torch.Generator().manual_seed(3)
    for _ in range(400):
        give(ours, [torch.rand(4096, generator=generator) + 1])
        ours.step()
        exact.step()
    off = exact.of(ours, "momentum_buffer") / exact.numbers("momentum_buffer") - 1
    assert abs(off.mean()) < ROUNDING[torch.float32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each_row
def test_sixteen_bits(row, dtype):
    """Arithmetic in float32, one rounding where a number is stored; most of torch's code rounds at every operation."""
    if row.doubt:
        # With few bits most signs hang on rounding sooner or later, so one step is compared at a time.
        params = model(dtype)
        ours = row.ours(params, **row.full)
        for step in range(1, 31):
            give(ours, gradients(params, step))
            checked_step(row, ours)
    else:
        assert_as_exact_as_torch(row, row.full, dtype)


@each_row
def test_groups(row):
    """A group is stepped to the same bits alone and among groups of other hyperparameters and dtypes."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    settings = [*row.variants.values(), *row.own_variants.values()]
    if row.eager:  # the constructor makes all states alike, whatever a group says
        settings = [{k: v for k, v in kw.items() if k != "initial_accumulator_value"} for kw in settings]
    models = [model(dtypes[i % 3]) for i in range(len(settings))]
    together = row.ours([{"params": copies(m), **kw} for m, kw in zip(models, settings, strict=True)])
    alone = [row.ours(copies(m), **kw) for m, kw in zip(models, settings, strict=True)]
    for step in range(1, 11):
        grads = [gradients(m, step) for m in models]
        flat = [grad for group in grads for grad in group]
        give(together, flat)
        with only_kernels(sum(grad is not None for grad in flat)):
            together.step()
        for optimizer, group_grads in zip(alone, grads, strict=True):
            give(optimizer, group_grads)
            optimizer.step()
    alone_params = [(o, p) for o in alone for p in params_of(o)]
    for p, (optimizer, q) in zip(params_of(together), alone_params, strict=True):
        assert bits(p) == bits(q)
        for name in row.held:
            assert (name in together.state[p]) == (name in optimizer.state[q])
            if name in together.state[p]:
                assert bits(together.state[p][name]) == bits(optimizer.state[q][name])


@each_row
def test_late_and_rare_gradients(row):
    """Each parameter keeps its own count of steps, and has no state before its first gradient."""
    params = model()
    ours = row.ours(copies(params), **row.full)
    for step in range(1, 13):
        give(ours, [torch.randn_like(p) if step > 2 * i or step % 5 == i else None for i, p in enumerate(params)])
        stepped = {p for p in params_of(ours) if p.grad is not None or p in ours.state}
        checked_step(row, ours)
        assert set(ours.state) == (set(params_of(ours)) if row.eager else stepped)


@each_row
def test_changing_hyperparameters(row):
    """Every number in a group is read anew at each step."""
    ours = row.ours(model(), **row.full)
    (group,) = ours.param_groups
    for step in range(1, 7):
        group["lr"] *= 1.5
        group.update(row.having(weight_decay=[0.1, 0, 0.3][step % 3]))
        group["maximize"] = step % 3 == 2
        give(ours, gradients(params_of(ours), step))
        checked_step(row, ours)


@each_row
def test_learning_rate_changed_in_place(row):
    """A schedule writes to a tensor; nothing else in the group tells of it."""
    ours = row.ours(model(), **{**row.full, "lr": torch.tensor(0.04)})
    for step in range(1, 5):
        ours.param_groups[0]["lr"].mul_(0.5)
        give(ours, gradients(params_of(ours), step))
        checked_step(row, ours)


@each_row
def test_loss_scale(row):
    """Gradients are unscaled inside the kernel: a scale that is a power of two changes no bit."""
    params = model()
    plain, scaled = (row.ours(copies(params), **row.full) for _ in range(2))
    for step in range(1, 6):
        grads = gradients(params, step)
        give(plain, grads)
        give(scaled, [grad * 1024 if grad is not None else None for grad in grads])
        scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        plain.step()
        scaled.step()
    for p, q in zip(params_of(plain), params_of(scaled), strict=True):
        assert bits(p) == bits(q)


NOT_FINITE = [float("nan"), float("inf"), -float("inf"), 1e20, -1e20, 3e38, 1e-30, 0.0, -0.0, 1.0]


@each_row
def test_not_finite(row):
    """NaN, infinities and overflows spread through a parameter and its states as in torch, and to no neighbour.

    Where torch's intermediate results overflow, and ours do not, ours are those of the formula.
    """
    for kwargs in (row.variants["default"], row.full):
        params = [torch.ones(len(NOT_FINITE), requires_grad=True)]
        ours, theirs = row.ours(copies(params), **kwargs), row.theirs(copies(params), **kwargs)
        exact = Trajectory(row, ours)
        for grad in (torch.tensor(NOT_FINITE), torch.ones(len(NOT_FINITE)), torch.ones(len(NOT_FINITE))):
            for optimizer in (ours, theirs):
                give(optimizer, [grad])
                optimizer.step()
            with np.errstate(all="ignore"):
                exact.step()
            (p,), (q,) = params_of(ours), params_of(theirs)
            pairs = [(p, q, exact.values[p])]
            pairs += [(ours.state[p][name], theirs.state[q][name], exact.states[p][name]) for name in exact.names()[1:]]
            for got, torchs, formulas in pairs:
                as_torch = torch.isclose(got, torchs, equal_nan=True)
                assert (as_torch | torch.isclose(got, torch.from_numpy(formulas).float())).all(), (got, torchs)
