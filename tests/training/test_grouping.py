"""param_groups, create, list_optimizers: who gets which rate and weight decay, and optimizers by name."""

import math
import re

import onepass
import pytest
import torch
from cases import ROWS
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4)
        self.in_proj_bias = nn.Parameter(torch.zeros(4))


class RMSNormOfMine(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class MyNorm(RMSNormOfMine):
    pass


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.last = MyNorm()
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.tokens.weight


def told(groups):
    """name -> (lr, weight_decay)"""
    return {name: (g.get("lr"), g.get("weight_decay")) for g in groups for name, _ in g["params"]}


def names(model):
    return [name for name, _ in model.named_parameters()]


def test_no_decay_of_biases_norms_and_embeddings():
    model = Transformer()
    found = told(onepass.param_groups(model, weight_decay=0.1))
    assert list(found) == [n for decayed in (False, True) for n in names(model) if (found[n][1] != 0.0) == decayed]
    assert {name for name, (_, decay) in found.items() if decay == 0.1} == {f"blocks.{i}.mix.weight" for i in range(3)}
    assert {decay for _, decay in found.values()} == {0.0, 0.1}


@pytest.mark.parametrize(
    ("no_decay", "exempt"),
    [
        ((), set()),
        (("bias",), {f"blocks.{i}.{n}" for i in range(3) for n in ("norm.bias", "mix.bias", "in_proj_bias")}),
        (("norm",), {f"blocks.{i}.norm.{n}" for i in range(3) for n in ("weight", "bias")} | {"last.scale"}),
        (("embedding",), {"tokens.weight"}),
        (("blocks.1.*", "last.*"), {n for n in names(Transformer()) if n.startswith(("blocks.1.", "last."))}),
    ],
)
def test_no_decay_by_kind_and_by_name(no_decay, exempt):
    found = told(onepass.param_groups(Transformer(), weight_decay=0.1, no_decay=no_decay))
    assert {name for name, (_, decay) in found.items() if decay == 0.0} == exempt


def test_layers_and_scales():
    model = Transformer()
    groups = onepass.param_groups(
        model, lr=1.0, weight_decay=0.1, layer_decay=0.5, lr_scale={"blocks.2.mix.*": 10.0, "*.bias": 0.5}
    )
    layer = {"tokens": 0, "blocks.0": 1, "blocks.1": 2, "blocks.2": 3, "last": 4}
    for name, (lr, _) in told(groups).items():
        number = next(i for prefix, i in layer.items() if name.startswith(prefix + "."))
        scale = 10.0 if name.startswith("blocks.2.mix") else 1.0
        assert lr == 0.5 ** (4 - number) * scale * (0.5 if name.endswith(".bias") else 1.0), name
    pairs = [(g["lr"], g["weight_decay"]) for g in groups]
    assert len(set(pairs)) == len(pairs)


def test_the_longest_list_has_the_layers():
    model = nn.Sequential(
        nn.Linear(2, 2), nn.ReLU(), nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))), nn.Linear(2, 1)
    )
    found = told(onepass.param_groups(model, lr=1.0, layer_decay=0.5))
    assert [lr for name, (lr, _) in found.items() if name.endswith("weight")] == [2.0**-i for i in (5, 4, 3, 2, 1, 0)]
    flat = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    assert [lr for lr, _ in told(onepass.param_groups(flat, lr=1.0, layer_decay=0.5)).values()] == [0.5, 0.5, 1.0, 1.0]


def test_nothing_asked_is_one_group():
    model = Transformer()
    (group,) = onepass.param_groups(model)
    assert [name for name, _ in group["params"]] == names(model)
    assert group.keys() == {"params"}


