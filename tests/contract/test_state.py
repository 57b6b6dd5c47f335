"""States and checkpoints: what torch would make, in torch's places, and both ways between torch and us."""

import copy
import io
import re

import onepass
import pytest
import torch
from cases import ELEMENTWISE, ROW, ROWS, SCALARS, each_class, each_of_torchs, each_row, for_rows
from contract import assert_close, assert_same, give_gradients, leaves, numbers, run_both, snapshot, torch_path, train
from reference import params_of
from torch.nn import Parameter

# -- what is made ----------------------------------------------------------------------------------------------------


def form(opt):
    """Everything of a state_dict but the numbers: names in order, dtypes, shapes, strides, devices."""
    saved = opt.state_dict()
    states = {
        index: [(name, s.dtype, s.shape, s.stride(), s.device, s.requires_grad) for name, s in state.items()]
        for index, state in saved["state"].items()
    }
    return states, [list(group.items()) for group in saved["param_groups"]], list(opt.defaults)


# What decides which states there are, and who makes them.
FORMS = [
    {},
    {"momentum": 0, "nesterov": False},
    {"momentum": 0, "centered": True},
    {"centered": False},
    {"momentum": 0, "centered": False},
    {"amsgrad": False},
    {"foreach": True},
    {"fused": True},
    {"maximize": True},
]
FORMS = [(row, flags) for row in ELEMENTWISE for flags in FORMS if row.takes(flags)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
VIEWS = (
    lambda x: x,
    lambda x: x.to(memory_format=torch.channels_last),
    lambda x: x.permute(3, 1, 0, 2),
    lambda x: x[:, :, ::2, 1:],
)


@pytest.mark.parametrize(("row", "flags"), FORMS)
@pytest.mark.parametrize(
    ("dtype", "default"), [*((dtype, torch.float32) for dtype in DTYPES), (torch.float32, torch.float64)], ids=str
)
def test_states_have_the_form_that_torch_gives_them(row, flags, dtype, default):
    if flags.get("fused") and dtype.is_complex:
        dtype = torch.float32  # torch has no fused step for complex parameters
    forms = []
    torch.set_default_dtype(default)
    try:
        for cls in (row.ours, row.theirs):
            x = numbers(2, 4, 6, 5, dtype=dtype)
            params = [Parameter(view(x.clone())) for view in VIEWS]
            params += [Parameter(numbers(*shape, dtype=dtype)) for shape in [(), (1,), (0, 2)]]
            opt = cls(params, **{**row.full, **flags})
            for p in params:
                p.grad = torch.randn_like(p)
            opt.step()
            opt.step()
            forms.append(form(opt))
    finally:
        torch.set_default_dtype(torch.float32)
    assert forms[0] == forms[1]


@for_rows(row for row in ELEMENTWISE if "capturable" in row.arguments and issubclass(row.ours, row.theirs))
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_capturable_has_torchs_form_as_well(row, default):
    """On the CPU torch makes the states, and then refuses to step them. Ours steps."""
    torch.set_default_dtype(default)
    try:
        ours, stock = (cls(leaves([(3,), ()]), **row.full, capturable=True) for cls in (row.ours, row.theirs))
        train(ours)
        with pytest.raises(AssertionError, match="capturable"):
            train(stock)
    finally:
        torch.set_default_dtype(torch.float32)
    assert form(ours) == form(stock)


@each_class
def test_state_dicts_hold_nothing_of_ours_unless_it_is_asked_for(row):
    ours, stock = run_both(row, lambda opt: train(opt, 2))
    mine, torchs = ours.state_dict(), stock.state_dict()
    assert list(mine) == list(torchs) == ["state", "param_groups"]
    assert mine["param_groups"] == torchs["param_groups"]
    assert set(ours.__getstate__()) == set(stock.__getstate__())
    assert repr(ours) == repr(stock).replace("Plain", "")


@each_row
def test_saving_does_not_copy(row):
    """As torch's: the tensors of a state_dict are the optimizer's own, and go on with it."""
    opt = row.ours(leaves(), **row.full)
    train(opt, 2)
    saved = opt.state_dict()
    held = [s for state in saved["state"].values() for s in state.values()]
    train(opt, 2, first=2)
    again = [s for state in opt.state_dict()["state"].values() for s in state.values()]
    assert all(a is b for a, b in zip(held, again, strict=True))


# -- checkpoints -----------------------------------------------------------------------------------------------------


def by_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


WITH_STATE_DTYPES = [{}, {"state_dtype": torch.bfloat16}, {"state_dtype": torch.float64}]


@pytest.mark.slow
@each_class
@pytest.mark.parametrize("options", WITH_STATE_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", [by_file, copy.deepcopy])
def test_stopping_and_resuming_is_not_stopping(row, options, dtype, way):
    options = {name: value for name, value in options.items() if name in row.own}
    whole, stopped = (row.ours(leaves(row.shapes, dtype), **row.full, **options) for _ in range(2))
    train(whole, 4)
    train(stopped, 2)
    resumed = row.ours([p.detach().clone().requires_grad_() for p in params_of(stopped)], lr=123.0)
    resumed.load_state_dict(way(stopped.state_dict()))
    assert resumed.state_dict()["param_groups"] == stopped.state_dict()["param_groups"]
    assert_same(snapshot(resumed), snapshot(stopped))
    train(resumed, 2, first=2)
    assert_same(snapshot(resumed), snapshot(whole))


FLAGS = [{}, {"foreach": True}, {"fused": True}, {"maximize": True}]


@pytest.mark.parametrize(
    ("row", "flags"), [(row, flags) for row in ROWS if not row.wants_closure for flags in FLAGS if row.takes(flags)]
)
@pytest.mark.parametrize("way", [by_file, copy.deepcopy])
@pytest.mark.usefixtures("in_float64")
def test_to_torch_and_back_in_the_middle_of_training(row, flags, way):
    options = {**row.full, **flags}
    stock = row.theirs(leaves(row.shapes), **options)
    train(stock, 8)
    opt = row.theirs(leaves(row.shapes), **options)
    for part, cls in enumerate([row.theirs, row.ours, row.theirs, row.ours]):
        following = cls(params_of(opt), lr=123.0)
        following.load_state_dict(way(opt.state_dict()))
        opt = following
        train(opt, 2, first=2 * part)
    assert_close(snapshot(opt), snapshot(stock))
    assert opt.param_groups[0].get("state_dtype") is None


# Arguments that torch's classes have not always had, and fill in.
NEWER = {
    "foreach",
    "fused",
    "capturable",
    "maximize",
    "differentiable",
    "decoupled_weight_decay",
    "amsgrad",
    "nesterov",
}


@each_of_torchs
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("counter", [float, int, torch.as_tensor])
def test_old_checkpoints(row, old, counter):
    missing = {*NEWER, *(["momentum", "centered"] if "centered" in row.arguments else [])} if old else set()

    def script(opt):
        train(opt, 3)
        saved = copy.deepcopy(opt.state_dict())
        for group in saved["param_groups"]:
            for key in missing:
                group.pop(key, None)
        for state in saved["state"].values():
            for name in SCALARS & state.keys():
                kept = torch.as_tensor if counter is torch.as_tensor else float
                state[name] = (counter if name == "step" else kept)(state[name].item())
        opt.load_state_dict(saved)
        train(opt, 2, first=3)
        return form(opt)[0], sorted(opt.param_groups[0])

    run_both(row, script)


@pytest.mark.parametrize("way", [by_file, copy.deepcopy])
def test_adagrads_decoupled_decay_stands_in_groups_where_it_is_asked_for(way):
    options, key = {"lr": 0.05, "weight_decay": 0.3}, "decoupled_weight_decay"
    opt = onepass.Adagrad(leaves(), **options)
    spelled = onepass.Adagrad([{"params": leaves(), key: False}], **options)  # as groups were once
    asked = onepass.Adagrad(leaves(), **options, decoupled_weight_decay=True)
    asked.add_param_group({"params": leaves(seed=1)})
    asked.add_param_group({"params": leaves(seed=2), key: False})
    assert [group.get(key) for group in asked.param_groups] == [True, True, False]
    for step, decoupled in enumerate([False, True, False]):
        if decoupled:
            opt.param_groups[0][key] = True
        else:
            opt.param_groups[0].pop(key, None)
        spelled.param_groups[0][key] = decoupled
        for each in (opt, spelled):
            train(each, 1, first=step)
        assert_same(snapshot(opt)["params"], snapshot(spelled)["params"])
        for source in (opt, spelled):
            other = onepass.Adagrad(leaves(), lr=0.5, decoupled_weight_decay=True)
            other.load_state_dict(way(source.state_dict()))
            assert other.param_groups[0].get(key) == source.param_groups[0].get(key)


@pytest.mark.parametrize(("source", "target"), [("Adam", "AdamW"), ("AdamW", "Adam")])
def test_checkpoints_between_adam_and_adamw(source, target):
    source, target = ROW[source], ROW[target]

    def script(opt):
        for cls in (source.ours, source.theirs):
            other = cls(leaves(), amsgrad=True, weight_decay=0.2)
            train(other, 3)
            opt.load_state_dict(other.state_dict())
            train(opt, 2, first=3)
        return opt.param_groups[0]["decoupled_weight_decay"]

    run_both(target, script)


@each_row
def test_named_parameters(row):
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)).double()

    def script(opt):
        opt.param_groups.clear()
        opt.state.clear()
        opt.add_param_group({"params": copy.deepcopy(model[0]).named_parameters()})
        opt.add_param_group({"params": copy.deepcopy(model[1]).named_parameters(), "lr": 0.3})
        train(opt, 2)
        saved = copy.deepcopy(opt.state_dict())
        names = [group["param_names"] for group in saved["param_groups"]]
        unnamed = copy.deepcopy(saved)
        for group in unnamed["param_groups"]:
            del group["param_names"]
        saved["param_groups"][0]["param_names"] = ["a", "b"]
        for checkpoint in (saved, unnamed):
            opt.load_state_dict(checkpoint)
            train(opt, 1, first=2)
            names.append([group["param_names"] for group in opt.param_groups])
        return names

    ours, _ = run_both(row, script)
    assert [row.name for row in onepass.explain(ours)] == ["a", "b", "weight", "bias"]


