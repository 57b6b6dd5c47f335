"""transformers.Trainer with onepass: the losses that it has with torch.optim, and checkpoints in both directions."""

import onepass
import pytest
import torch
from onepass.lr_scheduler import get_cosine_schedule_with_warmup
from onepass.schedules import cosine, warmup
from reference import only_kernels
from tiny import assert_clipped, assert_kernels, assert_same_bits, assert_same_run, weights
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)
from transformers import get_cosine_schedule_with_warmup as transformers_cosine

STEPS = 8
KW = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


def gpt2(width=16):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=12, n_embd=width, n_layer=2, n_head=2, bos_token_id=0,
                                      eos_token_id=0))  # fmt: skip


def sentences():
    ids = torch.randint(0, 40, (64, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in ids]


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=40, max_position_embeddings=12, num_labels=2, **sizes))


def classified():
    return [{"input_ids": row["input_ids"], "labels": row["labels"][0] % 2} for row in sentences()]


class Recording(Trainer):
    """Keeps the loss of every batch: the log rounds."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.seen = [*getattr(self, "seen", []), loss.item()]
        return loss


def trainer(folder, model, data, optimizers=(None, None), optimizer_cls_and_kwargs=None, **arguments):
    arguments = {"max_steps": STEPS, "per_device_train_batch_size": 4, "save_strategy": "no", **arguments}
    args = TrainingArguments(str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **arguments)
    return Recording(model, args, train_dataset=data, optimizers=optimizers,
                     optimizer_cls_and_kwargs=optimizer_cls_and_kwargs)  # fmt: skip


def finish(run, **kwargs):
    run.train(**kwargs)
    return run.seen, weights(run.model)


OURS_AND_TORCHS = [(onepass.AdamW, get_cosine_schedule_with_warmup), (torch.optim.AdamW, transformers_cosine)]


@pytest.mark.parametrize(("model", "data"), [(gpt2, sentences), (bert, classified)], ids=["GPT-2", "BERT"])
def test_an_optimizer_and_a_schedule(tmp_path, model, data):
    runs, rates = [], []
    for cls, schedule in OURS_AND_TORCHS:
        net = model()
        optimizer = cls(net.parameters(), **KW)
        run = trainer(tmp_path, net, data(), (optimizer, schedule(optimizer, 2, STEPS)), logging_steps=1)
        before = onepass.stats()
        runs.append(finish(run))
        rates.append([row["learning_rate"] for row in run.state.log_history if "learning_rate" in row])
        if cls is onepass.AdamW:
            assert_kernels(optimizer)
            assert onepass.stats()["torch"] == before["torch"]
    assert_same_run(*runs)
    assert len(rates[0]) == STEPS
    assert rates[0] == pytest.approx(rates[1])


CLASSES = {"AdamW": KW, "SGD": {"lr": 0.1, "momentum": 0.9}, "Adafactor": {"lr": 1e-2}, "RMSprop": {"lr": 1e-3}}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_and_its_arguments(tmp_path, name):
    """Trainer makes the groups (no decay for biases and norms), the schedule and the optimizer."""

    def run(of):
        arguments = getattr(of, name), CLASSES[name]
        return finish(trainer(tmp_path, gpt2(), sentences(), optimizer_cls_and_kwargs=arguments))

    with only_kernels():
        ours = run(onepass)
    assert_same_run(ours, run(torch.optim))


def test_accumulation_and_clipping(tmp_path):
    runs = []
    for cls in (onepass.AdamW, torch.optim.AdamW):
        arguments = {"gradient_accumulation_steps": 3, "max_grad_norm": 0.05, "per_device_train_batch_size": 2}
        run = trainer(tmp_path, gpt2(), sentences(), optimizer_cls_and_kwargs=(cls, KW), **arguments)
        runs.append(finish(run))
    assert len(runs[0][0]) == 3 * STEPS
    assert_same_run(*runs)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_clipping_in_the_step(tmp_path, name, accumulate):
    """docs/frameworks/transformers.md: max_grad_norm=0, and max_norm among the arguments of the optimizer."""
    arguments = {"gradient_accumulation_steps": accumulate, "per_device_train_batch_size": 2}

    def run(cls, max_grad_norm, **own):
        kwargs = {**CLASSES[name], **own}
        made = trainer(tmp_path, gpt2(), sentences(), optimizer_cls_and_kwargs=(cls, kwargs),
                       max_grad_norm=max_grad_norm, logging_steps=1, **arguments)  # fmt: skip
        end = finish(made)
        return end, [row["grad_norm"] for row in made.state.log_history if "grad_norm" in row], made.optimizer

    ours = getattr(onepass, name)
    with only_kernels():
        clipped, norms, optimizer = run(ours, 0.0, max_norm=0.3)
    assert optimizer.optimizer.last_step.coefficient < 1.0
    assert optimizer.optimizer.last_step.grad_norm == pytest.approx(norms[-1], rel=1e-5)
    for cls in (ours, getattr(torch.optim, name)):
        theirs, their_norms, _ = run(cls, 0.3)
        assert_same_run(clipped, theirs)
        assert norms == pytest.approx(their_norms, rel=1e-3)
    assert_clipped(clipped, run(ours, 0.0)[0])


def test_clipping_and_an_average_in_the_step_of_a_resumed_run(tmp_path):
    """A policy's history is in the checkpoint of the optimizer. The average is resumed by hand."""

    def make(**arguments):
        net = gpt2()
        average = onepass.swa_utils.AveragedModel(net, decay=0.9)
        policy = onepass.AutoClip(50.0)
        optimizer = onepass.AdamW(net.parameters(), **KW, max_norm=policy, average=average)
        scheduler = get_cosine_schedule_with_warmup(optimizer, 2, STEPS)
        made = trainer(tmp_path, net, sentences(), (optimizer, scheduler), max_grad_norm=0.0, **arguments)
        return made, policy, average

    whole, policy, average = make(save_strategy="steps", save_steps=3)
    end = finish(whole)
    assert average.n_averaged == STEPS
    resumed, again, _ = make()
    assert finish(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))[0] == end[0][3:]
    assert_same_bits(weights(resumed.model), end[1])
    assert again.state_dict() == policy.state_dict()


