"""What torch builds around optimizers: schedulers, averaging, checkpoints, a training run, and the names to import."""

import copy
import importlib
import inspect
import math
from types import ModuleType

import imitation
import onepass
import pytest
import torch
from cases import ELEMENTWISE, ROWS, each_class, each_row, for_rows
from contract import assert_close, assert_same, leaves, python, run_both, snapshot, train
from reference import params_of
from torch.optim import lr_scheduler


@pytest.fixture(autouse=True)
def _one_thread(machine):
    """The models here are small: a second thread would only wait for the first."""
    torch.set_num_threads(1)


# -- schedulers ------------------------------------------------------------------------------------------------------


def chained(opt):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.5, 3), lr_scheduler.ExponentialLR(opt, 0.8)], optimizer=opt
    )


def sequential(opt):
    parts = [lr_scheduler.LinearLR(opt, 0.25, total_iters=4), lr_scheduler.CosineAnnealingLR(opt, 6)]
    return lr_scheduler.SequentialLR(opt, parts, milestones=[4])


def cycles(opt):
    """Whether there is momentum, or a first beta, to be cycled against the learning rate."""
    return bool({"momentum", "betas"} & opt.defaults.keys())


def cyclic(opt):
    return lr_scheduler.CyclicLR(opt, 0.001, 0.1, step_size_up=3, cycle_momentum=cycles(opt))


def one_cycle(opt):
    return lr_scheduler.OneCycleLR(opt, 0.1, total_steps=20, cycle_momentum=cycles(opt))


SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + t)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda t: 0.9),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5], 0.5),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.5, 4),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.25, total_iters=5),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.8),
    "SequentialLR": sequential,
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 8),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=1),
    "CyclicLR": cyclic,
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 4),
    "OneCycleLR": one_cycle,
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 8),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, 0.001, anneal_epochs=4),
}


def test_every_scheduler_of_torchs_is_tried():
    assert set(SCHEDULERS) == {*lr_scheduler.__all__, "SWALR"} - {"LRScheduler"}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@each_row
def test_schedulers(row, name, tensor):
    """With a tensor as learning rate, schedulers fill it in place."""
    lr = torch.tensor(0.05, dtype=torch.float64) if tensor else 0.05

    def script(opt):
        opt.add_param_group({"params": leaves([(3,)], seed=8), "lr": 0.02})
        rates = opt.param_groups[0]["lr"] if tensor else None
        scheduler = SCHEDULERS[name](opt)
        seen = []
        for t in range(10):
            train(opt, first=t)
            scheduler.step(*([math.cos(t)] if name == "ReduceLROnPlateau" else []))
            rows = [[group.get(key) for key in ("lr", "momentum", "betas")] for group in opt.param_groups]
            seen.append([[float(lr), *others] for lr, *others in rows])
        assert (opt.param_groups[0]["lr"] is rates) == tensor
        assert len({str(row) for row in seen}) > 1
        return seen

    run_both(row, script, lr=lr)


@each_row
def test_a_scheduler_and_its_optimizer_resume_together(row):
    def begin():
        opt = row.ours(leaves(), **row.full)
        return opt, one_cycle(opt)

    def go(opt, scheduler, ts):
        for t in ts:
            train(opt, first=t)
            scheduler.step()

    whole, stopped = begin(), begin()
    go(*whole, range(8))
    go(*stopped, range(4))
    resumed = begin()
    with torch.no_grad():
        for p, q in zip(params_of(resumed[0]), params_of(stopped[0]), strict=True):
            p.copy_(q)
    resumed[1].load_state_dict(stopped[1].state_dict())
    resumed[0].load_state_dict(stopped[0].state_dict())
    go(*resumed, range(4, 8))
    assert_same(snapshot(resumed[0]), snapshot(whole[0]))


# -- averaging -------------------------------------------------------------------------------------------------------


def net(seed=0, dtype=torch.float64):
    # No bias before the normalization: its gradient is rounding errors around zero, of which Lion takes the sign.
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(64, 3),
    ).to(dtype)


def digits(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(24, 1, 6, 6, dtype=dtype, generator=generator)
    return x, x.mean((1, 2, 3)).sign().long() + 1


def fit(model, opt, steps, after=lambda: None):
    x, y = digits(next(model.parameters()).dtype)
    losses = []
    for t in range(steps):
        part = slice(8 * (t % 3), 8 * (t % 3) + 8)
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x[part]), y[part])
        loss.backward()
        opt.step()
        after()
        losses.append(loss.item())
    return losses


