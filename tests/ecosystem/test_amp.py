"""torch.amp.GradScaler around a model under float16 autocast: steps are skipped and scales change as with torch's."""

import itertools

import onepass
import pytest
import torch
from reference import only_kernels
from tiny import assert_same_run, loader, loss_of, net, weights

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU: not run")
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, NO_GPU])])

CLASSES = {
    "AdamW": {"lr": 0.02},
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "RAdam": {"lr": 0.02},
    "Adagrad": {"lr": 0.05},
}


def train(cls, options, device, clip=False):
    model = net().to(device)
    model[3].p = 0.0
    optimizer = cls(model.parameters(), **options)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**16, growth_factor=4.0, growth_interval=3)
    losses, scales = [], []
    for x, y in [*loader()] * 3:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.float16):
            loss = loss_of(model, x.to(device), y.to(device))
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        scales.append(scaler.get_scale())
    return (losses, weights(model)), scales


@each_device
@pytest.mark.parametrize("clip", [False, True], ids=["", "clipped"])
@pytest.mark.parametrize("name", CLASSES)
def test_the_same_steps_are_skipped(name, clip, device):
    with only_kernels():
        ours, scales = train(getattr(onepass, name), CLASSES[name], device, clip)
    theirs, expected = train(getattr(torch.optim, name), CLASSES[name], device, clip)
    assert scales == expected
    changes = [b / a for a, b in itertools.pairwise(scales)]
    assert {0.5, 4.0} <= set(changes)  # it has been halved for an inf, and grown
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=5e-3, atol=5e-3)


@each_device
@pytest.mark.parametrize("name", CLASSES)
def test_clipping_in_the_step(name, device):
    """docs/frameworks/amp.md: max_norm instead of unscale_ and clip_grad_norm_."""
    with only_kernels():
        ours, scales = train(getattr(onepass, name), {**CLASSES[name], "max_norm": 0.3}, device)
    theirs, expected = train(getattr(torch.optim, name), CLASSES[name], device, clip=True)
    assert scales == expected
    assert 0.5 in [b / a for a, b in itertools.pairwise(scales)]  # a step was skipped
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=5e-3, atol=5e-3)


def test_in_float32_weights_are_torchs_too():
    """Autocast rounds to float16, so that a last place of a weight may become one of an activation: not here."""

    def run(cls):
        model = net()
        model[3].p = 0.0
        optimizer, scaler = cls(model.parameters(), lr=0.02), torch.amp.GradScaler("cpu", init_scale=1024.0)
        losses = []
        for t, (x, y) in enumerate([*loader()] * 2):
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            scaler.scale(loss).backward()
            if t == 3:
                model[0].weight.grad[0, 0] = float("nan")
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert scaler.get_scale() == 512.0
        return losses, weights(model)

    with only_kernels():
        ours = run(onepass.AdamW)
    assert_same_run(ours, run(torch.optim.AdamW))
