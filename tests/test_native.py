"""Calls to the C libraries below PyTorch: OpenMP's threads, mapped files, freed memory."""

import ctypes
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deepseek_vl.checkpoints.read import forget_pages

COUNT = """
import os
import time
import torch
from deepseek_vl.kernels.threads import release_threads

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
numbers = torch.tensor(2.0).expand(2**22)
before = threads()
sums = [numbers.exp2().sum()]
with_pool = threads()
release_threads()
deadline = time.monotonic() + 10
while (without := threads()) > before and time.monotonic() < deadline:
    time.sleep(0.01)  # they end on their own
sums.append(numbers.exp2().sum())
assert sums[0] == sums[1] == 2**24
print(with_pool - before, with_pool - without)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None) if sys.platform == "linux" else None, "omp_pause_resource_all"),
    reason="this PyTorch's OpenMP cannot",
)
def test_threads_are_released_and_come_back() -> None:
    done = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "2"]


def test_pages_of_a_mapped_file_are_forgotten_and_read_again(tmp_path: Path) -> None:
    numbers = torch.arange(2**22, dtype=torch.int32).reshape(2048, 2048)
    save_file({"first": numbers, "second": -numbers}, tmp_path / "a.safetensors")
    mapped = safe_open(tmp_path / "a.safetensors", framework="pt")
    first, second = mapped.get_tensor("first"), mapped.get_tensor("second")
    assert torch.equal(first, numbers)
    assert torch.equal(second, -numbers)
    with_both = mapped_memory()
    forget_pages(first[512:])
    forget_pages(second[:, ::2])
    assert torch.equal(first[:512], numbers[:512])
    if sys.platform == "linux":
        forgotten = (1536 + 2048) * 2048 * 4
        assert 0.8 * forgotten < with_both - mapped_memory()  # the system also maps pages around those that are read
    assert torch.equal(first, numbers)
    assert torch.equal(second, -numbers)


KEEP = """
import re
from contextlib import suppress
from pathlib import Path
import torch
from deepseek_vl.kernels.memory import keeping_freed_memory

SIZE = 2**26

def memory():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

def kept():
    return memory() - before > SIZE / 2

def take():
    torch.ones(SIZE, dtype=torch.uint8)

take()
before = memory()
with suppress(KeyboardInterrupt), keeping_freed_memory(torch.device("cpu")):
    take()
    print(kept(), end=" ")
    raise KeyboardInterrupt
print(kept(), end=" ")
take()
print(kept())
"""


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_freed_memory_is_kept_and_given_back_at_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", KEEP], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "False"]


def mapped_memory() -> int:
    """The bytes of mapped files that are in this process's memory; 0 where this is not Linux."""
    status = Path("/proc/self/status").read_text(encoding="utf-8") if sys.platform == "linux" else "RssFile: 0 kB"
    return int(re.search(r"RssFile:\s+(\d+) kB", status)[1]) * 1024
