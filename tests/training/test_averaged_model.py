"""Averages of a model's parameters: torch's, where they are used as torch's, and those that an optimizer moves."""

import contextlib
import copy
import gc
import io
import pickle
import weakref

import numpy as np
import onepass
import pytest
import torch
from contract import assert_close, assert_same, through_a_file
from hypothesis import given, settings
from hypothesis import strategies as st
from onepass.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn
from onepass.training.restoring import restored
from reference import bits
from torch import nn
from torch.nn import Module, Parameter
from torch.nn.utils import prune

pytestmark = pytest.mark.usefixtures("one_thread")

Torchs = torch.optim.swa_utils.AveragedModel

# Torch's functions compute in the dtype of the average; relative error of a few operations.
ROUNDING = {torch.float64: 1e-15, torch.float32: 3e-7, torch.bfloat16: 3e-2, torch.float16: 4e-3}


class Net(Module):
    """Parameters of several shapes and dtypes, a shared one, an empty one, one of integers; buffers of all kinds."""

    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape, dtype=dtype):
            return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

        self.first = nn.Linear(3, 5, dtype=dtype)
        self.norm = nn.BatchNorm1d(5, dtype=dtype)
        self.last = nn.Linear(5, 3, bias=False, dtype=dtype)
        self.tied = nn.Linear(3, 5, dtype=dtype)
        self.tied.weight = self.first.weight
        self.scalar = Parameter(normal())
        self.empty = Parameter(normal(0, 4))
        self.strided = Parameter(normal(4, 3).t())
        self.frozen = Parameter(normal(2), requires_grad=False)
        self.wide = Parameter(normal(3, dtype=torch.float64))
        self.narrow = Parameter(normal(3, dtype=torch.float16))
        self.phase = Parameter(torch.randn(2, dtype=torch.complex64, generator=generator))
        self.index = Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("scale", normal(2))
        self.register_buffer("cache", normal(2), persistent=False)
        self.register_buffer("count", torch.arange(2))
        self.register_buffer("absent", None)
        self.mask = torch.ones(2)  # no buffer
        with torch.no_grad():
            for p in (self.first.weight, self.first.bias, self.last.weight, self.tied.bias):
                p.copy_(normal(*p.shape))

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def change(model, t):
    """Changes all parameters and buffers, differently in each step t."""
    generator = torch.Generator().manual_seed(t)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            noise = torch.randn(tensor.shape, dtype=torch.float64, generator=generator) * 3
            tensor.copy_(tensor + noise.to(tensor.dtype))


def values(model):
    return copy.deepcopy([tensor.detach() for tensor in [*model.parameters(), *model.buffers()]])


def plain(dtype=torch.float32):
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)


def with_norm():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))


# -- as torch's ------------------------------------------------------------------------------------------------------

AS_TORCH = {
    "mean": ({}, {}),
    "decay": ({"decay": 0.9}, {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}),
    "decay 0.3": ({"decay": 0.3}, {"multi_avg_fn": get_ema_multi_avg_fn(0.3)}),
    "decay 1": ({"decay": 1}, {"multi_avg_fn": get_ema_multi_avg_fn(1.0)}),
    "decay 0": ({"decay": torch.tensor(0.0)}, {"multi_avg_fn": get_ema_multi_avg_fn(0.0)}),
    "avg_fn": ({"avg_fn": get_ema_avg_fn(0.8)},) * 2,
    "multi_avg_fn": ({"multi_avg_fn": get_swa_multi_avg_fn()},) * 2,
}


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("case", AS_TORCH)
def test_alone_it_is_torchs_to_the_bit(case, use_buffers):
    make = plain if case == "multi_avg_fn" else Net  # torch's function raises for integers
    model, (ours, theirs) = make(), AS_TORCH[case]
    average, expected = (
        AveragedModel(model, use_buffers=use_buffers, **ours),
        Torchs(model, use_buffers=use_buffers, **theirs),
    )
    assert_same(average.state_dict(), expected.state_dict())
    for t in range(5):
        change(model, t)
        for each in (average, expected):
            each.update_parameters(model)
        assert_same(values(average), values(expected))
        assert list(average.state_dict()) == list(expected.state_dict())
    assert average.n_averaged.item() == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"decay": 0.9}, {"decay": 0.9, "warmup": True, "warmup_gamma": 3}], ids=str)
def test_against_float64(dtype, kwargs):
    model = plain(dtype)
    average = AveragedModel(model, **kwargs)
    expected = [p.detach().double().numpy() for p in model.parameters()]
    largest = [abs(e) for e in expected]
    for n in range(6):
        change(model, n)
        average.update_parameters(model)
        for i, p in enumerate(model.parameters()):
            w = 1 / (n + 1)
            if kwargs:
                w = 1 - min(0.9, 1 - (1 + n / 3) ** (-2 / 3) if "warmup" in kwargs else (0.9 if n else 0.0))
            p = p.detach().double().numpy()
            expected[i] = expected[i] + w * (p - expected[i])
            largest[i] = np.maximum(largest[i], abs(p))
        for got, e, most in zip(average.parameters(), expected, largest, strict=True):
            assert (abs(got.detach().double().numpy() - e) <= 8 * ROUNDING[dtype] * most).all()


