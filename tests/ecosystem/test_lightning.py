"""Lightning with onepass: automatic and manual optimization, schedulers, clipping, precision, resuming."""

import onepass
import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from onepass.schedules import cosine, warmup
from reference import only_kernels
from tiny import assert_clipped, assert_kernels, assert_same_bits, assert_same_run, loader, loss_of, net, weights

KW = {"lr": 0.02, "weight_decay": 0.1}


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)


def schedule_lr(optimizer):
    return onepass.ScheduleLR(optimizer, warmup(3) >> cosine(30), weight_decay=cosine(30, end=0.5))


class Automatic(LightningModule):
    def __init__(self, cls, options=KW, schedule=step_lr, interval="step"):
        super().__init__()
        self.net, self.seen, self.rates = net(), [], []
        self.made = cls, options, schedule, interval

    def loss(self, batch):
        loss = loss_of(self.net, *batch)
        self.seen.append(loss.item())
        return loss

    def training_step(self, batch, index):
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        loss = self.loss(batch)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        cls, options, schedule, interval = self.made
        optimizer = cls(self.net.parameters(), **options)
        config = {"scheduler": schedule(optimizer), "interval": interval, "monitor": "train_loss"}
        return {"optimizer": optimizer, "lr_scheduler": config}


class Manual(Automatic):
    """Two batches to a step, with a closure or without."""

    automatic_optimization = False
    closure = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()

        def backward():
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            return loss

        if self.closure:
            optimizer.step(closure=backward)
        else:
            backward()
            optimizer.step()
        scheduler.step()


class ManualWithClosure(Manual):
    closure = True


def fit(module, folder, epochs=2, checkpoint=None, callbacks=(), **arguments):
    torch.manual_seed(1)  # for the dropout
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **arguments,
    )
    trainer.fit(module, loader(), ckpt_path=checkpoint)
    return module.seen, weights(module.net)


def compare(folder, make, name="AdamW", options=KW, **arguments):
    """Trains by both classes; returns the modules."""
    ours, theirs = (make(getattr(of, name), options) for of in (onepass, torch.optim))
    with only_kernels():
        run = fit(ours, folder, **arguments)
    assert_kernels(ours.trainer.optimizers[0])
    assert_same_run(run, fit(theirs, folder, **arguments))
    assert ours.rates == pytest.approx(theirs.rates)
    return ours, theirs


@pytest.mark.parametrize("name", ["AdamW", "SGD", "NAdam"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_clip_val": 0.2},
        {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2, "epochs": 3},
        {"precision": "bf16-mixed"},
    ],
    ids=lambda arguments: "-".join(arguments) or "plain",
)
def test_automatic_optimization(tmp_path, name, arguments):
    options = {"lr": 0.1, "momentum": 0.9} if name == "SGD" else KW
    ours, _ = compare(tmp_path, Automatic, name, options, **arguments)
    assert len(set(ours.rates)) > 1


def test_a_plateau_that_lightning_feeds(tmp_path):
    def make(cls, options):
        plateau = (onepass if cls is onepass.AdamW else torch.optim).lr_scheduler.ReduceLROnPlateau
        return Automatic(cls, options, lambda opt: plateau(opt, patience=0, threshold=0.5), "epoch")

    ours, _ = compare(tmp_path, make, epochs=4)
    assert len(set(ours.rates)) > 1


class Plateau(Automatic):
    """A warm-up with a plateau as docs/frameworks/lightning.md shows: `said` is in the dict, or the plateau is fed."""

    said = ("reduce_on_plateau", True)
    feeds = False

    def configure_optimizers(self):
        optimizer = onepass.AdamW(self.net.parameters(), **KW)
        plateau = {"patience": 0, "factor": 0.5, "threshold": 0.9}  # hardly any loss is so much better than the last
        scheduler = onepass.ScheduleLR(optimizer, warmup(3), plateau=plateau)
        config = {"scheduler": scheduler, "interval": "step", **dict([self.said])}
        return {"optimizer": optimizer, "lr_scheduler": {**config, "monitor": "train_loss"}}

    def on_train_epoch_end(self):
        if self.feeds:
            self.lr_schedulers().feed(self.trainer.callback_metrics["train_loss"])


