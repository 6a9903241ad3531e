"""The key-value cache: one per row, and several rows' caches as one batch for a decoding step.

Rows are added, grow and are removed without copying others' keys and values, and none is padded to another's length.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

STEP = 128
"""Buffers that grow get room for this many more tokens, so that most tokens are written without copying the others."""

Buffers = tuple[torch.Tensor, torch.Tensor]
"""Buffers for one row's keys and values in a layer, [1, heads, capacity, head_dim] each."""


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, in buffers longer than what they hold.

    transformers' own layer copies everything for each new token.

    Args:
        room: the number of positions to have room for from the beginning.

    Attributes:
        buffers: the keys and values, with room for more positions.
    """

    def __init__(self, room: int = 0):
        self.buffers: Buffers = (torch.empty(1, 0, 0, 0), torch.empty(1, 0, 0, 0))
        self._length = 0
        self._room = room
        super().__init__()

    @property
    def keys(self) -> torch.Tensor:
        """[1, heads, length, head_dim]"""
        return self.buffers[0].narrow(2, 0, self._length)

    @property
    def values(self) -> torch.Tensor:
        """[1, heads, length, head_dim]"""
        return self.buffers[1].narrow(2, 0, self._length)

    # transformers' constructor sets both to None.
    @keys.setter
    def keys(self, keys: None) -> None:
        pass

    @values.setter
    def values(self, values: None) -> None:
        pass

    def get_seq_length(self) -> int:
        return self._length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [1, heads, T, head_dim]; returns all that is held."""
        if not self.is_initialized:
            self._hold([states[:, :, :0] for states in (key_states, value_states)], self._room)
        return self.append(key_states, value_states)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> Buffers:
        """`update`, for a layer that already holds keys and values."""
        start, new = self._length, keys.shape[2]
        self.reserve(start + new)
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            buffer.narrow(2, start, new).copy_(states)  # faster than indexing
        self.show(start + new)
        return self.keys, self.values

    def reserve(self, length: int) -> None:
        """Make room for `length` positions, and for `STEP` more if the buffers must grow."""
        if length > self.buffers[0].shape[2]:
            self._hold([self.keys, self.values], length - self._length + STEP)

    def show(self, length: int) -> None:
        """Make the first `length` positions of the buffers the layer's keys and values."""
        self._length = length

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, room: int) -> "GrowingLayer":
        """A layer that holds a copy of these keys and values, with room for `room` more positions."""
        layer = cls()
        layer._hold([keys, values], room)
        return layer

    @property
    def nbytes(self) -> int:
        """The size of the buffers in bytes."""
        return sum(buffer.nbytes for buffer in self.buffers)

    def _hold(self, states: Sequence[torch.Tensor], room: int) -> None:
        """Hold a copy of keys and values, in buffers with room for `room` more positions."""
        self._length = states[0].shape[2]
        keys, values = (_widened(held, self._length + room) for held in states)
        self.buffers = (keys, values)
        self.device, self.dtype = states[0].device, states[0].dtype  # transformers reads these
        self.is_initialized = True


def _widened(held: torch.Tensor, length: int) -> torch.Tensor:
    wider = held.new_empty(*held.shape[:2], length, held.shape[3])
    wider[:, :, : held.shape[2]] = held
    return wider


class RowCache(Cache):
    """Keys and values of one conversation.

    Args:
        room: the number of positions to have room for from the beginning.
    """

    layers: list[GrowingLayer]

    def __init__(self, room: int = 0):
        layer_class: Any = functools.partial(GrowingLayer, room)
        super().__init__(layer_class_to_replicate=layer_class)

    @property
    def nbytes(self) -> int:
        """The size of all buffers in bytes."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def spare_bytes(self) -> int:
        """How many bytes of the buffers are room for more positions."""
        return self.nbytes - sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def prefix(self, length: int, room: int = 0) -> "RowCache":
        """A copy of the first `length` positions, with room for `room` more."""
        copied = RowCache()
        copied.layers += [
            GrowingLayer.of(layer.keys[:, :, :length], layer.values[:, :, :length], room) for layer in self.layers
        ]
        return copied

    def reserve(self, length: int) -> None:
        """Make room for `length` positions."""
        if length > self.layers[-1].buffers[0].shape[2]:  # the last layer to grow, if memory should run out in between
            for layer in self.layers:
                layer.reserve(length)

    def truncate(self, length: int) -> None:
        """Hold the first `length` positions of the buffers. (transformers' `crop` differs between versions.)"""
        for layer in self.layers:
            layer.show(length)


class RowsCache(Cache):
    """Several rows' caches as one batch, for one more token in each.

    Its layers give the attention two lists, each row's keys and each row's values, which the implementations in
    `deepseek_vl.kernels.attention` take as well as tensors.
    """

    def __init__(self, caches: Sequence[RowCache]):
        rows = (cache.layers for cache in caches)
        super().__init__(layers=[_RowsLayer(layers) for layers in zip(*rows, strict=True)])


class _RowsLayer(DynamicLayer):
    """One layer of several rows."""

    def __init__(self, rows: Sequence[GrowingLayer]):
        super().__init__()
        self._rows = rows
        self.is_initialized = True

    def get_seq_length(self, *args: object) -> int:
        """The length of the longest row."""
        return max(row.get_seq_length() for row in self._rows)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Append [rows, heads, 1, head_dim]; returns each row's keys, and values, [1, heads, length, head_dim]."""
        pairs = list(map(GrowingLayer.append, self._rows, key_states.split(1), value_states.split(1)))
        return [keys for keys, _ in pairs], [values for _, values in pairs]
