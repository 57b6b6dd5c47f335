"""The optimizer's part of training in other frameworks: AdamW in transformers, accelerate, Lightning and timm.

``python bench/frameworks.py [--quick] [--rounds N]``, with ``pip install 'onepass[ecosystem]'``. Two results per
framework: the whole training step, from one step of the optimizer to the next, and the optimizer's part of it. A sample
is the median over a whole run: every contender trains the same small model, from the same weights and seeds, in the
framework's own loop. In every run, losses are compared step by step, and then every parameter. A closure (Lightning's)
is not part of the optimizer's time.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import logging
import statistics
import tempfile
import time
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, cast

import onepass
import torch
from onepass.cli.bench import Subject
from onepass.cli.timing import Result, Samples, check, sample_in_turn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset
from torchvision_on_cpu import import_torchvision

STEPS, QUICK_STEPS = 30, 8
WARM_UP = 5  # untimed steps of each run, which make the states and touch the memory

Make = Callable[..., Optimizer]  # its argument: parameters, or groups of them

# Attention does not depend on the keys' bias: its gradients are rounding errors of some 1e-10, which Adam divides by
# their size plus eps. With the usual eps of 1e-8 the updates differ even between torch's own forms; with 1e-6 they do
# not.
ADAMW = Subject(onepass.AdamW, {"lr": 1e-3, "eps": 1e-6})
CONTENDERS: dict[str, Make] = {name: make for name, make in ADAMW.optimizers().items() if name != "foreach"}


class Watch:
    """The record of one run: start and duration of the optimizer's steps, and the losses of the batches."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.params: list[Tensor] = []

    def put_on(self, optimizer: Optimizer) -> Optimizer:
        step = type(optimizer).step

        def timed(self_: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            begin = time.perf_counter()
            step(self_)
            self.seconds.append(time.perf_counter() - begin)
            self.begun.append(begin)
            return loss

        optimizer.step = types.MethodType(timed, optimizer)  # type: ignore[method-assign]
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        return optimizer

    def whole_step(self) -> float:
        return statistics.median(after - before for before, after in itertools.pairwise(self.begun[WARM_UP:]))

    def optimizers_part(self) -> float:
        return statistics.median(self.seconds[WARM_UP:])

    def agree(self, name: str, expected: Watch, steps: int) -> None:
        """Compare every loss and, after the last step, every parameter.

        Losses may differ by what `check` allows, some 8 units of rounding; measured is one unit, also between torch's
        own forms. Parameters may differ by another unit (of numbers near 1) per step, because the rounding errors of
        the decay add up; measured is 0.6. A learning rate that is wrong by 1e-4 of its value fails in each framework.
        """
        if not len(self.seconds) == len(self.losses) == len(expected.losses) == steps:
            found = f"{len(self.seconds)} steps, {len(self.losses)} losses, {len(expected.losses)} to compare with"
            raise AssertionError(f"{name}: {found}, of {steps}")
        check(f"{name}: losses", [torch.tensor(self.losses)], [torch.tensor(expected.losses)])
        tolerance = steps * torch.finfo(torch.float32).eps
        check(f"{name}: parameters", self.params, expected.params, tolerance=tolerance)


# ---- The frameworks' loops ----

Run = Callable[[Make, int, Watch], None]


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_positions": 32, "n_embd": 128, "n_layer": 6, "n_head": 4}
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    return model


def sentences(count: int) -> Tensor:
    return torch.randint(0, 128, (count, 16), generator=torch.Generator().manual_seed(1))


def batches(steps: int) -> DataLoader[Tensor]:
    rows = cast("Dataset[Tensor]", sentences(4 * steps))  # a tensor has all that a DataLoader uses
    return DataLoader(rows, batch_size=4)


def run_transformers(make: Make, steps: int, watch: Watch) -> None:
    from transformers import Trainer, TrainingArguments

    class Recording(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().training_step(*args, **kwargs)
            watch.losses.append(loss.item())
            return loss

    model = gpt2()
    optimizer = watch.put_on(make(model.parameters()))
    data = [{"input_ids": row, "labels": row} for row in sentences(4 * steps)]
    with tempfile.TemporaryDirectory() as folder:
        options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, logging_strategy="no", **options
        )
        Recording(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()


def run_accelerate(make: Make, steps: int, watch: Watch) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = gpt2()
    optimizer = watch.put_on(make(model.parameters()))
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches(steps))
    for batch in loader:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.losses.append(loss.item())


def run_lightning(make: Make, steps: int, watch: Watch) -> None:
    from lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = gpt2()

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss: Tensor = self.model(input_ids=batch, labels=batch).loss
            watch.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Optimizer:
            return watch.put_on(make(self.parameters()))

    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **options)
    trainer.fit(Module(), batches(steps))


