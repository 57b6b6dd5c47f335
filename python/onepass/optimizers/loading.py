"""Loading of checkpoints: states in the dtypes in which they were saved, or converted to those of the optimizer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import block_states, cautious
from .arguments import described
from .fallback import encode
from .gradient_norm import is_plain
from .hooks import params_of
from .master import NAMES as MASTER_NAMES
from .master import low_bits_versions, master_name, set_low_bits_versions
from .rules import RULES, has_kernels

if TYPE_CHECKING:
    from .base import Native

# The key of a clipping policy's state in the first group of a state_dict. The optimizer's own first group has it too,
# with "", because torch.distributed.checkpoint loads only keys that are there.
POLICY_STATE = "clipping_policy"

SLOW_PARAM = "slow_param"  # the state that holds Lookahead's slow weights

# Keys of groups that torch's classes do not have, each only if its argument was given.
OWN_KEYS = ("state_dtype", "master", "stochastic_rounding", "rounding_seed", *cautious.NAMES)


def packed(policy_state: dict[str, Any]) -> Any:
    """Return the state of a policy as a string, which torch.distributed.checkpoint keeps whole, if JSON can hold it."""
    with contextlib.suppress(TypeError, ValueError):
        text = json.dumps(policy_state)
        if json.loads(text) == policy_state:
            return text
    return policy_state


def _unpacked(optimizer: Optimizer, value: Any) -> Any:
    if not isinstance(value, str) or not value:
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(
            f"{type(optimizer).__name__}: group 0: {POLICY_STATE} must be the state of a policy as JSON, got "
            f"{described(value)}"
        ) from error


@contextlib.contextmanager
def while_loading(
    optimizer: Optimizer,
    look: Callable[[Optimizer, dict[str, Any]], None],
    restore: Callable[[Optimizer], None],
) -> Iterator[None]:
    """Call ``look`` after the user's load pre-hooks, and ``restore`` before the user's load post-hooks.

    If torch or ``restore`` raises, the optimizer keeps its groups and states: torch's classes check a part of the
    states after they have replaced them.
    """
    held: dict[str, Any] = {}
    versions: dict[Tensor, int | None] = {}

    def begin(_: Optimizer, final: dict[str, Any]) -> None:
        look(optimizer, final)
        versions.update(low_bits_versions(params_of(optimizer)))
        held.update(state=optimizer.state, param_groups=optimizer.param_groups)

    def end(_: Optimizer) -> None:
        restore(optimizer)
        held.clear()

    before = optimizer.register_load_state_dict_pre_hook(begin)
    after = optimizer.register_load_state_dict_post_hook(end, prepend=True)
    try:
        yield
    except BaseException:
        if held:
            optimizer.__dict__.update(held)
            set_low_bits_versions(versions)
        raise
    finally:
        before.remove()
        after.remove()


@contextlib.contextmanager
def states_restored(optimizer: Native) -> Iterator[None]:
    """While torch loads a state_dict, check it before, and restore afterwards what torch's casts have changed."""
    saved: dict[str, Any] = {}
    own: list[dict[str, Any]] = []

    def look(_: Optimizer, final: dict[str, Any]) -> None:
        saved.update(final)
        own.extend({name: group.get(name) for name in OWN_KEYS} for group in optimizer.param_groups)
        _check(optimizer, final, own)
        if optimizer._tail is not None and optimizer._tail.policy is not None:
            for group in final["param_groups"]:
                if state := _unpacked(optimizer, group.get(POLICY_STATE)):
                    # In a copy: an invalid state raises before anything is loaded.
                    deepcopy(optimizer._tail.policy).load_state_dict(state)

    with while_loading(optimizer, look, lambda _: _restore(optimizer, saved, own)):
        yield


def _check(optimizer: Native, state_dict: Mapping[str, Any], own: list[dict[str, Any]]) -> None:
    """Check, before anything is loaded, that the states of a state_dict can be decoded and encoded.

    Args:
        optimizer: The optimizer that loads them.
        state_dict: The state_dict.
        own: The ``OWN_KEYS`` of the optimizer's groups. torch refuses a state_dict with other groups.

    Raises:
        ValueError: A state does not fit. The message names the parameter.
    """
    for number, (saved_group, group, arguments) in enumerate(
        zip(state_dict["param_groups"], optimizer.param_groups, own, strict=False)
    ):
        forced = arguments["state_dtype"] if _converts(optimizer, saved_group) else None
        for index, (key, p) in enumerate(zip(saved_group["params"], group["params"], strict=False)):
            where = f"{type(optimizer).__name__}: parameter {index} of group {number}"
            held = state_dict["state"].get(key, {})
            if not isinstance(held, Mapping):
                raise ValueError(f"{where}: its state must be a dict, got {described(held)}")
            block_states.check(where, held)
            if forced != block_states.CODES or not block_states.fits(p):
                continue
            for name in optimizer._state_names():
                if isinstance(value := held.get(name), Tensor) and not block_states.is_in_blocks(value):
                    block_states.check_unencoded(where, p, name, value, held.get("step", 0))


def _converts(optimizer: Native, saved_group: Mapping[str, Any]) -> bool:
    """Return whether the states of a saved group are converted to the optimizer's ``state_dtype``."""
    return "state_dtype" in optimizer.defaults or "state_dtype" not in saved_group