@each_row
def test_what_others_put_into_the_state_survives(row):
    def script(opt):
        train(opt, 1)
        p = params_of(opt)[1]
        opt.state[p]["note"] = "text"
        opt.state[p]["ema"] = torch.full((5,), 0.25, dtype=torch.float64)
        opt.state[p]["nested"] = {"counts": [1, 2], "tensor": torch.ones(2, dtype=torch.float64)}
        opt.state["global"] = {"calls": 3}
        opt.state[7] = "seven"
        train(opt, 1, first=1)
        twin = type(opt)(params_of(opt), lr=0.5)
        twin.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.state, opt.param_groups = twin.state, twin.param_groups
        train(opt, 1, first=2)
        state = opt.state[p]
        kept = [state.pop(name) for name in ("note", "ema", "nested")]
        nested = kept[2]
        assert_same(nested.pop("tensor"), torch.ones(2, dtype=torch.float64))
        text = re.sub(" at 0x[0-9a-f]+", "", kept[0])  # torch 2.10 loads the repr of a generator in place of a string
        return [text, kept[1].tolist(), nested, opt.state["global"], opt.state[7]]

    run_both(row, script)


@each_row
def test_checkpoints_that_do_not_fit_are_refused_in_torchs_words(row):
    def script(opt):
        train(opt, 1)
        texts = []
        for others in ([leaves(), leaves()], [leaves()[:2]]):
            other = type(opt)([{"params": params} for params in others], lr=0.5)
            with pytest.raises(ValueError, match="loaded state dict") as error:
                opt.load_state_dict(other.state_dict())
            texts.append(str(error.value))
        train(opt, 1, first=1)
        return texts

    run_both(row, script)