def test_any_optimizer_takes_them_and_explain_tells():
    model = Transformer()
    for cls in (onepass.AdamW, torch.optim.AdamW):
        opt = cls(onepass.param_groups(model, lr=1e-3, weight_decay=0.1, lr_scale={"last.*": 0.1}))
        assert sum(len(g["params"]) for g in opt.param_groups) == len(names(model))
        printed = str(onepass.explain(opt)).splitlines()
        assert [line for line in printed if line.startswith("  group")] == [
            "  group 0: lr 0.001, weight_decay 0",
            "  group 1: lr 0.001, weight_decay 0.1",
            "  group 2: lr 0.0001, weight_decay 0",
        ]
        assert any(line.startswith("    parameter 0 last.scale: float32 [4]") for line in printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight_decay": -0.1}, "weight_decay must be >= 0, got -0.1"),
        ({"lr": float("nan")}, "lr must be >= 0, got nan"),
        ({"lr": 1.0, "layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], got 0.0"),
        ({"layer_decay": 0.5}, "param_groups: lr must be given with layer_decay or lr_scale, got None"),
        ({"lr_scale": {"*": 2.0}}, "param_groups: lr must be given with layer_decay or lr_scale, got None"),
        (
            {"lr": 1.0, "lr_scale": {"head.*": 2.0}},
            "no parameter has a name like 'head.*'; the first is 'tokens.weight'",
        ),
        ({"lr": 1.0, "lr_scale": {"*": -2.0}}, "lr_scale of '*' must be >= 0, got -2.0"),
        ({"weight_decay": 0.1, "no_decay": ("biases",)}, "no_decay: no parameter has a name like 'biases'"),
        ({"weight_decay": 0.1, "no_decay": "bias"}, r"got the str 'bias': pass \['bias'\]"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(
        ValueError, match="^param_groups: .*" + message.removeprefix("param_groups: ").replace("*", r"\*")
    ):
        onepass.param_groups(Transformer(), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": "1e-3"}, "lr must be a number, got the str '1e-3'"),
        ({"lr": [1e-3]}, "lr must be a number, got the list [0.001]"),
        ({"weight_decay": "0.1"}, "weight_decay must be a number, got the str '0.1'"),
        ({"lr": 1.0, "layer_decay": "0.5"}, "layer_decay must be a number, got the str '0.5'"),
        (
            {"lr": 1.0, "lr_scale": [("head.*", 2.0)]},
            "lr_scale must be a mapping of patterns of names to factors, such as {'head.*': 10.0}, got the list "
            "[('head.*', 2.0)]",
        ),
        ({"lr": 1.0, "lr_scale": {"*": "2"}}, "lr_scale of '*' must be a number, got the str '2'"),
        ({"lr": 1.0, "lr_scale": {0: 2.0}}, "lr_scale must have patterns of names for keys, got the int 0"),
        ({"weight_decay": 0.1, "no_decay": None}, "no_decay must be a list of ('bias', 'norm', 'embedding') and"),
        ({"weight_decay": 0.1, "no_decay": [1]}, "no_decay must be a list of ('bias', 'norm', 'embedding') and"),
    ],
)
def test_arguments_of_the_wrong_type(arguments, message):
    with pytest.raises(TypeError, match="^param_groups: " + re.escape(message)):
        onepass.param_groups(Transformer(), **arguments)


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_numbers_that_no_step_can_use(name):
    with pytest.raises(ValueError, match=f"^param_groups: {name} must fit a float, got an int of 1329 bits$"):
        onepass.param_groups(Transformer(), **{name: 10**400})
    with pytest.raises(ValueError, match=rf"^param_groups: {name} must be one number, got a tensor of shape \[2\]$"):
        onepass.param_groups(Transformer(), **{name: torch.ones(2)})


def test_a_tensor_is_a_learning_rate():
    lr = torch.tensor(0.5)
    (group,) = onepass.param_groups(nn.Linear(2, 2), lr=lr)
    assert float(group["lr"]) == 0.5


def test_what_is_no_model_or_has_no_layers():
    with pytest.raises(TypeError, match=r"^param_groups: model must be a torch\.nn\.Module, got a list"):
        onepass.param_groups([])
    with pytest.raises(ValueError, match="no ModuleList or Sequential"):
        onepass.param_groups(nn.Linear(2, 2), lr=1.0, layer_decay=0.5)
    stages = nn.ModuleDict(
        {name: nn.Sequential(*(nn.Linear(2, 2) for _ in range(n))) for name, n in (("a", 2), ("b", 3), ("c", 2))}
    )
    with pytest.raises(ValueError, match=r"longest list of the model, 'b', has only 6 of its 14 parameters"):
        onepass.param_groups(stages, lr=1.0, layer_decay=0.5)


# -- which list has the layers ---------------------------------------------------------------------------------------


def tower(layers):
    return nn.ModuleList(nn.Linear(2, 2) for _ in range(layers))


def rates(model):
    """The rates of the weights, with layer_decay 0.5 and an lr of 1."""
    found = told(onepass.param_groups(model, lr=1.0, layer_decay=0.5))
    return {name.removesuffix(".weight"): lr for name, (lr, _) in found.items() if name.endswith("weight")}


@pytest.mark.parametrize("teacher_first", [True, False])
@pytest.mark.parametrize("teacher_layers", [3, 5])
def test_a_frozen_teacher_has_no_part_in_the_choice(teacher_layers, teacher_first):
    parts = {"student": tower(3), "teacher": tower(teacher_layers).requires_grad_(False)}
    model = nn.ModuleDict({name: parts[name] for name in sorted(parts, reverse=teacher_first)})
    found = rates(model)
    assert [found[f"student.{i}"] for i in range(3)] == [0.25, 0.5, 1.0]


def test_a_list_that_is_frozen_in_part_counts_with_all_of_its_layers():
    model = nn.ModuleDict({"blocks": tower(4), "head": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))})
    for number in range(3):
        model["blocks"][number].requires_grad_(False)
    blocks = {f"blocks.{i}": 0.5 ** (4 - i) for i in range(4)}
    assert rates(model) == {**blocks, "head.0": 1.0, "head.1": 1.0}


