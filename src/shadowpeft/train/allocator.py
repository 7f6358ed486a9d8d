"""glibc's memory allocator, told to keep what a training step gives back."""

import ctypes
import sys

# From malloc.h: when to return the top of the heap, how much to ask for at a time, how many blocks may be mapped alone.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets this process keep freed memory for its next step; True where the C library could be told.

    As it comes, glibc maps every large block by itself and returns it when it is freed, so that each step of a training
    run on a CPU writes to fresh pages, which the kernel first has to fill with zeros: up to half of a step's time
    (LOG.md). The resident set then stays at its peak.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has no such function
        return False
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _LARGEST_INT), (_TOP_PAD, 2**28))
    return all([mallopt(name, value) == 1 for name, value in settings])
