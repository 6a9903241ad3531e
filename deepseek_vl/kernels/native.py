"""What the C libraries below PyTorch on Linux, glibc and GNU's OpenMP, do only when told to. Elsewhere: nothing."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def return_freed_memory() -> None:
    """Let glibc give back to the system what this process has freed, and keeps for the threads that had it."""
    _call("malloc_trim", 0)


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """Let glibc keep what the main thread frees, for what it allocates next, and give it back at the end.

    Training allocates and frees the same large tensors in every step. Without this the system takes their pages each
    time and clears them for the next, which on two cores is a tenth of a step. Processes that are forked keep it up.
    Memory of other threads is kept in part, and settings by environment variables (`MALLOC_...`) end with the block.
    """
    _call("mallopt", _M_TRIM_THRESHOLD, -1)
    _call("mallopt", _M_MMAP_MAX, 0)
    try:
        yield
    finally:
        # Once set, they no longer adapt; these are what they adapt to in a process that frees large tensors.
        _call("mallopt", _M_TRIM_THRESHOLD, 64 * 2**20)
        _call("mallopt", _M_MMAP_THRESHOLD, 32 * 2**20)
        _call("mallopt", _M_MMAP_MAX, 2**16)
        return_freed_memory()


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def release_threads() -> None:
    """Let go of the threads that OpenMP keeps ready for this thread's next parallel region.

    While there are more of them in a process than cores, for all of its threads together, none waits actively any more,
    and every operation of a model has to wake up its own: a token then takes half as long again.
    """
    _call("omp_pause_resource_all", 1)  # omp_pause_soft: they come back when they are needed


def _call(name: str, *arguments: Any) -> None:
    """Call a function of the libraries that are loaded, if there is one of this name."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)
