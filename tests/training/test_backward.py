"""step_in_backward: the same bits as a step after the backward, one gradient at a time."""

import copy
import gc
import types
from weakref import ref

import onepass
import pytest
import torch
from cases import ROWS, for_rows
from contract import assert_same, snapshot
from onepass.training.backward import FreedGradient
from reference import params_of
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 5, bias=False), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def loss_of(model, t):
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(4, 3, generator=generator).to(next(model.parameters()).dtype)
    return model(x).square().sum()


def plain(model, opt, t):
    opt.zero_grad()
    loss_of(model, t).backward()
    opt.step()


def in_backward(model, opt, t):
    loss_of(model, t).backward()


def pair(cls=onepass.AdamW, params=lambda model: model.parameters(), dtype=torch.float32, **arguments):
    """Two equal models with optimizers; the second is stepped in backward."""
    models = net(dtype), net(dtype)
    opts = [cls(params(model), **arguments) for model in models]
    return models, opts, onepass.step_in_backward(opts[1])


def assert_equal(opts):
    assert_same(*map(snapshot, opts))
    assert_same(*(opt.state_dict() for opt in opts))


def freed(params):
    return [isinstance(p.grad, FreedGradient) for p in params]


# They need closures, all parameters at once, and sparse gradients.
WHOLE = ("LBFGS", "Prodigy", "SparseAdam")
rows = for_rows([row for row in ROWS if row.name not in WHOLE])


@rows
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_every_optimizer_ends_at_the_same_bits(row, whose):
    matrices = row.takes_matrices
    models, opts, _ = pair(
        getattr(row, whose),
        lambda model: [p for p in model.parameters() if p.ndim == 2 or not matrices],
        **row.full,
    )
    for t in range(4):
        for model, opt, train in zip(models, opts, (plain, in_backward), strict=True):
            train(model, opt, t)
            if matrices and model is models[0]:
                model.zero_grad()
    assert_equal(opts)
    assert all(freed(params_of(opts[1])))


def test_kernels_do_it(kernels_only):
    models, opts, _ = pair(lr=0.1)
    in_backward(models[1], opts[1], 0)


def test_explain_tells_of_the_kernels():
    models, opts, _ = pair(lr=0.1)
    in_backward(models[1], opts[1], 0)
    assert {(row.path, row.reason) for row in onepass.explain(opts[1])} == {("kernel", "no gradient now")}
    assert all(freed(params_of(opts[1])))


def test_one_gradient_at_a_time():
    models, opts, _ = pair(lr=0.1)
    params = list(models[1].parameters())
    held = []
    for p in params:
        p.register_post_accumulate_grad_hook(
            lambda _: held.append([p.grad.untyped_storage().nbytes() for p in params if p.grad is not None])
        )
    in_backward(models[1], opts[1], 0)
    assert held == [[4] * n for n in range(1, 6)]  # the update came first, and an element is left
    assert all(freed(params))


USES = {
    "clip_grad_norm_": lambda model, _: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    "clip_grad_norm_, one by one": lambda model, _: nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False),
    "clip_grad_value_": lambda model, _: nn.utils.clip_grad_value_(model.parameters(), 1.0),
    "unscale_": lambda _, opt: scaler().unscale_(opt),
    "GradScaler.step": lambda _, opt: scaler().step(opt),
    "norm": lambda model, _: model[0].weight.grad.norm(),
    "another optimizer of torch's": lambda model, _: torch.optim.SGD(model.parameters(), lr=1.0).step(),
    "another optimizer of ours": lambda model, _: onepass.SGD(model.parameters(), lr=1.0).step(),
}


def scaler():
    made = torch.amp.GradScaler("cpu")
    made.scale(torch.zeros(()))  # what brings its scale into being
    return made


@pytest.mark.parametrize("use", USES)
def test_a_gradient_that_is_gone_cannot_be_used(use):
    """As if there were no gradients, clipping and the scaler would do nothing, and not say so."""
    models, opts, _ = pair(lr=0.1)
    for t in range(3):
        plain(models[0], opts[0], t)
        in_backward(models[1], opts[1], t)
        with pytest.raises(RuntimeError, match=r"step_in_backward has used and freed.*does not work"):
            USES[use](models[1], opts[1])
    assert_equal(opts)


