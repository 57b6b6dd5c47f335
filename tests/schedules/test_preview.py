"""Preview and plot: what is told beforehand is what happens then, and the telling changes nothing."""

import copy
import itertools
import pickle
import sys
import threading
import warnings

import numpy as np
import onepass
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from onepass import plot, preview
from schedulers import (
    ALL,
    CHAININGS,
    OURS,
    SINGLE,
    TORCH,
    Halving,
    advance,
    metric,
    numbers,
    optimizer,
    run,
    takes_metrics,
)

MODULES = pytest.mark.parametrize("m", [OURS, TORCH], ids=["ours", "torch's"])


def snapshot(scheduler):
    """All that a preview must leave as it is, to the bit, as bytes; and which objects it consists of."""
    groups = scheduler.optimizer.param_groups
    state = {k: v for k, v in scheduler.state_dict().items() if not callable(v)}
    identities = [[(k, id(v)) for k, v in group.items()] for group in groups]
    identities += [(k, id(v)) for k, v in vars(scheduler).items()]
    plain = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    return pickle.dumps((state, plain)), identities, pickle.dumps(scheduler.optimizer.state_dict())


def told_is_done(scheduler, n, begin=0):
    """Previews n steps, and takes them."""
    metrics = [metric(t) for t in range(begin, begin + n)] if takes_metrics(scheduler) else None
    before = snapshot(scheduler)
    told = preview(scheduler, n, metrics)
    assert snapshot(scheduler) == before
    assert (told.dtype, told.shape) == (np.float64, (n, len(scheduler.optimizer.param_groups)))
    done = [[lr for lr, _ in row] for row in run(scheduler, n, begin)]
    assert told.tolist() == done
    return told


@MODULES
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("case", ALL)
def test_told_is_done(case, tensor_lr, m):
    package = onepass if m is OURS else torch.optim
    told_is_done(ALL[case](m, optimizer(package, tensor_lr)), 150)


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from(list(ALL)),
    m=st.sampled_from([OURS, TORCH]),
    begin=st.integers(0, 120),
    n=st.integers(0, 60),
    more=st.integers(0, 30),
)
def test_told_is_done_from_any_step(case, m, begin, n, more):
    scheduler = ALL[case](m, optimizer())
    for t in range(begin):
        advance(scheduler, t)
    told_is_done(scheduler, n, begin)
    told_is_done(scheduler, more, begin + n)


def test_row_0_is_the_rate_as_it_is():
    scheduler = OURS.StepLR(optimizer(), 3)
    scheduler.optimizer.param_groups[1]["lr"] = 0.7
    assert scheduler.preview(1).tolist() == [[0.1, 0.7]]
    assert scheduler.preview(0).shape == (0, 2)
    scheduler.optimizer.step()
    assert scheduler.preview(4).tolist() == [[0.1, 0.7], [0.1, 0.7], [0.1, 0.7], [0.1 * 0.1, 0.7 * 0.1]]


def counting():
    """A function with a state in its closure."""
    calls = 0

    def factor(t):
        nonlocal calls
        calls += 1
        return 1 / calls

    return factor


def remembering():
    """The same, in a list and in the argument's default."""
    seen = []

    def factor(t, last=[0]):  # noqa: B006
        seen.append(t)
        last[0] += 1
        return 1 / (len(seen) + last[0])

    return factor


def counting_on_itself():
    """A function with its state among its attributes."""

    def factor(t):
        factor.calls += 1
        return 1 / factor.calls

    factor.calls = 0
    return factor


def recursive():
    """A closure that holds itself and a variable that is not there yet."""

    def factor(t):
        if t < 0:
            return later
        return 1.0 if t < 1 else 0.5 * factor(t - 1)

    if factor is None:
        later = 0
    return factor


class Method:
    def __init__(self):
        self.calls = 0

    def factor(self, t):
        self.calls += 1
        return 1 / self.calls


def iterating():
    values = iter([1.0, 0.5, 0.25, 0.125] * 50)
    return lambda t: next(values)


