"""The optimizers that torch does not have, beside those of timm, pytorch_optimizer, schedulefree and prodigyopt.

After 100 steps no element is further from theirs than rounding explains. Where they deviate from the paper, with the
argument that undoes it, or with the deviation.
"""

import copy

import onepass
import prodigyopt
import pytest
import pytorch_optimizer
import schedulefree
import timm.optim
import torch
from torch.nn import Parameter

STEPS = 100
LR = 1e-3


def public_schedule_free(optimizer):
    """It begins in the other mode."""
    optimizer.train()
    return optimizer


# Name -> ours, theirs.
PAIRS = {
    "AdaBelief, pytorch_optimizer": (
        lambda p: onepass.AdaBelief(p, LR, eps=1e-8),
        lambda p: pytorch_optimizer.AdaBelief(p, LR, eps=1e-8, weight_decay=0.0),
    ),
    "AdaBelief, timm": (  # it rectifies by default, and decays with the rate
        lambda p: onepass.AdaBelief(p, LR, eps=1e-8, weight_decay=0.1),
        lambda p: timm.optim.AdaBelief(p, LR, eps=1e-8, weight_decay=0.1, rectify=False, decoupled_decay=True),
    ),
    "Adan, pytorch_optimizer": (
        lambda p: onepass.Adan(p, LR, weight_decay=0.02, no_prox=True),
        lambda p: pytorch_optimizer.Adan(p, LR, betas=(0.98, 0.92, 0.99), weight_decay=0.02, weight_decouple=True),
    ),
    "Adan, timm": (
        lambda p: onepass.Adan(p, LR, weight_decay=0.02),
        lambda p: timm.optim.Adan(p, LR, weight_decay=0.02, foreach=False),
    ),
    "AdEMAMix": (
        lambda p: onepass.AdEMAMix(p, LR, alpha=5.0, weight_decay=0.1),
        lambda p: pytorch_optimizer.AdEMAMix(p, LR, alpha=5.0, weight_decay=0.1, weight_decouple=True),
    ),
    "AdEMAMix, warm-up": (
        lambda p: onepass.AdEMAMix(p, LR, alpha=5.0, alpha_warmup=60, beta3_warmup=60),
        lambda p: pytorch_optimizer.AdEMAMix(p, LR, alpha=5.0, weight_decay=0.0, t_alpha_beta3=60),
    ),
    "ADOPT, timm": (  # its exponent is 1/3
        lambda p: onepass.ADOPT(p, LR, weight_decay=0.1, decoupled_weight_decay=True),
        lambda p: timm.optim.Adopt(p, LR, weight_decay=0.1, decoupled=True, clip_exp=0.25, foreach=False),
    ),
    "ADOPT, pytorch_optimizer": (  # it counts the steps of the clamp from one later
        lambda p: onepass.ADOPT(p, LR),
        lambda p: pytorch_optimizer.ADOPT(p, LR, weight_decay=0.0, clip_lambda=lambda step: (step - 1) ** 0.25),
    ),
    "AdamW, cautious": (
        lambda p: onepass.AdamW(p, LR, weight_decay=0.1, cautious=True),
        lambda p: timm.optim.AdamWLegacy(p, LR, weight_decay=0.1, caution=True),
    ),
    "Lion, cautious": (
        lambda p: onepass.Lion(p, LR, weight_decay=0.1, cautious=True),
        lambda p: timm.optim.Lion(p, LR, weight_decay=0.1, caution=True, foreach=False),
    ),
    "ADOPT, cautious": (
        lambda p: onepass.ADOPT(p, LR, weight_decay=0.1, decoupled_weight_decay=True, cautious=True),
        lambda p: timm.optim.Adopt(p, LR, weight_decay=0.1, decoupled=True, clip_exp=0.25, caution=True, foreach=False),
    ),
    "LaProp, cautious": (
        lambda p: onepass.LaProp(p, LR, cautious=True),
        lambda p: timm.optim.LaProp(p, LR, eps=1e-15, caution=True),
    ),
    "CAME": (
        lambda p: onepass.CAME(p, LR, weight_decay=0.1),
        lambda p: pytorch_optimizer.CAME(p, LR, betas=(0.9, 0.999, 0.9999), weight_decay=0.1, weight_decouple=True),
    ),
    "LAMB, timm": (  # it clips the gradients by default
        lambda p: onepass.LAMB(p, LR, weight_decay=0.1),
        lambda p: timm.optim.Lamb(p, LR, weight_decay=0.1, max_grad_norm=None),
    ),
    "LAMB, timm, as by default": (
        lambda p: onepass.LAMB(p, LR, weight_decay=0.1, trust_clip=True, max_norm=1.0),
        lambda p: timm.optim.Lamb(p, LR, weight_decay=0.1, trust_clip=True),
    ),
    "MARS, timm": (
        lambda p: onepass.MARS(p, LR, weight_decay=0.1),
        lambda p: timm.optim.Mars(p, LR, betas=(0.95, 0.99), weight_decay=0.1, optimize_1d=True),
    ),
    "NovoGrad, timm": (
        lambda p: onepass.NovoGrad(p, LR, weight_decay=0.1, grad_averaging=True),
        lambda p: timm.optim.NvNovoGrad(p, LR, weight_decay=0.1, grad_averaging=True),
    ),
    "Prodigy": (
        lambda p: onepass.Prodigy(p, d0=LR, eps=1e-8, weight_decay=0.1, use_bias_correction=True),
        lambda p: prodigyopt.Prodigy(p, d0=LR, eps=1e-8, weight_decay=0.1, use_bias_correction=True),
    ),
    "LARS, timm": (
        lambda p: onepass.LARS(p, 1.0, weight_decay=0.1, nesterov=True),
        lambda p: timm.optim.Lars(p, 1.0, momentum=0.9, weight_decay=0.1, nesterov=True),
    ),
    "StableAdamW": (
        lambda p: onepass.StableAdamW(p, LR, weight_decay=0.1),
        lambda p: pytorch_optimizer.StableAdamW(p, LR, eps=1e-6, weight_decay=0.1, kahan_sum=False),
    ),
    "LaProp, pytorch_optimizer": (
        lambda p: onepass.LaProp(p, LR),
        lambda p: pytorch_optimizer.LaProp(p, LR, betas=(0.9, 0.999), weight_decay=0.0),
    ),
    "ScheduleFreeAdamW": (
        lambda p: onepass.ScheduleFreeAdamW(p, LR, weight_decay=0.1, warmup_steps=20),
        lambda p: public_schedule_free(schedulefree.AdamWScheduleFree(p, LR, weight_decay=0.1, warmup_steps=20)),
    ),
    "ScheduleFreeRAdam": (
        lambda p: onepass.ScheduleFreeRAdam(p, LR, r=1.0, silent_sgd_phase=False),
        lambda p: public_schedule_free(schedulefree.RAdamScheduleFree(p, LR, r=1.0, silent_sgd_phase=False)),
    ),
    "ScheduleFreeSGD": (
        lambda p: onepass.ScheduleFreeSGD(p, LR, weight_decay=0.1, warmup_steps=20),
        lambda p: public_schedule_free(schedulefree.SGDScheduleFree(p, LR, weight_decay=0.1, warmup_steps=20)),
    ),
    "Signum": (
        lambda p: onepass.Signum(p, LR, weight_decay=0.1),
        lambda p: pytorch_optimizer.SignSGD(p, LR, momentum=0.9, weight_decay=0.1, weight_decouple=True),
    ),
}


