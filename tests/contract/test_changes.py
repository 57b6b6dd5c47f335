"""What a user may do to parameters, states and groups between two steps: the next step works on what is there now.

Each change is made to our optimizer, to torch's, and, just before a step, to a copy of ours, which has no memory of
the steps before: nothing that is kept between steps may show.
"""

import copy
import io
import pickle
from collections import defaultdict, deque

import onepass
import pytest
import torch
from cases import ELEMENTWISE, ROW, SCALARS, each_class, each_row
from contract import assert_close, assert_same, give_gradients, leaves, numbers, run_both, snapshot, torch_path, train
from reference import checked_step, params_of
from torch.nn import Parameter

CHANGES = {}


def change(function):
    CHANGES[function.__name__] = function
    return function


def first(opt):
    return opt.param_groups[0]["params"][2]


# -- parameters ------------------------------------------------------------------------------------------------------


@change
def nothing(opt):
    pass


@change
def data_is_replaced(opt):
    first(opt).data = numbers(4, 3)


@change
def data_is_replaced_by_a_transposed_matrix(opt):
    first(opt).data = numbers(3, 4).t()


@change
def data_is_replaced_by_a_slice(opt):
    first(opt).data = numbers(4, 7)[:, ::2][:, :3]


@change
def set_to_another_tensor(opt):
    with torch.no_grad():
        first(opt).set_(numbers(4, 3))


@change
def set_to_an_offset_of_its_storage(opt):
    with torch.no_grad():
        first(opt).set_(numbers(30).untyped_storage(), 7, (4, 3), (5, 1))


@change
def resized_with_states_that_fit(opt):
    p = first(opt)
    p.data = numbers(9, 2).clone()
    p.data.resize_(5, 2)
    opt.state.pop(p, None)


@change
def storage_freed_and_allocated_again(opt):
    """As FSDP does between steps."""
    p = first(opt)
    size, values = p.untyped_storage().nbytes(), p.detach().clone()
    p.untyped_storage().resize_(0)
    p.untyped_storage().resize_(size)
    with torch.no_grad():
        p.copy_(values)


@change
def copied_in_place(opt):
    with torch.no_grad():
        first(opt).copy_(numbers(4, 3))


@change
def swapped_with_another_tensor(opt):
    p, other = first(opt), Parameter(numbers(4, 3))
    state = opt.state.pop(p)
    torch.utils.swap_tensors(p, other)
    opt.state[p] = state


@change
def several_moved_into_one_buffer(opt):
    """As DDP and FSDP flatten parameters."""
    params = params_of(opt)[1:3]
    buffer = torch.cat([p.detach().flatten() for p in params])
    for p, part in zip(params, buffer.split([p.numel() for p in params]), strict=True):
        p.data = part.view_as(p)


# -- states ----------------------------------------------------------------------------------------------------------


def tensors(opt, p=None):
    """The states of a parameter that have its shape."""
    state = opt.state[first(opt) if p is None else p]
    return {name: value for name, value in state.items() if name not in SCALARS}


@change
def states_cleared(opt):
    opt.state.clear()


@change
def state_dict_replaced_by_an_empty_one(opt):
    opt.state = defaultdict(dict)


@change
def state_of_one_deleted(opt):
    del opt.state[first(opt)]


@change
def state_of_one_emptied(opt):
    opt.state[first(opt)].clear()


@change
def state_dict_of_one_replaced(opt):
    opt.state[first(opt)] = {name: value.clone() for name, value in opt.state[first(opt)].items()}


@change
def state_tensors_replaced(opt):
    for name, value in tensors(opt).items():
        opt.state[first(opt)][name] = value + 0.5


@change
def state_tensors_edited(opt):
    for value in tensors(opt).values():
        value.mul_(0.5)


@change
def state_tensors_with_other_strides(opt):
    for name, value in tensors(opt).items():
        opt.state[first(opt)][name] = value.t().contiguous().t()


@change
def state_data_replaced(opt):
    for value in tensors(opt).values():
        value.data = value.data.abs() / 2


@change
def states_in_one_buffer(opt):
    """As ZeRO may lay them out."""
    for p in params_of(opt)[1:3]:
        buffer = torch.cat([value.flatten() for value in tensors(opt, p).values()])
        for i, (name, value) in enumerate(tensors(opt, p).items()):
            opt.state[p][name] = buffer[i * p.numel() : (i + 1) * p.numel()].view_as(value)