STATEFUL = {
    "closure": counting,
    "list": remembering,
    "attribute": counting_on_itself,
    "recursion": recursive,
    "object": lambda: Halving(2),
    "method": lambda: Method().factor,
    "object in a closure": lambda: (lambda method: lambda t: method.factor(t))(Method()),
    "iterator": iterating,
    "random numbers": lambda: (lambda rng: lambda t: rng.random())(np.random.default_rng(3)),
    "tensor": lambda: (lambda count: lambda t: 1 / float(count.add_(1)))(torch.zeros(())),
}


@MODULES
@pytest.mark.parametrize("name", ["LambdaLR", "MultiplicativeLR"])
@pytest.mark.parametrize("case", STATEFUL)
def test_functions_with_a_state(case, name, m):
    scheduler = getattr(m, name)(optimizer(), STATEFUL[case]())
    assert told_is_done(scheduler, 6)[:, 0].min() < 0.1
    if name == "LambdaLR":
        scheduler = m.CyclicLR(optimizer(), 0.1, 0.2, 3, scale_fn=STATEFUL[case]())
        told_is_done(scheduler, 6)


def test_a_generator_is_not_used_up():
    values = (1 / t for t in range(1, 100))
    scheduler = OURS.LambdaLR(optimizer(), lambda t: next(values))
    with pytest.raises(TypeError, match="preview of LambdaLR would use up the generator"):
        scheduler.preview(5)
    advance(scheduler, 0)
    assert scheduler.get_last_lr()[0] == 0.1 * (1 / 3)  # one value for each of two groups, at each step


class Uncopied(torch.nn.Linear):
    def __deepcopy__(self, memo):
        raise AssertionError("copied")


def test_nothing_heavy_is_copied(monkeypatch, tmp_path):
    model = Uncopied(3, 3)
    opt = onepass.Adam(model.parameters(), lr=1.0)
    data = torch.utils.data.TensorDataset(torch.zeros(3))
    loader = torch.utils.data.DataLoader(data)
    table, array = torch.ones(1 << 15), np.ones(1 << 14)
    copied = []
    monkeypatch.setattr(torch.Tensor, "clone", lambda x: copied.append(x.numel()) or x.new_tensor(x.tolist()))
    lock = threading.Lock()
    with open(tmp_path / "log", "w") as log:

        def factor(t):
            with lock:
                log.write(f"{t}\n")
            return 0.5**t * len(model.weight) * len(data) * len(loader) / 27 * float(table[t]) * array[t]

        for p in model.parameters():
            p.grad = torch.ones_like(p)
        opt.step()
        scheduler = OURS.LambdaLR(opt, factor)
        monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", Uncopied.__deepcopy__)
        assert scheduler.preview(3).ravel().tolist() == [1.0, 0.5, 0.25]
        assert preview(OURS.StepLR(opt, 1, 0.5), 3).ravel().tolist() == [1.0, 0.5, 0.25]
        assert copied == []


class ByState(torch.optim.lr_scheduler.LRScheduler):
    """A scheduler that reads the optimizer's parameters and keeps things that cannot be copied."""

    def __init__(self, opt):
        self.lock = threading.Lock()
        self.history = []
        super().__init__(opt)

    def get_lr(self):
        self.history.append(self.last_epoch)
        p = self.optimizer.param_groups[0]["params"][0]
        assert isinstance(self.optimizer, torch.optim.Optimizer)
        momentum = 0.0 if p not in self.optimizer.state else float(self.optimizer.state[p]["momentum_buffer"].sum())
        return [lr * self.optimizer.defaults["momentum"] ** len(self.history) + momentum for lr in self.base_lrs]

    def state_dict(self):
        return {k: v for k, v in super().state_dict().items() if k != "lock"}


