"""Runs a script as torchrun would, and frees its process group before Python ends.

DDP and others hold the default process group in reference cycles, so it outlives destroy_process_group, with the
threads of gloo. Python is aborted ("terminate called without an active exception") if it ends before one of these has
freed the tensors of the last collective. torch.distributed.nn.functional has the group in its functions' default
arguments, unless it is imported before there is a group.
"""

import gc
import runpy
import sys

import torch.distributed.nn.functional  # noqa: F401

if __name__ == "__main__":
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    gc.collect()
