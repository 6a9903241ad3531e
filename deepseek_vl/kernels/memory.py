"""glibc's memory settings, for commands."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8

ARENAS = 2
"""The number of arenas of a server: one for its main thread, and one for all others."""


def share_memory_between_threads() -> None:
    """Limit glibc to `ARENAS` arenas for the whole process; to be called before other threads are started.

    By default each new thread gets an arena of its own, up to 8 for each core, and memory freed in an arena is reused
    only by its threads. On CPUs the engine starts a new thread for every burst of work, so that a server of the bundled
    model grew by 70 MB now and then for an hour. Threads wait only microseconds for an arena that another one uses.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, ARENAS)


@contextmanager
def keeping_freed_memory(device: torch.device) -> Iterator[None]:
    """Let glibc keep the memory that the main thread frees, and return it to the system at the end of a `with` block.

    This is for commands, as it changes the whole process and the processes forked from it. Training on a CPU allocates
    and frees the same large tensors in every step. By default the system takes back their pages and clears new ones
    each time, which on two cores takes a tenth of a step. Memory of other threads is kept only in part, and settings by
    environment variables (`MALLOC_...`) no longer apply after the block. On other devices than CPUs nothing happens.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    libc.mallopt(_M_MMAP_MAX, 0)
    try:
        yield
    finally:
        # Once set, the thresholds no longer adapt; these are the values they adapt to where large tensors are freed.
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_M_MMAP_MAX, 2**16)
        libc.malloc_trim(0)