def trained(make):
    """Parameters after STEPS steps with random gradients, and how far they have moved."""
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in [(64, 33), (7,), (3, 5, 2)]]
    start = [p.detach().clone() for p in params]
    optimizer = make(params)
    for _ in range(STEPS):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return params, max(float((p.detach() - q).abs().max()) for p, q in zip(params, start, strict=True))


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.filterwarnings("ignore")
def test_the_same_parameters(name):
    (ours, moved), (theirs, _) = (trained(make) for make in PAIRS[name])
    assert moved > 5 * LR
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-3 * moved)


@pytest.mark.filterwarnings("ignore")
def test_deviations():
    """pytorch_optimizer's ADOPT clamps less; timm's AdaBelief rectifies; each is visible."""
    for ours, theirs in (
        (lambda p: onepass.ADOPT(p, LR), lambda p: pytorch_optimizer.ADOPT(p, LR, weight_decay=0.0)),
        (lambda p: onepass.AdaBelief(p, LR, eps=1e-8), lambda p: timm.optim.AdaBelief(p, LR, eps=1e-8)),
    ):
        (a, moved), (b, _) = trained(ours), trained(theirs)
        assert max(float((p - q).abs().max()) for p, q in zip(a, b, strict=True)) > 1e-2 * moved


SCHEDULE_FREE = {
    "AdamW": (onepass.ScheduleFreeAdamW, schedulefree.AdamWScheduleFree, {"warmup_steps": 5, "weight_decay": 0.1}),
    "RAdam": (onepass.ScheduleFreeRAdam, schedulefree.RAdamScheduleFree, {"silent_sgd_phase": False}),
    "SGD": (onepass.ScheduleFreeSGD, schedulefree.SGDScheduleFree, {"r": 1.0}),
}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_a_checkpoint_of_schedulefree(name, mode):
    """Ours goes on where theirs has stopped, from a checkpoint taken in either of its modes."""
    ours, theirs, kwargs = SCHEDULE_FREE[name]
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in [(64, 33), (7,)]]
    first = public_schedule_free(theirs(params, lr=0.01, **kwargs))

    def step(optimizer, params):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    for _ in range(10):
        step(first, params)
    getattr(first, mode)()
    own = [Parameter(p.detach().clone()) for p in params]
    second = ours(own)
    second.load_state_dict(onepass.convert_state_dict(copy.deepcopy(first.state_dict())))
    for optimizer in (first, second):
        optimizer.train()
    state = generator.get_state()
    for optimizer, held in ((first, params), (second, own)):
        generator.set_state(state)
        for _ in range(10):
            step(optimizer, held)
    for point in ("train", "eval"):
        for optimizer in (first, second):
            getattr(optimizer, point)()
        for p, q in zip(params, own, strict=True):
            torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("still", [False, True])  # whether the first parameter has a learning rate of 0
