"""keep_freed_memory, in a process of its own: it cannot be undone."""

import os
import platform
import resource
import subprocess
import sys

from megatron_core_impl.host_memory import keep_freed_memory

STEPS = """
import ctypes
import resource
import sys
import torch
from megatron_core_impl.host_memory import keep_freed_memory

PR_SET_THP_DISABLE = 41  # linux/prctl.h: where huge pages are on, there are few faults to count
assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
if sys.argv[1] == "keep":
    assert keep_freed_memory()

def step():
    tensors = [torch.ones(size << 20) for size in (1, 9, 3)]  # 52 MiB
    return [tensor.add_(1) for tensor in tensors] and None

for _ in range(5):  # where tensors lie settles
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(argument: str) -> int:
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # which may bring another malloc
    done = subprocess.run([sys.executable, "-c", STEPS, argument], capture_output=True, text=True, check=True, env=plain)
    return int(done.stdout)


def test_memory_that_is_freed_is_not_new_the_next_time() -> None:
    if platform.libc_ver()[0] != "glibc":
        assert not keep_freed_memory(), "other mallocs cannot be told, and it says so"
        return
    default = page_faults("default")
    assert default > (52 << 20) // resource.getpagesize(), "glibc keeps it anyway: keep_freed_memory has no use"
    assert page_faults("keep") < default // 20