@pytest.mark.parametrize("frozen", ["all", "the list"])
def test_a_list_that_is_frozen_is_taken_where_no_other_is_trained(frozen):
    """Before gradual unfreezing, say."""
    model = nn.ModuleDict({"blocks": tower(3), "head": nn.Linear(2, 1)})
    (model if frozen == "all" else model["blocks"]).requires_grad_(False)
    assert rates(model) == {"blocks.0": 0.125, "blocks.1": 0.25, "blocks.2": 0.5, "head": 1.0}


def test_lists_of_equally_many_layers_are_an_error_that_names_them():
    model = nn.ModuleDict({"encoder": tower(2), "decoder": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))})
    text = (
        r"layer_decay: the lists 'encoder' and 'decoder' have equally many layers \(2\).*"
        "; scale the learning rates by name"
    )
    with pytest.raises(ValueError, match=text):
        onepass.param_groups(model, lr=1.0, layer_decay=0.5)
    model["memory"] = tower(2)
    with pytest.raises(ValueError, match="the lists 'encoder', 'decoder' and 'memory' have equally many layers"):
        onepass.param_groups(model, lr=1.0, layer_decay=0.5)
    scaled = told(onepass.param_groups(model, lr=1.0, lr_scale={"encoder.0.*": 0.25, "encoder.1.*": 0.5}))
    assert scaled["encoder.0.weight"][0] == 0.25


def test_a_list_within_the_layers_of_another_is_no_rival():
    model = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    )
    assert rates(model) == {"0.0": 0.5, "0.1": 0.5, "1.0": 1.0, "1.1": 1.0}


# -- by name ---------------------------------------------------------------------------------------------------------


def test_every_optimizer_has_a_name():
    known = onepass.list_optimizers()
    assert known == sorted(known)
    classes = {n.lower() for n in torch.optim.__all__ if isinstance(getattr(torch.optim, n), type)} - {"optimizer"}
    assert set(known) == classes | {row.name.lower() for row in ROWS if not hasattr(torch.optim, row.name)}
    for name in known:
        weights = [nn.Parameter(torch.zeros(2, 2))]
        arguments = {} if name in ("lbfgs",) else {"lr": 0.5}
        opt = onepass.create(name, weights, **arguments)
        assert type(opt).__name__.lower() == name
        assert type(opt).__module__ == "onepass"
        assert opt.param_groups[0]["lr"] == arguments.get("lr", 1.0)


def test_create_from_a_model():
    model = Transformer()
    opt = onepass.create("Adam_W", model, lr=1e-3, weight_decay=0.1)
    assert opt.param_groups[0]["param_names"] == names(model)
    opt = onepass.create("adamw", model, lr=1e-3, weight_decay=0.1, layer_decay=0.5, betas=(0.8, 0.9))
    wanted = onepass.param_groups(model, lr=1e-3, weight_decay=0.1, layer_decay=0.5)
    assert [(g["lr"], g["weight_decay"], g["param_names"]) for g in opt.param_groups] == [
        (g["lr"], g["weight_decay"], [name for name, _ in g["params"]]) for g in wanted
    ]
    assert opt.defaults["betas"] == (0.8, 0.9)


def test_create_passes_what_a_step_does_beside_the_update():
    torch.manual_seed(0)
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    average = onepass.swa_utils.AveragedModel(model, decay=0.9)
    arguments = {"lr": 0.1, "weight_decay": 0.1, "no_decay": ["bias"]}
    optimizer = onepass.create("adamw", model, max_norm=0.5, average=average, zero_grad=True, **arguments)
    bare = onepass.create("adamw", twin, **arguments)
    assert len(optimizer.param_groups) == 2
    for step in range(3):
        for each in (model, twin):
            torch.manual_seed(step)
            each(torch.randn(8, 3)).square().sum().backward()
        optimizer.step()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        bare.step()
        bare.zero_grad()
        assert not any(p.grad.any() for p in model.parameters())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert average.n_averaged == 3