@pytest.mark.parametrize("arguments", [{}, {"slice_p": 3}, {"betas": (0.5, 0.99)}, {"safeguard_warmup": True}], ids=str)
def test_a_checkpoint_of_prodigyopt(arguments, still):
    """Ours goes on where theirs has stopped, in the middle of the growth, and the estimates stay the same."""
    generator = torch.Generator().manual_seed(0)
    goals = [torch.randn(shape, generator=generator) for shape in [(64, 33), (7,), (3, 2)]]
    params = [Parameter(torch.zeros_like(goal) if i == 1 else goal + 1) for i, goal in enumerate(goals)]

    def groups(params):
        return [{"params": params[:1], "lr": 0.0}, {"params": params[1:]}] if still else params

    first = prodigyopt.Prodigy(groups(params), d0=1e-4, **arguments)

    def step(optimizer, params):
        for p, goal in zip(params, goals, strict=True):
            p.grad = p.detach() - goal + 0.1 * torch.randn(p.shape, generator=generator)
        optimizer.step()

    for _ in range(2):
        step(first, params)
    own = [Parameter(p.detach().clone()) for p in params]
    second = onepass.Prodigy(groups(own))
    second.load_state_dict(onepass.convert_state_dict(copy.deepcopy(first.state_dict())))
    state, before = generator.get_state(), first.param_groups[0]["d"]
    for optimizer, held in ((first, params), (second, own)):
        generator.set_state(state)
        for _ in range(10):
            step(optimizer, held)
    assert first.param_groups[0]["d"] > 1.2 * before > 1e-4
    assert second.param_groups[0]["d"] == pytest.approx(first.param_groups[0]["d"], rel=1e-4)
    for p, q in zip(params, own, strict=True):
        # Where gradients have been small from the first step on, epsilon is visible: they multiply it by the next d.
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-3 * first.param_groups[0]["d"])


