"""A few steps on another processor: imports the package, and compares steps of kernels with steps in torch operations.

Those are torch's classes or, where torch has none, ours with parameters that no kernel covers.
"""

import onepass
import torch
from torch.nn import Parameter


class Subclass(torch.Tensor):
    pass


SHAPES = [(), (7,), (50, 40), (300, 300)]
torch.manual_seed(0)
print("torch", torch.__version__, "kernels for", onepass._core.isa())
[runtime] = onepass._openmp.runtimes()
print("OpenMP", runtime)
for name in ("SGD", "Adam", "AdamW", "NAdam", "RMSprop", "Adafactor", "LBFGS", "Lion", "LAMB", "CAME", "Prodigy"):
    ours = [Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = getattr(onepass, name)(ours)
    if torchs := getattr(torch.optim, name, None):
        theirs = [Parameter(p.detach().clone()) for p in ours]
        other = torchs(theirs)
    else:
        theirs = [p.detach().clone().as_subclass(Subclass).requires_grad_() for p in ours]
        other = getattr(onepass, name)(theirs)
        assert {row.path for row in onepass.explain(other)} == {"torch"}, name
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for each in (optimizer, other):
            each.step(lambda: 1.0)
    assert {row.path for row in onepass.explain(optimizer)} == {"kernel"}, name
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach().as_subclass(torch.Tensor), rtol=2e-5, atol=2e-6)
    print(name, "as torch's" if torchs else "as in torch operations")