AVERAGES = {
    "swa": lambda utils: {},
    "swa by one": lambda utils: {"avg_fn": utils.get_swa_avg_fn()},
    "swa of many": lambda utils: {"multi_avg_fn": utils.get_swa_multi_avg_fn()},
    "ema by one": lambda utils: {"avg_fn": utils.get_ema_avg_fn(0.9)},
    "ema of many": lambda utils: {"multi_avg_fn": utils.get_ema_multi_avg_fn(0.9), "use_buffers": True},
}


@pytest.mark.usefixtures("in_float64")
@pytest.mark.parametrize("average", AVERAGES)
@each_row
def test_averaged_models(row, average):
    utils = onepass.swa_utils
    ends = []
    for cls in (row.ours, row.theirs):
        model = net()
        opt = cls(model.parameters(), **row.full)
        averaged = utils.AveragedModel(model, **AVERAGES[average](utils))
        scheduler = utils.SWALR(opt, 0.02, anneal_epochs=3)

        def after(averaged=averaged, scheduler=scheduler, model=model):
            averaged.update_parameters(model)
            scheduler.step()

        fit(model, opt, 6, after)
        utils.update_bn(digits()[0].split(8), averaged)
        ends.append(list(averaged.state_dict().values()))
    assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-11)


# -- a model that learns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-8), (torch.float32, 2e-2)], ids=str)
@each_row
def test_fifty_steps_of_training(row, dtype, close):
    """Every step's loss; a difference in rounding grows along the way, a wrong formula is off at once."""
    curves = []
    for cls in (row.ours, row.theirs):
        model = net(dtype=dtype)
        before = onepass.stats()
        curves.append(fit(model, cls(model.parameters(), **row.full), 50))
        assert onepass.stats()["torch"] == before["torch"]
    assert curves[0][-1] < 0.7 * curves[0][0]
    assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=close, atol=close)


# -- distributed checkpoints, of one process -------------------------------------------------------------------------


@each_row
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torch_distributed_checkpoint_makes_and_moves_all_state(row):
    """It makes the states by a step with zero gradients and a learning rate of zero: no parameter may change a bit."""
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, other = net(), net(seed=1)
    opt, fresh = row.ours(model.parameters(), **row.full), row.ours(other.parameters(), lr=0.5)
    untouched = [p.detach().clone() for p in model.parameters()]
    get_state_dict(model, opt)
    assert_same([p.detach() for p in model.parameters()], untouched)
    assert all(set(row.states) <= set(opt.state[p]) for p in params_of(opt))
    fit(model, opt, 3)
    weights, states = copy.deepcopy(get_state_dict(model, opt))  # loading takes tensors as they are
    set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=states)
    assert_same(snapshot(fresh), snapshot(opt))
    fit(model, opt, 2)
    fit(other, fresh, 2)
    assert_same(snapshot(fresh), snapshot(opt))


# -- names -----------------------------------------------------------------------------------------------------------


def test_onepass_has_every_name_of_torch_optim():
    public = {name for name in dir(torch.optim) if not name.startswith("_")}
    assert public <= set(dir(onepass))
    assert {*getattr(torch.optim, "__all__", ())} <= {*onepass.__all__}
    taken_over = {row.name for row in ROWS}
    for name in public - taken_over - {"lr_scheduler", "swa_utils"}:
        assert getattr(onepass, name) is getattr(torch.optim, name)
    names = {}
    exec("from onepass import *", names)
    assert set(onepass.__all__) <= set(names)


def test_dir_has_public_names_only():
    shown = {name for name in dir(onepass) if not name.startswith("__")}
    assert shown == set(onepass.__all__) - {"__version__"}
    assert "__version__" in dir(onepass)
    modules = {name for name in shown if isinstance(getattr(onepass, name), ModuleType)}
    of_torch = {name for name in torch.optim.__all__ if isinstance(getattr(torch.optim, name), ModuleType)}
    assert modules == of_torch | {"lr_scheduler", "schedules", "swa_utils"}