@pytest.mark.parametrize("kwargs", [{}, {"decay": 0.99}], ids=str)
@pytest.mark.parametrize("use_buffers", [False, True])
def test_float32_averages_of_a_bfloat16_model(kwargs, use_buffers):
    """They are those of a float32 model with the same values."""
    model = with_norm().bfloat16()
    exact = copy.deepcopy(model).float()
    average = AveragedModel(model, use_buffers=use_buffers, **kwargs).float()
    theirs = {"multi_avg_fn": get_ema_multi_avg_fn(0.99)} if kwargs else {}
    expected = Torchs(exact, use_buffers=use_buffers, **theirs)
    for t in range(6):
        change(model, t)
        with torch.no_grad():
            for to, value in zip(values_of(exact), values_of(model), strict=True):
                to.copy_(value)
        average.update_parameters(model)
        expected.update_parameters(exact)
    assert {p.dtype for p in average.parameters()} == {torch.float32}
    assert_close(values(average), values(expected), rtol=1e-6, atol=1e-7)
    if kwargs:
        assert_same(values(average), values(expected))


def values_of(model):
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("kwargs", [{}, {"decay": 0.75}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "of_model"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_averages_of_another_dtype_are_rounded_once(dtype, of_model, kwargs):
    model = plain(of_model)
    average = AveragedModel(model, **kwargs).to(dtype)
    model = model.to(of_model)
    average.update_parameters(model)
    for n in range(1, 4):
        before = [p.detach().clone() for p in average.parameters()]
        change(model, n)
        average.update_parameters(model)
        w = 0.25 if kwargs else 1 / (n + 1)
        for p, a, new in zip(model.parameters(), before, average.parameters(), strict=True):
            both = torch.promote_types(dtype, of_model)
            exact = a.double() + w * (p.detach().double() - a.double())
            tolerance = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(both).eps
            most = torch.maximum(a.double().abs(), p.detach().double().abs())
            assert ((new.detach().double() - exact).abs() <= tolerance * most).all()


def test_a_parametrized_model():
    model = plain()
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.parametrizations.spectral_norm(model[2])
    average = AveragedModel(model, decay=0.9)
    expected = Torchs(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for t in range(3):
        change(model, t)
        average.update_parameters(model)
        expected.update_parameters(model)
    assert_same(average.state_dict(), expected.state_dict())
    x, before = torch.ones(2, 4), values(model)
    outputs = average.eval()(x)
    with average.swapped(model.eval()):
        assert_same(model(x), outputs)
    assert_same(values(model), before)


def test_batch_normalization():
    """update_bn is torch's."""
    model, data = with_norm(), [torch.randn(8, 4) for _ in range(3)]
    average, expected = AveragedModel(model, decay=0.9), Torchs(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for t in range(3):
        change(model, t)
        average.update_parameters(model)
        expected.update_parameters(model)
    for each in (average, expected):
        update_bn(data, each)
    assert_same(average.state_dict(), expected.state_dict())
    with average.swapped(model):
        assert_same(model[1].running_var, average.module[1].running_var)


class Nested(Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"inner": nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))})
        self.head = nn.Linear(2, 2)


CHANGES = {
    "replaced": lambda model: setattr(model, "head", nn.Linear(2, 2)),
    "replaced in its place": lambda model: (delattr(model, "head"), setattr(model, "head", nn.Linear(2, 2))),
    "replaced below": lambda model: model.body["inner"].__setitem__(1, nn.Linear(6, 2)),
    "removed": lambda model: delattr(model, "head"),
    "removed below": lambda model: model.body["inner"].__delitem__(1),
    "added": lambda model: model.body.add_module("other", nn.Linear(2, 2)),
    "parameter": lambda model: setattr(model.head, "weight", Parameter(torch.ones(2, 2))),
    "no parameter": lambda model: setattr(model.head, "bias", None),
    "dict": lambda model: setattr(model.body, "_modules", {"inner": nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))}),
    "tied": lambda model: setattr(model.body["inner"][1], "bias", model.head.bias),
}


@pytest.mark.parametrize("both", [False, True], ids=["model", "average, too"])
@pytest.mark.parametrize("changed", CHANGES)
def test_a_model_that_changes_is_averaged_as_by_torch(changed, both):
    if changed.startswith("removed below") or changed in ("tied", "no parameter"):
        both = True  # torch's class pairs parameters by order, whatever their shapes
    torch.manual_seed(3)
    model = Nested()
    averages = [AveragedModel(model, decay=0.9), Torchs(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))]

    def train():
        for t in range(2):
            change(model, t)
            for average in averages:
                average.update_parameters(model)
        assert_same(averages[0].state_dict(), averages[1].state_dict())

    train()
    for each in [model, *(average.module for average in averages if both)]:
        torch.manual_seed(4)
        CHANGES[changed](each)
    train()