def test_own_subclass():
    opt = optimizer()
    opt.param_groups[0]["params"][0].grad = torch.ones(2)
    opt.step()
    opt.param_groups[0]["params"][0].grad = None
    scheduler = ByState(opt)
    told_is_done(scheduler, 10)
    assert scheduler.history == list(range(11))


def test_the_optimizer_is_not_stepped():
    class Stepping(torch.optim.lr_scheduler.LRScheduler):
        def get_lr(self):
            if self.last_epoch > 0:
                self.optimizer.step()
            return self.base_lrs

    with pytest.raises(RuntimeError, match="does not step the optimizer"):
        preview(Stepping(optimizer()), 3)


def test_lookahead():
    inner = optimizer()
    opt = onepass.Lookahead(inner)
    before = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in inner.param_groups])
    scheduler = OURS.ChainedScheduler([OURS.ExponentialLR(opt, 0.5), OURS.StepLR(opt, 2)])
    assert scheduler.preview(3).tolist() == [[0.1, 0.02], [0.05, 0.01], [0.1 * 0.25 * 0.1, 0.02 * 0.25 * 0.1]]
    for group, old in zip(inner.param_groups, before, strict=True):
        assert {k: v for k, v in group.items() if k in old} == old
    told_is_done(scheduler, 10)


def test_before_the_first_step_nothing_warns():
    scheduler = OURS.StepLR(optimizer(), 2)
    scheduler.preview(5)  # warnings are errors here
    assert not getattr(scheduler.optimizer, "_opt_called", False)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_steps_replaced():
    """Nor does an optimizer whose step was replaced make a preview warn."""
    opt = optimizer()
    scheduler = OURS.StepLR(opt, 2)
    opt.step = lambda: None
    scheduler.preview(5)
    with pytest.warns(UserWarning, match="has been overridden"):
        scheduler.step()


@MODULES
def test_plateau(m):
    opt = optimizer()
    scheduler = m.ReduceLROnPlateau(opt, factor=0.5, patience=0)
    lrs = preview(scheduler, 4, [3.0, 2.0, 2.0])[:, 0].tolist()
    assert lrs == [0.1, 0.1, 0.1, 0.05]
    assert preview(scheduler, 4, itertools.repeat(1.0))[:, 0].tolist() == [0.1, 0.1, 0.05, 0.025]
    assert (scheduler.best, scheduler.num_bad_epochs, scheduler.last_epoch) == (float("inf"), 0, 0)
    assert preview(scheduler, 1, []).tolist() == [[0.1, 0.02]]
    with pytest.raises(ValueError, match="ReduceLROnPlateau needs metrics"):
        preview(scheduler, 4)
    with pytest.raises(ValueError, match="ReduceLROnPlateau needs 3 metrics for a preview of 4 steps, but got 2"):
        preview(scheduler, 4, [1.0, 2.0])


def test_plateau_within_others():
    def make(opt):
        plateau = OURS.ReduceLROnPlateau(opt, factor=0.5, patience=0)
        chain = OURS.ChainedScheduler([OURS.LambdaLR(opt, lambda t: 0.9**t), plateau])
        return OURS.SequentialLR(opt, [OURS.LinearLR(opt, 0.5, total_iters=3), chain], [3])

    scheduler = make(optimizer())
    before = snapshot(scheduler)
    told, held = scheduler.preview(20, itertools.repeat(1.0)), scheduler.preview(20)
    assert snapshot(scheduler) == before
    assert [scheduler.preview(k, [1.0] * 20).tolist() for k in range(20)] == [told[:k].tolist() for k in range(20)]
    for lrs, metrics in ((told, 1.0), (held, None)):
        scheduler = make(optimizer())
        for row in lrs.tolist():
            assert [lr for lr, _ in numbers(scheduler.optimizer)] == row
            scheduler.optimizer.step()
            scheduler.step(metrics)
    assert told[19, 0] < 1e-4 < held[19, 0]


@MODULES
def test_end_of_one_cycle(m):
    scheduler = m.OneCycleLR(optimizer(), 0.1, 10)
    assert preview(scheduler, 11).shape == (11, 2)
    with pytest.raises(ValueError, match="specified number of total steps is 10"):
        preview(scheduler, 12)


