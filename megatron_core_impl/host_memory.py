"""Memory of the host, of a process that trains on a CPU."""

import ctypes

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