def test_a_model_whose_parameters_are_assigned_or_pruned():
    for kwargs, theirs in (AS_TORCH["mean"], AS_TORCH["decay"]):
        model = plain()
        averages = [AveragedModel(model, **kwargs), Torchs(model, **theirs)]
        for average in averages:
            average.update_parameters(model)
        for each in (model, *averages):
            each.load_state_dict({name: p.clone() for name, p in each.state_dict().items()}, assign=True)
        for _ in range(2):
            for t in range(2):
                change(model, t)
                for average in averages:
                    average.update_parameters(model)
            assert_same(averages[0].state_dict(), averages[1].state_dict())
            for each in (model, *(average.module for average in averages)):
                prune.l1_unstructured(each[0], "weight", 0.5)


def test_a_scripted_model():
    class Scaled(Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("scale", torch.ones(2))

        def forward(self, x):
            return self.linear(x) * self.scale

    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit"):  # the second from torch 2.14 on
        model = torch.jit.script(Scaled())
    average, expected = AveragedModel(model, decay=0.5), Torchs(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for t in range(3):
        change(model, t)
        average.update_parameters(model)
        expected.update_parameters(model)
    assert_same(values(average), values(expected))
    assert len(average._averages_of(model.parameters())) == 2


def test_a_model_that_overrides_parameters():
    """Only what it yields is averaged."""

    class Part(nn.Sequential):
        def named_parameters(self, *args, **kwargs):
            found = super().named_parameters(*args, **kwargs)
            return ((name, p) for name, p in found if "weight" in name)

    torch.manual_seed(3)
    model = Part(nn.Linear(3, 4), nn.Linear(4, 2))
    average = AveragedModel(model, decay=0.5)
    bias = average.module[1].bias.detach().clone()
    for t in range(2):
        before = average.module[1].weight.detach().clone()
        change(model, t)
        model[1].bias.data.add_(1)
        average.update_parameters(model)
    assert not torch.equal(model[1].bias, bias)
    assert_same(average.module[1].weight.detach(), before.lerp(model[1].weight.detach(), 0.5))
    assert_same(average.module[1].bias.detach(), bias)
    assert average._averages_of([model[1].weight])[id(model[1].weight)] is average.module[1].weight


def test_a_model_with_another_number_of_buffers_is_refused_as_by_torch():
    average, model = AveragedModel(plain(), decay=0.9), with_norm()
    with pytest.raises(ValueError, match="zip"):
        average.update_parameters(model)
    assert average.n_averaged == 0


# -- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"decay": -0.1}, ValueError, r"AveragedModel: decay must be in \[0, 1\], got -0.1"),
        ({"decay": 1.5}, ValueError, r"AveragedModel: decay must be in \[0, 1\], got 1.5"),
        ({"decay": float("nan")}, ValueError, r"AveragedModel: decay must be in \[0, 1\], got nan"),
        ({"decay": "0.9"}, TypeError, r"AveragedModel: decay must be a number, got the str '0.9'"),
        ({"decay": torch.ones(2)}, ValueError, r"AveragedModel: decay must be one number, got a tensor of shape \[2\]"),
        ({"decay": 0.9, "avg_fn": max}, ValueError, "pass either decay or avg_fn, got both"),
        ({"decay": 0.9, "multi_avg_fn": max}, ValueError, "pass either decay or multi_avg_fn, got both"),
        ({"warmup": True}, ValueError, "AveragedModel: warmup needs a decay, got None: pass decay="),
        ({"warmup": True, "avg_fn": max}, ValueError, "warmup needs a decay"),
        ({"decay": 0.9, "warmup_gamma": 0}, ValueError, "warmup_gamma must be > 0 and finite, got 0"),
        ({"decay": 0.9, "warmup_gamma": None}, TypeError, "warmup_gamma must be a number"),
        ({"decay": 0.9, "warmup_power": -1}, ValueError, "warmup_power must be > 0 and finite, got -1"),
        ({"decay": 0.9, "warmup_power": float("inf")}, ValueError, "warmup_power must be > 0 and finite, got inf"),
        ({"avg_fn": max, "multi_avg_fn": max}, AssertionError, "Only one of avg_fn and multi_avg_fn"),
    ],
    ids=str,
)
def test_invalid_arguments(kwargs, error, message):
    with pytest.raises(error, match=message):
        AveragedModel(plain(), **kwargs)


def test_torchs_arguments_may_be_positional_and_ours_may_not():
    average = AveragedModel(plain(), "cpu", None, get_ema_multi_avg_fn(0.9), True)
    assert average.use_buffers
    with pytest.raises(TypeError):
        AveragedModel(plain(), None, None, None, False, 0.9)


