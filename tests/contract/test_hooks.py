"""Around a step: hooks, the profiler, closures, torch.compile. Each as torch's classes have it, seen side by side."""

import onepass
import pytest
import torch
from cases import ROWS, each_class, each_of_torchs, each_row
from contract import assert_same, give_gradients, leaves, run_both, snapshot, train
from reference import params_of
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


def listen(opt, events, only=(), **results):
    """Registers hooks, which note their name, their arguments and whether the step has been made."""
    start = snapshot(opt)["params"]

    def hook(name):
        def note(this, args, kwargs):
            stepped = not all(map(torch.equal, params_of(opt), start))
            events.append((name, this is opt, args[0] is opt, args[1:], dict(kwargs), stepped))
            return results.get(name)

        return note

    register = {
        "global_post": register_optimizer_step_post_hook,
        "post": opt.register_step_post_hook,
        "pre": opt.register_step_pre_hook,
        "pre2": opt.register_step_pre_hook,
        "global_pre": register_optimizer_step_pre_hook,
    }
    return [register[name](hook(name)) for name in only or register]


def unlisten(handles):
    for handle in handles:
        handle.remove()


ORDER = ["global_pre", "pre", "pre2", "post", "global_post"]


@each_row
@pytest.mark.parametrize(
    ("args", "kwargs"),
    [((), {}), ((lambda: 7.5,), {}), ((), {"closure": lambda: 7.5})],
    ids=["none", "plain", "keyword"],
)
def test_hooks_fire_once_in_torchs_order_with_torchs_arguments(row, args, kwargs):
    def script(opt):
        events = []
        give_gradients(params_of(opt), 0)
        handles = listen(opt, events)
        try:
            result = opt.step(*args, **kwargs)
        finally:
            unlisten(handles)
        opt.step()
        assert [event[0] for event in events] == ORDER
        return events, result

    run_both(row, script)


@pytest.mark.parametrize("only", ORDER)
@each_class
def test_one_hook_alone_is_heard_as_well(row, only):
    def script(opt):
        events = []
        handles = listen(opt, events, [only])
        try:
            train(opt)
        finally:
            unlisten(handles)
        assert [event[0] for event in events] == [only]
        return [event[:3] + event[4:] for event in events]  # without the arguments: two closures are not equal

    run_both(row, script)


@each_row
def test_a_pre_hook_can_replace_the_arguments(row):
    def given():
        return 1.0

    def other():
        return 2.0

    def script(opt):
        events = []
        give_gradients(params_of(opt), 0)
        handles = listen(opt, events, pre=((opt, other), {}))
        try:
            result = opt.step(closure=given)
        finally:
            unlisten(handles)
        assert result == 2.0
        return events, result

    run_both(row, script)


@each_row
def test_a_pre_hook_that_returns_something_else_is_an_error(row):
    for cls in (row.ours, row.theirs):
        opt = cls(leaves(), **row.full)
        give_gradients(params_of(opt), 0)
        before = snapshot(opt)
        opt.register_step_pre_hook(lambda *_: 3)
        with pytest.raises(RuntimeError, match=r"must return None or a tuple of \(new_args, new_kwargs\), but got 3\."):
            opt.step()
        assert_same(snapshot(opt), before)


@each_row
def test_hooks_fire_once_around_a_step_that_a_subclass_overrides(row):
    # torch's own classes fire them once more inside super().step(), as their step is wrapped, too.
    class Louder(row.ours):
        def step(self, closure=None):
            events.append("in")
            loss = super().step(closure)
            events.append("out")
            return loss

    class Loudest(Louder):
        pass

    train(row.ours(leaves(), **row.full))
    for cls in (Louder, Loudest):
        opt, plain = cls(leaves(), **row.full), row.ours(leaves(), **row.full)
        train(plain)
        events = []
        give_gradients(params_of(opt), 0)
        noted = []
        handles = listen(opt, noted)
        try:
            assert opt.step(lambda: 4.0) == 4.0
        finally:
            unlisten(handles)
        assert [event[0] for event in noted] == ORDER
        assert events == ["in", "out"]
        assert_same(snapshot(opt), snapshot(plain))


@each_class
def test_a_hook_that_raises_stops_the_step(row):
    def script(opt):
        def hook(*_):
            raise ArithmeticError("no")

        train(opt, 1)
        handle = opt.register_step_pre_hook(hook)
        with pytest.raises(ArithmeticError):
            train(opt)
        handle.remove()
        train(opt, 1, first=1)

    run_both(row, script)


@each_row
def test_hooks_may_change_the_optimizer(row):
    """A post hook that sets the learning rate, and a pre hook that edits gradients, count at once."""

    def script(opt):
        def halve(this, args, kwargs):
            for group in this.param_groups:
                group["lr"] = group["lr"] / 2

        def clip(this, args, kwargs):
            torch.nn.utils.clip_grad_norm_(params_of(this), 0.5)

        opt.register_step_pre_hook(clip)
        opt.register_step_post_hook(halve)
        train(opt, 4)
        return [group["lr"] for group in opt.param_groups]

    run_both(row, script)


# -- the profiler ----------------------------------------------------------------------------------------------------