def test_a_checkpoint_of_prodigyopt_before_a_tensor_is_frozen():
    """The estimate is that of our own run from the beginning: no share of it outlives the gradients that it is of."""
    generator = torch.Generator().manual_seed(0)
    goals = [torch.randn(shape, generator=generator) for shape in [(8,), (64, 33), (70,)]]
    theirs, ours = ([Parameter(goal + 1) for goal in goals] for _ in range(2))
    arguments = {"d0": 1e-4, "betas": (0.9, 0.9)}
    first, whole = prodigyopt.Prodigy(theirs, **arguments), onepass.Prodigy(ours, **arguments)

    def step(optimizer, params, number, frozen):
        noise = torch.Generator().manual_seed(number)
        for place, (p, goal) in enumerate(zip(params, goals, strict=True)):
            grad = p.detach() - goal + 0.02 * torch.randn(p.shape, generator=noise)
            p.grad = None if place < frozen else grad
        optimizer.step()

    for number in range(20):
        step(first, theirs, number, 0)
        step(whole, ours, number, 0)
    own = [Parameter(p.detach().clone()) for p in theirs]
    second = onepass.Prodigy(own)
    second.load_state_dict(onepass.convert_state_dict(copy.deepcopy(first.state_dict())))
    for number in range(20, 200):
        for optimizer, params in ((whole, ours), (second, own)):
            optimizer.param_groups[0]["lr"] *= 0.9
            step(optimizer, params, number, 1)
    d = whole.param_groups[0]["d"]
    assert second.param_groups[0]["d"] == pytest.approx(d, rel=1e-4)
    for p, q in zip(ours, own, strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-3 * d)


# Name -> ours, theirs, and the arguments of theirs. Ours has other defaults, and takes its options of the checkpoint.
OF_TIMM = {
    "AdaBelief": (onepass.AdaBelief, timm.optim.AdaBelief, {"rectify": False, "eps": 1e-8, "weight_decay": 0.1}),
    "AdaBelief, no decay": (
        onepass.AdaBelief,
        timm.optim.AdaBelief,
        {"rectify": False, "decoupled_decay": False, "eps": 1e-8},
    ),
    "Adan": (onepass.Adan, timm.optim.Adan, {"weight_decay": 0.02, "no_prox": True}),
    "ADOPT": (onepass.ADOPT, timm.optim.Adopt, {"clip_exp": 0.25, "decoupled": True, "weight_decay": 0.1}),
    "ADOPT, not clipped": (onepass.ADOPT, timm.optim.Adopt, {"clip_exp": None, "caution": True}),
    "AdamW": (onepass.AdamW, timm.optim.AdamWLegacy, {"weight_decay": 0.1, "caution": True}),
    "AdamW, amsgrad": (onepass.AdamW, timm.optim.AdamWLegacy, {"weight_decay": 0.1, "amsgrad": True}),
    "LAMB": (onepass.LAMB, timm.optim.Lamb, {"weight_decay": 0.1, "trust_clip": True, "max_grad_norm": None}),
    "LAMB, not adapted": (onepass.LAMB, timm.optim.Lamb, {"weight_decay": 0.0, "max_grad_norm": None}),
    "LAMB, always adapted": (
        onepass.LAMB,
        timm.optim.Lamb,
        {"weight_decay": 0.0, "always_adapt": True, "max_grad_norm": None},
    ),
    "LARS": (onepass.LARS, timm.optim.Lars, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}),
    "LARS, not adapted": (onepass.LARS, timm.optim.Lars, {"momentum": 0.9, "weight_decay": 0.0}),
    "Lion": (onepass.Lion, timm.optim.Lion, {"weight_decay": 0.1, "caution": True}),
    "MARS": (onepass.MARS, timm.optim.Mars, {"weight_decay": 0.1, "optimize_1d": True, "gamma": 0.05}),
    "NovoGrad": (onepass.NovoGrad, timm.optim.NvNovoGrad, {"weight_decay": 0.1, "grad_averaging": True}),
}


