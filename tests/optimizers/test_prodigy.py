"""Prodigy's estimate of the distance, which depends on all tensors: the update of one is in the table of cases."""

import copy
import math

import numpy as np
import onepass
import pytest
import reference
import torch
from reference import bits, hyper, numbers, params_of
from torch.nn import Parameter

SHAPES = [(33, 17), (5,), (), (0, 3), (2, 3, 4)]


class Exact:
    """All tensors of an optimizer, stepped by the formula with the optimizer's own gradients, in float64."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.values = {p: numbers(p).astype(np.float64) for p in params_of(optimizer)}
        self.first = dict(self.values)
        self.states = {p: {} for p in self.values}
        self.steps = dict.fromkeys(self.values, 0)
        self.d = self.d_max = optimizer.param_groups[0]["d0"]

    def step(self, limited=lambda g: g):
        groups = [hyper(group) for group in self.optimizer.param_groups]
        lr = max(group["lr"] for group in groups)
        above = below = 0.0
        for group, own in zip(self.optimizer.param_groups, groups, strict=True):
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, {**own, "d": self.d}, limited(numbers(p.grad).astype(np.float64)))
                if own["lr"] > 0 and self.states[p]:
                    above += self.states[p]["d_numerator"] * lr / own["lr"]
                    below += self.states[p]["d_denom"] * (own["lr"] / lr if own["safeguard_warmup"] else 1)
        if below == 0:
            return
        d_hat = groups[0]["d_coef"] * above / below
        if self.d == groups[0]["d0"]:
            self.d = max(self.d, d_hat)
        self.d_max = max(self.d_max, d_hat)
        self.d = min(self.d_max, self.d * groups[0]["growth_rate"])

    def _update(self, p, h, g):
        g = -g if h["maximize"] else g
        self.steps[p] += 1
        states = self.states[p]
        every = h["slice_p"]
        whole = {name: states.get(name, 0.0) for name in ("exp_avg", "exp_avg_sq", "s" if every == 1 else "")}
        whole |= {"p0": self.first[p], "d_numerator": states.get("d_numerator", 0.0)}
        value, new = reference.prodigy(self.values[p], g, whole, self.steps[p], **h)
        if every != 1:  # the same sums, of a part of the tensor
            part = [x.ravel()[::every] for x in (self.values[p], g, self.first[p])]
            within = {**states, "p0": part[2], "exp_avg": 0.0, "exp_avg_sq": 0.0}
            _, sums = reference.prodigy(part[0], part[1], within, self.steps[p], **h)
            new |= {name: sums[name] for name in ("s", "p0", "d_numerator", "d_denom")}
        self.values[p], self.states[p] = value, new


def problem(dtype, seed=0):
    """Parameters, and a function that gives them the gradients of a quadratic bowl around other points.

    With float64 also the numbers that each parameter has are float64.
    """
    if dtype == torch.float64:
        torch.set_default_dtype(dtype)
    generator = torch.Generator().manual_seed(seed)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    params = [Parameter(draw(shape).to(dtype)) for shape in SHAPES]
    goals, scales = [[draw(shape) for shape in SHAPES] for _ in range(2)]

    def give(params, step):
        for i, (p, goal, scale) in enumerate(zip(params, goals, scales, strict=True)):
            noise = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
            p.grad = ((p.detach().double() - goal) * scale.square() + noise).to(p.dtype)

    return params, give


ARGUMENTS = {
    "default": {},
    "d0": {"d0": 1e-3},
    "d_coef": {"d_coef": 0.3},
    "growth_rate": {"growth_rate": 1.1},
    "beta3": {"beta3": 0.9},
    "decay": {"weight_decay": 0.1},
    "coupled": {"weight_decay": 0.1, "decouple": False},
    "corrected": {"use_bias_correction": True},
    "safeguarded": {"safeguard_warmup": True, "lr": 0.5},
    "maximize": {"maximize": True},
    "slice": {"slice_p": 3},
    "slice, coupled": {"slice_p": 11, "weight_decay": 0.1, "decouple": False, "use_bias_correction": True},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_step(name, dtype):
    """Every element of parameters and states, and the estimate, which grows."""
    params, give = problem(dtype)
    # Beside parameters of 1, steps of 1e-6 have few digits in float32.
    d0 = 1e-6 if dtype == torch.float64 else 0.01
    optimizer = onepass.Prodigy(params, **{"d0": d0, **ARGUMENTS[name]})
    check(optimizer, give, 20 if name == "maximize" else 60)  # which runs away
    assert optimizer.param_groups[0]["d"] > 3 * optimizer.param_groups[0]["d0"]


def check(optimizer, give, steps, limited=lambda g: g):
    params = params_of(optimizer)
    exact = Exact(optimizer)
    rtol = 1e-9 if params[0].dtype == torch.float64 else 2e-4
    for step in range(1, steps + 1):
        give(params, step)
        optimizer.step()
        exact.step(limited)
        for group in optimizer.param_groups:
            assert group["d"] == pytest.approx(exact.d, rel=rtol)
            assert group["d_max"] == pytest.approx(exact.d_max, rel=rtol)
        for p in params:
            held = optimizer.state.get(p, {})
            np.testing.assert_allclose(numbers(p), exact.values[p], rtol, rtol * exact.d)
            assert bool(held) == bool(exact.states[p])
            for name in ("exp_avg", "exp_avg_sq", "s", "p0") if held else ():
                want = exact.states[p][name]
                room = rtol * abs(want).max(initial=0.0)
                np.testing.assert_allclose(numbers(held[name]), want, rtol, room, err_msg=f"{name}, step {step}")
    return exact


@pytest.mark.parametrize("slice_p", [1, 3])
def test_late_gradients(slice_p):
    """Parameters that have made fewer steps have another bias correction."""
    params, give = problem(torch.float64)
    optimizer = onepass.Prodigy(params, slice_p=slice_p, use_bias_correction=True)

    def some(params, step):
        give(params, step)
        for i, p in enumerate(params):
            if step <= 2 * i or (step + i) % 5 == 0:
                p.grad = None

    check(optimizer, some, 30)


@pytest.mark.parametrize("safeguard", [False, True])
def test_groups_of_different_rates(safeguard):
    """As if the parameters of a group were measured in other units: an exact copy of the run in these units."""
    params, give = problem(torch.float64)
    kwargs = {"safeguard_warmup": safeguard, "eps": 0.0}
    groups = [{"params": params[:2], "lr": 0.8}, {"params": params[2:], "lr": 0.2}]
    optimizer = onepass.Prodigy(groups, **kwargs)
    check(optimizer, give, 40)

    params, give = problem(torch.float64)
    units = [1.0 if i < 2 else 4.0 for i in range(len(params))]  # a parameter is 1/4 of the other's
    scaled = [Parameter(p.detach() * unit) for p, unit in zip(params, units, strict=True)]
    other = onepass.Prodigy(scaled, lr=0.8, **kwargs)
    for step in range(1, 41):
        with torch.no_grad():
            for p, q, unit in zip(params, scaled, units, strict=True):
                p.copy_(q / unit)
        give(params, step)
        for p, q, unit in zip(params, scaled, units, strict=True):
            q.grad = p.grad / unit
        other.step()
    assert other.param_groups[0]["d"] == pytest.approx(optimizer.param_groups[0]["d"], rel=1e-6)
    for p, q, unit in zip(params_of(optimizer), scaled, units, strict=True):
        torch.testing.assert_close(p, q / unit, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("rates", [(1.0, 0.0), (0.0, 1.0)])
def test_a_group_with_a_rate_of_zero_does_not_count(rates):
    params, give = problem(torch.float64)
    groups = [{"params": part, "lr": lr} for part, lr in zip((params[:1], params[1:]), rates, strict=True)]
    optimizer = onepass.Prodigy(groups)
    before = [bits(p) for p in params]
    check(optimizer, give, 30)
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        still = rates[0 if i < 1 else 1] == 0 or p.numel() == 0
        assert (bits(p) == old) == still


def test_no_rate_no_estimate():
    params, give = problem(torch.float64)
    optimizer = onepass.Prodigy(params, lr=0.0)
    give(params, 1)
    optimizer.step()
    assert optimizer.param_groups[0]["d"] == 1e-6


@pytest.mark.parametrize("slice_p", [1, 3])
def test_clipped_scaled_and_zeroed_gradients(slice_p):
    """The estimate is that of the gradients as the step uses them."""
    params, give = problem(torch.float64)
    optimizer = onepass.Prodigy(params, slice_p=slice_p, max_norm=3.0, clip_value=0.2, zero_grad=True)
    exact = Exact(optimizer)
    for step in range(1, 31):
        give(params, step)
        given = {p: p.grad.clone() for p in params}
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)  # GradScaler's
        for p in params:
            p.grad *= 4.0
        norm = math.sqrt(sum(float(g.square().sum()) for g in given.values()))
        optimizer.step()
        assert all(not p.grad.any() for p in params)
        for p in params:
            p.grad = given[p]
        exact.step(lambda g, norm=norm: np.clip(g * min(1.0, 3.0 / (norm + 1e-6)), -0.2, 0.2))
        assert optimizer.param_groups[0]["d"] == pytest.approx(exact.d, rel=1e-9)
    for p in params:
        np.testing.assert_allclose(numbers(p), exact.values[p], 1e-9, 1e-9)


@pytest.mark.parametrize("by", ["norm", "scaler"])
@pytest.mark.parametrize("slice_p", [1, 3])
def test_a_skipped_step_changes_nothing(slice_p, by):
    params, give = problem(torch.float32)
    optimizer = onepass.Prodigy(params, slice_p=slice_p, growth_rate=1.5, skip_nonfinite=True)
    for step in range(1, 6):
        give(params, step)
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()), [bits(p) for p in params]
    if by == "norm":
        params[1].grad[2] = math.nan
    else:
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    optimizer.step()
    assert optimizer.last_step.skipped
    assert [bits(p) for p in params] == before[1]
    assert_same_state(optimizer.state_dict(), before[0])


def assert_same_state(one, other):
    assert one["param_groups"] == other["param_groups"]
    for a, b in zip(one["state"].values(), other["state"].values(), strict=True):
        assert a.keys() == b.keys()
        assert all(bits(a[name]) == bits(b[name]) for name in a)


@pytest.mark.parametrize("slice_p", [1, 3])
@pytest.mark.parametrize(("dtype", "master"), [(torch.float32, None), (torch.bfloat16, "split")], ids=str)
def test_a_checkpoint_goes_on(dtype, master, slice_p, tmp_path):
    """To the bit, in the middle of the growth."""
    params, give = problem(dtype)
    optimizer = onepass.Prodigy(params, slice_p=slice_p, master=master)
    for step in range(1, 9):
        give(params, step)
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state")
    twins = [Parameter(p.detach().clone()) for p in params]
    second = onepass.Prodigy(twins, master=master)
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for step in range(9, 20):
        for each in (params, twins):
            give(each, step)
        optimizer.step()
        second.step()
    assert optimizer.param_groups[0]["d"] == second.param_groups[0]["d"] > 1e-6
    assert [bits(p) for p in params] == [bits(p) for p in twins]
    assert_same_state(optimizer.state_dict(), second.state_dict())


@pytest.mark.parametrize("slice_p", [1, 4])
def test_sixteen_bits(slice_p):
    """The states are float32, and masters are what the estimate sees."""
    params, give = problem(torch.bfloat16)
    wide = [Parameter(p.detach().float()) for p in params]
    ours = onepass.Prodigy(params, master="split", slice_p=slice_p)
    theirs = onepass.Prodigy(wide, slice_p=slice_p)
    for step in range(1, 30):
        give(params, step)
        for p, q in zip(params, wide, strict=True):
            q.grad = p.grad.float()
        ours.step()
        theirs.step()
    assert ours.param_groups[0]["d"] == theirs.param_groups[0]["d"] > 1e-6
    for p, q in zip(params, wide, strict=True):
        assert bits(p) == bits(q.bfloat16())
        for name in ("exp_avg", "exp_avg_sq", "s", "p0"):
            assert bits(ours.state[p][name]) == bits(theirs.state[q][name])


@pytest.mark.parametrize("slice_p", [1, 3])
def test_complex_parameters_are_pairs(slice_p):
    torch.manual_seed(0)
    pairs = [Parameter(torch.randn(9, 4, 2)), Parameter(torch.randn(3, 2))]
    own = [Parameter(torch.view_as_complex(p.detach().clone())) for p in pairs]
    one, two = (onepass.Prodigy(params, slice_p=slice_p) for params in (pairs, own))
    for _ in range(20):
        for p, q in zip(pairs, own, strict=True):
            p.grad = p.detach() - 3 + torch.randn(p.shape)
            q.grad = torch.view_as_complex(p.grad.clone())
        one.step()
        two.step()
    assert one.param_groups[0]["d"] == two.param_groups[0]["d"] > 1e-6
    assert all(bits(p) == bits(q) for p, q in zip(pairs, own, strict=True))


def test_the_slice_is_that_of_the_flattened_tensor():
    p = Parameter(torch.randn(4, 6).t())
    first = p.detach().clone()
    optimizer = onepass.Prodigy([p], slice_p=5)
    p.grad = torch.randn(6, 4)
    optimizer.step()
    assert bits(optimizer.state[p]["p0"]) == bits(first.flatten()[::5])
    want = p.grad.flatten()[::5] * 1e-6
    torch.testing.assert_close(optimizer.state[p]["s"], want)


@pytest.mark.parametrize(
    ("slice_p", "error", "text"),
    [
        (0, ValueError, "Prodigy: group 1: slice_p must be >= 1, got 0"),
        (2.5, TypeError, "Prodigy: group 1: slice_p must be an integer"),
        (2, ValueError, r"Prodigy: group 1: with slice_p=2 the state s of a parameter of shape \(8,\) must have shape"),
    ],
)
def test_a_slice_set_later_is_refused_before_anything_is_written(slice_p, error, text):
    params = [Parameter(torch.ones(4)), Parameter(torch.ones(8))]
    optimizer = onepass.Prodigy([{"params": [p]} for p in params])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()), [bits(p) for p in params]
    optimizer.param_groups[1]["slice_p"] = slice_p
    with pytest.raises(error, match=text):
        optimizer.step()
    optimizer.param_groups[1]["slice_p"] = 1
    assert [bits(p) for p in params] == before[1]
    assert_same_state(optimizer.state_dict(), before[0])


def test_large_scaled_gradients_beside_states_of_16_bits():
    """The slice is measured in float32: a scaled gradient may be too large for the states' dtype."""
    p = Parameter(torch.ones(64))
    optimizer = onepass.Prodigy([p], slice_p=2, d0=0.01, state_dtype=torch.float16)
    for _ in range(4):
        p.grad = (p.detach() + 3) * 65536.0
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(65536.0), torch.tensor(0.0)
        optimizer.step()
    assert 0.01 < optimizer.param_groups[0]["d"] < 10
    assert all(torch.isfinite(x).all() for x in optimizer.state[p].values())