def test_warmup_with_its_defaults():
    """As timm's comment says: 0.999 after 31.6K steps, 0.9999 after 1M."""
    average = AveragedModel(plain(), decay=1.0, warmup=True)
    optimizer = Follower(average, plain().parameters())
    found = []
    for n in (1, 31_600, 1_000_000):
        average.n_averaged.fill_(n)
        found.append(1 - average._step_weight(optimizer))
    assert found == pytest.approx([1 - 2 ** (-2 / 3), 0.999, 0.9999], abs=1e-5)
    average.decay = 0.5
    assert average._step_weight(optimizer) == 0.5
    average.n_averaged.zero_()
    assert average._step_weight(optimizer) == 1.0


# -- moved by optimizers ---------------------------------------------------------------------------------------------


class Follower(torch.optim.SGD):
    """An optimizer whose steps move the averages of its parameters."""

    def __init__(self, average, params, lr=0.1):
        super().__init__(params, lr=lr)
        self.average = average
        average._attach(self)

    def step(self, skipped=False):
        if skipped:
            return
        params = [p for group in self.param_groups for p in group["params"]]
        weight, averages = self.average._step_weight(self), self.average._averages_of(params)
        super().step()
        with torch.no_grad():
            for p in params:
                if id(p) in averages:
                    averages[id(p)].lerp_(p.to(averages[id(p)].dtype), weight)
        self.average._note_step(self)


def give_gradients(model, t):
    generator = torch.Generator().manual_seed(t)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


KINDS = {"mean": {}, "decay": {"decay": 0.9}, "warmup": {"decay": 0.9, "warmup": True, "warmup_power": 0.75}}
each_kind = pytest.mark.parametrize("kwargs", KINDS.values(), ids=KINDS)


def pair_of_runs(kwargs, use_buffers=False):
    """A model with an average alone, and a twin of it whose average is still to be attached."""
    made = []
    for _ in range(2):
        model = with_norm()
        made += [model, AveragedModel(model, use_buffers=use_buffers, **kwargs)]
    return made


