"""Runs a script as torchrun would, after torch.distributed.nn.functional has been imported.

That module has the default process group in its functions' default arguments. DDP and FSDP import it when there is a
group, which then outlives destroy_process_group, with the threads of gloo. Python is aborted ("terminate called without
an active exception") if it ends before one of these has freed the tensors of the last collective. Imported before there
is a group, the module holds None.
"""

import runpy
import sys

import torch.distributed.nn.functional  # noqa: F401

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
