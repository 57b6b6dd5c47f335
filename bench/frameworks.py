"""The optimizer's part of training in other frameworks: onepass's AdamW beside torch's default and fused.

``python bench/frameworks.py [--steps N] [--rounds N] [--threads N]``, with ``pip install 'onepass[ecosystem]'``

Every contender trains the same small model, from the same weights and random numbers, in its framework's own loop. The
losses are compared, step by step, in every round, and the optimizer's step is timed inside that loop; contenders take
turns. A closure (Lightning's) is called before the clock starts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

import onepass
import torch
from torch import nn
from torch.optim import Optimizer

WARM_UP = 5  # steps that are not counted: states are made, memory is touched
MAKERS: dict[str, Callable[..., Optimizer]] = {
    "onepass": onepass.AdamW,
    "default": torch.optim.AdamW,
    "fused": lambda params, **options: torch.optim.AdamW(params, fused=True, **options),
}


class Watch:
    """Times of an optimizer's steps, and the losses of the batches."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.begin = time.perf_counter()

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
            return loss

        optimizer.step = types.MethodType(timed, optimizer)  # type: ignore[method-assign]
        return optimizer


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_positions": 32, "n_embd": 128, "n_layer": 6, "n_head": 4}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def sentences(count: int) -> torch.Tensor:
    return torch.randint(0, 128, (count, 16), generator=torch.Generator().manual_seed(1))


def run_transformers(make: Callable[..., Optimizer], steps: int, watch: Watch) -> None:
    from transformers import Trainer, TrainingArguments

    class Recording(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            watch.losses.append(loss.item())
            return loss

    model = gpt2()
    optimizer = watch.put_on(make(model.parameters(), lr=1e-3))
    data = [{"input_ids": row, "labels": row} for row in sentences(4 * steps)]
    with tempfile.TemporaryDirectory() as folder:
        options = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=4, logging_strategy="no", **options
        )
        Recording(model, arguments, train_dataset=data, optimizers=(optimizer, None)).train()


def run_accelerate(make: Callable[..., Optimizer], steps: int, watch: Watch) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = gpt2()
    optimizer = watch.put_on(make(model.parameters(), lr=1e-3))
    loader = torch.utils.data.DataLoader(sentences(4 * steps), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for batch in loader:
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch.losses.append(loss.item())


def run_lightning(make: Callable[..., Optimizer], steps: int, watch: Watch) -> None:
    from lightning import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = gpt2()

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss = self.model(input_ids=batch, labels=batch).loss
            watch.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Optimizer:
            return watch.put_on(make(self.parameters(), lr=1e-3))

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, enable_checkpointing=False, **quiet)
    trainer.fit(Module(), torch.utils.data.DataLoader(sentences(4 * steps), batch_size=4))


def run_timm(make: Callable[..., Optimizer], steps: int, watch: Watch) -> None:
    import timm
    from timm.optim import param_groups_layer_decay
    from timm.scheduler import CosineLRScheduler

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 8, "num_heads": 3, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **sizes)
    optimizer = watch.put_on(make(param_groups_layer_decay(model, 0.05), lr=1e-3))
    scheduler = CosineLRScheduler(optimizer, t_initial=steps, t_in_epochs=False)
    for step in range(steps):
        images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(step))
        loss = nn.functional.cross_entropy(model(images), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step_update(step + 1)
        watch.losses.append(loss.item())


FRAMEWORKS = {
    "transformers.Trainer": run_transformers,
    "accelerate": run_accelerate,
    "Lightning": run_lightning,
    "timm": run_timm,
}


def measure(run: Callable[..., None], steps: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Of every contender the median seconds of an optimizer's step, and that step's share of a whole one."""
    times: dict[str, list[float]] = {name: [] for name in MAKERS}
    shares: dict[str, list[float]] = {name: [] for name in MAKERS}
    for number in range(rounds + 1):  # the first is for the comparison, and to have everything imported
        losses = {}
        for name, make in MAKERS.items():
            watch = Watch()
            torch.manual_seed(2)
            run(make, steps, watch)
            whole = time.perf_counter() - watch.begin
            losses[name] = watch.losses
            if number:
                times[name].append(statistics.median(watch.seconds[WARM_UP:]))
                shares[name].append(sum(watch.seconds) / whole)
        for name in MAKERS:
            expected = torch.tensor(losses["default"])
            assert len(expected) == steps
            torch.testing.assert_close(torch.tensor(losses[name]), expected, rtol=1e-3, atol=1e-3, msg=name)
    return {name: (statistics.median(times[name]), statistics.median(shares[name])) for name in MAKERS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    print("| | onepass, us/step | default | fused | optimizer's share: default | fused | onepass |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for framework, run in FRAMEWORKS.items():
        try:
            found = measure(run, given.steps, given.rounds)
        except ImportError as error:
            print(f"| {framework} | not measured: {error} |")
            continue
        (ours, our_share), (default, its_share), (fused, fused_share) = (found[name] for name in MAKERS)
        cells = [f"{ours * 1e6:.0f}", f"{default / ours:.2f}x", f"{fused / ours:.2f}x"]
        cells += [f"{share:.1%}" for share in (its_share, fused_share, our_share)]
        print(f"| {framework} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