# -- hooks -----------------------------------------------------------------------------------------------------------


@each_row
def test_state_dict_hooks_fire_in_torchs_order_and_their_results_count(row):
    def script(opt):
        events = []

        def note(name, result=None):
            def hook(this, *args):
                given = [sorted(arg, key=str) for arg in args]
                dtypes = sorted({str(s.dtype) for p in params_of(this) for s in this.state.get(p, {}).values()})
                events.append((name, this is opt, given, dtypes, this.param_groups[0]["lr"]))
                return result(*args) if result else None

            return hook

        def faster(state_dict):
            groups = [{**group, "lr": group["lr"] * 2} for group in state_dict["param_groups"]]
            return {**state_dict, "param_groups": groups}

        handles = [
            opt.register_state_dict_pre_hook(note("save pre")),
            opt.register_state_dict_pre_hook(note("save pre first"), prepend=True),
            opt.register_state_dict_post_hook(note("save post", lambda saved: {**saved, "extra": 1})),
            opt.register_state_dict_post_hook(note("save post first"), prepend=True),
            opt.register_load_state_dict_pre_hook(note("load pre", faster)),
            opt.register_load_state_dict_pre_hook(note("load pre first"), prepend=True),
            opt.register_load_state_dict_post_hook(note("load post")),
            opt.register_load_state_dict_post_hook(note("load post first"), prepend=True),
        ]
        train(opt, 2)
        saved = opt.state_dict()
        events.append(saved["extra"])
        opt.load_state_dict(saved)
        train(opt, 1, first=2)
        for handle in handles:
            handle.remove()
        opt.load_state_dict(opt.state_dict())
        return events

    ours, _ = run_both(row, script)
    assert_no_hooks_left(ours)


