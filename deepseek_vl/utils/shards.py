"""Weights out, shard by shard, so that memory holds one at a time."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from deepseek_vl.models.layout_weights import Slice, itemsize_of, shape_of

INDEX = "model.safetensors.index.json"


def write_shards(tensors: Mapping[str, Slice | torch.Tensor], directory: Path, shard_bytes: int) -> None:
    """Write `model.safetensors`, or several such files and their index.

    Args:
        tensors: by name; each is read when its turn comes.
        directory: where.
        shard_bytes: of a file at most, unless it holds a single tensor.
    """
    shards: list[list[str]] = [[]]
    used = total = 0
    for name, tensor in tensors.items():
        size = math.prod(shape_of(tensor)) * itemsize_of(tensor)
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
            shard = {}
            for name in names:
                shard[name] = tensors[name][...].contiguous()
                progress.update()
            save_file(shard, directory / file, metadata={"format": "pt"})
            weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
