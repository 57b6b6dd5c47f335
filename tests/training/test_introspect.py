"""explain() and stats(): they tell the truth, and change nothing."""

import re
from dataclasses import astuple

import onepass
import pytest
import torch
from cases import each_own_case, each_row
from contract import assert_close, assert_same, give_gradients, leaves, numbers, snapshot, torch_path, train
from reference import params_of
from torch.nn import Parameter


class Subclass(torch.Tensor):
    """A tensor subclass like many: it changes nothing."""


def dense(x):
    p = Parameter(x)
    p.grad = torch.ones_like(x)
    return [p]


def plain(*shape):
    """No leaf that requires grad: autograd lets a differentiable step write to it."""
    x = numbers(*shape)
    x.grad = torch.ones_like(x)
    return [x]


def with_gradient(x, grad):
    p = Parameter(x)
    p.grad = grad
    return [p]


def shared():
    base = numbers(6)
    return dense(base[:4]) + dense(base[2:])


def sparse():
    return with_gradient(numbers(4, 2), torch.eye(4, 2, dtype=torch.float64).to_sparse())


def overlapping():
    x = numbers(3, 3)
    return with_gradient(x, x.t())


# Parameters, arguments of the class, and the path of each parameter and its reason, for SGD, which takes all of them.
PATHS = {
    "plain": (lambda: dense(numbers(3, 2)), {}, ("kernel", "")),
    "without a gradient": (lambda: [Parameter(numbers(3))], {}, ("kernel", "no gradient now")),
    "complex": (lambda: dense(numbers(3, dtype=torch.complex64)), {}, ("kernel", "")),
    "a lazy gradient": (lambda: with_gradient(numbers(3), torch._neg_view(numbers(3))), {}, ("kernel", "")),
    "sparse": (sparse, {}, ("torch", "sparse gradient")),
    "differentiable": (lambda: plain(3), {"differentiable": True}, ("torch", "differentiable=True")),
    "a subclass": (
        lambda: dense(numbers(3).as_subclass(Subclass)),
        {},
        ("torch", "tensor subclass Subclass"),
    ),
    "a subclass without a gradient": (
        lambda: [Parameter(numbers(3).as_subclass(Subclass))],
        {},
        ("torch", "tensor subclass Subclass; no gradient now"),
    ),
    "a gradient of a subclass": (
        lambda: with_gradient(numbers(3), numbers(3).as_subclass(Subclass)),
        {},
        ("torch", "tensor subclass Subclass"),
    ),
    "shared memory": (shared, {}, ("torch", "memory shared with another parameter")),
    "interleaved strides": (
        lambda: dense(numbers(20).as_strided((3, 4), (2, 1))),
        {},
        ("torch", "parameter with interleaved strides"),
    ),
    "negated": (lambda: dense(torch._neg_view(numbers(3))), {}, ("torch", "negated or conjugated parameter")),
    "overlapping its gradient": (overlapping, {}, ("torch", "gradient that overlaps its parameter or states")),
}


@pytest.mark.parametrize("warm", [False, True], ids=["before the first step", "after a step"])
@pytest.mark.parametrize(("make", "options", "told"), [pytest.param(*path, id=name) for name, path in PATHS.items()])
def test_what_explain_tells_is_what_a_step_does(make, options, told, warm):
    params = make()
    opt = onepass.SGD([{"params": plain(2)}, {"params": params}], lr=0.1, momentum=0.9, **options)
    if warm:
        opt.step()
    rows = onepass.explain(opt)
    path, reason = told
    for index, p in enumerate(params):
        assert astuple(rows[1 + index])[:7] == (1, index, None, tuple(p.shape), str(p.dtype)[6:], path, reason)
    assert astuple(rows[0])[5:7] == (("torch", "differentiable=True") if options else ("kernel", ""))
    assert len(rows) == 1 + len(params)

    before = onepass.stats()
    opt.step()
    after = onepass.stats()
    stepped = sum(p.grad is not None for p in params)
    by_kernel = (0 if options else 1) + (stepped if path == "kernel" else 0)
    by_torch = {reason: stepped + (1 if options else 0)} if path == "torch" and stepped else {}
    assert sum(after["kernel"].values()) - sum(before["kernel"].values()) == by_kernel
    more = {why: count - before["torch"].get(why, 0) for why, count in after["torch"].items()}
    assert {why: count for why, count in more.items() if count} == by_torch


