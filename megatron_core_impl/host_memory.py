"""Memory of the host: what a process that trains on a CPU keeps of it, and what there is."""

import ctypes
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

# of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1  # as an unsigned number, the largest


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for the next step: the process stays as large as it has been.

    It may become larger than what it holds at most, as all tensors lie in one heap, whose gaps have to fit the next ones.

    By default glibc gives large tensors back to the kernel as they die, and gets them anew in every step, page by page: faults,
    and zeros that nobody reads. PyTorch has a cache of its own for GPUs only.

    Returns:
        Whether the C library could be told so; it is glibc. (Another malloc that is loaded before it is not reached.)
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: Windows wants a name
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))


def peak_bytes() -> int:
    """The most that this process has held of the machine's memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_bytes() -> int:
    """What this process can still take before it or another is refused or killed: of the machine, its container, its limits."""
    page = os.sysconf("SC_PAGE_SIZE")
    limits = [os.sysconf("SC_AVPHYS_PAGES") * page]
    with suppress(OSError, StopIteration, ValueError):  # it counts what is cached of files, which the kernel gives up
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits = [1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])]
    with suppress(OSError, StopIteration, ValueError):  # cgroup v2; "max", where it sets no limit, is no number
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        lines = (group / "memory.stat").read_text().splitlines()
        cached = int(next(line for line in lines if line.startswith("inactive_file ")).split()[1])
        limits.append(limit - used + cached)
    with suppress(OSError, ValueError):
        allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
        if allowed != resource.RLIM_INFINITY:
            limits.append(allowed - int(Path("/proc/self/statm").read_text().split()[0]) * page)
    return max(0, min(limits))