@change
def counter_edited(opt):
    if "step" in opt.state[first(opt)]:
        opt.state[first(opt)]["step"].fill_(100)


@change
def counter_replaced(opt):
    if "step" in opt.state[first(opt)]:
        opt.state[first(opt)]["step"] = torch.tensor(7.0, dtype=torch.float64)


@change
def scalars_in_tensors_of_one_element(opt):
    for p in params_of(opt)[1:]:
        for name in SCALARS & opt.state[p].keys():
            opt.state[p][name] = opt.state[p][name].reshape(1).clone()


@change
def scalars_edited(opt):
    for name in SCALARS & opt.state[first(opt)].keys() - {"step"}:
        opt.state[first(opt)][name].mul_(0.5)


@change
def states_swapped_between_parameters(opt):
    p, q = opt.param_groups[1]["params"]
    opt.state[p], opt.state[q] = opt.state[q], opt.state[p]


@change
def another_checkpoint_loaded(opt):
    other = type(opt)([{"params": g["params"]} for g in opt.param_groups], lr=0.5)
    train(other, 3, first=20)
    opt.load_state_dict(other.state_dict())


@change
def own_checkpoint_loaded(opt):
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


@change
def own_live_checkpoint_loaded(opt):
    opt.load_state_dict(opt.state_dict())


# -- groups ----------------------------------------------------------------------------------------------------------


@change
def group_added(opt):
    opt.add_param_group({"params": leaves([(3,), (2, 2)], seed=9), "lr": 0.3})


@change
def group_removed(opt):
    del opt.param_groups[0]


@change
def groups_reversed(opt):
    opt.param_groups.reverse()


@change
def groups_replaced(opt):
    opt.param_groups = [dict(group, params=list(group["params"])) for group in opt.param_groups]


@change
def group_emptied(opt):
    opt.param_groups[0]["params"] = []


@change
def parameters_swapped_in_a_list(opt):
    params = opt.param_groups[0]["params"]
    params[0], params[2] = params[2], params[0]


@change
def parameters_swapped_between_groups(opt):
    a, b = (group["params"] for group in opt.param_groups)
    a[0], b[0] = b[0], a[0]


@change
def parameter_moved_to_another_group(opt):
    opt.param_groups[1]["params"].append(opt.param_groups[0]["params"].pop(1))


@change
def boundary_between_groups_moved(opt):
    """All parameters stay in their order, but one belongs to another group."""
    opt.param_groups[1]["params"].insert(0, opt.param_groups[0]["params"].pop())


@change
def parameter_replaced(opt):
    opt.param_groups[0]["params"][0] = Parameter(numbers(6))


@change
def parameter_removed(opt):
    del opt.param_groups[0]["params"][0]


@change
def parameters_appended_to_a_list(opt):
    opt.param_groups[0]["params"].extend(leaves([(7,), (1, 2)], seed=5))


@change
def list_of_parameters_replaced(opt):
    opt.param_groups[0]["params"] = list(reversed(opt.param_groups[0]["params"]))


@change
def list_of_parameters_made_a_tuple(opt):
    opt.param_groups[1]["params"] = tuple(opt.param_groups[1]["params"])


@change
def list_of_parameters_made_a_parameter_list(opt):
    opt.param_groups[1]["params"] = torch.nn.ParameterList(opt.param_groups[1]["params"])


@change
def list_of_parameters_made_a_deque(opt):
    opt.param_groups[1]["params"] = deque(opt.param_groups[1]["params"])


@change
def keys_added_to_a_group(opt):
    opt.param_groups[0] = {"name": "backbone", **opt.param_groups[0]}
    opt.param_groups[1]["initial_lr"] = 3.0