@each_row
def test_hooks_around_loading_see_and_decide_what_is_loaded(row):
    """A pre hook's state_dict is the one whose dtypes are kept, and a post hook sees the states as they stay."""
    source = row.ours(leaves(dtype=torch.float32), **row.full, state_dtype=torch.bfloat16)
    train(source, 2)
    opt = row.ours([p.detach().clone().requires_grad_() for p in params_of(source)], lr=0.5)
    seen = []

    def widen(_, saved):
        states = {
            i: {name: s.to(torch.float64) if name in row.states else s for name, s in state.items()}
            for i, state in saved["state"].items()
        }
        return {**saved, "state": states}

    opt.register_load_state_dict_post_hook(lambda this: seen.append(dtypes_of(this)))
    opt.load_state_dict(source.state_dict())
    opt.register_load_state_dict_post_hook(lambda this: seen.append(dtypes_of(this)), prepend=True)
    opt.register_load_state_dict_pre_hook(widen)
    opt.load_state_dict(source.state_dict())
    assert seen == [{torch.bfloat16}, {torch.float64}, {torch.float64}]


def assert_no_hooks_left(opt):
    assert not opt._optimizer_load_state_dict_pre_hooks
    assert not opt._optimizer_load_state_dict_post_hooks


@each_row
def test_a_hook_that_raises_leaves_no_hook_of_ours_behind(row):
    opt = row.ours(leaves(), **row.full)

    def hook(*_):
        raise ArithmeticError("no")

    for register in (opt.register_load_state_dict_pre_hook, opt.register_load_state_dict_post_hook):
        handle = register(hook)
        with pytest.raises(ArithmeticError):
            opt.load_state_dict(opt.state_dict())
        handle.remove()
        assert_no_hooks_left(opt)


# -- state_dtype -----------------------------------------------------------------------------------------------------


def dtypes_of(opt):
    """Of all states but the counters."""
    return {opt.state[p][name].dtype for p in params_of(opt) for name in opt.state[p] if name not in SCALARS}