def test_what_zeroes_or_moves_gradients_passes_by():
    models, opts, _ = pair(lr=0.1, params=lambda model: list(model.parameters())[1:])
    in_place = {"set_to_none": False}
    for t in range(4):
        for model, opt, train in zip(models, opts, (plain, in_backward), strict=True):
            train(model, opt, t)
            assert model[0].weight.grad.abs().sum() > 0  # the one that is not the optimizer's
            (opt if t == 1 else model).zero_grad(**in_place)
            assert (model[0].weight.grad.abs().sum() > 0) == (t == 1)
            model.zero_grad(**in_place)
            if t == 2:
                model.double()
                opt.load_state_dict(opt.state_dict())
        assert all(freed(params_of(opts[1])))
    assert_equal(opts)


def test_the_loop_may_stay_as_it_is_with_schedulers_and_hooks():
    models, opts, _ = pair(lr=0.1, weight_decay=0.1)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for opt in opts]
    calls = []
    opts[1].register_step_post_hook(lambda *_: calls.append(1))
    for t in range(4):
        for model, opt, scheduler in zip(models, opts, schedulers, strict=True):
            plain(model, opt, t)
            scheduler.step()
    assert_equal(opts)
    assert calls == [1] * 4


OPTIMIZERS = [onepass.AdamW, onepass.SGD, torch.optim.AdamW, torch.optim.SGD]


def name_of(cls):
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


@pytest.mark.parametrize("calls_step", [True, False])
@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize("schedulers", [onepass.lr_scheduler, torch.optim.lr_scheduler], ids=["ours", "torch"])
@pytest.mark.parametrize("cls", OPTIMIZERS, ids=name_of)
def test_a_scheduler_made_before_or_after(cls, schedulers, scheduler_first, calls_step):
    """A scheduler puts a ``step`` bound to the whole optimizer into it. A warning would fail the test."""
    models = net(), net()
    for model in models:
        model[4].bias.requires_grad_(False)
    opts = [cls(model.parameters(), lr=0.1) for model in models]
    made = [schedulers.ExponentialLR(opt, 0.5) for opt in opts] if scheduler_first else []
    handle = onepass.step_in_backward(opts[1])
    made = made or [schedulers.ExponentialLR(opt, 0.5) for opt in opts]
    for model, opt in zip(models, opts, strict=True):
        model[4].bias.requires_grad_(True)
        opt.step()  # includes the parameter
    calls = []
    opts[1].register_step_post_hook(lambda *_: calls.append(1))
    for t in range(4):
        loss_of(models[0], 2 * t).backward()
        loss_of(models[0], 2 * t + 1).backward()
        opts[0].step()
        opts[0].zero_grad()
        with handle.accumulate():
            loss_of(models[1], 2 * t).backward()
        loss_of(models[1], 2 * t + 1).backward()
        if calls_step:
            opts[1].step()
        for scheduler in made:
            scheduler.step()
    assert_equal(opts)
    assert calls == [1] * 4 * calls_step


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_a_scheduler_that_steps_without_a_step_warns(scheduler_first):
    model = net()
    opt = onepass.SGD(model.parameters(), lr=0.1)
    scheduler = onepass.lr_scheduler.ExponentialLR(opt, 0.5) if scheduler_first else None
    handle = onepass.step_in_backward(opt)
    scheduler = scheduler or onepass.lr_scheduler.ExponentialLR(opt, 0.5)
    with handle.accumulate():
        loss_of(model, 0).backward()
    with pytest.warns(UserWarning, match=r"`lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        scheduler.step()


def test_methods_that_were_replaced_are_those_of_the_whole_optimizer():
    """As ``optimizer.step = torch.compile(optimizer.step)``, and libraries that bind functions to an optimizer."""

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            self.adjust()
            return super().step(closure)

        def adjust(self):
            self.param_groups[0]["lr"] /= 2  # of this part's group

    models = net(), net()
    opts = [Own(model.parameters(), lr=0.2) for model in models]
    calls = []
    for name in ("step", "adjust"):
        method = getattr(opts[1], name)
        setattr(opts[1], name, lambda *args, method=method: (calls.append(1), method(*args))[1])
    handle = onepass.step_in_backward(opts[1])
    for t in range(0, 4, 2):
        opts[0].param_groups[0]["lr"] = 0.2
        loss_of(models[0], t).backward()
        loss_of(models[0], t + 1).backward()
        opts[0].step()
        opts[0].zero_grad()
        with handle.accumulate():
            loss_of(models[1], t).backward()
        in_backward(models[1], opts[1], t + 1)
    assert_same(*([p.detach() for p in model.parameters()] for model in models))
    assert not calls


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=name_of)
def test_hooks_of_all_optimizers_are_called_by_step_only(cls):
    model = net()
    opt = cls(model.parameters(), lr=0.1)
    calls = []
    handles = [
        register_optimizer_step_pre_hook(lambda opt, *_: calls.append(opt)),
        register_optimizer_step_post_hook(lambda opt, *_: calls.append(opt)),
    ]
    try:
        onepass.step_in_backward(opt)
        loss_of(model, 0).backward()
        assert not calls
        opt.step()
        assert [each is opt for each in calls] == [True, True]
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=name_of)
def test_the_profiler_sees_each_update(cls):
    model = net()
    onepass.step_in_backward(cls(model.parameters(), lr=0.1))
    with torch.profiler.profile() as profile:
        loss_of(model, 0).backward()
    names = [event.name for event in profile.events()]
    assert names.count(f"Optimizer.step#{cls.__name__}.step") == len(list(model.parameters()))


