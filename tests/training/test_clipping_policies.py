"""ZClip, AutoClip and SkipSpikes against the formulas of their papers, written in NumPy and float64."""

import copy
import json
import math
import pickle
import pickletools
import random

import numpy as np
import onepass
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onepass.training import sorted_values
from onepass.training.sorted_values import SortedValues

INVALID = math.nan, math.inf, -math.inf


def torchs_coefficient(max_norm, norm):
    return float(min(1.0, max_norm / (norm + 1e-6)))


class PlainZClip:
    """Equations of arXiv:2504.02507, with the authors' epsilon."""

    def __init__(self, alpha=0.97, z_thresh=2.5, warmup_steps=25, mode="reciprocal", max_norm=None, eps=1e-6):
        xi = {"reciprocal": lambda z: z_thresh**2 / z, "mean": lambda z: 0.0, "max": lambda z: z_thresh}[mode]
        self.xi, self.alpha, self.z_thresh, self.max_norm, self.eps = xi, alpha, z_thresh, max_norm, eps
        self.warmup_steps, self.warmup, self.mean, self.var = warmup_steps, [], None, None

    def coefficient(self, norm):
        if not np.isfinite(norm):
            return 1.0
        bound = np.inf if self.max_norm is None else self.max_norm
        if self.mean is None:
            self.warmup.append(norm)
            if len(self.warmup) == self.warmup_steps:
                self.mean, self.var = np.mean(self.warmup), np.var(self.warmup)
            return torchs_coefficient(bound, norm)
        clipped = norm
        if self.var > 0:
            z = (norm - self.mean) / (np.sqrt(self.var) + self.eps)
            if z > self.z_thresh:
                clipped = self.mean + self.xi(z) * np.sqrt(self.var)
        self.mean = self.alpha * self.mean + (1 - self.alpha) * clipped
        self.var = self.alpha * self.var + (1 - self.alpha) * (clipped - self.mean) ** 2
        limit = min(bound, clipped if clipped < norm else np.inf)
        return torchs_coefficient(limit, norm)


class PlainAutoClip:
    """Algorithm of arXiv:2007.14469."""

    def __init__(self, percentile=10.0, history=None):
        self.percentile, self.history, self.norms = percentile, history, []

    def coefficient(self, norm):
        if not np.isfinite(norm) or norm == 0:
            return 1.0
        self.norms = [*self.norms, norm][-self.history if self.history else 0 :]
        return torchs_coefficient(np.percentile(self.norms, self.percentile), norm)


