"""keep_freed_memory, in a process of its own: it cannot be undone."""

import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = """
import resource
import sys
import torch
from megatron_core_impl.host_memory import keep_freed_memory

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


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def page_faults(argument: str) -> int:
    done = subprocess.run([sys.executable, "-c", STEPS, argument], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's")
@pytest.mark.skipif(HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(), reason="huge pages: there are few faults")
def test_memory_that_is_freed_is_not_new_the_next_time() -> None:
    default = page_faults("default")
    assert default > (52 << 20) // resource.getpagesize(), "glibc keeps it anyway: keep_freed_memory has no use"
    assert page_faults("keep") < default // 20