def assert_equal_averages(average, expected):
    assert average.n_averaged == expected.n_averaged
    assert_close(average.state_dict(), expected.state_dict(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("parts", [[(0, 6)], [(0, 2)], [(0, 2), (2, 6)], [(0, 2), (4, 6)]], ids=str)
@each_kind
def test_attached_it_is_as_alone(kwargs, parts, use_buffers):
    """Whichever of the parameters the optimizers have."""
    model, average, twin, followed = pair_of_runs(kwargs, use_buffers)
    optimizers = [
        [cls(list(m.parameters())[first:last]) for first, last in parts]
        for cls, m in ((lambda p: torch.optim.SGD(p, lr=0.1), model), (lambda p: Follower(followed, p), twin))
    ]
    for t in range(5):
        for m, opts, averaged in ((model, optimizers[0], average), (twin, optimizers[1], followed)):
            give_gradients(m, t)
            m(torch.randn(8, 4, generator=torch.Generator().manual_seed(t)))
            for opt in opts:
                opt.step()
            averaged.update_parameters(m)
        assert_equal_averages(followed, average)


@each_kind
def test_steps_alone_average_and_count(kwargs):
    """Without update_parameters."""
    model, average, twin, followed = pair_of_runs(kwargs)
    plain_one, follower = torch.optim.SGD(model.parameters(), lr=0.1), Follower(followed, twin.parameters())
    for t in range(5):
        for m, opt in ((model, plain_one), (twin, follower)):
            give_gradients(m, t)
            opt.step()
        average.update_parameters(model)
        assert followed.n_averaged == t + 1
        assert_close(list(followed.parameters()), list(average.parameters()), rtol=1e-6, atol=1e-6)


@each_kind
def test_two_optimizers_share_a_round(kwargs):
    model, average, twin, followed = pair_of_runs(kwargs)
    params = list(twin.parameters())
    first, second = Follower(followed, params[:2]), Follower(followed, params[2:])
    plain_one = torch.optim.SGD(model.parameters(), lr=0.1)
    for t in range(4):
        give_gradients(model, t)
        give_gradients(twin, t)
        weights = [followed._step_weight(each) for each in (first, second)]
        assert weights[0] == weights[1]
        plain_one.step()
        first.step()
        assert followed.n_averaged == t + 1
        assert followed._step_weight(second) == weights[1]
        second.step()
        assert followed.n_averaged == t + 1
        if t == 1:
            followed.update_parameters(twin)
        average.update_parameters(model)
        assert_close(list(followed.parameters()), list(average.parameters()), rtol=1e-6, atol=1e-6)


def test_an_optimizer_that_steps_twice_opens_the_next_round():
    model = plain()
    average = AveragedModel(model, decay=0.9)
    params = list(model.parameters())
    often, seldom = Follower(average, params[:2]), Follower(average, params[2:])
    give_gradients(model, 0)
    weights = []
    for each in (often, often, seldom, often, seldom):
        weights.append(average._step_weight(each))
        each.step()
    assert weights == [1.0, 1 - 0.9, 1 - 0.9, 1 - 0.9, 1 - 0.9]
    assert average.n_averaged == 3


def test_a_round_of_torchs_first_update_copies_what_is_left():
    model = plain()
    average = AveragedModel(model, decay=0.9)
    opt = Follower(average, list(model.parameters())[:2])
    change(model, 0)
    give_gradients(model, 0)
    opt.step()
    average.update_parameters(model)
    assert_same(values(average)[:4], values(model))


@each_kind
def test_a_skipped_step_changes_nothing(kwargs):
    model = with_norm()
    average = AveragedModel(model, **kwargs)
    opt = Follower(average, list(model.parameters())[:3])
    before = bits_of(average)
    average.update_parameters(model)  # before the first step
    assert bits_of(average) == before
    for t in range(3):
        give_gradients(model, t)
        opt.step()
        average.update_parameters(model)
        before = bits_of(average)
        model(torch.randn(8, 4))
        opt.step(skipped=True)
        average.update_parameters(model)
        average.update_parameters(model)
        assert bits_of(average) == before


def bits_of(module):
    return [bits(tensor.detach()) for tensor in module.state_dict().values()]


def test_functions_cannot_be_attached():
    for name, make in (("avg_fn", get_ema_avg_fn), ("multi_avg_fn", get_ema_multi_avg_fn)):
        average = AveragedModel(plain(), **{name: make(0.9)})
        with pytest.raises(ValueError, match=f"Follower cannot move averages that {name} computes: pass decay="):
            Follower(average, plain().parameters())


def test_attaching_twice_is_attaching_once():
    model = plain()
    average = AveragedModel(model)
    opt = Follower(average, model.parameters())
    average._attach(opt)
    Follower(average, model.parameters())
    gc.collect()
    average._attach(opt)
    assert [ref() for ref in average._optimizers] == [opt]


def test_the_optimizer_is_held_weakly():
    """Without it, the average is torch's again."""
    model = plain()
    average = AveragedModel(model, decay=0.9)
    opt = Follower(average, model.parameters())
    give_gradients(model, 0)
    opt.step()
    average.update_parameters(model)
    seen = weakref.ref(opt)
    del opt
    gc.collect()
    assert seen() is None
    change(model, 0)
    average.update_parameters(model)
    assert average.n_averaged == 2


def test_the_model_is_held_weakly():
    model = plain()
    average = AveragedModel(model, decay=0.9)
    average.update_parameters(model)
    seen = [weakref.ref(model), *map(weakref.ref, model.parameters())]
    del model
    gc.collect()
    assert [ref() for ref in seen] == [None] * 5


def test_an_optimizer_that_is_gone_in_a_round():
    """update_parameters does the rest of the round; a new optimizer of the same parameters opens another."""
    for update in (True, False):
        model = plain()
        average = AveragedModel(model)
        opt = Follower(average, list(model.parameters())[:2])
        give_gradients(model, 0)
        opt.step()
        moved = [p.detach().clone() for p in average.parameters()][:2]
        del opt
        gc.collect()
        if update:
            change(model, 0)
            average.update_parameters(model)
            assert average.n_averaged == 1
            assert_same([p.detach() for p in average.parameters()], moved + values(model)[2:])
        else:
            again = Follower(average, model.parameters())
            assert average._step_weight(again) == 0.5
            again.step()
            assert average.n_averaged == 2


def test_averages_of():
    model, other = Net(), plain()
    average = AveragedModel(model, decay=0.9)
    averages = dict(zip(map(id, model.parameters()), average.module.parameters(), strict=True))
    found = average._averages_of([*model.parameters(), *other.parameters()])
    assert found.keys() == averages.keys()
    assert all(found[key] is averages[key] for key in found)
    assert average._averages_of([]) == {}
    assert average._averages_of([Parameter(torch.ones(2))]) == {}
    average.float()
    assert found[id(model.narrow)].dtype == torch.float32
    average._bind(other)
    assert len(average._averages_of(other.parameters())) == 4
    assert average._averages_of(model.parameters()) == {}


def test_averages_that_have_been_replaced_are_found():
    model = plain()
    average = AveragedModel(model, decay=0.9)
    average.module[0].weight = Parameter(torch.zeros(6, 4))
    (found,) = average._averages_of([model[0].weight]).values()
    assert found is average.module[0].weight
    del average.module[0].bias
    assert average._averages_of([model[0].bias]) == {}


def test_parameters_that_the_model_has_replaced_are_found():
    """As by a load_state_dict(assign=True) or by sharding between the constructors of average and optimizer."""
    model = plain()
    average = AveragedModel(model, decay=0.9)
    model.load_state_dict({name: p.clone() for name, p in model.state_dict().items()}, assign=True)
    assert len(average._averages_of(model.parameters())) == 4
    model[0].weight = Parameter(torch.ones(6, 4))
    (found,) = average._averages_of([model[0].weight]).values()
    assert found is average.module[0].weight
    params = list(model.parameters())[:3]
    last = weakref.ref(model[2].bias)
    del model
    gc.collect()
    assert last() is None
    assert len(average._averages_of(params)) == 3
    assert average._averages_of([Parameter(torch.ones(2)) for _ in range(100)]) == {}


@each_kind
def test_an_average_without_a_model_is_moved_by_update_parameters(kwargs):
    """After unpickling, until the first update_parameters has named the model."""
    model, average, twin, followed = pair_of_runs(kwargs)
    followed = pickle.loads(pickle.dumps(followed))
    optimizers = torch.optim.SGD(model.parameters(), lr=0.1), Follower(followed, twin.parameters())
    for t in range(4):
        for m, opt, averaged in zip((model, twin), optimizers, (average, followed), strict=True):
            give_gradients(m, t)
            opt.step()
            assert averaged is average or followed._averages_of(twin.parameters()) == {} or t > 0
            averaged.update_parameters(m)
        assert_equal_averages(followed, average)


def test_steps_without_a_model_are_counted():
    model = plain()
    average = pickle.loads(pickle.dumps(AveragedModel(model, decay=0.9)))
    opt = Follower(average, model.parameters())
    give_gradients(model, 0)
    opt.step()
    opt.step()
    assert average.n_averaged == 2


def test_a_wrapper_may_be_passed():
    model = plain()
    average = AveragedModel(model)
    opt = Follower(average, model.parameters())
    give_gradients(model, 0)
    for _ in range(2):
        opt.step()
        average.update_parameters(nn.DataParallel(model))
        gc.collect()
    assert len(average._averages_of(model.parameters())) == 4
    assert average.n_averaged == 2


def test_an_uninitialized_model():
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    average = AveragedModel(model, decay=0.9)
    for each in (model, average):
        each(torch.ones(2, 4))
    average.update_parameters(model)
    assert_same(values(average)[:4], values(model))


@given(
    st.lists(st.sampled_from(["first", "second", "both", "skip", "update", "save", "load"]), max_size=12),
    st.sampled_from(list(KINDS.values())),
)
@settings(max_examples=60, deadline=None)
def test_any_order_of_calls(calls, kwargs):
    """Beside a plain account in float64: a round, its weight, and what has been moved in it."""
    params = [Parameter(torch.full((2,), float(i), dtype=torch.float64)) for i in range(3)]
    model = nn.ParameterList(params)
    average = AveragedModel(model, **kwargs)
    opts = {"first": Follower(average, params[:1]), "second": Follower(average, params[1:2])}
    for opt in opts.values():
        opt.param_groups[0]["lr"] = 0.0
    expected, n, moved = [p.detach().clone() for p in params], 0, None
    saved = None

    def move(i, weight):
        expected[i] = expected[i] + weight * (params[i].detach() - expected[i])

    def weight_of(n):
        if "decay" not in kwargs:
            return 1 / (n + 1)
        d = 0.9 if n else 0.0
        return 1 - (min(d, 1 - (1 + n) ** -0.75) if "warmup" in kwargs else d)

    for t, call in enumerate(calls):
        for p in params:
            p.grad = torch.zeros_like(p)
            p.data.add_(t + 1)
        for name in ("first", "second") if call == "both" else [call]:
            if name in opts:
                i = list(opts).index(name)
                if moved is None or i in moved:
                    n, moved = n + 1, set()
                moved.add(i)
                opts[name].step()
                move(i, weight_of(n - 1))
        if call == "update":
            average.update_parameters(model)
            for i in range(3):
                if moved is not None and i not in moved:
                    move(i, weight_of(n - 1))
            moved = None
        if call == "save":
            saved = copy.deepcopy(average.state_dict()), list(expected), n
        if call == "load" and saved is not None and saved[2] != n:
            average.load_state_dict(saved[0])
            expected, n, moved = list(saved[1]), saved[2], None
        assert average.n_averaged == n
        assert_close([p.detach() for p in average.parameters()], expected)


# -- checkpoints -----------------------------------------------------------------------------------------------------


def test_state_dicts_are_torchs():
    model = Net()
    average, theirs = AveragedModel(model, decay=0.9), Torchs(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for t in range(3):
        change(model, t)
        average.update_parameters(model)
        theirs.update_parameters(model)
    for one, other in ((average, theirs), (theirs, average)):
        fresh = type(other)(Net(seed=1), **({"decay": 0.9} if other is average else {}))
        fresh.load_state_dict(through_a_file(one.state_dict()))
        assert_same(fresh.state_dict(), one.state_dict())
    assert average._step_weight(None or Follower(average, model.parameters())) == 1 - 0.9


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("after_update", [False, True])
@each_kind
def test_a_resumed_run_is_the_whole_one_to_the_bit(kwargs, at, after_update):
    def run(model, average, opt, steps, save_at=None):
        for t in steps:
            give_gradients(model, t)
            opt.step()
            if t == save_at and not after_update:
                saved = copy.deepcopy((model.state_dict(), average.state_dict(), opt.state_dict()))
            average.update_parameters(model)
            if t == save_at and after_update:
                saved = copy.deepcopy((model.state_dict(), average.state_dict(), opt.state_dict()))
        return saved if save_at is not None else None

    def make():
        model = with_norm()
        average = AveragedModel(model, **kwargs)
        return model, average, Follower(average, model.parameters())

    whole = make()
    saved = run(*whole, range(5), save_at=at)
    parts = make()
    for part, state_dict in zip(parts, saved, strict=True):
        part.load_state_dict(through_a_file(state_dict))
    run(*parts, range(at + 1, 5))
    assert bits_of(parts[1]) == bits_of(whole[1])


@each_kind
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda average: pickle.loads(pickle.dumps(average))])
def test_copies_and_pickles(copied, kwargs):
    """They have averages and arguments, but neither a model nor an optimizer."""
    model = with_norm()
    average = AveragedModel(model, use_buffers=True, **kwargs)
    opt = Follower(average, model.parameters())
    give_gradients(model, 0)
    opt.step()
    again = copied(average)
    assert type(again) is AveragedModel
    assert_same(again.state_dict(), average.state_dict())
    assert (again.decay, again.warmup, again.use_buffers) == (average.decay, average.warmup, True)
    assert again._averages_of(model.parameters()) == {}
    average.update_parameters(model)
    for each in (average, again):
        other = Follower(each, model.parameters())
        assert each._step_weight(other) == average._step_weight(opt)
        each._bind(model)
        assert len(each._averages_of(model.parameters())) == 6
    assert again._averages_of([model[0].weight])[id(model[0].weight)] is again.module[0].weight
    averages = copied(again)
    change(model, 0)
    averages.update_parameters(model)
    assert averages.n_averaged == 2


def test_a_pickle_is_small_and_has_the_public_path():
    model = plain()
    average = AveragedModel(model, decay=0.9)
    opt = Follower(average, model.parameters())
    pickled = pickle.dumps(average)
    assert b"onepass.swa_utils" in pickled
    assert b"averaged_model" not in pickled
    assert AveragedModel.__module__ == "onepass.swa_utils"
    file, torchs = io.BytesIO(), io.BytesIO()
    torch.save(average, file)
    torch.save(Torchs(model), torchs)
    assert len(file.getvalue()) < len(torchs.getvalue()) + 500
    del opt


def test_only_the_averages_are_its_parameters():
    model = plain()
    average = AveragedModel(model, decay=0.9)
    opt = Follower(average, model.parameters())
    assert [*dict(average.named_children())] == ["module"]
    assert not {id(p) for p in average.parameters()} & {id(p) for p in model.parameters()}
    assert [*dict(average.named_buffers())] == ["n_averaged"]
    del opt


def test_an_average_within_another_module():
    """Its parent loads and moves it."""
    model = plain()
    parent = nn.ModuleDict({"model": model, "average": AveragedModel(model, decay=0.9)})
    opt = Follower(parent["average"], model.parameters())
    give_gradients(model, 0)
    opt.step()
    saved = copy.deepcopy(parent.state_dict())
    for _ in range(3):
        opt.step()
    parent.load_state_dict(saved)
    parent.double()
    assert parent["average"].n_averaged == 1
    give_gradients(model, 1)
    opt.step()
    parent["average"].update_parameters(model)
    assert parent["average"].n_averaged == 2
    assert parent["average"].module[0].weight.dtype == torch.float64


def test_a_learning_rate_range_test_restores_the_averages():
    """The optimizer refers to them."""
    model = with_norm()
    average = AveragedModel(model, decay=0.9)
    opt = Follower(average, model.parameters())
    for t in range(2):
        give_gradients(model, t)
        opt.step()
    before, weight = bits_of(average), average._step_weight(opt)
    with restored(model, opt):
        for t in range(4):
            give_gradients(model, t)
            opt.step()
            average.update_parameters(model)
        assert bits_of(average) != before
    assert bits_of(average) == before
    assert average._step_weight(opt) == weight
    assert average._open_round() is not None
    average.update_parameters(model)
    assert average.n_averaged == 2
    give_gradients(model, 7)
    opt.step()
    assert average.n_averaged == 3


def test_lr_find_restores_the_averages():
    model = plain()
    average = AveragedModel(model, decay=0.9)

    class WithClosure(Follower):
        def step(self, closure=None):
            with torch.enable_grad():
                loss = closure()
            super().step()
            return loss

    opt = WithClosure(average, model.parameters())
    before = bits_of(average)
    batches = [(torch.randn(8, 4), torch.randn(8, 2))]
    onepass.lr_find(model, opt, nn.functional.mse_loss, batches, steps=5, progress=False)
    assert bits_of(average) == before
    assert average.n_averaged == 0


# -- swapped ---------------------------------------------------------------------------------------------------------


def averaged_net(dtype=None, make=Net):
    model = make()
    average = AveragedModel(model, decay=0.5)
    for t in range(3):
        change(model, t)
        average.update_parameters(model)
    change(model, 3)
    convert = {None: lambda: average, torch.float64: average.double, torch.bfloat16: average.bfloat16}
    return model, convert[dtype]()


def addresses(model):
    return [(id(tensor), tensor.data_ptr(), tensor.dtype, tensor.requires_grad) for tensor in values_of(model)]


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("raising", [False, True])
def test_swapped_gives_the_averages_and_puts_everything_back(dtype, raising):
    model, average = averaged_net(dtype)
    with torch.no_grad():  # NaNs with a payload, and a negative zero
        model.first.weight.view(torch.int32)[0, 0] = 0x7FC12345
        model.first.weight[0, 1] = -0.0
        model.wide[0] = float("inf")
    before, where = bits_of(model), addresses(model)
    expected = [a.detach().to(t.dtype) for a, t in zip(values_of(average.module), values_of(model), strict=True)]
    averages = bits_of(average)
    with contextlib.suppress(Interrupted), average.swapped(model):
        assert addresses(model) == where
        assert_same(values(model), expected)
        change(model, 9)  # as an evaluation in train mode changes buffers
        if raising:
            raise Interrupted
    assert bits_of(model) == before
    assert addresses(model) == where
    assert bits_of(average) == averages
    with average.swapped(model):  # again
        assert_same(values(model), expected)


def test_what_is_replaced_within_swapped_is_put_back():
    model, average = averaged_net(make=with_norm)
    before, where = bits_of(model), addresses(model)
    with average.swapped(model):
        model.half()
        model[1].running_mean = torch.zeros(6)
    assert bits_of(model) == before
    assert addresses(model) == where


def test_swapped_is_not_nested():
    model, average = averaged_net()
    before = bits_of(model)
    opt = Follower(average, model.parameters())
    with average.swapped(model):
        for call in (
            lambda: average.swapped(model).__enter__(),
            lambda: average.update_parameters(model),
            lambda: average._step_weight(opt),
        ):
            with pytest.raises(RuntimeError, match=r"was called within swapped\(\)"):
                call()
        other = AveragedModel(model)
        with other.swapped(model):
            pass
    assert bits_of(model) == before


def ending(last):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), last)


