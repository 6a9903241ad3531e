"""What the C libraries below PyTorch on Linux, glibc and GNU's OpenMP, do only when told to. Elsewhere: nothing."""

import ctypes
import sys


def return_freed_memory() -> None:
    """Let glibc give back to the system what this process has freed, and keeps for the threads that had it."""
    _call("malloc_trim", 0)


def release_threads() -> None:
    """Let go of the threads that OpenMP keeps ready for this thread's next parallel region.

    While there are more of them in a process than cores, for all of its threads together, none waits actively any more,
    and every operation of a model has to wake up its own: a token then takes half as long again.
    """
    _call("omp_pause_resource_all", 1)  # omp_pause_soft: they come back when they are needed


def _call(name: str, argument: int) -> None:
    """Call a function of the libraries that are loaded, if there is one of this name."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(argument)