@pytest.mark.parametrize("slice_p", [1, 2])
def test_meta_parameters(slice_p):
    p = Parameter(torch.ones(6, device="meta"))
    p.grad = torch.ones(6, device="meta")
    optimizer = onepass.Prodigy([p], slice_p=slice_p)
    optimizer.step()
    assert optimizer.param_groups[0]["d"] == 1e-6
    assert optimizer.state[p]["step"] == 1


def test_a_group_that_is_added_takes_the_estimate():
    params, give = problem(torch.float64)
    optimizer = onepass.Prodigy(params)
    for step in range(1, 20):
        give(params, step)
        optimizer.step()
    optimizer.add_param_group({"params": [Parameter(torch.zeros(3))]})
    first, second = optimizer.param_groups
    assert first["d"] == second["d"] > 1e-6
    assert first["d_max"] == second["d_max"]


def test_groups_of_different_d0_are_refused():
    """Their shares of the estimate are in units of ``1 / d0``."""
    params = [Parameter(torch.ones(2)) for _ in range(3)]
    with pytest.raises(ValueError, match=r"Prodigy: d0 must be the same in all groups, got 0\.01 in group 1"):
        onepass.Prodigy([{"params": params[:1]}, {"params": params[1:], "d0": 1e-2}])
    with pytest.raises(ValueError, match="Prodigy: d0 must be the same in all groups, got 1e-06 in group 1"):
        onepass.Prodigy([{"params": params[:1], "d0": 1e-2}, {"params": params[1:]}])
    optimizer = onepass.Prodigy([{"params": params[:1], "d0": 1e-3}, {"params": params[1:2], "d0": 1e-3}], d0=0.01)
    with pytest.raises(ValueError, match=r"got 0\.01 in group 2 and 0\.001 before it"):
        optimizer.add_param_group({"params": params[2:]})
    with pytest.raises(TypeError, match="Prodigy: group 2: d0 must be a number"):
        optimizer.add_param_group({"params": params[2:], "d0": "0.001"})
    assert len(optimizer.param_groups) == 2
    for p in params:
        p.grad = torch.ones(2)
    optimizer.step()
    saved, before = (copy.deepcopy(optimizer.state_dict()) for _ in range(2))
    saved["param_groups"][1]["d0"] = 0.01
    saved["param_groups"][0]["lr"] = 7.0
    saved["state"][0]["s"] = saved["state"][0]["s"] + 1
    with pytest.raises(ValueError, match=r"got 0\.01 in group 1 and 0\.001 before it"):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert torch.equal(after["state"][0]["s"], before["state"][0]["s"])
    saved["param_groups"][0]["d0"] = 0.01
    optimizer.load_state_dict(saved)
    assert [group["d0"] for group in optimizer.param_groups] == [0.01, 0.01]