def test_clipping_in_the_step_with_bf16_autocast(tmp_path):
    def run(max_grad_norm, **own):
        kwargs = {**CLASSES["SGD"], **own}
        made = trainer(tmp_path, gpt2(), sentences(), optimizer_cls_and_kwargs=(onepass.SGD, kwargs), bf16=True,
                       max_grad_norm=max_grad_norm)  # fmt: skip
        return finish(made)

    clipped, theirs = run(0.0, max_norm=0.3), run(0.3)
    # Activations are rounded to 8 bits: a last place of a weight may become one of an activation.
    torch.testing.assert_close(torch.tensor(clipped[0]), torch.tensor(theirs[0]), rtol=2e-3, atol=2e-3)
    assert_clipped(clipped, run(0.0))


def with_schedule(folder, cls, **arguments):
    net = gpt2()
    optimizer = cls(net.parameters(), **KW)
    if cls is onepass.AdamW:
        scheduler = onepass.ScheduleLR(optimizer, warmup(2) >> cosine(STEPS - 2), weight_decay=cosine(STEPS, end=0.5))
    else:
        scheduler = transformers_cosine(optimizer, 2, STEPS)
    return trainer(folder, net, sentences(), (optimizer, scheduler), **arguments)


def by_class(folder, cls, **arguments):
    return trainer(folder, gpt2(), sentences(), optimizer_cls_and_kwargs=(cls, KW), **arguments)


@pytest.mark.parametrize("make", [with_schedule, by_class])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path, make):
    whole = finish(make(tmp_path, onepass.AdamW, save_strategy="steps", save_steps=3))
    resumed = finish(make(tmp_path, onepass.AdamW), resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed[0] == whole[0][3:]
    assert_same_bits(resumed[1], whole[1])


@pytest.mark.parametrize(("first", "then"), [(onepass.AdamW, torch.optim.AdamW), (torch.optim.AdamW, onepass.AdamW)])
def test_a_checkpoint_of_one_is_resumed_by_the_other(tmp_path, first, then):
    whole = finish(by_class(tmp_path, first, save_strategy="steps", save_steps=3))
    resumed = finish(by_class(tmp_path, then), resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_run(resumed, (whole[0][3:], whole[1]))


def test_bf16_autocast(tmp_path):
    runs = [finish(by_class(tmp_path, cls, bf16=True)) for cls in (onepass.AdamW, torch.optim.AdamW)]
    torch.testing.assert_close(torch.tensor(runs[0][0]), torch.tensor(runs[1][0]), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("dtype", "settings"), [(torch.float32, {}), (torch.bfloat16, {"master": "split"})], ids=["float32", "bfloat16"]
)
def test_8bit_states(tmp_path, dtype, settings):
    """A resumed run is the uninterrupted one, and the losses are close to those with float32 states."""

    def run(state_dtype, **arguments):
        kw = {**KW, **settings, "lr": 1e-3, "state_dtype": state_dtype}
        net = gpt2(width=64).to(dtype)  # matrices of more than 4,096 elements
        return trainer(tmp_path, net, sentences(), optimizer_cls_and_kwargs=(onepass.AdamW, kw), **arguments)

    saving = run(torch.float8_e4m3fn, save_strategy="steps", save_steps=3)
    with only_kernels():
        whole = finish(saving)
    states = saving.optimizer.optimizer.state
    matrices = [p for p in saving.model.parameters() if p.ndim == 2 and p.numel() >= 4096]
    assert len(matrices) == 8
    assert {states[p]["exp_avg"].dtype for p in matrices} == {torch.float8_e4m3fn}
    resumed = finish(run(torch.float8_e4m3fn), resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed[0] == whole[0][3:]
    assert_same_bits(resumed[1], whole[1])
    plain = finish(run(torch.float32))
    torch.testing.assert_close(torch.tensor(whole[0]), torch.tensor(plain[0]), rtol=5e-3, atol=0)
    assert whole[0] != plain[0]
