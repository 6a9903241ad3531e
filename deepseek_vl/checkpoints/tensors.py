"""Tensors in files, read only when indexed: their shapes and dtypes, and tensors joined from rows of others."""

import functools
from typing import Any, Protocol

import torch


class Slice(Protocol):
    """A tensor that is read when it is indexed, as safetensors' slices are. A `torch.Tensor` may be given instead."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: Any) -> torch.Tensor: ...


def shape_of(tensor: Slice | torch.Tensor) -> list[int]:
    """A tensor's shape, read or not."""
    return list(tensor.shape if isinstance(tensor, torch.Tensor) else tensor.get_shape())


def dtype_of(tensor: Slice | torch.Tensor) -> torch.dtype:
    """A tensor's dtype, read or not."""
    return tensor.dtype if isinstance(tensor, torch.Tensor) else _DTYPES[tensor.get_dtype()]


DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
"""safetensors' names of the dtypes."""

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


PIECE = 2**15
"""The most numbers that PyTorch copies without dividing them among threads."""


def copy_alone(source: torch.Tensor, target: torch.Tensor) -> None:
    """`target.copy_(source)`, for a contiguous target, by this thread alone.

    Several threads load a weight each. If PyTorch divided their copies among threads, each of them would start threads
    of its own, which wait for one another and stay alive.
    """
    for piece, copied in zip(source.reshape(-1).split(PIECE), target.view(-1).split(PIECE), strict=True):
        copied.copy_(piece)


class JoinedRows:
    """A tensor made of rows of others, which are read when it is indexed.

    Args:
        rows: tensors and slices of their rows, which are stacked in this order.
        shape: of the result.
    """

    def __init__(self, rows: list[tuple[Slice, slice]], shape: list[int]):
        self._rows = rows
        self._shape = shape

    def get_shape(self) -> list[int]:
        """The shape."""
        return self._shape

    def get_dtype(self) -> str:
        """The dtype as safetensors writes it: `F16`."""
        dtypes = (dtype_of(tensor) for tensor, _ in self._rows)
        return DTYPE_NAMES[functools.reduce(torch.promote_types, dtypes)]

    def __getitem__(self, index: Any) -> torch.Tensor:
        parts = [tensor[rows] for tensor, rows in self._rows]
        if len(parts) == 1:
            return parts[0].reshape(self._shape)[index]
        dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
        whole = torch.empty(self._shape, dtype=dtype, device="cpu")
        for part, rows in zip(parts, whole.split([len(part) for part in parts]), strict=True):
            copy_alone(part, rows)
        return whole[index]


def divide_rows(tensors: list[Slice], shares: list[int]) -> list[Slice]:
    """Stack tensors by rows, and divide the rows into as many tensors as there are shares."""
    shapes = [shape_of(tensor) for tensor in tensors]
    total = sum(shape[0] for shape in shapes)
    divided: list[Slice] = []
    begin = 0
    for share in shares:
        end = begin + total * share // sum(shares)
        rows, first = [], 0
        for tensor, shape in zip(tensors, shapes, strict=True):
            start, stop = max(begin, first), min(end, first + shape[0])
            if start < stop:
                rows.append((tensor, slice(start - first, stop - first)))
            first += shape[0]
        divided.append(JoinedRows(rows, [end - begin, *shapes[0][1:]]))
        begin = end
    return divided