def test_gradients_that_are_all_zero():
    params = [Parameter(torch.ones(3))]
    optimizer = onepass.Prodigy(params)
    params[0].grad = torch.zeros(3)
    optimizer.step()
    assert optimizer.param_groups[0]["d"] == 1e-6
    assert torch.equal(params[0], torch.ones(3))


def test_infinite_gradients_of_both_signs_leave_the_estimate():
    """Their sum over the tensors is NaN."""
    params = [Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = onepass.Prodigy(params)
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    before = optimizer.param_groups[0]["d"], optimizer.param_groups[0]["d_max"]
    params[0].grad[0], params[1].grad[0] = math.inf, -math.inf
    optimizer.step()
    assert (optimizer.param_groups[0]["d"], optimizer.param_groups[0]["d_max"]) == before


def test_what_needs_all_parameters_is_refused():
    optimizer = onepass.Prodigy([Parameter(torch.ones(3))])
    with pytest.raises(TypeError, match="Prodigy uses all parameters together"):
        onepass.step_in_backward(optimizer)


def spread(slice_p):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    params, give = problem(torch.float64)
    mesh = init_device_mesh("cpu", (2,))
    sharded = [Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) if p.ndim else p for p in params]
    optimizer = onepass.Prodigy(sharded, slice_p=slice_p)
    alone = [Parameter(p.detach().clone()) for p in params]
    single = onepass.Prodigy(alone)
    for step in range(1, 30):
        give(alone, step)
        for p, q in zip(alone, sharded, strict=True):
            q.grad = distribute_tensor(p.grad, mesh, [Shard(0)]) if p.ndim else p.grad.clone()
        single.step()
        optimizer.step()
    assert single.param_groups[0]["d"] > 1e-6
    assert optimizer.param_groups[0]["d"] == pytest.approx(single.param_groups[0]["d"], rel=1e-9)
    for p, q in zip(alone, sharded, strict=True):
        torch.testing.assert_close(q.full_tensor() if p.ndim else q, p, rtol=1e-9, atol=1e-12)


