"""Reading weights tensor by tensor, so that each is in memory only once."""

import ctypes
import json
import logging
import math
import mmap
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_utils import load_state_dict

from deepseek_vl.checkpoints.find import find_checkpoint
from deepseek_vl.checkpoints.tensors import copy_alone

logger = logging.getLogger(__name__)


class UnreadTensor:
    """A tensor of a safetensors file, read when it is indexed.

    Args:
        file: the opened file, which is mapped into memory.
        name: the tensor's.
        dtype: what floating point numbers are converted to as they are read; None leaves them.
    """

    def __init__(self, file: Any, name: str, dtype: torch.dtype | None = None):
        self._file, self._name, self._slice = file, name, file.get_slice(name)
        self._dtype = dtype

    def get_shape(self) -> list[int]:
        return self._slice.get_shape()

    def get_dtype(self) -> str:
        return self._slice.get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        mapped = self._file.get_tensor(self._name)[index]
        dtype = self._dtype if self._dtype is not None and mapped.is_floating_point() else mapped.dtype
        # A copy, because the mapped numbers would change if the file is written again.
        read = torch.empty(mapped.shape, dtype=dtype, device="cpu")
        copy_alone(mapped, read)
        forget_pages(mapped)
        return read


def unread_weights(files: Iterable[str | Path], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The tensors of a checkpoint's safetensors or torch files, by name, read when indexed.

    Args:
        files: their paths.
        dtype: what floating point numbers of safetensors files are converted to as they are read; None leaves them.

    Raises:
        OSError: if a file is broken.
    """
    tensors: dict[str, Any] = {}
    for file in map(str, files):
        try:
            if not file.endswith(".safetensors"):
                tensors |= load_state_dict(file)
                continue
            opened = safe_open(file, framework="pt", backend="mmap")
        except (SafetensorError, EOFError, RuntimeError, UnpicklingError) as error:
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise OSError(f"{file!r} is broken or truncated ({cause}); download it again.") from error
        tensors |= {name: UnreadTensor(opened, name, dtype) for name in opened.keys()}  # noqa: SIM118  it is no dict
    return tensors


def checkpoint_dtype(name_or_path: str | os.PathLike) -> torch.dtype:
    """The dtype that a checkpoint's config says its weights are stored in; float32 if it says nothing.

    Raises:
        OSError: if there is no such checkpoint.
    """
    file = Path(find_checkpoint(name_or_path, weights=False), "config.json")
    config = json.loads(file.read_text(encoding="utf-8"))
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    return getattr(torch, str(name).removeprefix("torch."))


def load_tower_checkpoint(tower: nn.Module, path: str, prefix: str = "") -> None:
    """Fill a tower from a weights file of its own (`ckpt_path` in the config), a `.safetensors` or a torch file.

    Keys in the file may carry `prefix`. The file may hold other parts or lack some, as a plain SAM file lacks the
    second neck: these are logged. Nothing is read while transformers builds the model on the meta device, because then
    the model's own checkpoint follows.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file fills no parameter at all, or a shape differs.
    """
    if not path or any(parameter.is_meta for parameter in tower.parameters()):
        return
    if not Path(path).is_file():
        raise FileNotFoundError(f"No tower weights at {path!r} (ckpt_path).")
    if path.endswith(".safetensors"):
        state_dict = load_file(path)
    else:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    own = tower.state_dict()
    if not own.keys() & state_dict.keys():
        raise ValueError(
            f"No key in {path!r} belongs to {type(tower).__name__}, which has {', '.join(list(own)[:3])}..."
        )
    mismatched = [key for key in own.keys() & state_dict.keys() if own[key].shape != state_dict[key].shape]
    if mismatched:
        details = ", ".join(
            f"{key} {tuple(state_dict[key].shape)} in the file, {tuple(own[key].shape)} in the tower"
            for key in sorted(mismatched)[:5]
        )
        raise ValueError(f"{path!r} is for another size: {details}.")
    missing, unexpected = tower.load_state_dict(state_dict, strict=False)
    if missing or unexpected:
        logger.warning(
            "%s: %d keys missing (%s), %d unused (%s)", path, len(missing), missing, len(unexpected), unexpected
        )


def forget_pages(tensor: torch.Tensor) -> None:
    """Release the memory that holds a tensor of a mapped file.

    Otherwise it counts as the process's memory. The tensor stays readable: its pages are read from the file again.
    """
    if tensor.numel() == 0 or sys.platform != "linux":
        return
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start, end = tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize
    start, end = math.ceil(start / mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
    if start < end:  # whole pages only: the first and last may hold other tensors too
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
