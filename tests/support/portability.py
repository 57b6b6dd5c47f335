"""A few steps on another processor: imports the package, and compares what kernels step with torch's classes."""

import onepass
import torch
from torch.nn import Parameter

SHAPES = [(), (7,), (50, 40), (300, 300)]
torch.manual_seed(0)
print("torch", torch.__version__, "kernels for", onepass._core.isa())
[runtime] = onepass._openmp.runtimes()
print("OpenMP", runtime)
for name in ("SGD", "Adam", "AdamW", "NAdam", "RMSprop", "Adafactor", "LBFGS", "Lion", "LAMB", "CAME", "Prodigy"):
    ours = [Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [Parameter(p.detach().clone()) for p in ours]
    optimizer = getattr(onepass, name)(ours)
    torchs = getattr(torch.optim, name, None)
    other = torchs(theirs) if torchs else None
    for _ in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape)
            q.grad = p.grad.clone()
        for each in filter(None, (optimizer, other)):
            each.step(lambda: 1.0)
    assert {row.path for row in onepass.explain(optimizer)} == {"kernel"}, name
    for p, q in zip(ours, theirs, strict=True):
        if other:
            torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)
        assert torch.isfinite(p).all(), name
    print(name, "as torch's" if other else "steps")