def test_dtensors(processes):
    """The sums are those of whole tensors."""
    processes(2, spread, 1)


def refused():
    with pytest.raises(ValueError, match="Prodigy: group 0: slice_p must be 1 for DTensors, got 2"):
        spread(2)


def test_a_slice_of_a_dtensor_is_refused(processes):
    processes(2, refused)


WRONG_ESTIMATES = [
    ("d_coef", "x", TypeError, "d_coef must be a number"),
    ("d_coef", None, TypeError, "d_coef must be a number"),
    ("d_coef", -1.0, ValueError, "d_coef must be above 0 and finite, got -1.0"),
    ("growth_rate", "x", TypeError, "growth_rate must be a number"),
    ("growth_rate", math.nan, ValueError, "growth_rate must be >= 1, got nan"),
    ("d_max", None, TypeError, "d_max must be a number"),
    ("d_max", math.nan, ValueError, "d_max must be >= 0, got nan"),
]


@pytest.mark.parametrize(("name", "value", "error", "text"), WRONG_ESTIMATES)
def test_wrong_numbers_of_the_estimate_are_refused_before_anything_is_written(name, value, error, text):
    p = Parameter(torch.ones(4, 4))
    with pytest.raises(error, match=f"Prodigy: group 0: {text}"):
        onepass.Prodigy([{"params": [p], name: value}])
    optimizer = onepass.Prodigy([p])
    p.grad = torch.ones(4, 4)
    optimizer.step()
    before = bits(p), {key: bits(held) for key, held in optimizer.state[p].items()}
    with pytest.raises(error, match=f"Prodigy: group 1: {text}"):
        optimizer.add_param_group({"params": [Parameter(torch.ones(2))], name: value})
    optimizer.param_groups[0][name] = value
    with pytest.raises(error, match=f"Prodigy: group 0: {text}"):
        optimizer.step()
    assert (bits(p), {key: bits(held) for key, held in optimizer.state[p].items()}) == before


@pytest.mark.parametrize("slice_p", [1, 2])
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_loaded_states_of_complex_parameters_stay(slice_p, state_dtype):
    """state_dtype is for real parameters; the slices of complex ones are real."""
    kwargs = {"slice_p": slice_p, "state_dtype": state_dtype}
    p = Parameter(torch.randn(9, dtype=torch.complex64))
    optimizer = onepass.Prodigy([p], **kwargs)
    p.grad = torch.randn(9, dtype=torch.complex64)
    optimizer.step()
    resumed = onepass.Prodigy([p], **kwargs)
    resumed.load_state_dict(optimizer.state_dict())
    assert {name: held.dtype for name, held in resumed.state[p].items()} == {
        name: held.dtype for name, held in optimizer.state[p].items()
    }
    assert all(bits(held) == bits(optimizer.state[p][name]) for name, held in resumed.state[p].items())