class PlainSkipSpikes:
    """OLMo-core's SkipStepOptimizer, without the loss. Its list contains the norm of this step."""

    def __init__(self, sigma=6.0, window=128, max_norm=None):
        self.sigma, self.window, self.max_norm, self.norms = sigma, window, max_norm, []

    def coefficient(self, norm):
        if not np.isfinite(norm):
            return 1.0
        self.norms = [*self.norms, norm][-self.window - 1 :]
        before = np.array(self.norms[:-1])
        enough = len(self.norms) >= max(3, self.window // 2)
        if enough and norm - before.mean() > self.sigma * before.std(ddof=1):
            return 0.0
        return torchs_coefficient(np.inf if self.max_norm is None else self.max_norm, norm)


CASES = [
    (onepass.ZClip, PlainZClip, arguments)
    for arguments in (
        {},
        {"alpha": 0.9},
        {"alpha": 0.0},
        {"z_thresh": 1.0},
        {"warmup_steps": 1},
        {"warmup_steps": 3},
        {"mode": "mean"},
        {"mode": "max"},
        {"max_norm": 1.2},
        {"max_norm": 0.3, "mode": "mean"},
        {"eps": 0.0},
        {"eps": 0.1},
    )
]
CASES += [
    (onepass.AutoClip, PlainAutoClip, arguments)
    for arguments in (
        {},
        {"percentile": 0.0},
        {"percentile": 50.0},
        {"percentile": 100.0},
        {"history": 1},
        {"history": 7},
        {"percentile": 90.0, "history": 40},
    )
]
CASES += [
    (onepass.SkipSpikes, PlainSkipSpikes, arguments)
    for arguments in (
        {},
        {"sigma": 1.0},
        {"sigma": 3.0, "window": 2},
        {"window": 10, "sigma": 2.0},
        {"window": 41},
        {"max_norm": 0.5},
        {"sigma": 2.0, "window": 50, "max_norm": 1.1},
    )
]
each_case = pytest.mark.parametrize(
    ("ours", "plain", "arguments"), CASES, ids=[f"{ours.__name__}-{arguments}" for ours, _, arguments in CASES]
)
each_class = pytest.mark.parametrize("cls", [onepass.ZClip, onepass.AutoClip, onepass.SkipSpikes])


def norms_of_a_run(steps=400, scale=1.0, seed=0):
    """Norms that fall and vary by a third, with a spike in every thirtieth step on average."""
    rng = np.random.default_rng(seed)
    norms = rng.lognormal(0.0, 0.3, steps) * np.linspace(2.0, 0.5, steps)
    norms[rng.random(steps) < 1 / 30] *= 20.0
    return (scale * norms).tolist()


def coefficients(policy, norms):
    found = [policy.coefficient(norm) for norm in norms]
    assert all(type(each) is float and 0.0 <= each <= 1.0 for each in found)
    return found


def with_invalid(norms):
    """The norms with NaN, infinity and -infinity before the first, and often between them."""
    rng = random.Random(1)
    return [
        *INVALID,
        *(each for norm in norms for each in (norm, *rng.choices((*INVALID, None), k=2)) if each is not None),
    ]


@each_case
def test_the_formula(ours, plain, arguments):
    norms = norms_of_a_run()
    found = coefficients(ours(**arguments), norms)
    np.testing.assert_allclose(found, coefficients(plain(**arguments), norms), rtol=1e-10)
    assert len(set(found)) > 1 or arguments in ({"alpha": 0.0}, {"eps": 0.1}, {"percentile": 100.0}, {"history": 1})


@each_case
@pytest.mark.parametrize("scale", [1e-140, 1e-12, 1e-4, 1e4, 1e30, 1e140])
def test_tiny_and_huge_norms(ours, plain, arguments, scale):
    norms = norms_of_a_run(200, scale)
    expected = coefficients(plain(**arguments), norms)
    np.testing.assert_allclose(coefficients(ours(**arguments), norms), expected, rtol=1e-10)


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**1000])
def test_norms_whose_squares_underflow_or_overflow(scale):
    """Their spikes are those of the same norms in another unit."""
    policies = onepass.ZClip(eps=0.0), onepass.ZClip(eps=0.0, mode="max"), onepass.SkipSpikes(sigma=2.0)
    norms = norms_of_a_run(200)
    for policy in policies:
        scaled = copy.deepcopy(policy)
        for norm in norms:
            policy.coefficient(norm)
            scaled.coefficient(norm * scale)
        state, of_scaled = policy.state_dict(), scaled.state_dict()
        for key in set(state) - {"policy"}:
            np.testing.assert_allclose(of_scaled[key], np.multiply(state[key], scale), rtol=1e-9)


@each_case
def test_invalid_norms_change_nothing(ours, plain, arguments):
    """They give 1.0, and the coefficients of the other norms have the same bits as without them."""
    norms = norms_of_a_run(150)
    mixed = with_invalid(norms)
    policy = ours(**arguments)
    found = []
    for norm in mixed:
        before = policy.state_dict()
        coefficient = policy.coefficient(norm)
        if math.isfinite(norm):
            found.append(coefficient)
        else:
            assert coefficient == 1.0
            assert policy.state_dict() == before
    assert len(mixed) > len(norms) + 100
    assert found == coefficients(ours(**arguments), norms)


