"""Tensors that are spread over processes, and the parts of whole tensors, for tests that compare the two.

To gather a tensor takes longer than a step, so a test whose processes all have the whole tensors compares parts.
"""

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def spread(values, mesh, placements):
    """Whole values that all processes have alike as a DTensor: nothing is sent."""
    return values if mesh is None else distribute_tensor(values, mesh, placements, src_data_rank=None)


def whole(x):
    """What all processes hold of a tensor together."""
    if not isinstance(x, DTensor):
        return x.detach().clone()
    if x.dtype == torch.int16:  # which gloo does not gather
        x = x.int()
    return x.full_tensor().detach().clone()


def own(x):
    """The part of this process."""
    return x._local_tensor if isinstance(x, DTensor) else x.detach()


def own_of_both(x, values):
    """The parts of this process: of a tensor, and of whole values placed alike."""
    if not isinstance(x, DTensor):
        return x.detach(), values
    assert x.shape == values.shape
    if all(type(placement) in (Shard, Replicate) for placement in x.placements):
        return own(x), own(spread(values.detach(), x.device_mesh, x.placements))
    together = whole(x)
    return together, values.to(together.dtype)
