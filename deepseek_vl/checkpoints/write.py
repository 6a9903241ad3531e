"""Writing weights tensor by tensor, so that only one is in memory at a time."""

import contextlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from deepseek_vl.checkpoints.tensors import DTYPE_NAMES, Slice, dtype_of, shape_of

INDEX = "model.safetensors.index.json"


@contextlib.contextmanager
def appearing_whole(directory: Path) -> Iterator[Path]:
    """A temporary directory that is renamed to `directory` at the end, or deleted if anything fails."""
    parent = directory.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{directory.name}-") as name:
        unfinished = Path(name) / "unfinished"
        unfinished.mkdir()
        yield unfinished
        unfinished.rename(directory)


def write_shards(tensors: Mapping[str, Slice | torch.Tensor], directory: Path, shard_bytes: int) -> None:
    """Write `model.safetensors`, or several such files and their index.

    Args:
        tensors: by name; each is read when its turn comes.
        directory: where.
        shard_bytes: the most bytes of a file that holds several tensors.
    """
    shards: list[list[str]] = [[]]
    used = total = 0
    for name, tensor in tensors.items():
        size = _size_of(tensor)
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
        total += size
    weight_map = {}
    with tqdm(total=len(tensors), desc="Writing", unit="tensor", disable=None) as progress:
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            _write({name: tensors[name] for name in names}, directory / file, progress.update)
            weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write(tensors: Mapping[str, Slice | torch.Tensor], file: Path, progress: Callable[[], Any]) -> None:
    """Write a safetensors file. The library's own writer wants all of its tensors in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # In the library's order, in which every tensor begins at a multiple of its elements' size.
    names = sorted(tensors, key=lambda name: (-dtype_of(tensors[name]).itemsize, name))
    end = 0
    for name in names:
        begin, end = end, end + _size_of(tensors[name])
        header[name] = {
            "dtype": DTYPE_NAMES[dtype_of(tensors[name])],
            "shape": shape_of(tensors[name]),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as opened:
        opened.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            opened.write(bytes_of(tensors[name][...]))
            progress()


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """A CPU tensor's numbers as uint8, without a copy of them if it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


def _size_of(tensor: Slice | torch.Tensor) -> int:
    """The bytes of a tensor, read or not."""
    return math.prod(shape_of(tensor)) * dtype_of(tensor).itemsize