def test_accumulation():
    models, opts, handle = pair(lr=0.1)
    for t in range(0, 6, 3):
        opts[0].zero_grad()
        for micro in range(t, t + 3):
            loss_of(models[0], micro).backward()
        opts[0].step()
        with handle.accumulate():
            loss_of(models[1], t).backward()
            with handle.accumulate():
                loss_of(models[1], t + 1).backward()
        loss_of(models[1], t + 2).backward()
    assert_equal(opts)


def test_tied_parameters_are_stepped_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    torch.manual_seed(0)
    models = Tied(), Tied()
    models[1].load_state_dict(models[0].state_dict())
    opts = [onepass.AdamW(model.parameters(), lr=0.1) for model in models]
    onepass.step_in_backward(opts[1])
    for t in range(3):
        plain(models[0], opts[0], t)
        in_backward(models[1], opts[1], t)
    assert_equal(opts)
    assert [float(s["step"]) for s in opts[1].state.values()] == [3.0] * 3


def test_groups_that_come_and_parameters_that_thaw():
    def some(model):
        model[0].bias.requires_grad_(False)
        return [*model[0].parameters(), *model[2].parameters()]

    models, opts, _ = pair(params=some, lr=0.1)
    for t in range(6):
        for model, opt in zip(models, opts, strict=True):
            if t == 2:
                model[0].bias.requires_grad_(True)
                opt.add_param_group({"params": list(model[4].parameters()), "lr": 0.3})
                model.zero_grad()  # what the frozen ones have had
            plain(model, opt, t)
    assert_equal(opts)
    loss_of(models[1], 9).backward()
    assert all(freed(models[1].parameters()))


def test_a_parameter_that_the_optimizer_no_longer_has_is_left_alone():
    models, opts, _ = pair(lr=0.1)
    del opts[1].param_groups[0]["params"][1:]
    before = models[1][4].weight.detach().clone()
    in_backward(models[1], opts[1], 0)
    assert torch.equal(models[1][4].weight, before)
    assert freed(models[1].parameters()) == [True, False, False, False, False]


def test_a_checkpoint_is_loaded_in_between():
    models, opts, _ = pair(lr=0.1)
    for t in range(2):
        plain(models[0], opts[0], t)
    models[1].load_state_dict(models[0].state_dict())
    opts[1].load_state_dict(copy.deepcopy(opts[0].state_dict()))
    for t in range(2, 4):
        plain(models[0], opts[0], t)
        in_backward(models[1], opts[1], t)
    assert_equal(opts)


def test_removed():
    models, opts, handle = pair(lr=0.1)
    in_backward(models[1], opts[1], 0)
    handle.remove()
    assert all(p.grad is None for p in models[1].parameters())
    before = [p.detach().clone() for p in models[1].parameters()]
    in_backward(models[1], opts[1], 1)
    assert_same([p.detach() for p in models[1].parameters()], before)
    assert all(p.grad is not None for p in models[1].parameters())
    opts[1].step(lambda: 1.0)


def test_what_nobody_refers_to_is_freed_without_remove():
    models, opts, handle = pair(lr=0.1)
    in_backward(models[1], opts[1], 0)
    alive = [ref(x) for x in (models[1], opts[1], handle, *models[1].parameters())]
    del models, opts, handle
    gc.collect()
    assert [x() for x in alive] == [None] * len(alive)


