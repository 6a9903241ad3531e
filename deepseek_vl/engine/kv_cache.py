"""The key-value cache: one per row, and several rows' caches as one batch for a decoding step.

A row comes, grows and leaves without a byte of another's being touched, and none is padded to another's length.
"""

import functools
import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

STEP = 128
"""A cache that has grown has room for so many tokens more, so that most are written without copying the rest."""

SHARED_POSITIONS = 1024
"""Shared buffers have room for so many positions of a row, or twice as many, or four times, and so on."""

Buffers = tuple[torch.Tensor, torch.Tensor]
"""Room for a layer's keys and values of one row, [1, heads, capacity, head_dim] each."""


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, in buffers longer than what they hold.

    transformers' own layer copies everything for each new token.

    Args:
        room: for how many positions there is to be room from the beginning.

    Attributes:
        is_borrowed: whether the buffers are someone else's, who will write other rows to them.
    """

    is_borrowed = False
    keys: torch.Tensor  # ty: ignore[incompatible-mutable-override]  transformers' are None at first
    values: torch.Tensor  # ty: ignore[incompatible-mutable-override]
    _buffers: Buffers

    def __init__(self, room: int = 0):
        super().__init__()
        self._room = room

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [1, heads, T, head_dim]; returns all that is held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._own([states[:, :, :0] for states in (key_states, value_states)], 0)
            self.reserve(self._room)
        return self.append(key_states, value_states)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> Buffers:
        """`update`, for a layer that already holds keys and values."""
        start, new = self.keys.shape[2], keys.shape[2]
        for buffer, states in zip(self.reserve(start + new), (keys, values), strict=True):
            buffer.narrow(2, start, new).copy_(states)  # quicker than an index, which counts: see `_RowsLayer`
        self.show(start + new)
        return self.keys, self.values

    def reserve(self, length: int) -> Buffers:
        """The buffers, long enough for so many positions; `STEP` longer if they had to grow. All that is in them is
        finite."""
        if length > self._buffers[0].shape[2]:
            self._own([_widened(held, length + STEP) for held in (self.keys, self.values)], self.get_seq_length())
        return self._buffers

    def show(self, length: int) -> None:
        """Make the first `length` positions of the buffers the layer's keys and values."""
        keys, values = self._buffers
        self.keys, self.values = keys.narrow(2, 0, length), values.narrow(2, 0, length)

    def borrow(self, buffers: Buffers) -> None:
        """Move keys and values into someone else's buffers, which must be long enough."""
        if self.is_borrowed and all(map(torch.Tensor.is_set_to, buffers, self._buffers)):
            return
        length = self.get_seq_length()
        held = [states.clone() if self.is_borrowed else states for states in (self.keys, self.values)]  # may overlap
        for buffer, states in zip(buffers, held, strict=True):
            buffer[:, :, :length] = states
            buffer[:, :, length:] = 0  # another's may not be finite, see `_widened`
        self._own(buffers, length)
        self.is_borrowed = True

    def give_back(self) -> None:
        """Move keys and values back into buffers of the layer's own."""
        if self.is_borrowed:
            self._own([states.clone() for states in (self.keys, self.values)], self.get_seq_length())

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, room: int) -> "GrowingLayer":
        """A layer that begins with a copy of these, with room for so many positions more."""
        layer = cls()
        layer.lazy_initialization(keys, values)
        length = keys.shape[2]
        layer._own([_widened(held, length + room) for held in (keys, values)], length)
        return layer

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def _own(self, buffers: Sequence[torch.Tensor], length: int) -> None:
        keys, values = buffers
        self._buffers, self.is_borrowed = (keys, values), False
        self.show(length)


def _widened(held: torch.Tensor, length: int) -> torch.Tensor:
    wider = held.new_empty(*held.shape[:2], length, held.shape[3])
    wider[:, :, : held.shape[2]] = held
    # What is masked is multiplied with 0, which leaves 0 of finite numbers only.
    wider[:, :, held.shape[2] :] = 0
    return wider


class RowCache(Cache):
    """Keys and values of one conversation.

    Args:
        room: for how many positions there is to be room from the beginning.
    """

    layers: list[GrowingLayer]

    def __init__(self, room: int = 0):
        layer_class: Any = functools.partial(GrowingLayer, room)
        super().__init__(layer_class_to_replicate=layer_class)

    @property
    def nbytes(self) -> int:
        """How much memory it takes."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def spare_bytes(self) -> int:
        """How much of that memory is room for more positions."""
        return self.nbytes - sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    @property
    def is_borrowed(self) -> bool:
        """Whether its keys and values are in someone else's buffers."""
        return any(layer.is_borrowed for layer in self.layers)

    def prefix(self, length: int, room: int = 0) -> "RowCache":
        """The first `length` positions, copied to a cache of their own with room for so many more."""
        copied = RowCache()
        copied.layers += [
            GrowingLayer.of(layer.keys[:, :, :length], layer.values[:, :, :length], room) for layer in self.layers
        ]
        return copied

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` positions. (transformers' `crop` differs between versions.)"""
        for layer in self.layers:
            layer.show(length)


class RowsCache(Cache):
    """Several rows' caches as one batch, for one more token in each.

    Its layers give the attention two lists, each row's keys and each row's values, which is what the implementations in
    `deepseek_vl.kernels.attention` take beside tensors.
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


class SharedBuffers:
    """Memory for one cache at a time, in which caches of the same size lie at the same addresses.

    Args:
        cache: what there is to be room for, at least.
    """

    def __init__(self, cache: RowCache):
        elements = 1 << (math.prod(_shape(cache)) - 1).bit_length()  # so that it seldom has to grow
        self._memory: list[Buffers] = [  # each layer's, flat
            (layer.keys.new_empty(elements), layer.values.new_empty(elements)) for layer in cache.layers
        ]
        self._lent: weakref.ref[RowCache] | None = None

    def has_room(self, cache: RowCache) -> bool:
        """Whether a cache with one more position fits into this memory."""
        return math.prod(_shape(cache)) <= self._memory[0][0].numel()

    def lend(self, cache: RowCache) -> list[Buffers]:
        """Move a cache into this memory; returns each layer's buffers.

        A cache that was here before, and is still in use, moves back into buffers of its own.
        """
        before = None if self._lent is None else self._lent()
        if before is not None and before is not cache:
            for layer in before.layers:
                layer.give_back()
        self._lent = weakref.ref(cache)
        shape = _shape(cache)
        size = math.prod(shape)
        lent = [(keys[:size].view(shape), values[:size].view(shape)) for keys, values in self._memory]
        for layer, buffers in zip(cache.layers, lent, strict=True):
            layer.borrow(buffers)
        return lent


def _shape(cache: RowCache) -> tuple[int, int, int, int]:
    """The shape of a layer's keys, with room for at least one more position."""
    rows, heads, length, head_dim = cache.layers[0].keys.shape
    capacity = SHARED_POSITIONS
    while capacity <= length:
        capacity *= 2
    return rows, heads, capacity, head_dim
