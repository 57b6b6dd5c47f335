"""torch.distributed around our optimizers, in a group of one process: where tensors lie, and who writes states."""

import pytest
from cases import ELEMENTWISE
from contract import python

SETUP = """
import copy, tempfile, warnings
import torch, torch.distributed as dist
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.distributed.optim import ZeroRedundancyOptimizer
    from torch.distributed.fsdp import fully_shard
import onepass
warnings.simplefilter("ignore")  # of torch's own parts
torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.set_default_dtype(torch.float64)

def net():
    torch.manual_seed(0)
    parts = torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2, bias=False)
    return torch.nn.Sequential(*parts)

def train(model, opt, steps):
    x = torch.linspace(-1, 1, 12).view(4, 3)
    for _ in range(steps):
        opt.zero_grad()
        (model(x) ** 2).sum().backward()
        opt.step()

def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x

def compare(run):
    for name, options in CLASSES.items():
        a, b = run(getattr(onepass, name), options), run(getattr(torch.optim, name), options)
        torch.testing.assert_close([whole(x) for x in a], [whole(x) for x in b], rtol=1e-12, atol=1e-14)
"""

CLASSES = {row.name: row.full for row in ELEMENTWISE if issubclass(row.ours, row.theirs)}

RUNS = {
    # Gradients are views of a bucket, at whatever offset.
    "DistributedDataParallel": (
        """
def run(cls, options):
    model = torch.nn.parallel.DistributedDataParallel(net(), gradient_as_bucket_view=True)
    opt = cls(model.parameters(), **options)
    train(model, opt, 3)
    return [p.detach() for p in model.parameters()]
""",
        {},
    ),
    # Parameters are views of a bucket, and the states of a checkpoint are taken as they are.
    "ZeroRedundancyOptimizer": (
        """
def run(cls, options):
    model = net()
    opt = ZeroRedundancyOptimizer(model.parameters(), cls, parameters_as_bucket_view=True, **options)
    train(model, opt, 2)
    opt.consolidate_state_dict()
    saved = copy.deepcopy(opt.state_dict())
    train(model, opt, 1)
    opt.load_state_dict(saved)
    train(model, opt, 2)
    return [p.detach() for p in model.parameters()]
""",
        {},
    ),
    # Parameters, gradients and states are DTensors.
    "fully_shard": (
        """
CLASSES.pop("Rprop")  # torch's cannot do it

def run(cls, options):
    model = net()
    for part in (model[0], model[2], model):
        fully_shard(part)
    opt = cls(model.parameters(), **options)
    train(model, opt, 3)
    states = [s for p in model.parameters() for s in opt.state[p].values()]
    assert sum(hasattr(s, "full_tensor") for s in states) == len(states) - sum(s.ndim == 0 for s in states)
    return [p.detach() for p in model.parameters()] + states
""",
        {},
    ),
}


@pytest.mark.parametrize(("run", "path"), RUNS.values(), ids=RUNS)
def test_as_torchs_classes(run, path):
    end = "compare(run)\nprint(onepass.stats()['torch'], flush=True)\ndist.destroy_process_group()\n"
    end += "import os\nos._exit(0)\n"  # without freeing the group's threads: support/run_script.py tells why
    done = python(f"CLASSES = {CLASSES}\n{SETUP}{run}{end}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(path)  # gloo of torch 2.10 tells how many are connected
