"""Runs a script as torchrun would, and ends the process without freeing its process group.

DDP and others hold the default process group in reference cycles, so it outlives destroy_process_group, with the
threads of gloo, which free the tensors of the last collective some time later. Python is aborted ("terminate called
without an active exception") if it ends before that. If the group is freed before that, the two wait for each other:
the thread for the GIL, and its owner for the thread.
"""

import faulthandler
import os
import runpy
import sys

if __name__ == "__main__":
    faulthandler.dump_traceback_later(150, exit=True)  # one that hangs tells where
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
