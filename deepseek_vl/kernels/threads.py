"""The threads that compute beside each thread of a program."""

import ctypes
import sys


def release_threads() -> None:
    """Let go of the threads that OpenMP keeps ready for this thread's next parallel region, which starts them again.

    While there are more of them in a process than cores, for all of its threads together, none waits actively any more,
    and every operation of a model has to wake up its own: a token then takes half as long again. Nothing else changes.
    Only on Linux, where PyTorch has no name for OpenMP's function.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None) if sys.platform == "linux" else None
    if pause is not None:
        pause(1)  # omp_pause_soft