def test_wrong_arguments():
    scheduler = OURS.StepLR(optimizer(), 3)
    with pytest.raises(ValueError, match="n must be >= 0, got -1"):
        scheduler.preview(-1)
    for n, got in (
        (2.5, "the float 2.5"),
        ("3", "the str '3'"),
        (None, "the NoneType None"),
        (float("inf"), "the float inf"),
    ):
        for call in (scheduler.preview, scheduler.plot):
            with pytest.raises(TypeError, match=f"^n must be an integer >= 0, got {got}$"):
                call(n)
    for n in (1e1, np.float32(10), np.int64(10)):  # the numbers that schedules take
        assert (scheduler.preview(n) == scheduler.preview(10)).all()
    with pytest.raises(TypeError, match=r"^scheduler must be a learning rate scheduler, got the SGD "):
        preview(scheduler.optimizer, 3)
    with pytest.raises(TypeError, match=r"got the cosine cosine\(3\): pass ScheduleLR\(optimizer, schedule\)$"):
        preview(onepass.schedules.cosine(3), 3)
    with pytest.raises(ValueError, match=r"^plot: schedulers must be at least one scheduler, got none$"):
        plot(n=3)
    with pytest.raises(ValueError, match=r"^plot: labels must be one label for each of 1 schedulers, got 2$"):
        plot(scheduler, n=3, labels=["a", "b"])
    with pytest.raises(TypeError, match=r"^plot: labels must be a list of labels, got the str 'ab'$"):
        plot(scheduler, scheduler, n=3, labels="ab")


def lines(ax):
    return {line.get_label(): line.get_ydata().tolist() for line in ax.lines}


def test_plot_saved(tmp_path):
    scheduler = SINGLE["StepLR-1"](OURS, optimizer())
    before = snapshot(scheduler)
    figure = scheduler.plot(20, path=tmp_path / "schedule.png")
    assert snapshot(scheduler) == before
    assert isinstance(figure, Figure)
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")
    (ax,) = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("optimizer step", "learning rate")
    told = scheduler.preview(20)
    assert lines(ax) == {"StepLR, group 0": told[:, 0].tolist(), "StepLR, group 1": told[:, 1].tolist()}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["StepLR, group 0", "StepLR, group 1"]
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def many_groups(rates):
    return onepass.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates], momentum=0.9)


def test_plot_draws_groups_of_the_same_rates_once(tmp_path):
    scheduler = OURS.StepLR(many_groups([0.1, 0.1, 0.2, 0.1, 0.3, 0.2]), 3)
    drawn = lines(scheduler.plot(7, path=tmp_path / "s.png").axes[0])
    assert list(drawn) == ["StepLR, groups 0-1, 3", "StepLR, groups 2, 5", "StepLR, group 4"]
    assert list(drawn.values()) == scheduler.preview(7)[:, [0, 2, 4]].T.tolist()
    scheduler = OURS.StepLR(many_groups([0.1] * 24), 3)
    assert list(lines(scheduler.plot(7, path=tmp_path / "s.png").axes[0])) == ["StepLR"]


