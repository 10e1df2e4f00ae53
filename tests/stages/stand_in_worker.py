"""A worker without torch, for the tests of stages.torchrun: `python -m stand_in_worker MODE`."""

import os
import signal
import sys

from stages import torchrun

if __name__ == "__main__":
    should_stop = torchrun.join()
    mode = sys.argv[1]
    print("what libraries print", flush=True)
    torchrun.tell("ready", pid=os.getpid(), torchrun=os.getppid(), threads=os.environ["OMP_NUM_THREADS"])
    while mode == "deaf" or not should_stop():  # else until the stage asks
        signal.pause()
    torchrun.tell("stopped")
