"""Steps among torch's transforms, which see torch's operations alone: torch.func, make_fx, forward-mode derivatives.

Beside torch's classes, which are made of these operations, and by the same code: the results are equal to the bit.
"""

import onepass
import pytest
import torch
from cases import ROW, for_rows
from contract import assert_same, leaves, torch_path
from torch.autograd import forward_ad
from torch.func import functionalize, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

# torch's Adafactor and ASGD cannot be traced; the others want a closure or sparse gradients, or are not torch's.
TORCHS = {*ROW} & {*torch.optim.__all__}
each_traced = for_rows(ROW[name] for name in sorted(TORCHS - {"Adafactor", "ASGD", "LBFGS", "SparseAdam"}))
each_functional = for_rows(ROW[name] for name in sorted(TORCHS - {"Adafactor", "LBFGS", "SparseAdam"}))
SHAPE = (4, 3)

# What torch imports for forward-mode derivatives uses deprecated parts of torch itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),  # from torch 2.14 on
]


def seed(number, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(number))


def stepped(cls, row, value, grad, steps=2):
    """What some steps make of a parameter of this value."""
    p = value.clone()
    opt = cls([p], **row.full)
    for _ in range(steps):
        p.grad = grad
        opt.step()
    return p


def both(row, transformed, reason):
    """What comes of a transformed function of the class: of torch's, and of ours, which torch's code has to step."""
    before = onepass.stats()
    actual = transformed(row.ours)
    assert torch_path(before) == {reason}
    assert_same(actual, transformed(row.theirs))


@each_traced
def test_a_traced_step_is_in_the_trace(row):
    def traced(cls):
        graph = make_fx(lambda value, grad: stepped(cls, row, value, grad))(seed(0), seed(1))
        return graph(seed(2), seed(3))

    both(row, traced, "make_fx")


@each_functional
def test_functionalize(row):
    both(row, lambda cls: functionalize(lambda v, g: stepped(cls, row, v, g))(seed(0), seed(1)), "torch.func")


def test_vmap_and_jvp():
    row = ROW["SGD"]
    many = seed(0, (5, *SHAPE)), seed(1, (5, *SHAPE))
    both(row, lambda cls: vmap(lambda v, g: stepped(cls, row, v, g))(*many), "torch.func")
    both(row, lambda cls: jvp(lambda v, g: stepped(cls, row, v, g), many, many[::-1]), "torch.func")


def test_forward_mode_derivatives():
    row = ROW["SGD"]

    def dual(cls):
        with forward_ad.dual_level():
            value, grad = forward_ad.make_dual(seed(0), seed(1)), forward_ad.make_dual(seed(2), seed(3))
            return tuple(forward_ad.unpack_dual(stepped(cls, row, value, grad)))

    both(row, dual, "forward-mode derivatives")


@pytest.mark.parametrize("k", [1, 2])
def test_lookahead_follows(k):
    def trained(cls):
        p = leaves([SHAPE], torch.float32)[0]
        opt = onepass.Lookahead(cls([p], lr=0.1), k=k)
        for t in range(4):
            p.grad = seed(t)
            if t == 2:
                with forward_ad.dual_level():
                    opt.step()
            else:
                opt.step()
        return p.detach()

    torch.testing.assert_close(trained(onepass.SGD), trained(torch.optim.SGD))


def test_explain_tells():
    opt = onepass.Adam(leaves([SHAPE]))
    with forward_ad.dual_level():
        assert [(row.path, row.reason) for row in onepass.explain(opt)] == [("torch", "forward-mode derivatives")]
    assert onepass.explain(opt)[0].path == "kernel"


def test_nothing_has_a_gradient():
    opt = onepass.Adam(leaves([SHAPE]))
    with forward_ad.dual_level():
        opt.step()
    assert not opt.state