@each_case
@pytest.mark.parametrize("at", [0, 1, 24, 25, 26, 62, 63, 64, 200])
def test_a_resumed_run(ours, plain, arguments, at, tmp_path):
    norms = norms_of_a_run(300)
    policy = ours(**arguments)
    first = coefficients(policy, norms[:at])
    torch.save(policy.state_dict(), tmp_path / "policy.pt")
    held = [
        policy.state_dict(),
        json.loads(json.dumps(policy.state_dict())),
        torch.load(tmp_path / "policy.pt", weights_only=True),
    ]
    rest = coefficients(policy, norms[at:])
    assert first + rest == coefficients(ours(**arguments), norms)
    for state_dict in held:
        again = ours(**arguments)
        coefficients(again, norms_of_a_run(100, seed=3))  # is replaced
        again.load_state_dict(state_dict)
        assert again.state_dict() == state_dict
        assert coefficients(again, norms[at:]) == rest


@each_case
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_and_pickles(ours, plain, arguments, copied):
    norms = norms_of_a_run(200)
    policy = ours(**arguments)
    coefficients(policy, norms[:100])
    again = copied(policy)
    assert type(again) is ours
    assert repr(again) == repr(policy)
    assert coefficients(again, norms[100:]) == coefficients(ours(**arguments), norms)[100:]


@each_class
def test_a_deepcopy_has_its_own_statistics(cls):
    policy = cls()
    coefficients(policy, norms_of_a_run(40))
    before = policy.state_dict()
    coefficients(copy.deepcopy(policy), norms_of_a_run(40, seed=1))
    assert policy.state_dict() == before


@each_class
def test_a_pickle_names_no_private_module(cls):
    policy = cls()
    policy.coefficient(1.0)
    texts = [text for _, text, _ in pickletools.genops(pickle.dumps(policy)) if isinstance(text, str)]
    assert {text.split()[0] for text in texts if text.startswith("onepass")} == {"onepass"}


@each_class
def test_a_policy_is_a_clipping_policy(cls):
    assert isinstance(cls(), onepass.ClippingPolicy)
    assert not isinstance(1.0, onepass.ClippingPolicy)


@each_class
@pytest.mark.parametrize("norm", [2, np.float32(2.0), torch.tensor(2.0)])
def test_norms_of_other_types(cls, norm):
    policy = cls()
    assert type(policy.coefficient(norm)) is float
    json.dumps(policy.state_dict())


def test_the_state_dicts():
    zclip, autoclip, skip = onepass.ZClip(warmup_steps=2), onepass.AutoClip(history=2), onepass.SkipSpikes(window=2)
    for policy in (zclip, autoclip, skip):
        policy.coefficient(1.0)
    assert zclip.state_dict() == {"policy": "ZClip", "warmup_norms": [1.0], "mean": None, "std": 0.0}
    for policy in (zclip, autoclip, skip):
        coefficients(policy, [3.0] if policy is zclip else [3.0, 2.0])
    assert zclip.state_dict() == {"policy": "ZClip", "warmup_norms": [], "mean": 2.0, "std": 1.0}
    assert autoclip.state_dict() == {"policy": "AutoClip", "norms": [3.0, 2.0]}
    assert skip.state_dict() == {"policy": "SkipSpikes", "norms": [3.0, 2.0]}


def test_a_state_dict_shares_nothing_with_the_policy():
    for cls in (onepass.ZClip, onepass.AutoClip, onepass.SkipSpikes):
        policy = cls()
        policy.coefficient(1.0)
        held = policy.state_dict()
        before = copy.deepcopy(held)
        other = cls()
        other.load_state_dict(held)
        for each in (policy, other):
            coefficients(each, [2.0, 3.0])
        assert held == before