@pytest.mark.parametrize("name", OF_TIMM)
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_timm(name):
    """Ours goes on where theirs has stopped, with the options of the checkpoint, which the conversion leaves alone."""
    ours, theirs, kwargs = OF_TIMM[name]
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in [(64, 33), (7,), (3, 5, 2), (4,)]]
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.02}]  # the last parameter has no gradient
    first = theirs(groups, lr=0.01, **kwargs)

    def step(optimizer, params):
        for p in params[:3]:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()

    for _ in range(5):
        step(first, params)
    own = [Parameter(p.detach().clone()) for p in params]
    second = ours([{"params": own[:2]}, {"params": own[2:]}])
    given = copy.deepcopy(first.state_dict())
    before = str(given)
    second.load_state_dict(onepass.convert_state_dict(given))
    assert str(given) == before
    start, state = [p.detach().clone() for p in own[:3]], generator.get_state()
    for optimizer, held in ((first, params), (second, own)):
        generator.set_state(state)
        for _ in range(5):
            step(optimizer, held)
    for p, q, from_ in zip(params[:3], own, start, strict=False):
        moved = float((p.detach() - from_).abs().max())
        assert moved > 0
        torch.testing.assert_close(q, p, rtol=1e-6, atol=1e-4 * moved)


NOT_CONVERTED = "whose checkpoints are not converted"
REFUSED_OF_TIMM = {  # part of the message -> optimizer, arguments
    "rectify of timm's AdaBelief must be False, got True": (timm.optim.AdaBelief, {}),
    "decoupled_decay of timm's AdaBelief": (timm.optim.AdaBelief, {"rectify": False, "decoupled_decay": False}),
    "amsgrad of timm's AdaBelief": (timm.optim.AdaBelief, {"rectify": False, "amsgrad": True}),
    "caution of timm's Adan": (timm.optim.Adan, {"caution": True}),
    "clipping_threshold of timm's AdamWLegacy": (timm.optim.AdamWLegacy, {"clipping_threshold": 1.0}),
    "decoupled_decay of LAMB": (timm.optim.Lamb, {"decoupled_decay": True}),
    "caution of LAMB": (timm.optim.Lamb, {"caution": True}),
    "corrected_weight_decay of timm's Lion": (timm.optim.Lion, {"corrected_weight_decay": True}),
    "trust_clip of timm's Lars": (timm.optim.Lars, {"trust_clip": True}),
    "dampening of timm's Lars": (timm.optim.Lars, {"momentum": 0.9, "dampening": 0.1}),
    "optimize_1d of timm's Mars": (timm.optim.Mars, {}),
    "mars_type of timm's Mars": (timm.optim.Mars, {"mars_type": "lion", "optimize_1d": True}),
    "amsgrad of timm's NvNovoGrad": (timm.optim.NvNovoGrad, {"amsgrad": True}),
    f"{NOT_CONVERTED}$": (timm.optim.LaProp, {}),
    f"{NOT_CONVERTED}(?#AdamP)": (timm.optim.AdamP, {}),
    f"{NOT_CONVERTED}(?#Muon)": (timm.optim.Muon, {}),
    f"{NOT_CONVERTED}(?#NAdamLegacy)": (timm.optim.NAdamLegacy, {}),
    f"{NOT_CONVERTED}(?#NAdamW)": (timm.optim.NAdamW, {}),
    f"{NOT_CONVERTED}(?#RMSpropTF)": (timm.optim.RMSpropTF, {}),
    f"{NOT_CONVERTED}(?#SGDW)": (timm.optim.SGDW, {}),
}


@pytest.mark.parametrize("message", REFUSED_OF_TIMM)
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_timm_without_counterpart(message):
    theirs, kwargs = REFUSED_OF_TIMM[message]
    params = [Parameter(torch.ones(4, 3)), Parameter(torch.ones(3))]
    optimizer = theirs(params, lr=0.01, weight_decay=0.1, **kwargs)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(ValueError, match=f"group 0.*{message}"):
        onepass.convert_state_dict(optimizer.state_dict())
