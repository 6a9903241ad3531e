"""OpenMP's threads, which compute for each thread of a program."""

import ctypes
import sys


def release_threads() -> None:
    """Release the threads that OpenMP keeps for this thread; its next parallel region starts them again.

    If a process has more OpenMP threads than cores, none of them waits actively any more, and every operation has to
    wake up its own: a token then takes half as long again. This function works only on Linux; PyTorch has no name for
    OpenMP's function.
    """
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None) if sys.platform == "linux" else None
    if pause is not None:
        pause(1)  # omp_pause_soft