STATE_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@each_row
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
@pytest.mark.parametrize("dtype", STATE_DTYPES)
def test_state_dtype_of_new_and_of_loaded_states(row, dtype, state_dtype):
    opt = row.ours(leaves(dtype=dtype), **row.full, state_dtype=state_dtype)
    train(opt, 2)
    assert dtypes_of(opt) == {state_dtype}
    # The checkpoint brings its state_dtype along, and keeps every bit.
    saved = by_file(opt.state_dict())
    assert saved["param_groups"][0]["state_dtype"] == str(state_dtype).removeprefix("torch.")
    for kept in (saved["param_groups"][0]["state_dtype"], state_dtype):  # which it was itself, once
        saved["param_groups"][0]["state_dtype"] = kept
        other = row.ours(params_of(opt), **row.full)
        other.load_state_dict(saved)
        assert other.param_groups[0]["state_dtype"] is state_dtype
        assert_same(snapshot(other), snapshot(opt))
    other.add_param_group({"params": leaves([(3,)], dtype)})
    other.add_param_group({"params": leaves([(3,)], dtype), "state_dtype": torch.float64})
    train(other, 1)
    kinds = [other.state[group["params"][0]][row.states[0]].dtype for group in other.param_groups]
    assert kinds == [state_dtype, row.new_dtype(dtype), torch.float64]


@pytest.mark.parametrize("name", ["int64", "no_such_dtype", "tensor"])
def test_a_checkpoint_with_a_state_dtype_that_there_is_not(name):
    opt = onepass.AdamW(leaves())
    saved = opt.state_dict()
    saved["param_groups"][0]["state_dtype"] = name
    with pytest.raises(ValueError, match="state_dtype must be one of"):
        opt.load_state_dict(saved)
    assert "state_dtype" not in opt.param_groups[0]


@each_row
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_a_checkpoint_of_torchs_into_an_optimizer_with_a_state_dtype(row, state_dtype):
    stock = row.theirs(leaves(dtype=torch.float32), **row.full)
    train(stock, 2)
    opt = row.ours([p.detach().clone().requires_grad_() for p in params_of(stock)], lr=0.5, state_dtype=state_dtype)
    opt.load_state_dict(stock.state_dict())
    assert opt.param_groups[0].get("state_dtype") == state_dtype
    assert dtypes_of(opt) == {state_dtype}
    expected = snapshot(stock)
    for state in expected["state"]:
        for name in row.states:
            state[name] = state[name].to(state_dtype)
    assert_same(snapshot(opt), expected)
    train(opt, 1, first=2)
    assert dtypes_of(opt) == {state_dtype}


@each_row
def test_a_checkpoint_with_a_state_dtype_into_torchs_class(row):
    """torch casts to the parameter's dtype, and ignores a key that it does not know."""
    opt = row.ours(leaves(dtype=torch.float32), **row.full, state_dtype=torch.bfloat16)
    train(opt, 2)
    stock = row.theirs(params_of(opt), lr=0.5)
    stock.load_state_dict(by_file(opt.state_dict()))
    assert dtypes_of(stock) == {torch.float32}
    train(stock, 2, first=2)


@each_row
def test_loading_keeps_each_states_own_dtype(row):
    """As after a dtype was changed by hand, or a module became bfloat16 in mid-training."""
    opt = row.ours(leaves(), **row.full)
    train(opt, 2)
    with torch.no_grad():
        for p in params_of(opt):
            p.data = p.data.bfloat16()
            p.grad = None
    name = row.states[-1]
    opt.state[params_of(opt)[1]][name] = opt.state[params_of(opt)[1]][name].float()
    other = row.ours([p.detach().clone().requires_grad_() for p in params_of(opt)], **row.full)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert_same(snapshot(other), snapshot(opt))
    for each in (opt, other):
        give_gradients(params_of(each), 2)
        each.step()
    assert_same(snapshot(other), snapshot(opt))


@each_row
def test_complex_parameters_have_complex_states_whatever_the_state_dtype(row):
    opt = row.ours(leaves([(3,)], torch.complex64), **row.full, state_dtype=torch.bfloat16)
    train(opt, 2)
    assert dtypes_of(opt) == {torch.complex64}
    other = row.ours(params_of(opt), lr=0.5)
    other.load_state_dict(by_file(opt.state_dict()))
    assert_same(snapshot(other), snapshot(opt))