@each_class
def test_the_profiler_sees_the_step_under_torchs_name(row):
    def names(cls):
        cls = type(row.name, (cls,), {})  # so that the plain Lion has the same name, too
        opt = cls(leaves(row.shapes), **row.full)
        coded = []
        opt._optimizer_step_code = lambda: coded.append(1)  # where the memory profiler looks at the optimizer
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            train(opt, 2)
            opt.zero_grad()
        assert coded == [1, 1]
        return {e.key: e.count for e in profile.key_averages() if e.key.startswith(("Optimizer.", "onepass::"))}

    expected = {f"Optimizer.step#{row.name}.step": 2, f"Optimizer.zero_grad#{row.name}.zero_grad": 1}
    assert names(row.theirs) == expected
    kernels = {} if row.name == "LBFGS" else {f"onepass::{row.ours.rule}": 2}  # beside the closure, if there is one
    assert names(row.ours) == expected | kernels


# -- closures --------------------------------------------------------------------------------------------------------


@each_row
@pytest.mark.parametrize("around", [torch.no_grad, torch.enable_grad])
def test_a_closure_runs_once_with_gradients_enabled_and_its_value_comes_back(row, around):
    def script(opt):
        calls = []

        def closure():
            calls.append(torch.is_grad_enabled())
            opt.zero_grad()
            loss = sum((p**2 + p).sum() for p in params_of(opt))
            loss.backward()
            return loss

        with around():
            losses = [opt.step(closure).item() for _ in range(3)]
            calls.append(torch.is_grad_enabled())
        assert calls == [True] * 3 + [around is torch.enable_grad]
        assert losses == sorted(losses, reverse=True)

    run_both(row, script)


@each_row
def test_a_closure_that_raises_changes_nothing(row):
    def script(opt):
        def closure():
            raise ArithmeticError("no")

        train(opt, 2)
        before = snapshot(opt)
        with torch.no_grad():
            with pytest.raises(ArithmeticError):
                opt.step(closure)
            assert not torch.is_grad_enabled()
        assert_same(snapshot(opt), before)
        opt.step()

    run_both(row, script)


@each_row
def test_a_closure_may_step_another_optimizer(row):
    first, second = (row.ours(leaves(seed=s), **row.full) for s in (0, 1))
    alone = [row.ours(leaves(seed=s), **row.full) for s in (0, 1)]
    for opt in (first, second, *alone):
        give_gradients(params_of(opt), 0)
    first.step(second.step)
    for opt in alone:
        opt.step()
    assert_same([snapshot(opt) for opt in (first, second)], [snapshot(opt) for opt in alone])


# -- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(test):
    """Marks a test that compiles; what torch's compiler imports uses deprecated parts of torch itself."""
    test = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")(test)
    return pytest.mark.usefixtures("_fresh_dynamo")(test)


def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()


def training(cls, row, compile, **kw):
    """Three training steps, and all that they leave."""
    model = net()
    opt = cls(model.parameters(), **{**row.full, **kw})
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)

    def train_step(x):
        opt.zero_grad()
        loss = model(x).square().sum()
        value = loss.detach()
        loss.backward()
        opt.step()
        return value

    run = torch.compile(train_step, backend="eager") if compile else train_step
    return [run(x) for _ in range(3)], snapshot(opt)


@each_row
@compiled
def test_a_compiled_training_step(row):
    before = onepass.stats()
    actual = training(row.ours, row, compile=True)
    after = onepass.stats()
    assert_same(actual, training(row.ours, row, compile=False))
    assert sum(after["kernel"].values()) == sum(before["kernel"].values()) + 3 * 4
    assert after["torch"] == before["torch"]


@each_row
@compiled
def test_a_compiled_step(row):
    opt, plain = (row.ours(leaves(), **row.full) for _ in range(2))
    step = torch.compile(opt.step, backend="eager")
    for t in range(3):
        give_gradients(params_of(opt), t)
        assert step() is None
    train(plain, 3)
    assert_same(snapshot(opt), snapshot(plain))


@each_of_torchs
@compiled
def test_hooks_fire_in_a_compiled_step_as_torchs_do(row):
    def trained(cls, compile):
        opt = cls(leaves(row.shapes[:3]), **row.full)
        events = []
        for name in ("pre", "post"):
            getattr(opt, f"register_step_{name}_hook")(lambda *_, name=name: events.append(name))

        def run():
            opt.step()

        step = torch.compile(run, backend="eager") if compile else run
        for t in range(2):
            give_gradients(params_of(opt), t)
            step()
        return events, snapshot(opt)

    events, end = trained(row.ours, True)
    assert events == trained(row.theirs, True)[0] == ["pre", "post"] * 2
    assert_same(end, trained(row.ours, False)[1])


def test_the_table_has_every_class_of_this_package():
    own = {c for c in vars(onepass).values() if isinstance(c, type) and issubclass(c, torch.optim.Optimizer)}
    own = {c for c in own if c.__module__.startswith("onepass")}
    around = {onepass.Combined, onepass.Lookahead, onepass.SAM}  # any of them, with tests of their own in optimizers/
    assert {row.ours for row in ROWS} == own - around