@pytest.mark.slow
def test_preview_and_plot_are_functions_wherever_they_are_taken_from():
    """Whichever submodule is imported first."""
    for first in ("onepass.lr_scheduler", "onepass.schedules.preview", "onepass.cli.bench", "onepass"):
        code = f"import {first}, onepass, inspect; assert all(map(inspect.isfunction, (onepass.preview, onepass.plot)))"
        done = python(code)
        assert done.returncode == 0, done.stderr
    assert onepass.preview is onepass.lr_scheduler.preview
    assert onepass.plot is onepass.lr_scheduler.plot


@pytest.mark.parametrize("module", ["lr_scheduler", "swa_utils"])
def test_submodules_are_modules_with_torchs_names(module):
    ours = importlib.import_module(f"onepass.{module}")
    torchs = importlib.import_module(f"torch.optim.{module}")
    assert isinstance(ours, ModuleType)
    assert getattr(onepass, module) is ours
    assert [*ours.__all__] == [*torchs.__all__] + ["SWALR"] * (module == "lr_scheduler")
    own = {n for n, v in vars(torchs).items() if getattr(v, "__module__", None) == torchs.__name__ and n[0] != "_"}
    for name in {*own, *torchs.__all__} | ({"_LRScheduler", "EPOCH_DEPRECATION_WARNING"} & set(vars(torchs))):
        value, theirs = getattr(ours, name), getattr(torchs, name)
        if isinstance(theirs, type) and issubclass(theirs, lr_scheduler.LRScheduler):
            assert issubclass(value, theirs)  # has a preview besides
        elif name == "AveragedModel":
            assert issubclass(value, theirs)  # has decay= besides
        else:
            assert value is theirs


@for_rows(row for row in ROWS if row.name in torch.optim.__all__)
def test_our_classes_are_torchs_classes(row):
    opt = row.ours(leaves(row.shapes), **row.full)
    assert isinstance(opt, row.theirs)
    assert isinstance(opt, torch.optim.Optimizer)
    assert row.ours.__name__ == row.theirs.__name__
    # torch's AdamW is an Adam, and ours is torch's; but ours is not ours.
    assert isinstance(onepass.AdamW(leaves()), torch.optim.Adam)


@each_class
def test_signatures_are_torchs_and_a_little_more(row):
    ours = list(inspect.signature(row.ours).parameters.values())
    torchs = list(inspect.signature(row.theirs).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[: len(torchs)]] == [(p.name, p.kind, p.default) for p in torchs]
    assert {p.name: p.default for p in ours[len(torchs) :]} == row.own
    assert {p.kind for p in ours[len(torchs) :]} <= {inspect.Parameter.KEYWORD_ONLY}
    step = inspect.signature(row.ours.step)
    torchs = inspect.signature(row.theirs.step)
    assert list(step.parameters) == list(torchs.parameters) == ["self", "closure"]
    assert step.parameters["closure"].default is torchs.parameters["closure"].default


@each_class
def test_positional_arguments_arrive_where_torch_has_them(row):
    names = [p.name for p in inspect.signature(row.theirs).parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD][1:]
    values = {"lr": 0.3, "betas": (0.5, 0.6), "eps": 0.1, "weight_decay": 0.2, "amsgrad": True, "momentum": 0.7}
    values |= {"dampening": 0.0, "nesterov": True, "alpha": 0.8, "rho": 0.7, "centered": True, "lr_decay": 0.4}
    values |= {"initial_accumulator_value": 0.6, "momentum_decay": 0.05, "decoupled_weight_decay": True, "lambd": 0.15}
    values |= {"t0": 7.0, "etas": (0.4, 1.3), "step_sizes": (0.01, 0.02)}
    values |= {
        "beta2_decay": -0.5,
        "d": 2.0,
        "ns_coefficients": (3.0, -4.0, 2.0),
        "ns_steps": 3,
        "adjust_lr_fn": "original",
    }
    values |= {"max_iter": 7, "max_eval": 9, "tolerance_grad": 0.1, "tolerance_change": 0.2, "history_size": 3}
    values |= {"line_search_fn": "strong_wolfe"} | ({"eps": (0.1, 0.2)} if row.has_means else {})
    values |= {"foreach": False, "maximize": True, "capturable": False, "differentiable": True}
    values |= {"no_prox": True, "clip_exponent": 0.5, "alpha_warmup": 3.0, "beta3_warmup": 4.0}
    values |= {"warmup_steps": 5, "r": 0.5, "weight_lr_power": 1.5, "silent_sgd_phase": False}
    values |= {"gamma": 0.1, "clip_correction": False, "grad_averaging": True}
    values |= {"trust_ratio": False, "trust_clip": True, "trust_coefficient": 0.1}
    values |= {"beta3": 0.5, "decouple": False, "use_bias_correction": True, "safeguard_warmup": True}
    values |= {"beta2": 0.8, "d0": 0.1, "d_coef": 0.5, "growth_rate": 1.5, "slice_p": 2, "clip_threshold": 0.5}
    values |= {} if row.has_pairs else {"betas": (0.5, 0.6, 0.7)}
    ours, stock = (cls(leaves(row.shapes), *(values[name] for name in names)) for cls in (row.ours, row.theirs))
    group = ours.param_groups[0]
    assert {key: group[key] for key in stock.defaults} == stock.defaults
    assert {key: group[key] for key in names} == {key: values[key] for key in names}