@pytest.mark.parametrize("name", PATHS)
def test_explaining_changes_nothing(name):
    make, options, _ = PATHS[name]
    opt, unasked = (onepass.SGD(make(), lr=0.1, momentum=0.9, **options) for _ in range(2))
    for each in (opt, unasked):
        for _ in range(3):
            if each is opt:
                before = [p._version for p in params_of(opt)], len(opt.state), onepass.stats()
                for _ in range(2):
                    onepass.explain(opt)
                assert ([p._version for p in params_of(opt)], len(opt.state), onepass.stats()) == before
            each.step()
    ends = [[p.detach().as_subclass(torch.Tensor) for p in params_of(each)] for each in (opt, unasked)]
    assert_same(*ends)


@each_row
def test_explaining_before_and_between_steps_leaves_no_state(row):
    opt, unasked = (row.ours(leaves(), **row.full) for _ in range(2))
    for t in range(3):
        give_gradients(params_of(opt), t)
        before = snapshot(opt)
        assert [row.path for row in onepass.explain(opt)] == ["kernel"] * 5
        assert_same(snapshot(opt), before)
        opt.step()
    train(unasked, 3)
    assert_same(snapshot(opt), snapshot(unasked))


@pytest.mark.usefixtures("in_float64")
@each_row
def test_subclasses_are_stepped_as_torch_does(row):
    """And come out as they went in."""
    ours, stock = (
        cls([Parameter(numbers(3).as_subclass(Subclass)), *leaves([(2,)])], **row.full)
        for cls in (row.ours, row.theirs)
    )
    for opt in (ours, stock):
        train(opt, 3)
        assert type(params_of(opt)[0]) is Subclass
    torch.testing.assert_close(
        *([p.detach().as_subclass(torch.Tensor) for p in params_of(opt)] for opt in (ours, stock)),
        rtol=1e-12,
        atol=1e-14,
    )


@pytest.mark.usefixtures("in_float64")
@each_own_case
def test_what_torch_has_not_holds_on_its_path_as_well(row, kwargs):
    ends = []
    for kind in (torch.Tensor, Subclass):
        opt = row.ours([Parameter(numbers(3).as_subclass(kind))], **kwargs)
        before = onepass.stats()
        train(opt, 3)
        assert torch_path(before) == (set() if kind is torch.Tensor else {"tensor subclass Subclass"})
        ends.append(params_of(opt)[0].detach().as_subclass(torch.Tensor))
    assert_close(*ends)


def test_errors_are_told_not_raised():
    opt = onepass.Adam([("good", numbers(2)), ("flat", numbers(3).expand(2, 3))])
    give_gradients(params_of(opt), 0)
    rows = onepass.explain(opt)
    assert [row.path for row in rows] == ["kernel", "error"]
    text = "Adam: parameter 1 of group 0 'flat' (shape [2, 3], torch.float64): several of its elements share the same"
    assert rows[1].reason.startswith(text)
    with pytest.raises(ValueError, match="several of its elements share the same memory") as error:
        opt.step()
    assert str(error.value) == rows[1].reason


def test_names_that_no_longer_fit_their_parameters():
    """As after a parameter was put into the list by hand: who has no name is told of without one."""
    opt = onepass.Adam([("a", Parameter(numbers(2)))])
    opt.param_groups[0]["params"].append(Parameter(numbers(3)))
    train(opt)
    assert [(row.name, row.path) for row in onepass.explain(opt)] == [("a", "kernel"), (None, "kernel")]
    params_of(opt)[1].grad.data = numbers(4)
    text = "Adam: parameter 1 of group 0 (shape [3], torch.float64): its gradient has shape [4]"
    with pytest.raises(ValueError, match="^" + re.escape(text)):
        opt.step()