def test_param_groups_and_the_arguments_of_a_step():
    """The groups have hyperparameters alone; the norm is that of all of them."""
    model = nn.Linear(3, 2)
    copies = nn.Linear(3, 2).bfloat16()
    groups = onepass.param_groups(model, weight_decay=0.1)
    optimizer = onepass.SGD(groups, lr=0.1, max_norm=math.inf, copy_to=copies)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.last_step.grad_norm == pytest.approx(math.sqrt(8))
    for p, copied in zip(model.parameters(), copies.parameters(), strict=True):
        assert torch.equal(copied, p.bfloat16())
    assert all("max_norm" not in group for group in optimizer.param_groups)


def test_create_knows_no_such_name():
    with pytest.raises(ValueError, match=r"^create: there is no optimizer 'adamww': did you mean 'adamw'"):
        onepass.create("adamww", [torch.zeros(1)])
    with pytest.raises(ValueError, match=r"^create: there is no optimizer 'zzz': there are adabelief, "):
        onepass.create("zzz", [torch.zeros(1)])


@pytest.mark.parametrize(
    ("name", "what"),
    [
        (5, "the int 5"),
        (None, "the NoneType None"),
        (onepass.AdamW, "the class AdamW, which makes an optimizer when it is called"),
    ],
)
def test_create_takes_a_name(name, what):
    text = f"create: name must be the name of an optimizer, such as 'adamw', got {what}"
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        onepass.create(name, nn.Linear(2, 2))


@pytest.mark.parametrize(
    "arguments", [{"no_decay": ["bias"]}, {"layer_decay": 0.5, "lr": 1.0}, {"lr_scale": {"*": 2.0}, "lr": 1.0}]
)
def test_create_groups_the_parameters_of_a_module_only(arguments):
    name = next(iter(arguments))
    text = f"create: {name} needs a torch.nn.Module for params, got the generator: pass the model, not its parameters()"
    with pytest.raises(TypeError, match=f"^{re.escape(text)}$"):
        onepass.create("adamw", nn.Linear(2, 2).parameters(), **arguments)


@pytest.mark.parametrize("arguments", [{"no_muon": ["x"]}, {"adamw": {"lr": 0.1}}])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_create_divides_a_module_for_muon_only(name, arguments):
    params = nn.Linear(2, 2) if name == "adamw" else [nn.Parameter(torch.ones(2, 2))]
    text = f"create: {next(iter(arguments))} is only for muon and normuon, with a module"
    with pytest.raises(TypeError, match=f"^{text}$"):
        onepass.create(name, params, **arguments)


@pytest.mark.parametrize("module", [nn.LSTM(3, 4, 2), nn.GRU(3, 4), nn.MultiheadAttention(4, 2, add_bias_kv=True)])
def test_biases_of_recurrent_nets_and_of_attention_do_not_decay(module):
    decay = {
        name: weight_decay for name, (_, weight_decay) in told(onepass.param_groups(module, weight_decay=0.1)).items()
    }
    assert {name for name in decay if "bias" in name} == {name for name, value in decay.items() if value == 0.0}


@pytest.mark.parametrize("embedding_first", [True, False])
def test_an_embedding_that_is_tied_to_a_head_does_not_decay_whatever_comes_first(embedding_first):
    parts = {"tokens": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)}
    parts["head"].weight = parts["tokens"].weight
    model = nn.ModuleDict({name: parts[name] for name in sorted(parts, reverse=embedding_first)})
    (group,) = onepass.param_groups(model, weight_decay=0.1)
    assert [name for name, _ in group["params"]] == ["tokens.weight" if embedding_first else "head.weight"]
    assert group["weight_decay"] == 0.0


def test_no_decay_may_be_a_generator():
    module = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    groups = onepass.param_groups(module, weight_decay=0.1, no_decay=(kind for kind in ("0.weight", "norm", "bias")))
    assert [group["weight_decay"] for group in groups] == [0.0]


def test_create_exempts_from_the_weight_decay_that_the_optimizer_has_by_default():
    optimizer = onepass.create("adamw", nn.Linear(3, 4), no_decay=["bias"])
    assert [(g["param_names"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (["weight"], 0.01),
        (["bias"], 0.0),
    ]
    with pytest.raises(ValueError, match="no parameter has a name like 'foo'"):
        onepass.create("adamw", nn.Linear(3, 4), no_decay=["foo"])
    assert [
        g["weight_decay"] for g in onepass.create("adamw", nn.Linear(3, 4), lr=1.0, lr_scale={"*": 2.0}).param_groups
    ]