@pytest.mark.slow
def test_base_classes_are_bound_when_the_module_is_imported():
    """Who puts ours in the place of torch's must not make it its own parent."""
    code = """
import torch, onepass
for name in NAMES:
    setattr(torch.optim, name, getattr(onepass, name))
for name in NAMES:
    cls = getattr(torch.optim, name)
    p = torch.nn.Parameter(torch.ones(3))
    q = torch.nn.Parameter(torch.ones(2, 2))
    p.grad, q.grad = torch.ones(3), torch.ones(2, 2)
    opt = cls([p, q], lr=0.1)
    q.data = torch.ones(4, 2)[::2].t()
    opt.step()
    opt.load_state_dict(opt.state_dict())
    opt.step()
    shared = torch.ones(4)
    a, b = torch.nn.Parameter(shared[:3]), torch.nn.Parameter(shared[1:])
    a.grad, b.grad = torch.ones(3), torch.ones(3)
    cls([a, b], lr=0.1).step()  # by torch's own code
print(onepass.stats()["torch"])
"""
    names = [row.name for row in ELEMENTWISE if issubclass(row.ours, row.theirs)]
    done = python(f"NAMES = {names}\n{code}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{{'memory shared with another parameter': {2 * len(names)}}}"


# -- DLPack ----------------------------------------------------------------------------------------------------------


def steps_of_all_sorts_of_tensors() -> list:
    """The numbers that all classes leave in them, and the message about a tensor without memory."""
    ends = []
    for row in ELEMENTWISE:
        torch.manual_seed(0)
        params = [torch.randn(s) for s in [(), (3,), (0, 2), (4, 5)]]
        params += [torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)]
        params += [torch.randn(6, 4)[::2, 1:], torch.randn(3, 4).t()]
        params += [torch.randn(3, dtype=t) for t in (torch.float64, torch.bfloat16, torch.float16, torch.complex64)]
        params = [torch.nn.Parameter(p) for p in params]
        opt = row.ours(params, **copy.deepcopy(row.full))
        for _ in range(3):
            for p in params:
                p.grad = torch.randn_like(p)
            params[3].grad = torch.randn(5, 4).t()
            params[1].grad = torch._neg_view(torch.randn(3))
            params[-1].grad = torch.randn(3, dtype=torch.complex64).conj()
            opt.step()
        meta = torch.nn.Parameter(torch.ones(2, device="meta"))
        meta.grad = torch.ones(2, device="meta")
        opt.add_param_group({"params": [meta]})
        ends.append(onepass.explain(opt)[-1].reason)
        for p in params:
            both = (p.detach(), *opt.state[p].values())
            ends += [(torch.view_as_real(t) if t.is_complex() else t).tolist() for t in both]
    return ends


def test_a_torch_without_the_borrowing_export_is_read_through_the_owning_one():
    """Every sort of tensor that a step reads, by both: the same bits."""
    by_torch = onepass.stats()["torch"]
    borrowed = steps_of_all_sorts_of_tensors()
    with imitation.owning_export():
        owned = steps_of_all_sorts_of_tensors()
    assert owned == borrowed
    assert len(owned) > 100
    assert owned[-1]
    assert onepass.stats()["torch"] == by_torch