def run_timm(make: Make, steps: int, watch: Watch) -> None:
    import timm
    from timm.optim import param_groups_layer_decay
    from timm.scheduler import CosineLRScheduler

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 8, "num_heads": 3, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)
    optimizer = watch.put_on(make(param_groups_layer_decay(model, 0.05)))
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)
    for step in range(steps):
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(images), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(step + 1)
        watch.losses.append(loss.item())


class Framework(NamedTuple):
    """A framework's training function, and the modules that it needs."""

    run: Run
    needs: tuple[str, ...]


GPT2 = "transformers.models.gpt2.modeling_gpt2"  # transformers imports its parts lazily
FRAMEWORKS = {
    "transformers.Trainer": Framework(run_transformers, ("transformers.trainer", "accelerate", GPT2)),
    "accelerate": Framework(run_accelerate, ("accelerate", GPT2)),
    "Lightning": Framework(run_lightning, ("lightning", GPT2)),
    "timm": Framework(run_timm, ("timm",)),
}


def versions() -> dict[str, str]:
    """Return the versions of all required packages that are installed."""
    found = {}
    for name in sorted({name.partition(".")[0] for framework in FRAMEWORKS.values() for name in framework.needs}):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def why_missing(framework: Framework) -> str | None:
    """Return why a framework cannot be imported; None if it can."""
    try:
        with quiet():
            if importlib.util.find_spec("torchvision"):
                import_torchvision()  # before a framework imports it and fails
            for name in framework.needs:
                importlib.import_module(name)
    except Exception as error:  # incompatible packages raise all kinds of errors
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the frameworks' warnings, output and logs."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


# ---- The comparison ----


def train(run: Run, contender: str, steps: int) -> Watch:
    gc.collect()  # frameworks leave the last run's model in cycles, and the collector is off while sampling
    torch.manual_seed(2)
    watch = Watch()
    with quiet():
        run(CONTENDERS[contender], steps, watch)
    return watch


def compare(name: str, run: Run, steps: int, rounds: int) -> tuple[Result, Result]:
    """Return the times of whole steps, and of the optimizer's part of them."""
    expected = train(run, "default", steps)

    def checked(contender: str) -> Watch:
        watch = train(run, contender, steps)
        watch.agree(f"{name}: {contender}", expected, steps)
        return watch

    for contender in CONTENDERS:  # includes the default again: runs must be repeatable to be compared
        checked(contender)
    parts: Samples = {contender: [] for contender in CONTENDERS}

    def sample(contender: str) -> float:
        watch = checked(contender)
        parts[contender].append(watch.optimizers_part())
        return watch.whole_step()

    whole = sample_in_turn(CONTENDERS, rounds, sample)
    elements = sum(map(Tensor.numel, expected.params))

    def result(what: str, samples: Samples) -> Result:
        return Result(f"frameworks: {name}, {what}", ADAMW.name, elements, len(expected.params), samples)

    return result("whole step", whole), result("optimizer's part", parts)


def measure(quick: bool, rounds: int) -> Iterator[Result | str]:
    """Yield two results per framework, or why there are none."""
    for name, framework in FRAMEWORKS.items():
        if why := why_missing(framework):
            yield f"{name} is not measured: {why}"
        else:
            yield from compare(name, framework.run, QUICK_STEPS if quick else STEPS, rounds)


if __name__ == "__main__":
    from run import alone

    alone(measure, __doc__)
