"""The key/value cache of a batch whose rows come and go."""

import math
from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, DynamicLayer

STEP = 128
"""A cache that has grown has room for about so many tokens more, so that most are written without copying the rest."""

SHARED_POSITIONS = 1024
"""Shared buffers have room for so many positions of a row, or twice as many, or four times, and so on."""

Buffers = tuple[torch.Tensor, torch.Tensor]
"""Room for a layer's keys and values, [rows, heads, capacity, head_dim] each."""


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, in buffers longer than what they hold.

    transformers' own layer copies everything for each new token.

    Attributes:
        is_borrowed: whether the buffers are someone else's, who will write other rows to them.
    """

    is_borrowed = False

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [rows, heads, T, head_dim]; returns all that is held."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers = [
                states.new_empty(*states.shape[:2], 0, states.shape[3]) for states in (key_states, value_states)
            ]
            self.keys, self.values = self._buffers
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        for buffer, states in zip(self.reserve(end), (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.show(end)
        return self.keys, self.values

    def reserve(self, length: int) -> Buffers:
        """The buffers, made long enough for so many positions; what is behind those held is finite."""
        if length > self._buffers[0].shape[2]:
            length = -(-(length + STEP - 1) // STEP) * STEP
            self._own([_widened(held, length) for held in (self.keys, self.values)], self.get_seq_length())
        return tuple(self._buffers)

    def show(self, length: int) -> None:
        """Hold the first so many positions of the buffers."""
        self.keys, self.values = (buffer[:, :, :length] for buffer in self._buffers)

    def borrow(self, buffers: Buffers) -> None:
        """Hold the same in buffers of another's, which are long enough."""
        if self.is_borrowed and all(map(torch.Tensor.is_set_to, buffers, self._buffers)):
            return
        length = self.get_seq_length()
        held = [states.clone() if self.is_borrowed else states for states in (self.keys, self.values)]  # may overlap
        for buffer, states in zip(buffers, held, strict=True):
            buffer[:, :, :length] = states
            buffer[:, :, length:] = 0  # another's may not be finite, see `_widened`
        self._own(buffers, length)
        self.is_borrowed = True

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

    def replace(self, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Hold so many positions of these instead; what is behind is finite."""
        self._own([keys, values], length)

    def _own(self, buffers: Sequence[torch.Tensor], length: int) -> None:
        self._buffers, self.is_borrowed = list(buffers), False
        self.show(length)


def _widened(held: torch.Tensor, length: int) -> torch.Tensor:
    wider = held.new_empty(*held.shape[:2], length, held.shape[3])
    wider[:, :, : held.shape[2]] = held
    # What is masked is multiplied with 0, which leaves 0 of finite numbers only.
    wider[:, :, held.shape[2] :] = 0
    return wider


class RowCache(Cache):
    """Keys and values of several conversations of different lengths, padded on the left.

    Attributes:
        lengths: how many positions each row has; those in front of them are padding.
    """

    def __init__(self, lengths: Sequence[int] = ()):
        super().__init__(layer_class_to_replicate=GrowingLayer)
        self.lengths = list(lengths)

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

    def prefix(self, row: int, length: int, room: int = 0) -> "RowCache":
        """The first `length` positions of a row, copied to a cache of their own with room for so many more."""
        start = self.get_seq_length() - self.lengths[row]
        span = (slice(row, row + 1), slice(None), slice(start, start + length))
        copied = RowCache([length])
        copied.layers += [GrowingLayer.of(layer.keys[span], layer.values[span], room) for layer in self.layers]
        return copied

    def count(self) -> None:
        """Note that every row has got one more position."""
        self.lengths = [length + 1 for length in self.lengths]

    def step_arguments(self, device: torch.device | str) -> dict[str, torch.Tensor | None]:
        """`attention_mask` and `position_ids` for one more token in every row, which this also counts.

        Both are None where no row is padded.
        """
        longest = self.get_seq_length() + 1
        positions = self.lengths
        self.count()
        if min(self.lengths) == longest:
            return {"attention_mask": None, "position_ids": None}
        padding = torch.tensor([[longest - length] for length in self.lengths], device=device)
        return {
            "attention_mask": (torch.arange(longest, device=device) >= padding).long(),
            "position_ids": torch.tensor(positions, device=device)[:, None],
        }

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows and forget the others, and the padding that they alone needed."""
        index = torch.tensor(rows, dtype=torch.long)
        self.lengths = [self.lengths[row] for row in rows]
        length = max(self.lengths, default=0)
        padding = self.get_seq_length() - length
        for layer in self.layers:
            kept = (held[:, :, padding:].index_select(0, index.to(held.device)) for held in (layer.keys, layer.values))
            layer.replace(*kept, length)

    def append(self, other: "RowCache") -> None:
        """Add the rows of another cache, which may be longer or shorter."""
        length = max(self.get_seq_length(), other.get_seq_length())
        for layer, added in zip(self.layers, other.layers, strict=True):
            pairs = ((layer.keys, added.keys), (layer.values, added.values))
            layer.replace(*(_stacked(held, new, length) for held, new in pairs), length)
        self.lengths += other.lengths


def _stacked(first: torch.Tensor, second: torch.Tensor, length: int) -> torch.Tensor:
    """Two blocks of rows aligned at their ends, with room for more positions behind; the padding is zero."""
    rows = len(first) + len(second)
    both = first.new_zeros(rows, first.shape[1], length + STEP, first.shape[3])
    both[: len(first), :, length - first.shape[2] : length] = first
    both[len(first) :, :, length - second.shape[2] : length] = second
    return both


class SharedBuffers:
    """Memory for one cache at a time, in which caches of the same size lie at the same addresses.

    Args:
        cache: what there is to be room for, at least.
    """

    def __init__(self, cache: RowCache):
        elements = 1 << (math.prod(_shape(cache)) - 1).bit_length()  # so that it seldom has to grow
        self._memory: list[Buffers] = [  # each layer's, flat
            tuple(held.new_empty(elements) for held in (layer.keys, layer.values)) for layer in cache.layers
        ]

    def has_room(self, cache: RowCache) -> bool:
        """Whether a cache, and one more position of it, can be here."""
        return math.prod(_shape(cache)) <= self._memory[0][0].numel()

    def lend(self, cache: RowCache) -> list[Buffers]:
        """Move a cache here, unless it is, and whatever was here out of use; returns each layer's buffers."""
        shape = _shape(cache)
        lent = [tuple(flat[: math.prod(shape)].view(shape) for flat in pair) for pair in self._memory]
        for layer, buffers in zip(cache.layers, lent, strict=True):
            layer.borrow(buffers)
        return lent


def _shape(cache: RowCache) -> tuple[int, int, int, int]:
    """Of a layer's keys, with room for one more position."""
    rows, heads, length, head_dim = cache.layers[0].keys.shape
    capacity = SHARED_POSITIONS
    while capacity <= length:
        capacity *= 2
    return rows, heads, capacity, head_dim