class Unsaid(Plateau):
    said = ("interval", "step")


class Fed(Unsaid):
    feeds = True


def test_a_plateau_in_a_schedule_is_fed_if_lightning_is_told_or_by_hand(tmp_path):
    rates = {}
    for make in (Plateau, Unsaid, Fed):
        module = make(onepass.AdamW)
        fit(module, tmp_path)
        rates[make] = module.rates
    whole = [KW["lr"] * min(t / 3, 1.0) for t in range(12)]
    assert rates[Unsaid] == pytest.approx(whole)
    # The first metric is the best so far; every other one halves.
    assert rates[Plateau] == pytest.approx([rate * 0.5 ** max(t - 1, 0) for t, rate in enumerate(whole)])
    assert rates[Fed] == pytest.approx(whole)  # the first of two epochs
    module = Fed(onepass.AdamW)
    fit(module, tmp_path, epochs=4)
    assert module.rates[12::6] == pytest.approx([KW["lr"] * 0.5, KW["lr"] * 0.25])


@pytest.mark.parametrize("make", [Manual, ManualWithClosure])
def test_manual_optimization(tmp_path, make):
    compare(tmp_path, make)


def test_lbfgs_calls_the_closure_as_often_as_torchs(tmp_path):
    """Without dropout, which would make another function of every call."""

    def make(cls, options):
        module = Automatic(cls, options)
        module.net[3].p = 0.0
        return module

    ours, _ = compare(tmp_path, make, "LBFGS", {"lr": 0.1, "max_iter": 3}, epochs=1)
    assert len(ours.seen) > 6


@pytest.mark.parametrize("schedule", [step_lr, schedule_lr])
@pytest.mark.parametrize("make", [Automatic, Manual])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, make, schedule):
    keeping = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    whole, resumed = (make(onepass.AdamW, KW, schedule) for _ in range(2))
    for module in (whole, resumed):
        module.net[3].p = 0.0  # Lightning does not keep the state of the random numbers
    end = fit(whole, tmp_path, epochs=3, callbacks=[keeping])
    again = fit(resumed, tmp_path, epochs=3, checkpoint=str(tmp_path / "epoch=0.ckpt"))
    assert len(again[0]) == 12
    assert again[0] == end[0][6:]
    assert resumed.rates == whole.rates[6:]
    assert_same_bits(again[1], end[1])


@pytest.mark.parametrize(("precision", "more"), [("32-true", {}), ("bf16-true", {"master": "split"})])
def test_8bit_states(tmp_path, precision, more):
    options = {**KW, "lr": 1e-3, "state_dtype": torch.float8_e4m3fn, **more}
    keeping = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    whole, resumed, plain = (
        Automatic(onepass.AdamW, {**options, "state_dtype": dtype})
        for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float32)
    )
    for module in (whole, resumed, plain):
        torch.manual_seed(0)
        module.net = torch.nn.Sequential(torch.nn.Linear(8, 512), torch.nn.Tanh(), torch.nn.Linear(512, 3))
    with only_kernels():
        end = fit(whole, tmp_path, epochs=3, callbacks=[keeping], precision=precision)
    first = whole.net[0].weight  # 4,096 elements
    assert whole.trainer.optimizers[0].state[first]["exp_avg"].dtype == torch.float8_e4m3fn
    again = fit(resumed, tmp_path, epochs=3, checkpoint=str(tmp_path / "epoch=0.ckpt"), precision=precision)
    assert again[0] == end[0][6:]
    assert_same_bits(again[1], end[1])
    losses = fit(plain, tmp_path, epochs=3, precision=precision)[0]
    assert losses != end[0]
    torch.testing.assert_close(torch.tensor(end[0]), torch.tensor(losses), rtol=1e-2, atol=0)