def test_fake_tensors_are_stepped_by_torch():
    """With these torch tries out a training run, to estimate its memory or to trace it."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        opt = onepass.AdamW(torch.nn.Linear(3, 2).parameters())
        for p in params_of(opt):
            p.grad = torch.ones_like(p)
        before = onepass.stats()
        assert {row.reason for row in onepass.explain(opt)} == {"tensor subclass FakeTensor"}
        opt.step()
    assert onepass.stats()["kernel"] == before["kernel"]
    assert [tuple(opt.state[p]["exp_avg"].shape) for p in params_of(opt)] == [(2, 3), (2,)]


def test_overlaps_are_told_before_the_first_step_after_they_arose():
    opt = onepass.Adam(leaves([(4,), (3,)]))
    train(opt)
    assert [row.path for row in onepass.explain(opt)] == ["kernel"] * 2
    p = params_of(opt)[0]
    opt.state[p]["exp_avg"] = p.data
    row = onepass.explain(opt)[0]
    assert (row.path, row.reason.split("): ")[1]) == (
        "error",
        "its own tensors (parameter, states, step) overlap in memory",
    )


WITH_ARGUMENTS = {
    "max_norm": lambda model: {"max_norm": 1.0},
    "clip_value": lambda model: {"clip_value": 0.5},
    "skip_nonfinite": lambda model: {"skip_nonfinite": True},
    "average": lambda model: {"average": onepass.swa_utils.AveragedModel(model, decay=0.9)},
    "copy_to": lambda model: {"copy_to": [p.detach().bfloat16() for p in model.parameters()]},
    "zero_grad": lambda model: {"zero_grad": True},
}


@pytest.mark.parametrize("arguments", WITH_ARGUMENTS.values(), ids=WITH_ARGUMENTS)
@each_row
def test_what_a_step_does_beside_the_update(row, arguments):
    """Only Adafactor and CAME leave parameters to torch then, and says why; create passes the arguments on."""
    torch.manual_seed(0)
    model = torch.nn.ParameterList([Parameter(torch.randn(3, 2)), Parameter(torch.randn(2, 4))])
    opt = onepass.create(row.ours.__name__, model, **arguments(model))
    *stepped, _ = params_of(opt)
    for p in stepped:
        p.grad = torch.ones_like(p).to_sparse(1) if row.wants_sparse else torch.ones_like(p)
    is_left = row.has_means and "clip_value" in arguments(model)
    path, why = ("torch", "clip_value") if is_left else ("kernel", "")
    rows = [(each.path, each.reason) for each in onepass.explain(opt)]
    assert rows == [(path, why), (path, "; ".join(filter(None, [why, "no gradient now"])))]
    assert onepass.explain(onepass.Lookahead(opt)) == onepass.explain(opt)
    before = onepass.stats()
    opt.step()
    assert torch_path(before) == ({why} if is_left else set())
    assert opt.last_step is not None


def test_the_table_reads_well():
    model = torch.nn.Linear(3, 2)
    opt = onepass.Adam([{"params": model.named_parameters()}, {"params": [("table", Parameter(numbers(4, 2)))]}])
    model.weight.grad = torch.ones(2, 3)
    opt.param_groups[1]["params"][0].grad = torch.eye(4, 2, dtype=torch.float64).to_sparse()
    assert str(onepass.explain(opt)).splitlines() == [
        f"Adam, kernels for {onepass._core.isa()}",
        "  group 0: lr 0.001, weight_decay 0",
        "    parameter 0 weight: float32 [2, 3] -> kernel",
        "    parameter 1 bias: float32 [2] -> kernel (no gradient now)",
        "  group 1: lr 0.001, weight_decay 0",
        "    parameter 0 table: float64 [4, 2] -> torch (sparse gradient)",
    ]


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.RMSprop])
def test_optimizers_of_torchs_are_told_of_as_well(cls):
    opt = cls([("a", numbers(2, 3)), ("b", numbers(4))])
    rows = onepass.explain(opt)
    why = "not an optimizer of onepass"
    assert [astuple(row)[:7] for row in rows] == [
        (0, 0, "a", (2, 3), "float64", "torch", why),
        (0, 1, "b", (4,), "float64", "torch", why),
    ]
    assert str(rows).splitlines()[0] == cls.__name__
    before = onepass.stats()
    train(opt)
    assert onepass.stats() == before


def test_what_is_no_optimizer():
    for what in (torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).parameters(), None, onepass.AdamW):
        text = f"explain: optimizer must be a torch.optim.Optimizer, got the {type(what).__name__} "
        with pytest.raises(TypeError, match=f"^{re.escape(text)}"):
            onepass.explain(what)


def test_stats_count_each_parameter_at_each_step():
    before = onepass.stats()
    opt = onepass.SGD([*leaves([(3,), (2, 2), (0,)]), *shared()], lr=0.1)
    for t in range(3):
        give_gradients(params_of(opt), t)
        params_of(opt)[t].grad = None
        opt.step()
    after = onepass.stats()
    assert after["kernel"] == {**before["kernel"], "cpu": before["kernel"]["cpu"] + 6}
    why = "memory shared with another parameter"
    assert after["torch"] == {**before["torch"], why: before["torch"].get(why, 0) + 6}
    after["kernel"]["cpu"] = -1  # a copy of one's own
    assert sum(onepass.stats()["kernel"].values()) == sum(before["kernel"].values()) + 6


def test_a_parameter_that_has_no_shape_yet():
    opt = onepass.SGD(torch.nn.LazyLinear(3).named_parameters())
    opt.step()
    assert [(row.name, row.shape, row.path) for row in onepass.explain(opt)] == [
        ("weight", (), "torch"),
        ("bias", (), "torch"),
    ]


def test_the_formats_of_the_states_and_their_bytes():
    p, bias = Parameter(torch.zeros(512, 512)), Parameter(torch.zeros(512))
    opt = onepass.AdamW([p, bias], state_dtype=torch.float8_e4m3fn)
    rows = onepass.explain(opt)
    assert [(row.states, row.state_bytes, row.float32_bytes) for row in rows] == [({}, 0, 0)] * 2
    p.grad, bias.grad = torch.ones_like(p), torch.ones_like(bias)
    opt.step()
    rows = onepass.explain(opt)
    assert rows[0].states == {"exp_avg": "float8_e4m3fn", "exp_avg_sq": "float8_e4m3fn"}
    assert (rows[0].state_bytes, rows[0].float32_bytes) == (2 * (512 * 512 + 512 * 16), 8 * 512 * 512)
    assert rows[1].states == {"exp_avg": "float32", "exp_avg_sq": "float32"}
    assert rows[1].state_bytes == rows[1].float32_bytes == 8 * 512
    lines = str(rows).splitlines()
    assert lines[2].endswith("-> kernel; exp_avg float8_e4m3fn, exp_avg_sq float8_e4m3fn")
    assert lines[-1] == "  states: 544,768 bytes (2,101,248 in float32)"


def test_the_states_of_a_parameter_with_a_master():
    p = Parameter(torch.zeros(512, 512).bfloat16())
    opt = onepass.SGD([p], lr=0.1, momentum=0.9, master="split")
    p.grad = torch.ones_like(p)
    opt.step()
    (row,) = onepass.explain(opt)
    assert row.states == {"master_low": "int16", "momentum_buffer": "float32"}
    assert (row.state_bytes, row.float32_bytes) == (6 * 512 * 512, 8 * 512 * 512)