def test_it_lasts_as_long_as_the_model():
    models, opts, _ = pair(lr=0.1)
    stepped = ref(opts.pop())
    del _
    gc.collect()
    for t in range(2):
        plain(models[0], opts[0], t)
        loss_of(models[1], t).backward()
    assert stepped() is not None
    assert_same(*([p.detach() for p in model.parameters()] for model in models))


class Wrapping(torch.optim.Optimizer):
    """An optimizer as some libraries write Lookahead and SAM."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state

    def step(self):
        self.inner.step()


def test_what_it_cannot_work_with():
    model = net()
    for opt in (onepass.LBFGS(model.parameters()), torch.optim.LBFGS(model.parameters())):
        with pytest.raises(TypeError, match="LBFGS uses all parameters together"):
            onepass.step_in_backward(opt)
    with pytest.raises(TypeError, match="Lookahead uses all"):
        onepass.step_in_backward(onepass.Lookahead(onepass.SGD(model.parameters(), lr=0.1)))
    with pytest.raises(
        TypeError, match=r"^step_in_backward: optimizer must be a torch\.optim\.Optimizer, got the Sequential "
    ):
        onepass.step_in_backward(model)
    with pytest.raises(TypeError, match=r"Wrapping wraps another optimizer \(inner, of the class SGD\), so it cannot"):
        onepass.step_in_backward(Wrapping(onepass.SGD(model.parameters(), lr=0.1)))
    opt = onepass.SGD(model.parameters(), lr=0.1)
    onepass.step_in_backward(opt)
    before = snapshot(opt)
    for call in (lambda: opt.step(lambda: loss_of(model, 0)), lambda: opt.step(closure=lambda: loss_of(model, 0))):
        with pytest.raises(RuntimeError, match="takes no closure while the optimizer steps in backward"):
            call()
    assert_same(snapshot(opt), before)


def test_a_second_call_and_a_log_are_refused_until_remove():
    model = net()
    opt = onepass.SGD(model.parameters(), lr=0.1)
    handle = onepass.step_in_backward(opt)
    for _ in range(2):  # the error registers nothing
        with pytest.raises(ValueError, match="this SGD already steps in backward: call remove"):
            onepass.step_in_backward(opt)
    with pytest.raises(ValueError, match="log_to: this SGD steps in backward"):
        onepass.log_to(types.SimpleNamespace(add_scalar=print), opt)
    in_backward(model, opt, 0)
    handle.remove()
    onepass.step_in_backward(opt).remove()


def test_each_optimizer_of_a_combination_can_step_in_backward():
    models = net(), net()
    opts = [onepass.create("muon", model, lr=0.01) for model in models]
    with pytest.raises(TypeError, match=r"Combined steps by other optimizers.*for each of its optimizers"):
        onepass.step_in_backward(opts[1])
    for opt in opts[1].optimizers:
        onepass.step_in_backward(opt)
    for t in range(3):
        plain(models[0], opts[0], t)
        in_backward(models[1], opts[1], t)
    assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))


def test_an_error_names_the_parameter():
    models, opts, _ = pair(params=lambda model: model.named_parameters(), lr=0.1)
    in_backward(models[1], opts[1], 0)
    opts[1].state[models[1][2].weight]["exp_avg"] = torch.zeros(7)
    before = models[1][2].weight.detach().clone()
    with pytest.raises(ValueError, match=r"at parameter 2 of group 0: .*'2.weight'.*exp_avg has shape"):
        in_backward(models[1], opts[1], 1)
    assert torch.equal(models[1][2].weight, before)


@pytest.fixture
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("zeroes", [True, False])
@pytest.mark.parametrize("autograd", [True, False])
@pytest.mark.parametrize("whose", ["ours", "theirs"])
def test_compiled(whose, autograd, zeroes):
    models, opts, handle = pair(onepass.AdamW if whose == "ours" else torch.optim.AdamW, lr=0.1)

    def train_step(x):
        models[1](x).square().sum().backward()
        if zeroes:
            opts[1].step()
            opts[1].zero_grad()

    compiled = torch.compile(train_step, backend="eager")
    for t in range(3):
        plain(models[0], opts[0], t)
        with torch._dynamo.config.patch(compiled_autograd=autograd):
            compiled(torch.randn(4, 3, generator=torch.Generator().manual_seed(t)))
    assert_equal(opts)
    handle.remove()
