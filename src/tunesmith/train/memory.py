"""Main memory that a CPU trains in: kept between steps."""

import ctypes
import platform

# From glibc's malloc.h; see mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let the allocator keep what a step frees for the next step; returns whether it could be told to.

    glibc gives every freed block of some MB back to the system, and a step of training frees gigabytes. The next one
    asks for them again, and the system clears page after page: a tenth of the time of a step. The peak of the memory
    stays the same, only what lies between two peaks is not given back. Of other allocators nothing is known here.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