@pytest.mark.slow
@each_class
@pytest.mark.parametrize("collection", [torch.nn.ParameterList, deque, tuple, iter])
def test_parameters_come_in_any_collection_that_has_an_order(row, collection):
    def trained(params):
        opt = row.ours(params, **row.full)
        train(opt, 2)
        return snapshot(opt)

    expected = trained(leaves(row.shapes))
    assert_same(trained(collection(leaves(row.shapes))), expected)
    assert_same(trained([{"params": collection(leaves(row.shapes))}]), expected)
    if collection is not torch.nn.ParameterList:
        assert_same(trained(collection([{"params": leaves(row.shapes)}])), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
@each_row
def test_between_steps(row, name):
    def script(opt):
        opt.add_param_group({"params": leaves([(8,), (8,)], seed=4), "lr": 0.05})
        train(opt, 2)
        CHANGES[name](opt)
        for t in (2, 3):
            if isinstance(opt, row.ours):
                twin = copy.deepcopy(opt)
                train(twin, first=t)
            train(opt, first=t)
            if isinstance(opt, row.ours):
                assert_same(snapshot(opt), snapshot(twin))

    run_both(row, script)


@each_row
def test_old_memory_is_left_alone(row):
    opt = row.ours(leaves(), **row.full)
    train(opt, 2)
    p = params_of(opt)[2]
    old = [p.data, *opt.state[p].values()]
    p.data = p.data.clone()
    opt.state[p] = {name: value.clone() for name, value in opt.state[p].items()}
    before = copy.deepcopy(old)
    train(opt, 2, first=2)
    assert_same(old, before)


@each_row
def test_everything_gets_the_same_gaps(row):
    """Parameter, gradient and states alike: equal strides, but no longer packed."""
    opt, packed = (row.ours(leaves(), **row.full) for _ in range(2))
    train(opt, 2)
    train(packed, 3)

    def with_gaps(x):
        return torch.zeros(4, 7, dtype=x.dtype)[:, ::3].copy_(x)

    p = params_of(opt)[2]
    give_gradients(params_of(opt), 2)
    grad = p.grad
    p.grad = None
    p.data = with_gaps(p.data)
    p.grad = with_gaps(grad)
    for name in row.states:
        opt.state[p][name] = with_gaps(opt.state[p][name])
    opt.step()
    assert_same(snapshot(opt), snapshot(packed))
    for x in (p.data, *(opt.state[p][name] for name in row.states)):
        assert not torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).view(4, 7)[:, [1, 2, 4, 5]].any()


@each_row
def test_changes_in_every_step(row):
    """Parameters that come and go, so that their addresses are used again."""
    opt = row.ours(leaves([(6,)] * 3), **row.full)
    for t in range(30):
        params = opt.param_groups[0]["params"]
        gone = params.pop(t % 3)
        opt.state.pop(gone, None)
        del gone
        params.insert((t * 5) % 3, Parameter(numbers(6) + t))
        twin = copy.deepcopy(opt)
        for each in (opt, twin):
            train(each, first=t)
        assert_same(snapshot(opt), snapshot(twin))


# -- dtypes ----------------------------------------------------------------------------------------------------------


@each_row
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_module_changes_its_dtype(row, dtype):
    """The parameters stay the objects they were; the states keep their float32."""
    model = torch.nn.Linear(4, 3)
    opt = row.ours(model.parameters(), **row.full)
    train(opt, 2)
    model.to(dtype)
    for t in (2, 3):
        twin = copy.deepcopy(opt)
        for each in (opt, twin):
            train(each, first=t)
        assert_same(snapshot(opt), snapshot(twin))
    assert all(p.dtype == dtype for p in params_of(opt))
    assert {value.dtype for state in opt.state.values() for value in state.values()} == {torch.float32}


@each_row
def test_a_module_made_double_continues_as_in_double(row):
    model, exact = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3).double()
    exact.load_state_dict(model.state_dict())
    opt, stock = row.ours(model.parameters(), **row.full), row.theirs(exact.parameters(), **row.full)
    for t in range(4):
        if t == 2:
            model.double()
        for each in (opt, stock):
            generator = torch.Generator().manual_seed(t)
            for p in params_of(each):
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        opt.step()
        stock.step()
    assert_close([p.detach() for p in params_of(opt)], [p.detach() for p in params_of(stock)], rtol=1e-5, atol=1e-6)


# -- copies ----------------------------------------------------------------------------------------------------------


def by_pickle(opt):
    return pickle.loads(pickle.dumps(opt))