def differing():
    renamed = nn.Sequential()
    renamed.add_module("0", nn.Linear(4, 6))
    renamed.add_module("9", nn.Linear(6, 2))
    return {
        "shape": (
            nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)),
            r"2.weight must have the shape .*\[2, 6\]",
        ),
        "missing": (
            nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2, bias=False)),
            "Sequential with no 2.bias",
        ),
        "more": (nn.Sequential(*plain(), nn.Linear(2, 2)), "3.weight, which the average does not have"),
        "buffer": (with_norm(), "1.weight, which the average does not have"),
        "renamed": (renamed, "with no 2.weight"),
    }


@pytest.mark.parametrize("case", differing())
def test_swapped_refuses_another_structure(case):
    model, message = differing()[case]
    average = AveragedModel(plain(), decay=0.9)
    before = bits_of(model)
    with pytest.raises(ValueError, match=message), average.swapped(model):
        pass
    assert bits_of(model) == before
    with average.swapped(plain()):  # not entered by the failure
        pass


def test_swapped_refuses_parameters_that_are_no_longer_shared():
    model = Net()
    average = AveragedModel(model)
    model.tied.weight = Parameter(model.first.weight.detach().clone())
    with pytest.raises(ValueError, match=r"tied.weight, which the average does not have"), average.swapped(model):
        pass


