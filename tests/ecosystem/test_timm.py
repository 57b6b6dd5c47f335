"""timm's models, parameter groups and schedulers with onepass; parameter groups and averages beside timm's."""

import onepass
import pytest
import timm
import torch
from onepass import param_groups
from onepass.swa_utils import AveragedModel
from reference import only_kernels
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3, NativeScaler, dispatch_clip_grad
from tiny import assert_clipped, assert_same_run, weights

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 3, "num_heads": 2, "num_classes": 3}


def vit():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", pretrained=False, **VIT)


def resnet():
    torch.manual_seed(0)
    return timm.create_model("resnet10t", pretrained=False, num_classes=3, channels=(4, 8, 8, 8), stem_width=4)


MODELS = {"vit": vit, "resnet": resnet}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
each_grouping = pytest.mark.parametrize(
    "grouping",
    [
        lambda model: model.parameters(),
        lambda model: param_groups_weight_decay(model, 0.05),
        lambda model: param_groups_weight_decay(
            model, 0.05, no_weight_decay_list=["pos_embed", "cls_token", "*.fc1.*"]
        ),
        lambda model: param_groups_layer_decay(model, 0.05, layer_decay=0.6),
        lambda model: param_groups_layer_decay(model, 0.05, layer_decay=0.6, no_opt_scale=0.5),
    ],
    ids=["none", "weight decay", "weight decay, list", "layer decay", "layer decay, frozen"],
)


def described(optimizer, model):
    names = {p: name for name, p in model.named_parameters()}
    keys = ("lr", "weight_decay", "lr_scale", "initial_lr")
    groups = optimizer.param_groups
    return [([names[p] for p in group["params"]], {key: group.get(key) for key in keys}) for group in groups]


def train(cls, make, grouping, steps=9):
    model = make()
    optimizer = cls(grouping(model), lr=3e-3)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=8, lr_min=1e-5, warmup_t=3, warmup_lr_init=1e-4, t_in_epochs=False
    )
    generator = torch.Generator().manual_seed(1)
    x = (
        torch.randn(12, 3, 16, 16, generator=generator)
        if make is vit
        else torch.randn(12, 3, 32, 32, generator=generator)
    )
    y = torch.arange(12) % 3
    losses, groups = [], []
    for t in range(steps):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(t + 1)
        losses.append(loss.item())
        groups.append(described(optimizer, model))
    return (losses, weights(model)), groups


@each_model
@each_grouping
def test_groups_schedule_and_losses_are_torchs(make, grouping):
    with only_kernels():
        ours, groups = train(onepass.AdamW, make, grouping)
    theirs, expected = train(torch.optim.AdamW, make, grouping)
    assert groups == expected
    assert len({str(row) for row in groups}) > 5
    assert_same_run(ours, theirs)


# -- onepass.param_groups beside timm's --------------------------------------------------------------------------------


def per_parameter(model, groups, lr=1.0):
    """Learning rate and weight decay of every parameter; timm's schedulers multiply the rate by lr_scale."""
    optimizer = onepass.AdamW(groups, lr=lr, weight_decay=0.05)
    names = {p: name for name, p in model.named_parameters()}
    return {
        names[p]: (group["lr"] * group.get("lr_scale", 1.0), group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }


def differing(ours, theirs):
    assert ours.keys() == theirs.keys()
    return {name for name in ours if ours[name] != pytest.approx(theirs[name])}


@each_model
def test_weight_decay_is_of_the_same_parameters(make):
    model = make()
    ours = per_parameter(model, param_groups(model, weight_decay=0.05))
    assert differing(ours, per_parameter(model, param_groups_weight_decay(model, 0.05))) == set()


def test_what_a_model_names_itself_is_named_to_ours():
    """timm asks model.no_weight_decay() only in create_optimizer_v2; ours takes the names as patterns."""
    model = vit()
    names = sorted(model.no_weight_decay() & {name for name, _ in model.named_parameters()})
    assert names == ["cls_token", "pos_embed"]
    ours = per_parameter(model, param_groups(model, weight_decay=0.05, no_decay=("bias", "norm", *names)))
    assert (
        differing(ours, per_parameter(model, param_groups_weight_decay(model, 0.05, no_weight_decay_list=names)))
        == set()
    )


def test_vectors_of_other_modules_are_decayed_by_ours():
    """timm exempts whatever has one dimension; ours biases, norms and embeddings."""
    model = timm.create_model("vit_tiny_patch16_224", **VIT, init_values=0.1)  # has a LayerScale
    ours = per_parameter(model, param_groups(model, weight_decay=0.05))
    gammas = {f"blocks.{block}.ls{n}.gamma" for block in range(3) for n in (1, 2)}
    theirs = per_parameter(model, param_groups_weight_decay(model, 0.05))
    assert differing(ours, theirs) == gammas
    ours = per_parameter(model, param_groups(model, weight_decay=0.05, no_decay=("bias", "norm", "*.gamma")))
    assert differing(ours, theirs) == set()


def test_rates_of_a_vits_layers():
    """The norm after the last block has the head's rate, and the last block's with timm."""
    model = vit()
    ours = per_parameter(model, param_groups(model, lr=1.0, weight_decay=0.05, layer_decay=0.6))
    theirs = per_parameter(model, param_groups_layer_decay(model, 0.05, layer_decay=0.6))
    assert differing(ours, theirs) == {"norm.weight", "norm.bias"}


# -- averages beside timm's --------------------------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize(
    "warmup",
    [{}, {"warmup_gamma": 1.0, "warmup_power": 2 / 3}, {"warmup_gamma": 12.0, "warmup_power": 0.75}],
    ids=["none", "default", "slow"],
)
def test_averages_are_those_of_model_ema_v3(make, warmup):
    """timm counts steps from 1 and is told the number."""
    model = make()
    theirs = ModelEmaV3(model, decay=0.6, use_warmup=bool(warmup), exclude_buffers=True, **warmup)
    ours = AveragedModel(model, decay=0.6, warmup=bool(warmup), **warmup)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ours._attach(optimizer)  # to read the weights
    for step in range(1, 30):
        assert 1 - ours._step_weight(optimizer) == pytest.approx(theirs.get_decay(step), rel=1e-14, abs=1e-15)
        ours.n_averaged += 1
    ours = AveragedModel(model, decay=0.6, warmup=bool(warmup), **warmup)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 9):
        with torch.no_grad():
            for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
                tensor.add_(torch.randn(tensor.shape, generator=generator))
        theirs.update(model, step=step)
        ours.update_parameters(model)
        for name, value in ours.module.state_dict().items():
            torch.testing.assert_close(value, theirs.module.state_dict()[name], rtol=1e-6, atol=1e-6)