def by_torch_save(opt):
    file = io.BytesIO()
    torch.save(opt, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_class
@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("options", [{}, {"state_dtype": torch.bfloat16}], ids=["plain", "bfloat16 states"])
def test_a_copy_goes_on_where_the_original_stands(row, duplicate, options):
    options = {name: value for name, value in options.items() if name in row.own}
    opt = row.ours(leaves(row.shapes), **row.full, **options)
    opt.add_param_group({"params": leaves(row.shapes[1:2], seed=4), "lr": 0.05})
    for t in range(4):
        twin = duplicate(opt)
        assert type(twin) is type(opt)
        assert not {id(p) for p in params_of(twin)} & {id(p) for p in params_of(opt)}
        assert_same(snapshot(twin), snapshot(opt))
        for each in (opt, twin):
            train(each, first=t)
        assert_same(snapshot(twin), snapshot(opt))
    assert set(opt.__getstate__()) == {"defaults", "state", "param_groups"}


@pytest.mark.parametrize("cls", [onepass.SGD, onepass.LBFGS, onepass.Lookahead])
def test_the_method_goes_by_its_name(cls):
    opt = cls(onepass.SGD(leaves()) if cls is onepass.Lookahead else leaves())
    train(opt.optimizer if cls is onepass.Lookahead else opt)
    assert opt.step.__name__ == "step"
    assert_same(snapshot(pickle.loads(pickle.dumps(opt.step)).__self__), snapshot(opt))
    assert pickle.loads(pickle.dumps(cls.step)) is cls.step


@each_class
def test_a_shallow_copy_steps_the_same_parameters(row):
    opt, plain = (row.ours(leaves(row.shapes), **row.full) for _ in range(2))
    train(opt, 1)
    shallow = copy.copy(opt)
    train(shallow, 1, first=1)
    train(opt, 1, first=2)
    train(plain, 3)
    assert_same(snapshot(opt), snapshot(plain))


@each_class
def test_a_subclass_with_attributes_of_its_own(row):
    class Named(row.ours):
        def __init__(self, params, name, **kw):
            self.name = name
            super().__init__(params, **kw)

    opt, plain = Named(leaves(row.shapes), "x", **row.full), row.ours(leaves(row.shapes), **row.full)
    train(opt, 3)
    train(plain, 3)
    assert opt.name == "x"
    assert_same(snapshot(opt), snapshot(plain))


# -- what torch's classes cannot do, and ours can --------------------------------------------------------------------


@each_row
def test_a_missing_state_is_made_anew(row):
    for name in row.held:
        opt = row.ours(leaves(), **row.full)
        train(opt, 2)
        p = params_of(opt)[2]
        del opt.state[p][name]
        give_gradients(params_of(opt), 2)
        checked_step(row, opt)
        assert set(opt.state[p]) == {*row.scalars, *row.states}


def test_a_momentum_buffer_that_is_gone_begins_again():
    def script(opt):
        train(opt, 2)
        opt.state[params_of(opt)[1]].pop("momentum_buffer")
        opt.state[params_of(opt)[2]]["momentum_buffer"] = None
        train(opt, 2, first=2)

    run_both(ROW["SGD"], script)


NO_FLOAT = {"step": [torch.Tensor.int, lambda x: x.reshape(1).int()]}


@pytest.mark.parametrize(
    ("row", "name", "other"),
    [
        (row, name, other)
        for row in ELEMENTWISE
        for name in row.scalars
        for other in NO_FLOAT.get(name, [torch.Tensor.half])
    ],
)
def test_a_scalar_that_is_no_float_is_left_to_torch(row, name, other):
    def script(opt):
        train(opt, 2)
        state = opt.state[params_of(opt)[1]]
        state[name] = other(state[name])
        train(opt, 2, first=2)

    run_both(row, script, path={f"state {name} that is not one float on the CPU"})


def test_changes_are_stepped_by_the_kernels():
    """What the comparisons above rest on: nothing of it went to torch's code."""
    before = onepass.stats()
    opt = onepass.AdamW(leaves())
    train(opt, 2)
    data_is_replaced_by_a_slice(opt)
    state_tensors_with_other_strides(opt)
    train(opt, 2, first=2)
    assert torch_path(before) == set()
    assert sum(onepass.stats()["kernel"].values()) == sum(before["kernel"].values()) + 4 * 5
