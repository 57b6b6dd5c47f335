"""accelerate with onepass: prepare, mixed precision, accumulation, clipping, checkpoints, skipped steps."""

import math

import accelerate
import onepass
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from onepass.schedules import linear, warmup
from reference import only_kernels
from tiny import assert_clipped, assert_kernels, assert_same_bits, assert_same_run, loader, loss_of, net, weights

CLASSES = {
    "AdamW": {"lr": 0.02, "weight_decay": 0.1},
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "RMSprop": {"lr": 0.005, "momentum": 0.5},
}


def begin(cls, options, schedule=None, **arguments):
    accelerator = Accelerator(cpu=True, **arguments)
    model = net()
    optimizer = cls(model.parameters(), **options)
    scheduler = schedule(optimizer) if schedule else torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    return accelerator, *accelerator.prepare(model, optimizer, loader(), scheduler)


def train(accelerator, model, optimizer, data, scheduler, epochs=2, max_norm=None):
    losses = []
    for _ in range(epochs):
        for x, y in data:
            with accelerator.accumulate(model):
                loss = loss_of(model, x, y)
                accelerator.backward(loss)
                if max_norm and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), max_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            assert not accelerator.optimizer_step_was_skipped
    return losses, weights(model)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_prepare_accumulate_and_clip(name, precision, accumulate):
    arguments = {"mixed_precision": precision, "gradient_accumulation_steps": accumulate}
    ours = begin(getattr(onepass, name), CLASSES[name], **arguments)
    with only_kernels():
        run = train(*ours, epochs=3, max_norm=0.3)
    assert_kernels(ours[2].optimizer)
    theirs = begin(getattr(torch.optim, name), CLASSES[name], **arguments)
    assert_same_run(run, train(*theirs, epochs=3, max_norm=0.3))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_clipping_in_the_step(name, precision, accumulate):
    """docs/frameworks/accelerate.md: max_norm instead of accelerator.clip_grad_norm_."""
    arguments = {"mixed_precision": precision, "gradient_accumulation_steps": accumulate}

    def run(of, own, clip_grad_norm=None):
        begun = begin(getattr(of, name), {**CLASSES[name], **own}, **arguments)
        return train(*begun, epochs=3, max_norm=clip_grad_norm), begun[2].optimizer

    with only_kernels():
        clipped, optimizer = run(onepass, {"max_norm": 0.3})
    assert_kernels(optimizer)
    assert optimizer.last_step.coefficient < 1.0
    for of in (onepass, torch.optim):
        assert_same_run(clipped, run(of, {}, 0.3)[0])
    if name == "SGD":  # Adam's and RMSprop's steps do not depend on the scale of all gradients
        assert_clipped(clipped, run(onepass, {})[0])


def ramp(optimizer):
    return onepass.ScheduleLR(optimizer, warmup(4) >> linear(20))


def test_a_saved_state_is_gone_on_with_to_the_bit(tmp_path):
    whole = begin(onepass.AdamW, CLASSES["AdamW"], ramp)
    train(*whole, epochs=1)
    whole[0].save_state(str(tmp_path))
    ends = [train(*whole, epochs=2)]
    resumed = begin(onepass.AdamW, CLASSES["AdamW"], ramp)
    resumed[0].load_state(str(tmp_path))
    ends.append(train(*resumed, epochs=2))
    assert ends[0][0] == ends[1][0]
    assert_same_bits(ends[0][1], ends[1][1])
    assert resumed[2].param_groups[0]["lr"] == whole[2].param_groups[0]["lr"]


@pytest.mark.parametrize(("first", "then"), [(onepass.AdamW, torch.optim.AdamW), (torch.optim.AdamW, onepass.AdamW)])
def test_a_saved_state_of_one_is_gone_on_with_by_the_other(tmp_path, first, then):
    whole = begin(first, CLASSES["AdamW"])
    train(*whole, epochs=1)
    whole[0].save_state(str(tmp_path))
    end = train(*whole)
    resumed = begin(then, CLASSES["AdamW"])
    resumed[0].load_state(str(tmp_path))
    assert_same_run(train(*resumed), end)


def scaled(cls, fails, clip_grad_norm=None, schedule=None, **options):
    """What accelerate does with float16, which it has for GPUs only: its own classes around a scaler for the CPU."""
    Accelerator(cpu=True)
    model = net()
    inner = cls(model.parameters(), **CLASSES["AdamW"], **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    made = schedule(inner) if schedule else torch.optim.lr_scheduler.StepLR(inner, 1, 0.7)
    optimizer = AcceleratedOptimizer(inner, scaler=scaler)
    scheduler = accelerate.scheduler.AcceleratedScheduler(made, optimizer)
    losses, skipped, rates = [], [], []
    for t, (x, y) in enumerate(loader()):
        loss = loss_of(model, x, y)
        optimizer.scaler.scale(loss).backward()
        if t in fails:
            model[0].weight.grad[1, 1] = float("inf")
        if clip_grad_norm is not None:  # as accelerator.clip_grad_norm_
            scaler.unscale_(inner)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        skipped.append(optimizer.step_was_skipped)
        rates.append(inner.param_groups[0]["lr"])
    return (losses, weights(model)), skipped, rates, scaler.get_scale()


def test_it_is_seen_that_a_step_was_skipped():
    """accelerate asks whether the optimizer's step was called, and its scheduler waits if not."""
    ours, theirs = scaled(onepass.AdamW, {2, 3}), scaled(torch.optim.AdamW, {2, 3})
    assert ours[1] == theirs[1] == [False, False, True, True, False, False]
    assert ours[2] == theirs[2]
    assert ours[3] == theirs[3] == 2.0**10
    assert_same_run(ours[0], theirs[0])


def decaying(optimizer):
    return onepass.ScheduleLR(optimizer, onepass.schedules.exponential(0.7), count_skipped=False)


def test_clipping_in_the_step_that_unscales():
    """The step is called also to be skipped, which accelerate does not notice; last_step and ScheduleLR do."""
    with only_kernels():
        ours = scaled(onepass.AdamW, {2, 3}, schedule=decaying, max_norm=0.3)
    theirs = scaled(torch.optim.AdamW, {2, 3}, clip_grad_norm=0.3)
    assert ours[1] == [False] * 6
    assert theirs[1] == [False, False, True, True, False, False]
    assert ours[2] == pytest.approx(theirs[2])
    assert ours[3] == theirs[3] == 2.0**10
    assert_same_run(ours[0], theirs[0])


def test_accelerate_has_no_float16_on_the_cpu():
    """If it ever has, the test above is to be run with it."""
    assert Accelerator(cpu=True, mixed_precision="fp16").scaler is None


def test_what_looks_at_an_optimizer_looks_into_accelerates():
    steps = set()

    class Writer:
        def add_scalar(self, tag, value, step):
            steps.add(step)

    accelerator, model, optimizer, data, scheduler = begin(onepass.AdamW, {}, gradient_accumulation_steps=3)
    assert str(onepass.explain(optimizer)) == str(onepass.explain(optimizer.optimizer))
    onepass.ScheduleLR(optimizer, linear(3), count_skipped=False)
    with onepass.log_to(Writer(), optimizer, interval=1):
        train(accelerator, model, optimizer, data, scheduler, epochs=1)
    assert len(steps) == math.ceil(len(data) / 3)  # the others only add up
    with pytest.raises(RuntimeError, match="no closure while the optimizer steps in backward"):
        onepass.step_in_backward(optimizer) and optimizer.step(lambda: 0.0)
