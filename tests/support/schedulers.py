"""Every scheduler of torch with every argument, for the tests of schedulers and of their preview.

A case makes a scheduler from a module (``onepass.lr_scheduler`` or ``TORCH``, torch's own) and an optimizer.
"""

from types import SimpleNamespace

import onepass
import torch

TORCH = SimpleNamespace(**vars(torch.optim.lr_scheduler), SWALR=torch.optim.swa_utils.SWALR)
OURS = onepass.lr_scheduler


class Halving:
    """A factor with a state of its own: how often it was called."""

    def __init__(self, period):
        self.period = period
        self.calls = 0

    def __call__(self, t):
        self.calls += 1
        return 0.5 ** (self.calls // self.period)


ARGUMENTS = {
    "LambdaLR": [
        {"lr_lambda": lambda t: 1 / (1 + t)},
        {"lr_lambda": [lambda t: 0.95**t, lambda t: t // 30]},
        {"lr_lambda": Halving(7)},
    ],
    "MultiplicativeLR": [
        {"lr_lambda": lambda t: 0.99},
        {"lr_lambda": [lambda t: 0.95 if t < 30 else 1.0, lambda t: 1.001]},
    ],
    "StepLR": [{"step_size": 30}, {"step_size": 3, "gamma": 0.9}],
    "MultiStepLR": [{"milestones": [30, 80]}, {"milestones": [2, 2, 50], "gamma": 0.5}],
    "ConstantLR": [{}, {"factor": 0.5, "total_iters": 40}, {"factor": 1.0}],
    "LinearLR": [
        {},
        {"start_factor": 0.05, "end_factor": 0.5, "total_iters": 40},
        {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 100},
    ],
    "ExponentialLR": [{"gamma": 0.99}, {"gamma": 1.002}],
    "PolynomialLR": [{}, {"total_iters": 50, "power": 2.0}, {"total_iters": 1200, "power": 0.5}],
    "CosineAnnealingLR": [{"T_max": 10}, {"T_max": 70, "eta_min": 0.001}, {"T_max": 1100}],
    "CosineAnnealingWarmRestarts": [{"T_0": 10}, {"T_0": 7, "T_mult": 2, "eta_min": 0.001}],
    "CyclicLR": [
        {"base_lr": 0.001, "max_lr": 0.1, "step_size_up": 20},
        {"base_lr": [0.001, 0.002], "max_lr": [0.1, 0.3], "step_size_up": 10, "step_size_down": 25},
        {"base_lr": 0.001, "max_lr": 0.1, "step_size_up": 9, "mode": "triangular2", "cycle_momentum": False},
        {"base_lr": 0.001, "max_lr": 0.1, "step_size_up": 9, "mode": "exp_range", "gamma": 0.99},
        {
            "base_lr": 0.001,
            "max_lr": 0.1,
            "step_size_up": 9,
            "scale_fn": lambda x: 1 / x,
            "base_momentum": 0.5,
            "max_momentum": 0.99,
        },
        {
            "base_lr": 0.001,
            "max_lr": 0.1,
            "step_size_up": 9,
            "scale_fn": lambda x: 0.99**x,
            "scale_mode": "iterations",
        },
    ],
    "OneCycleLR": [
        {"max_lr": 0.1, "total_steps": 1000},
        {"max_lr": [0.1, 0.3], "epochs": 10, "steps_per_epoch": 100, "pct_start": 0.1, "anneal_strategy": "linear"},
        {"max_lr": 0.1, "total_steps": 1000, "three_phase": True, "div_factor": 10.0, "final_div_factor": 100.0},
        {"max_lr": 0.1, "total_steps": 1000, "base_momentum": 0.5, "max_momentum": [0.9, 0.95]},
        {"max_lr": 0.1, "total_steps": 1000, "cycle_momentum": False},
    ],
    "ReduceLROnPlateau": [
        {},
        {"mode": "max", "factor": 0.5, "patience": 2},
        {"patience": 3, "threshold": 0.1, "cooldown": 5, "min_lr": [0.001, 0.002]},
        {"patience": 1, "threshold": 0.05, "threshold_mode": "abs", "min_lr": 1e-4, "eps": 1e-3},
        {"mode": "max", "patience": 1, "threshold": 0.05, "threshold_mode": "abs", "factor": 0.9},
    ],
    "SWALR": [
        {"swa_lr": 0.05},
        {"swa_lr": [0.05, 0.5], "anneal_epochs": 100, "anneal_strategy": "linear"},
        {"swa_lr": 0.01, "anneal_epochs": 0},
    ],
}


def single(name, arguments):
    return lambda m, opt: getattr(m, name)(opt, **{k: _own(v) for k, v in arguments.items()})


def _own(value):
    """Each scheduler has its own object with a state."""
    return Halving(value.period) if isinstance(value, Halving) else value


# As torch's documentation shows them, and more.
CHAININGS = {
    "sequence": lambda m, opt: m.SequentialLR(opt, [m.ConstantLR(opt, 0.1, 20), m.ExponentialLR(opt, 0.9)], [20]),
    "warm-up and cosine": lambda m, opt: m.SequentialLR(
        opt, [m.LinearLR(opt, 0.01, total_iters=10), m.CosineAnnealingLR(opt, 990, 1e-4)], [10]
    ),
    "sequence of four": lambda m, opt: m.SequentialLR(
        opt,
        [
            m.LambdaLR(opt, lambda t: (t + 1) / 10),
            m.OneCycleLR(opt, 0.1, 40),
            m.CosineAnnealingWarmRestarts(opt, 5, 2),
            m.StepLR(opt, 30),
        ],
        [10, 30, 70],
    ),
    "chain": lambda m, opt: m.ChainedScheduler([m.ConstantLR(opt, 0.1, 20), m.ExponentialLR(opt, 0.9)], opt),
    "chain of four": lambda m, opt: m.ChainedScheduler(
        [
            m.LinearLR(opt, 0.1, total_iters=7),
            m.MultiStepLR(opt, [30, 80]),
            m.CosineAnnealingLR(opt, 1100),
            m.MultiplicativeLR(opt, lambda t: 0.999),
        ]
    ),
    "chain with a cycle": lambda m, opt: m.ChainedScheduler(
        [m.CyclicLR(opt, 0.001, 0.1, 20, mode="triangular2"), m.ExponentialLR(opt, 0.99)]
    ),
}

SINGLE = {
    f"{name}-{i}": single(name, arguments) for name, cases in ARGUMENTS.items() for i, arguments in enumerate(cases)
}
ALL = {**SINGLE, **CHAININGS}


def optimizer(package=onepass, tensor_lr=False, **options):
    """An optimizer of two groups; its steps change nothing, as there are no gradients."""
    lrs = [torch.tensor(lr, dtype=torch.float64) if tensor_lr else lr for lr in (0.1, 0.02)]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr} for lr in lrs]
    opt = package.SGD(groups, lr=0.5, momentum=0.9, **options)
    return opt


def metric(t):
    """A metric that falls, rises and stays: each plateau is reduced by it, and none at every chance."""
    return 1.0 / (1 + t // 9) if t < 100 else 0.2 + 0.01 * (t % 13)


def takes_metrics(scheduler):
    return isinstance(scheduler, TORCH.ReduceLROnPlateau)


def advance(scheduler, t):
    """Steps the optimizer, and the scheduler for the t-th time."""
    scheduler.optimizer.step()
    if takes_metrics(scheduler):
        scheduler.step(metric(t))
    else:
        scheduler.step()


def numbers(opt):
    """What schedulers change: rate and momentum of every group."""
    return [(float(group["lr"]), group["momentum"]) for group in opt.param_groups]


def run(scheduler, n, begin=0):
    """The numbers of n steps, the first of which is the begin-th."""
    rows = []
    for t in range(begin, begin + n):
        rows.append(numbers(scheduler.optimizer))
        advance(scheduler, t)
    return rows