def test_a_state_dict_of_a_longer_history_keeps_the_last_norms():
    for longer, shorter in (
        (onepass.AutoClip(), onepass.AutoClip(history=3)),
        (onepass.SkipSpikes(), onepass.SkipSpikes(window=3)),
    ):
        coefficients(longer, [5.0, 1.0, 4.0, 2.0, 3.0])
        shorter.load_state_dict(longer.state_dict())
        assert shorter.state_dict()["norms"] == [4.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("cls", "change", "message"),
    [
        (onepass.ZClip, {"policy": "AutoClip"}, r"ZClip: state_dict\['policy'\] must be 'ZClip', got 'AutoClip'"),
        (onepass.ZClip, {"policy": None}, r"must be 'ZClip', got None"),
        (onepass.ZClip, {"mean": math.nan}, r"ZClip: state_dict\['mean'\] must be None or a finite number >= 0"),
        (onepass.ZClip, {"mean": -1.0}, r"got the float -1.0"),
        (
            onepass.ZClip,
            {"std": math.inf},
            r"ZClip: state_dict\['std'\] must be a finite number >= 0, got the float inf",
        ),
        (onepass.ZClip, {"std": None}, r"got the NoneType None"),
        (onepass.ZClip, {"warmup_norms": [1.0, math.nan]}, r"\['warmup_norms'\] must be a list of finite numbers >= 0"),
        (onepass.AutoClip, {"norms": 1.0}, r"AutoClip: state_dict\['norms'\] must be a list of finite numbers >= 0"),
        (onepass.AutoClip, {"norms": [math.inf]}, r"AutoClip: state_dict\['norms'\]"),
        (onepass.SkipSpikes, {"norms": ["1"]}, r"SkipSpikes: state_dict\['norms'\]"),
        (onepass.SkipSpikes, {"norms": [-1.0]}, r"SkipSpikes: state_dict\['norms'\]"),
    ],
)
def test_an_invalid_state_dict(cls, change, message):
    policy = cls()
    coefficients(policy, norms_of_a_run(30))
    before = policy.state_dict()
    with pytest.raises(ValueError, match=message):
        policy.load_state_dict({**before, **change})
    assert policy.state_dict() == before