@pytest.mark.parametrize("groups", [9, 24, 100])
def test_plot_of_many_groups_can_be_read(groups, tmp_path):
    """Layer-wise rates: every line has a color of its own, in order, and the legend hides none of them."""
    model = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(groups)))
    scheduler = OURS.CosineAnnealingLR(onepass.AdamW(onepass.param_groups(model, lr=1.0, layer_decay=0.9)), 50)
    figure = scheduler.plot(50, path=tmp_path / "s.png")
    (ax,) = figure.axes
    assert len(ax.lines) == groups
    assert len({tuple(line.get_color()) for line in ax.lines}) == groups
    brightness = [sum(line.get_color()[:3]) for line in ax.lines]
    assert brightness[0] < brightness[groups // 2] < brightness[-1]
    figure.draw_without_rendering()
    legend, inner, whole = ax.get_legend().get_window_extent(), ax.get_window_extent(), figure.bbox
    assert legend.x0 >= inner.x1
    assert 0 <= legend.y0 < legend.y1 <= whole.y1
    assert legend.x1 <= whole.x1
    assert inner.width > 0.5 * whole.width
    named = [text.get_text() for text in ax.get_legend().get_texts()]
    assert (named[0], named[-1]) == (ax.lines[0].get_label(), ax.lines[-1].get_label())
    assert len(named) == min(groups, 24)


def test_plot_into_axes_leaves_their_colors_alone():
    ax, other = Figure().add_subplot(), Figure().add_subplot()
    OURS.StepLR(many_groups(np.linspace(0.1, 1, 12)), 3).plot(5, ax=ax)
    assert ax.plot([0, 1])[0].get_color() == other.plot([0, 1])[0].get_color()


def test_a_path_without_a_suffix_is_written_as_it_is(tmp_path):
    OURS.StepLR(optimizer(), 3).plot(5, path=tmp_path / "schedule")
    assert (tmp_path / "schedule").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in tmp_path.iterdir()] == ["schedule"]


def test_plot_of_several(tmp_path):
    def one_group():
        return onepass.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)

    schedulers = [CHAININGS["sequence"](TORCH, one_group()), OURS.CosineAnnealingLR(one_group(), 30)]
    schedulers.append(OURS.ReduceLROnPlateau(one_group(), patience=3))
    metrics = iter([1.0] * 60)  # read once, for all of them
    figure = plot(*schedulers, n=40, labels=["a", "b", "c"], metrics=metrics, path=tmp_path / "s.svg")
    expected = [preview(scheduler, 40, [1.0] * 40)[:, 0].tolist() for scheduler in schedulers]
    assert lines(figure.axes[0]) == dict(zip("abc", expected, strict=True))
    assert b"<svg" in (tmp_path / "s.svg").read_bytes()


def test_plot_into_axes():
    ax = Figure().add_subplot()
    figure = OURS.ExponentialLR(optimizer(), 0.9).plot(5, label="decay", ax=ax)
    assert figure is ax.figure
    assert list(lines(ax)) == ["decay, group 0", "decay, group 1"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("optimizer step", "learning rate")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_plot_shown(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of matplotlib's own dependencies
        import matplotlib
        from matplotlib import pyplot
    backend = matplotlib.get_backend()
    pyplot.switch_backend("agg")
    shown = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(pyplot.get_fignums()))
    figure = OURS.ExponentialLR(optimizer(), 0.9).plot(5)
    assert shown == [[figure.number]]
    pyplot.close(figure)
    pyplot.switch_backend(backend)


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'onepass\[plots\]'"):
        OURS.ExponentialLR(optimizer(), 0.9).plot(5)


def test_plot_into_a_subfigure_saves_all_of_the_figure(tmp_path):
    figure = Figure()
    axes = figure.subfigures(1, 2)[0].add_subplot()
    assert OURS.StepLR(optimizer(), 3).plot(5, ax=axes, path=tmp_path / "s.png") is figure
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_a_variable_that_two_closures_share():
    def make():
        calls = 0

        def first(t):
            nonlocal calls
            calls += 1
            return 1 / calls

        def second(t):
            return 1 / (1 + calls)

        params = [{"params": [torch.nn.Parameter(torch.zeros(2))]} for _ in range(2)]
        return torch.optim.lr_scheduler.LambdaLR(onepass.SGD(params, lr=1.0), [first, second])

    stepped = make()
    wanted = [stepped.get_last_lr()]
    for _ in range(3):
        stepped.optimizer.step()
        stepped.step()
        wanted.append(stepped.get_last_lr())
    scheduler = make()
    for _ in range(2):  # the first preview has changed nothing
        assert onepass.preview(scheduler, 4).tolist() == wanted