# -- clipping beside timm's --------------------------------------------------------------------------------------------


def train_clipped(cls, make, options, mode=None, limit=None, scaler=None, ema=False, dtype=None, **own):
    """timm's loop: its clipping and its average, or the optimizer's."""
    model = make()
    average = None
    if ema:
        average = (
            ModelEmaV3(model, decay=0.9, use_warmup=True) if mode else AveragedModel(model, decay=0.9, warmup=True)
        )
    if ema and not mode:
        own["average"] = average
    optimizer = cls(model.parameters(), **options, **own)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 3, 16 if make is vit else 32, 16 if make is vit else 32, generator=generator)
    y = torch.arange(12) % 3
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = torch.nn.functional.cross_entropy(model(x).float(), y)
        if scaler is not None:
            scaler(loss, optimizer, clip_grad=limit, clip_mode=mode or "norm", parameters=model.parameters())
        else:
            loss.backward()
            if mode:
                dispatch_clip_grad(model.parameters(), limit, mode=mode)
            optimizer.step()
        if ema:
            average.update(model, step=step + 1) if mode else average.update_parameters(model)
        losses.append(loss.item())
    return (losses, weights(model)), average


SETTINGS = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "AdamW": {"lr": 3e-3, "eps": 1e-5},
}  # the gradients of the keys' biases are rounding errors
LIMITS = {"norm": ("max_norm", 0.2), "value": ("clip_value", 1e-3)}


@each_model
@pytest.mark.parametrize("mode", LIMITS)
@pytest.mark.parametrize("name", SETTINGS)
def test_clipping_in_the_step(name, mode, make):
    argument, limit = LIMITS[mode]
    with only_kernels():
        clipped, _ = train_clipped(getattr(onepass, name), make, SETTINGS[name], **{argument: limit})
    for of in (onepass, torch.optim):
        theirs, _ = train_clipped(getattr(of, name), make, SETTINGS[name], mode, limit)
        assert_same_run(clipped, theirs)
    if name == "SGD":
        assert_clipped(clipped, train_clipped(onepass.SGD, make, SETTINGS[name])[0])


@each_model
def test_clipping_and_an_average_in_the_step(make):
    clipped, ours = train_clipped(onepass.SGD, make, SETTINGS["SGD"], ema=True, max_norm=0.2)
    expected, theirs = train_clipped(torch.optim.SGD, make, SETTINGS["SGD"], "norm", 0.2, ema=True)
    assert_same_run(clipped, expected)
    for p, q in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_clipping_in_the_step_with_timms_scaler(dtype):
    def run(cls, mode=None, limit=None, **own):
        scaler = NativeScaler("cpu")
        return train_clipped(cls, vit, SETTINGS["SGD"], mode, limit, scaler, dtype=dtype, **own)[0]

    with only_kernels():
        clipped = run(onepass.SGD, max_norm=0.2)
    theirs = run(torch.optim.SGD, "norm", 0.2)
    torch.testing.assert_close(torch.tensor(clipped[0]), torch.tensor(theirs[0]), rtol=5e-3, atol=5e-3)
    assert_clipped(clipped, run(onepass.SGD))