@pytest.mark.parametrize(("first", "then"), [(onepass.AdamW, torch.optim.AdamW), (torch.optim.AdamW, onepass.AdamW)])
def test_a_checkpoint_of_one_is_resumed_by_the_other(tmp_path, first, then):
    keeping = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    whole, resumed = Automatic(first), Automatic(then)
    for module in (whole, resumed):
        module.net[3].p = 0.0
    end = fit(whole, tmp_path, epochs=2, callbacks=[keeping])
    again = fit(resumed, tmp_path, epochs=2, checkpoint=str(tmp_path / "epoch=0.ckpt"))
    assert_same_run(again, (end[0][6:], end[1]))


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.2}], ids=["plain", "clipped"])
def test_float16_with_a_scaler(tmp_path, options):
    """Unscaled by Lightning before it clips."""

    def run(of):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1)
        plugin = MixedPrecision("16-mixed", "cpu", scaler)
        module = Automatic(of.AdamW)
        end = fit(module, tmp_path, plugins=[plugin], **options)
        assert scaler.get_scale() < 2.0 ** (12 + len(end[0]))  # a step was skipped
        return end, scaler.get_scale()

    with only_kernels():
        ours = run(onepass)
    theirs = run(torch.optim)
    assert ours[1] == theirs[1]
    torch.testing.assert_close(torch.tensor(ours[0][0]), torch.tensor(theirs[0][0]), rtol=5e-3, atol=5e-3)


CLIPPED = {"SGD": {"lr": 0.1, "momentum": 0.9}, "AdamW": KW}


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("arguments", [{}, {"accumulate_grad_batches": 2, "epochs": 3}, {"precision": "bf16-mixed"}],
                         ids=lambda arguments: "-".join(arguments) or "plain")  # fmt: skip
@pytest.mark.parametrize("name", CLIPPED)
def test_clipping_in_the_step(tmp_path, name, arguments, algorithm):
    """docs/frameworks/lightning.md: max_norm or clip_value, and gradient_clip_val=None."""
    limit = {"norm": 0.2, "value": 0.02}[algorithm]
    own = {{"norm": "max_norm", "value": "clip_value"}[algorithm]: limit}

    def run(of, own, **clipping):
        module = Automatic(getattr(of, name), {**CLIPPED[name], **own})
        return fit(module, tmp_path, **arguments, **clipping), module.trainer.optimizers[0]

    with only_kernels():
        clipped, optimizer = run(onepass, own)
    assert_kernels(optimizer)
    assert optimizer.last_step.coefficient < 1.0 or algorithm == "value"
    for of in (onepass, torch.optim):
        theirs, _ = run(of, {}, gradient_clip_val=limit, gradient_clip_algorithm=algorithm)
        assert_same_run(clipped, theirs)
    assert_clipped(clipped, run(onepass, {})[0])


def test_float16_with_clipping_in_the_step(tmp_path):
    """The step unscales, clips and skips; Lightning only steps."""

    def run(of, own, **clipping):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1)
        module = Automatic(of.AdamW, {**KW, **own})
        end = fit(module, tmp_path, plugins=[MixedPrecision("16-mixed", "cpu", scaler)], **clipping)
        assert scaler.get_scale() < 2.0 ** (12 + len(end[0]))  # a step was skipped
        return end, scaler.get_scale()

    with only_kernels():
        ours = run(onepass, {"max_norm": 0.2})
    theirs = run(torch.optim, {}, gradient_clip_val=0.2)
    assert ours[1] == theirs[1]
    torch.testing.assert_close(torch.tensor(ours[0][0]), torch.tensor(theirs[0][0]), rtol=5e-3, atol=5e-3)


def test_float16_with_both_kinds_of_clipping_is_refused_by_lightning(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match="performs unscaling of gradients internally"):
        fit(Automatic(onepass.AdamW, {**KW, "max_norm": 0.2}), tmp_path, plugins=[plugin], gradient_clip_val=0.2)


@pytest.mark.parametrize("of", [onepass, torch.optim])
def test_lightning_does_not_clip_what_the_step_unscales(tmp_path, of):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match="performs unscaling of gradients internally"):
        fit(Automatic(of.AdamW, {**KW, "fused": True}), tmp_path, plugins=[plugin], gradient_clip_val=0.2)