# -- where torch's code steps a parameter ----------------------------------------------------------------------------

# Its classes take no states of another dtype than the parameter's.
MIXED = [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float32),
    (torch.float32, torch.float64),
]
WITH_STATE_DTYPE = [row for row in ROWS if "state_dtype" in row.own and not row.wants_sparse]


def tolerance(*dtypes):
    return 8 * max(torch.finfo(dtype).eps for dtype in dtypes)


@for_rows(WITH_STATE_DTYPE)
@pytest.mark.parametrize(("dtype", "state_dtype"), MIXED)
def test_state_dtype_where_torchs_code_steps(row, dtype, state_dtype):
    """Parameters that share memory are stepped one after the other: as if each had an optimizer."""

    def overlapping():
        x = numbers(48).to(dtype)
        return [Parameter(x[:30].view(5, 6)), Parameter(x[18:].view(6, 5))]

    params, alone = overlapping(), overlapping()
    opt = row.ours(params, **row.full, state_dtype=state_dtype)
    parts = [row.ours([p], **row.full, state_dtype=state_dtype) for p in alone]
    before = onepass.stats()
    for t in range(3):
        give_gradients(params, t)
        opt.step()
    assert torch_path(before) == {"memory shared with another parameter"}
    before = onepass.stats()
    for t in range(3):
        give_gradients(alone, t)
        for part in parts:
            part.step()
    assert torch_path(before) == set()
    wide = {torch.promote_types(dtype, torch.float32)} if row.ours.wide_states else set()
    assert dtypes_of(opt) == {state_dtype, *wide}
    expected = {key: [snapshot(part)[key][0] for part in parts] for key in ("params", "state")}
    bound = tolerance(dtype, state_dtype)
    assert_close(snapshot(opt), expected, rtol=bound, atol=bound)
    assert [p.dtype for p in params] == [dtype] * 2


@for_rows(row for row in WITH_STATE_DTYPE if row.counts_steps)
@pytest.mark.parametrize(("dtype", "state_dtype"), MIXED)
def test_loaded_states_of_another_dtype_where_torchs_code_steps(row, dtype, state_dtype):
    opts = [row.ours(leaves(row.shapes, dtype), **row.full) for _ in range(2)]
    for opt in opts:
        train(opt, 2)
        for state in opt.state.values():
            for name in set(state) - set(SCALARS):
                state[name] = state[name].to(state_dtype)
    held = {p: dict(opts[0].state[p]) for p in params_of(opts[0])}
    for state in opts[0].state.values():
        state["step"] = state["step"].to(torch.int64)
    before = onepass.stats()
    for opt in opts:
        train(opt, 2, first=2)
    assert torch_path(before) == {"state step that is not one float on the CPU"}
    for p, state in opts[0].state.items():
        assert state["step"].item() == 4
        assert state["step"].dtype == torch.int64
        state["step"] = state["step"].to(torch.float32)
        for name in set(state) - {"step"}:
            assert state[name] is held[p][name]  # written in place, as by a kernel
    bound = tolerance(dtype, state_dtype)
    assert_close(snapshot(opts[0]), snapshot(opts[1]), rtol=bound, atol=bound)


# -- groups that a hook adds -----------------------------------------------------------------------------------------


@for_rows(row for row in ROWS if not row.wants_closure)  # torch's LBFGS has one group
def test_a_hook_may_add_the_group_that_a_checkpoint_has(row):
    def script(opt):
        opt.add_param_group({"params": leaves([(4, 2)], seed=5), "lr": 0.3})
        train(opt, 2)
        saved = copy.deepcopy(opt.state_dict())
        (added,) = opt.param_groups.pop()["params"]
        del opt.state[added]
        opt.register_load_state_dict_pre_hook(lambda this, _: this.add_param_group({"params": [added]}))
        opt.load_state_dict(saved)
        assert opt.param_groups[1]["lr"] == 0.3
        train(opt, 2, first=2)

    run_both(row, script, shapes=[(4, 3)])