@each_class
def test_an_incomplete_state_dict(cls):
    policy = cls()
    keys = [key for key in policy.state_dict() if key != "policy"]
    with pytest.raises(
        ValueError, match=rf"{cls.__name__}: state_dict must have the keys .*, but lacks \['{keys[0]}'\]"
    ):
        policy.load_state_dict({k: v for k, v in policy.state_dict().items() if k != keys[0]})
    with pytest.raises(TypeError, match=f"{cls.__name__}: state_dict must be a mapping, got the list"):
        policy.load_state_dict([])


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (onepass.ZClip, {"alpha": 1.0}, r"ZClip: alpha must be in \[0, 1\), got 1.0"),
        (onepass.ZClip, {"alpha": -0.1}, r"ZClip: alpha must be in \[0, 1\), got -0.1"),
        (onepass.ZClip, {"alpha": math.nan}, r"ZClip: alpha must be in \[0, 1\), got nan"),
        (onepass.ZClip, {"z_thresh": 0.0}, "ZClip: z_thresh must be finite and > 0, got 0.0"),
        (onepass.ZClip, {"z_thresh": math.inf}, "ZClip: z_thresh must be finite and > 0, got inf"),
        (onepass.ZClip, {"warmup_steps": 0}, "ZClip: warmup_steps must be >= 1, got 0"),
        (
            onepass.ZClip,
            {"mode": "zscore"},
            r"ZClip: mode must be one of \('reciprocal', 'mean', 'max'\), got 'zscore'",
        ),
        (onepass.ZClip, {"max_norm": 0.0}, "ZClip: max_norm must be finite and > 0, got 0.0"),
        (onepass.ZClip, {"eps": -1e-6}, "ZClip: eps must be finite and >= 0, got -1e-06"),
        (onepass.AutoClip, {"percentile": -1.0}, r"AutoClip: percentile must be in \[0, 100\], got -1.0"),
        (onepass.AutoClip, {"percentile": 100.5}, r"AutoClip: percentile must be in \[0, 100\], got 100.5"),
        (onepass.AutoClip, {"percentile": math.nan}, r"AutoClip: percentile must be in \[0, 100\], got nan"),
        (onepass.AutoClip, {"history": 0}, "AutoClip: history must be >= 1, got 0"),
        (onepass.SkipSpikes, {"sigma": 0.0}, "SkipSpikes: sigma must be finite and > 0, got 0.0"),
        (onepass.SkipSpikes, {"window": 1}, "SkipSpikes: window must be >= 2, got 1"),
        (onepass.SkipSpikes, {"max_norm": -1.0}, "SkipSpikes: max_norm must be finite and > 0, got -1.0"),
    ],
)
def test_an_argument_out_of_range(cls, arguments, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        cls(**arguments)


@pytest.mark.parametrize(
    ("cls", "name", "kind"),
    [
        (onepass.ZClip, "alpha", "a number"),
        (onepass.ZClip, "z_thresh", "a number"),
        (onepass.ZClip, "warmup_steps", "an integer >= 1"),
        (onepass.ZClip, "max_norm", "a number"),
        (onepass.ZClip, "eps", "a number"),
        (onepass.AutoClip, "percentile", "a number"),
        (onepass.AutoClip, "history", "an integer >= 1"),
        (onepass.SkipSpikes, "sigma", "a number"),
        (onepass.SkipSpikes, "window", "an integer >= 2"),
        (onepass.SkipSpikes, "max_norm", "a number"),
    ],
)
def test_an_argument_of_another_type(cls, name, kind):
    with pytest.raises(TypeError, match=f"^{cls.__name__}: {name} must be {kind}, got the str '5'"):
        cls(**{name: "5"})


def test_the_repr():
    assert repr(onepass.ZClip(mode="max", max_norm=1)) == (
        "ZClip(alpha=0.97, z_thresh=2.5, warmup_steps=25, mode='max', max_norm=1.0, eps=1e-06)"
    )
    assert repr(onepass.AutoClip()) == "AutoClip(percentile=10.0, history=None)"
    assert repr(onepass.SkipSpikes()) == "SkipSpikes(sigma=6.0, window=128, max_norm=None)"


# -- ZClip -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup_steps", [2, 3, 25])
def test_zclip_clips_from_the_first_step_after_the_warm_up(warmup_steps):
    warm_up = [1.0, *[1.1] * (warmup_steps - 1)]
    policy = onepass.ZClip(warmup_steps=warmup_steps)
    assert coefficients(policy, [*warm_up[:-1], 100.0]) == [1.0] * warmup_steps  # also the last step of the warm-up
    policy = onepass.ZClip(warmup_steps=warmup_steps)
    assert coefficients(policy, warm_up) == [1.0] * warmup_steps
    assert policy.coefficient(100.0) < 0.02


def test_zclip_clips_to_max_norm_also_in_the_warm_up():
    policy = onepass.ZClip(max_norm=0.5)
    assert policy.coefficient(2.0) == torchs_coefficient(0.5, 2.0)
    assert policy.state_dict()["warmup_norms"] == [2.0]


@pytest.mark.parametrize("mode", ["reciprocal", "mean", "max"])
@pytest.mark.parametrize("norm", [0.0, 0.1, 1.0, 1e-300, 1e300])
@pytest.mark.parametrize("warmup_steps", [1, 7, 25])
def test_zclip_does_not_clip_after_equal_norms(mode, norm, warmup_steps):
    policy = onepass.ZClip(mode=mode, warmup_steps=warmup_steps)
    assert coefficients(policy, [norm] * 100) == [1.0] * 100
    assert policy.state_dict() == {"policy": "ZClip", "warmup_norms": [], "mean": norm, "std": 0.0}
    assert policy.coefficient(2 * norm + 1.0) == 1.0


@pytest.mark.parametrize("mode", ["reciprocal", "mean", "max"])
def test_zclip_never_stops_training(mode):
    """After norms of 0 the published formula would clip every norm to 0."""
    policy = onepass.ZClip(mode=mode)
    assert min(coefficients(policy, [0.0] * 30 + [1.0] * 1000)) > 0.0


def test_zclip_after_a_lasting_rise():
    """Only mode="max" follows it."""
    norms = [*norms_of_a_run(100), *[100.0] * 300]
    last = {mode: coefficients(onepass.ZClip(mode=mode), norms)[-1] for mode in ("reciprocal", "mean", "max")}
    assert last["reciprocal"] < 0.1
    assert last["mean"] < 0.1
    assert last["max"] == 1.0


def test_zclip_with_norms_whose_squares_overflow():
    policy = onepass.ZClip(warmup_steps=4)
    assert coefficients(policy, [1e308, 1.2e308, 1.6e308, 1.7e308]) == [1.0] * 4
    state = policy.state_dict()
    assert 1.3e308 < state["mean"] < 1.45e308
    assert 2e307 < state["std"] < 3e307
    coefficients(policy, [1.7e308] * 10)
    policy.load_state_dict(policy.state_dict())


# -- AutoClip --------------------------------------------------------------------------------------------------------


def test_autoclip_is_the_authors_first_implementation():
    """autoclip.py: numpy.percentile of all norms, that of this step among them, then clip_grad_norm_."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    policy, history = onepass.AutoClip(percentile=25.0), []
    for norm in norms_of_a_run(60):
        direction = torch.randn(3, dtype=torch.float64)
        p.grad = direction * (norm / direction.norm())
        expected = p.grad.clone()
        history.append(p.grad.norm().item())
        expected *= policy.coefficient(history[-1])
        torch.nn.utils.clip_grad_norm_([p], np.percentile(history, 25.0))
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=0.0)


def test_autoclip_ignores_norms_of_zero():
    policy = onepass.AutoClip()
    norms = norms_of_a_run(50)
    found = [policy.coefficient(each) for norm in norms for each in (0.0, norm)]
    assert found[0::2] == [1.0] * 50
    assert found[1::2] == coefficients(onepass.AutoClip(), norms)


def test_autoclip_with_a_long_history(monkeypatch):
    """In blocks of a few values, that are cut and joined many times."""
    monkeypatch.setattr(sorted_values, "_BLOCK", 4)
    norms = norms_of_a_run(1000)
    for arguments in ({}, {"history": 1}, {"history": 10}, {"history": 300, "percentile": 75.0}):
        found = coefficients(onepass.AutoClip(**arguments), norms)
        np.testing.assert_allclose(found, coefficients(PlainAutoClip(**arguments), norms), rtol=1e-12)


def test_autoclip_keeps_no_more_than_twice_its_history():
    policy = onepass.AutoClip(history=10)
    for norm in norms_of_a_run(1000):
        policy.coefficient(norm)
        assert len(policy._norms) <= 21
        assert len(policy._sorted) <= 10


@given(st.data())
def test_sorted_values(data):
    small = data.draw(st.sampled_from([1, 2, 3, 8]))
    before, sorted_values._BLOCK = sorted_values._BLOCK, small
    try:
        held = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.5]), max_size=20))
        ours = SortedValues(held)
        for add in data.draw(st.lists(st.booleans(), max_size=60)):
            if add or not held:
                held.append(data.draw(st.floats(0.0, 10.0)))
                ours.add(held[-1])
            else:
                ours.remove(held.pop(data.draw(st.integers(0, len(held) - 1))))
            assert [x for block in ours._blocks for x in block] == sorted(held)
            assert ours._largest == [block[-1] for block in ours._blocks]
            assert max(map(len, ours._blocks), default=0) <= 2 * small
            assert len(ours) == len(held)
            assert len(ours._blocks) <= 2 * len(held) / small + 1
            if held:
                percent = data.draw(st.floats(0.0, 100.0))
                np.testing.assert_allclose(
                    ours.percentile(percent), np.percentile(held, percent), rtol=1e-9, atol=1e-12
                )
    finally:
        sorted_values._BLOCK = before


# -- SkipSpikes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "first"), [(2, 2), (5, 2), (8, 3), (20, 9), (43, 20), (128, 63)])
def test_skip_spikes_begins_after_so_many_norms(window, first):
    """OLMo-core's condition: the list with this step's norm has window // 2 entries."""
    usual = [1.0, 1.1] * 100
    for before in range(200):
        policy = onepass.SkipSpikes(window=window)
        coefficients(policy, usual[:before])
        assert policy.coefficient(100.0) == (0.0 if before >= first else 1.0)


def test_skip_spikes_of_equal_norms():
    for norm in (0.0, 0.1, 1.0, 1e-300, 1e300):
        policy = onepass.SkipSpikes(sigma=0.1, window=25)
        assert coefficients(policy, [norm] * 100) == [1.0] * 100
        assert policy.coefficient(1.5 * norm + 1e-9) == 0.0


def test_skip_spikes_ends_skipping_after_a_lasting_rise():
    found = coefficients(onepass.SkipSpikes(), [*[1.0] * 128, *[10.0] * 100])
    assert found[128:] == [0.0] * 4 + [1.0] * 96  # the norms of skipped steps enter the history


def test_skip_spikes_does_not_skip_small_norms():
    policy = onepass.SkipSpikes()
    coefficients(policy, [1.0, 1.01] * 64)
    assert policy.coefficient(1e-3) == 1.0


def test_skip_spikes_with_norms_whose_sum_overflows():
    policy = onepass.SkipSpikes()
    assert coefficients(policy, [1.5e308, 1.6e308] * 64) == [1.0] * 128
    assert policy.coefficient(1.7e308) == 1.0


# -- sequences -------------------------------------------------------------------------------------------------------

ANY_NORM = st.one_of(
    st.floats(0.0, 10.0),
    st.floats(0.0),
    st.sampled_from([0.0, 1.0, 5e-324, 1e-6, 1.7e308, *INVALID]),
)
POLICIES = st.one_of(
    st.builds(
        onepass.ZClip,
        alpha=st.floats(0.0, 0.999),
        z_thresh=st.floats(0.01, 10.0),
        warmup_steps=st.integers(1, 10),
        mode=st.sampled_from(["reciprocal", "mean", "max"]),
        max_norm=st.none() | st.floats(1e-3, 1e3),
        eps=st.sampled_from([0.0, 1e-6, 1.0]),
    ),
    st.builds(onepass.AutoClip, percentile=st.floats(0.0, 100.0), history=st.none() | st.integers(1, 10)),
    st.builds(
        onepass.SkipSpikes,
        sigma=st.floats(0.01, 10.0),
        window=st.integers(2, 30),
        max_norm=st.none() | st.floats(1e-3, 1e3),
    ),
)


@given(POLICIES, st.lists(ANY_NORM, max_size=60), st.integers(0, 60))
@settings(max_examples=300)
def test_any_sequence(policy, norms, at):
    """Coefficients are in [0, 1], only SkipSpikes gives 0, invalid norms change nothing, and a resumed run is equal."""
    valid = copy.deepcopy(policy)
    again = copy.deepcopy(policy)
    for i, norm in enumerate(norms):
        if i == at:
            again.load_state_dict(json.loads(json.dumps(policy.state_dict(), allow_nan=False)))
        coefficient = policy.coefficient(norm)
        assert type(coefficient) is float
        assert 0.0 <= coefficient <= 1.0
        if isinstance(policy, onepass.SkipSpikes):
            assert coefficient != 0.0 or len(policy.state_dict()["norms"]) >= 2
        else:
            assert coefficient > 0.0
        if i >= at:
            assert again.coefficient(norm) == coefficient
        if math.isfinite(norm):
            assert valid.coefficient(norm) == coefficient
        else:
            assert coefficient == 1.0
    assert valid.state_dict() == policy.state_dict()


@given(st.sampled_from(CASES), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=150))
@settings(max_examples=200)
def test_any_sequence_by_the_formula(case, norms):
    ours, plain, arguments = case
    policy, reference = ours(**arguments), plain(**arguments)
    for norm in norms:
        expected = reference.coefficient(norm)
        found = policy.coefficient(norm)
        if abs(found - expected) > 1e-9:
            assert near_a_threshold(reference, norm), (found, expected)
            return


def near_a_threshold(reference, norm):
    """Whether rounding decides if a norm is a spike: the two may then go different ways."""
    if isinstance(reference, PlainSkipSpikes):
        before = np.array(reference.norms[:-1])
        return abs(norm - before.mean() - reference.sigma * before.std(ddof=1)) < 1e-9 * norm
    return isinstance(reference, PlainZClip) and reference.var < 1e-18 * reference.mean**2


def test_a_class_is_not_a_policy():
    with pytest.raises(
        TypeError, match=r"^SGD: max_norm must be a number or a policy, got the class ZClip: pass ZClip\(\)$"
    ):
        onepass.SGD([torch.nn.Parameter(torch.ones(2))], max_norm=onepass.ZClip)