def test_swapped_takes_wrappers():
    model, average = averaged_net(make=with_norm)

    class Compiled(Module):
        def __init__(self, module):
            super().__init__()
            self._orig_mod = module

    expected = bits_of(average.module)
    for wrapped in (nn.DataParallel(model), Compiled(model), Compiled(nn.DataParallel(model))):
        with average.swapped(wrapped):
            assert bits_of(model) == expected
    of_wrapped = AveragedModel(nn.DataParallel(model))
    for to in (model, nn.DataParallel(model), Compiled(model)):
        with of_wrapped.swapped(to):
            pass


def test_swapped_with_a_buffer_that_repeats_itself():
    model = plain()
    model.register_buffer("ones", torch.ones(1, 3).expand(4, 3))
    average = AveragedModel(model, decay=0.9)
    average.module.ones = torch.full((4, 3), 2.0)
    with average.swapped(model):
        assert_same(model.ones, torch.full((4, 3), 2.0))
    assert_same(model.ones, torch.ones(4, 3))
    assert model.ones.stride() == (0, 1)


def test_swapped_with_a_sparse_buffer():
    model = plain()
    model.register_buffer("graph", torch.eye(3).to_sparse())
    average = AveragedModel(model, decay=0.9)
    average.module.graph.mul_(2)
    with average.swapped(model):
        assert_same(model.graph.to_dense(), 2 * torch.eye(3))
    assert_same(model.graph.to_dense(), torch.eye(3))
