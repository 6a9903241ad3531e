"""Helpers of the benchmarks: a clock, peak memory, the machine's rates, and output of results."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes


MOST_SECONDS = 4.0
"""About the longest time, in seconds, to measure one of the machine's limits."""


def now(device: torch.device) -> float:
    """The time in seconds, after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def fastest(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The seconds of the fastest of `repeats` runs, after one warm-up."""
    run()
    seconds = []
    for _ in range(repeats):
        begun = now(device)
        run()
        seconds.append(now(device) - begun)
    return min(seconds)


class PeakMemory:
    """Measure the peak of memory within a `with` block, above the memory in use at its start.

    On a CPU this is the process's resident memory, sampled every millisecond.

    Attributes:
        bytes: the peak above the start; valid after the block.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._process = psutil.Process()
            self._before = self._process.memory_info().rss
            self._watcher.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        else:
            self._ended.set()
            self._watcher.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.001):
            self.bytes = max(self.bytes, self._process.memory_info().rss - self._before)


def multiplication_rates(device: torch.device, side: int) -> dict[str, float]:
    """Operations per second (a multiplication and an addition are two) of matrix products, by dtype.

    Args:
        side: the right matrix is square with this side, or smaller where that would take long; the left one has 640
            rows, as many as a prompt.
    """
    rates = {}
    for name in ("float32", "bfloat16", "int8"):
        dtype = getattr(torch, name)
        multiply = torch._int_mm if name == "int8" else torch.mm
        # Smaller products first: without instructions for a dtype a large one takes minutes.
        for size in (side // 16, side // 4, side):
            left, right = (torch.ones(rows, size, dtype=dtype, device=device) for rows in (640, size))
            try:
                seconds = fastest(lambda: multiply(left, right), device, repeats=3)  # noqa: B023  it is called here
            except RuntimeError:  # this build of PyTorch has no such kernel
                break
            rates[name] = 2 * 640 * size**2 / seconds
            if seconds > MOST_SECONDS / 64:
                break
    return rates


def read_rate(device: torch.device, size: int) -> float:
    """Bytes per second that a sum reads from `size` bytes, which should exceed the processor's caches."""
    numbers = torch.ones(size // 4, device=device)
    return size / fastest(numbers.sum, device, repeats=5)


def write_json(results: Sequence[Any], file: Path) -> None:
    """Write dataclasses to a JSON file."""
    file.write_text(json.dumps([dataclasses.asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")


@contextmanager
def plot(file: Path, size: tuple[float, float] = (6, 4)) -> Iterator["Axes"]:
    """Within the `with` block, axes to draw on; afterwards the plot is saved to a file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=size)
    yield axes
    figure.savefig(file, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
