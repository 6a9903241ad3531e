"""glibc's memory settings, for commands."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8

ARENAS = 2
"""Of a server: one for its main thread, and one for all others."""


def share_memory_between_threads() -> None:
    """Let all threads allocate from `ARENAS` of glibc's arenas; called before there are threads, for the whole process.

    glibc gives each new thread one of its own, up to 8 for each core, and takes what was freed there for that thread
    alone. On CPUs the engine has a new thread for every burst of work, so that a server of the bundled model grew by 70
    MB now and then for an hour. Threads that wait for each other's arena do so for microseconds.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, ARENAS)


@contextmanager
def keeping_freed_memory(device: torch.device) -> Iterator[None]:
    """Let glibc keep what the main thread frees, for what it allocates next, and give it back at the end.

    This is for commands: it holds for the whole process, and processes that are forked keep it up. Training on a CPU
    allocates and frees the same large tensors in every step. Without this the system takes their pages each time and
    clears them for the next, which on two cores is a tenth of a step. Memory of other threads is kept in part, and
    settings by environment variables (`MALLOC_...`) end with the block. On other devices nothing happens.
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
        # Once set, they no longer adapt; these are what they adapt to in a process that frees large tensors.
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_M_MMAP_MAX, 2**16)
        libc.malloc_trim(0)