def _restore(optimizer: Native, saved: Mapping[str, Any], own: list[dict[str, Any]]) -> None:
    """Restore the optimizer's arguments, and the states of its parameters, from a state_dict that torch has loaded."""
    packed_states = [group.pop(POLICY_STATE) for group in optimizer.param_groups if POLICY_STATE in group]
    numbers = optimizer._param_numbers()
    for saved_group, group, arguments in zip(saved["param_groups"], optimizer.param_groups, own, strict=True):
        converts = _converts(optimizer, saved_group)
        for name, value in arguments.items():
            if value is not None and (name not in saved_group or (name == "state_dtype" and converts)):
                group[name] = value
        forced = arguments["state_dtype"] if converts else None
        is_torchs = not {"state_dtype", "master"} & saved_group.keys()
        for key, p in zip(saved_group["params"], group["params"], strict=True):
            held = saved["state"].get(key, {})
            _restore_scalars(optimizer, group, p, held)
            if key in saved["state"]:
                _restore_states(optimizer, group, p, held, None if p.is_complex() else forced, is_torchs, numbers[p])
    for p in numbers:
        _lay_out_as(p, optimizer.state.get(p, {}), optimizer._state_names())
    if optimizer._tail is not None and optimizer._tail.policy is not None:
        optimizer.param_groups[0][POLICY_STATE] = ""
        if packed_states and (policy_state := _unpacked(optimizer, packed_states[0])):
            optimizer._tail.load_policy_state(policy_state)


def _restore_scalars(optimizer: Native, group: dict[str, Any], p: Tensor, saved: Mapping[str, Any]) -> None:
    """Undo torch's cast of the rule's scalars to the parameter's dtype, and put all numbers on one device.

    torch leaves the device of ``step`` as it was saved, unless the group has ``capturable`` or ``fused``. Kernels step
    a parameter only if all its numbers are on the CPU or on its device.
    """
    state = optimizer.state.get(p, {})
    if not isinstance(count := state.get("step"), Tensor):
        return
    rule = RULES.get(optimizer.rule)
    if optimizer.is_elementwise and rule is not None and not rule.counts_steps:
        count = state["step"] = count.cpu()  # which only counts for random bits
    if not isinstance(saved.get("step"), Tensor):
        return
    own = optimizer._chooses_device_of_counts and p.device.type != "meta"
    device = (p.device if optimizer._counts_on_device(group) else torch.device("cpu")) if own else count.device
    if own and rule is not None and rule.counts_steps:
        state["step"] = count.to(device)
    for name in rule.scalars if rule is not None else ():
        value = saved.get(name)
        if isinstance(value, Tensor) and value.is_floating_point() and isinstance(state.get(name), Tensor):
            state[name] = value.to(device)


def _restore_states(
    optimizer: Native,
    group: dict[str, Any],
    p: Tensor,
    saved: Mapping[str, Any],
    forced: torch.dtype | None,
    is_torchs: bool,
    number: int,
) -> None:
    """Restore the dtypes of a parameter's states, or convert them.

    Args:
        optimizer: The optimizer.
        group: The parameter's group.
        p: The parameter.
        saved: Its saved state.
        forced: The ``state_dtype`` to which the states are converted; None: they keep their dtypes.
        is_torchs: Whether the saved group may be of torch's class.
        number: The parameter's place among all.
    """
    state, names = optimizer.state[p], optimizer._state_names()
    for name in optimizer.wide_states:
        if isinstance(value := saved.get(name), Tensor) and value.is_floating_point():
            state[name] = value.to(device=p.device, dtype=torch.promote_types(value.dtype, torch.float32))
    master = master_name(group, p)
    in_blocks = set(block_states.states_in_blocks(saved))
    if not (has_kernels(p.device) or master or in_blocks):
        return
    if in_blocks and forced is not None and not optimizer._in_blocks(group, p):
        saved = block_states.decoded_state(saved)
        for name in in_blocks:
            state[name] = saved[name].to(state[name].device)
            del state[name + block_states.SUFFIX]
    dtype = optimizer._state_dtype(group, p) if master and is_torchs else forced
    if dtype == block_states.CODES:
        dtype = None if optimizer._in_blocks(group, p) else optimizer._state_dtype(group, p)
    _restore_dtypes(
        state, {name: value for name, value in saved.items() if name not in optimizer.wide_states}, names, dtype, master
    )
    if forced == block_states.CODES and optimizer._in_blocks(group, p):
        for name in names:
            if isinstance(state.get(name), Tensor) and name not in in_blocks:
                encode(optimizer, group, p, name, state[name], number)


def _restore_dtypes(
    state: dict[str, Any],
    saved: Mapping[str, Any],
    state_names: Collection[str],
    forced: torch.dtype | None,
    master: str | None,
) -> None:
    """Cast a loaded state to its saved dtypes; tensors in ``state_names`` to ``forced`` instead, unless it is None.

    ``master``: the name of the state that holds the parameter's master; None if it has none.
    """
    for name, value in saved.items():
        if name == "step" or (name == SLOW_PARAM and not master) or not isinstance(value, Tensor):
            continue
        if not value.is_floating_point() and name not in MASTER_NAMES:
            continue
        dtype = (forced if name in state_names else None) or value.dtype
        if state[name].dtype != dtype:
            state[name] = value.to(device=state[name].device, dtype=dtype)


def _lay_out_as(p: Tensor, state: dict[str, Any], names: Sequence[str]) -> None:
    """Give states the strides of their parameter: those of a channels_last model may have been saved without them.

    Kernels step tensors of different strides several times more slowly.
    """
    if not is_plain(p) or p.layout != torch.strided:
        return
    for name in names:
        held = state.get(name)
        if (
            isinstance(held, Tensor)
            and is_plain(held)
            and held.layout == torch.strided
            and held.shape == p.shape
            and held.stride() != p.stride()
            and held.dtype != block_states.CODES  # whose blocks are in rows
            and held.device == p.device
        ):
            state[name] = torch.empty_like(p, dtype=held.dtype, requires_grad=False).copy_(held)
