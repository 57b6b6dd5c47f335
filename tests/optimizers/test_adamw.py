"""AdamW is an Adam, as in torch."""

import onepass
import pytest
import torch
from onepass.optimizers.base import Native
from torch.nn import Parameter


def test_adamw_is_an_adam():
    assert issubclass(torch.optim.AdamW, torch.optim.Adam)
    assert issubclass(onepass.AdamW, onepass.Adam)
    assert issubclass(onepass.AdamW, torch.optim.AdamW)
    assert not issubclass(onepass.Adam, torch.optim.AdamW)
    mro = onepass.AdamW.__mro__
    assert mro.index(Native) < mro.index(torch.optim.AdamW) < mro.index(torch.optim.Adam)


def test_adamw_keeps_its_own_arguments_and_errors():
    optimizer = onepass.AdamW([Parameter(torch.ones(2))])
    assert optimizer.defaults["weight_decay"] == 0.01
    assert optimizer.defaults["decoupled_weight_decay"]
    with pytest.raises(TypeError, match="decoupled_weight_decay"):
        onepass.AdamW([Parameter(torch.ones(2))], decoupled_weight_decay=False)


def test_an_adams_checkpoint_decays_as_torchs_adamw():
    """torch's AdamW sets ``decoupled_weight_decay`` where it loads."""
    ends = []
    for adam, adamw in ((onepass.Adam, onepass.AdamW), (torch.optim.Adam, torch.optim.AdamW)):
        p, q = Parameter(torch.ones(2)), Parameter(torch.ones(2))
        saved = adam([p], lr=0.1, weight_decay=0.1)
        p.grad, q.grad = torch.ones(2), torch.ones(2)
        saved.step()
        optimizer = adamw([q])
        optimizer.load_state_dict(saved.state_dict())
        optimizer.step()
        assert optimizer.param_groups[0]["decoupled_weight_decay"]
        ends.append(q.detach())
    torch.testing.assert_close(*ends)
