"""What is said to the C libraries below PyTorch."""

import ctypes
import subprocess
import sys

import pytest

COUNT = """
import os
import torch
from deepseek_vl.utils.native import release_threads

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
numbers = torch.tensor(2.0).expand(2**22)
before = threads()
sums = [numbers.exp2().sum()]
with_pool = threads()
release_threads()
without = threads()
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
