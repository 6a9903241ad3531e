"""The engine's caches: encoded images, and keys and values of ended conversations."""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from deepseek_vl.engine.kv_cache import STEP, RowCache
from deepseek_vl.engine.limits import EngineLimits
from deepseek_vl.engine.prompt import PromptImage
from deepseek_vl.kernels.quantized import QuantizedLinear
from deepseek_vl.kernels.weight_only import stored_bytes
from deepseek_vl.models import MultiModalityCausalLM

Value = TypeVar("Value", torch.Tensor, RowCache)


class WeightsState:
    """A record of a model's present weights, by which changes are noticed.

    Changes that PyTorch does not count (writing through `.data`, switching an adapter off) go unnoticed.
    """

    def __init__(self, model: MultiModalityCausalLM):
        weights = list(_weights(model))
        # PyTorch does not count changes of a model that was made in inference mode.
        self._state = None if any(weight.is_inference() for weight in weights) else _state_of(model)
        # While weak references to the storages exist, no new storage has the address (`_cdata`) of an old one, though
        # the memory for their numbers may be freed.
        self._references = [StorageWeakRef(weight.untyped_storage()) for weight in weights]

    def is_still_of(self, model: MultiModalityCausalLM) -> bool:
        """Whether no weight was trained, loaded, moved, cast or replaced; False if that cannot be told."""
        return self._state is not None and self._state == _state_of(model)


def _state_of(model: MultiModalityCausalLM) -> tuple[Any, ...]:
    weights = ((w.untyped_storage()._cdata, w._version, w.dtype, w.shape) for w in _weights(model))
    return (model.training, *itertools.chain.from_iterable(weights))


def _weights(model: MultiModalityCausalLM) -> Iterator[torch.Tensor]:
    """All parameters and buffers; those of a shared module come several times.

    This runs for every prompt. `parameters()` takes five times as long, as it makes names.
    """
    modules: list[nn.Module] = [model]
    while modules:
        module = modules.pop()
        modules += (child for child in module._modules.values() if child is not None)
        for weight in itertools.chain(module._parameters.values(), module._buffers.values()):
            if weight is not None:
                yield weight


def weight_bytes(model: MultiModalityCausalLM) -> int:
    """How much memory a model's weights take, as they are stored."""
    quantised = (module.weight_bytes for module in model.modules() if isinstance(module, QuantizedLinear))
    return sum(map(stored_bytes, itertools.chain(model.parameters(), model.buffers()))) + sum(quantised)


class LRUCache(Generic[Value]):
    """A cache with a limit on its total size, from which the least recently used values are dropped first."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._values: OrderedDict[bytes, Value] = OrderedDict()

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._values)

    def __contains__(self, key: bytes) -> bool:
        return key in self._values

    def use(self, key: bytes) -> Value:
        """The value of a key, which must be present; marks it as used."""
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: bytes, value: Value) -> None:
        """Add a new value, unless it is too large."""
        if value.nbytes <= self.max_bytes:
            self._shrink(self.max_bytes - value.nbytes)
            self._values[key] = value
            self.nbytes += value.nbytes

    def limit(self, max_bytes: int) -> None:
        """Change the limit, and drop values that exceed it."""
        self.max_bytes = max_bytes
        self._shrink(max_bytes)

    def _shrink(self, nbytes: int) -> None:
        while self.nbytes > max(nbytes, 0):
            self.drop(next(iter(self)))

    def drop(self, key: bytes) -> None:
        """Drop the value of a key, which must be present."""
        self.nbytes -= self._values.pop(key).nbytes


class ImageFeatures(LRUCache[torch.Tensor]):
    """Encoded images [N, D], by the hash of their pixels."""

    def encode(
        self, model: MultiModalityCausalLM, images: Sequence[PromptImage], keeps: bool = True
    ) -> dict[bytes, torch.Tensor]:
        """The features of images, by their keys. Images that are not cached are encoded, in one batch.

        Args:
            keeps: whether these are then cached.
        """
        features = {image.key: self.use(image.key) for image in images if image.key in self}
        missing = {image.key: image.pixels for image in images if image.key not in features}
        if missing:
            encoded = model.get_image_features(torch.stack(list(missing.values())).to(model.device, model.dtype))
            for key, feature in zip(missing, encoded, strict=True):
                features[key] = feature.clone()  # so that it can be freed alone
                if keeps:
                    self.put(key, features[key])
        return features


class PrefixCache(LRUCache[RowCache]):
    """Keys and values of conversations, by their content (see `Prompt.content`), for prompts with the same prefix."""

    def continued(self, content: np.ndarray) -> RowCache:
        """A new cache with the longest prefix of this content that a cached conversation has.

        It belongs to the caller, and has room for the rest of the content.
        """
        longest, shared = max(((_shared(_content(key), content), key) for key in self), default=(0, b""))
        if not longest:
            return RowCache(len(content))
        return self.use(shared).prefix(longest, room=len(content) - longest + STEP)

    def keep(self, content: np.ndarray, cache: RowCache) -> None:
        """Add a conversation's keys and values, if they fit. The caller must not use the cache afterwards."""
        if cache.nbytes - cache.spare_bytes > self.max_bytes:
            return
        if cache.spare_bytes > cache.nbytes // 10:
            cache = cache.prefix(len(content))
        key = content.tobytes()
        for other in list(self):
            if other.startswith(key):
                self.use(other)
                return
            if key.startswith(other):
                self.drop(other)
        self.put(key, cache)


def _content(key: bytes) -> np.ndarray:
    return np.frombuffer(key, dtype=np.int64)


def _shared(first: np.ndarray, second: np.ndarray) -> int:
    """The length of the common prefix of two sequences of numbers."""
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


class Caches:
    """All caches of a model's work. They are valid as long as its weights do not change.

    Attributes:
        images: encoded images.
        prefixes: conversations' keys and values.
    """

    def __init__(self, model: MultiModalityCausalLM, limits: EngineLimits):
        self._weights = WeightsState(model)
        self._limits = limits
        self.images = ImageFeatures(0)
        self.prefixes = PrefixCache(0)

    def limit(self, max_bytes: int) -> None:
        """Change the limit on the total size, and drop values that exceed it."""
        if self._limits.keeps:
            self.images.limit(min(self._limits.image_bytes, max_bytes))
            self.prefixes.limit(max_bytes - self.images.nbytes)

    @property
    def nbytes(self) -> int:
        """The total size in bytes."""
        return self.images.nbytes + self.prefixes.nbytes

    def hold_for(self, model: MultiModalityCausalLM) -> bool:
        """Whether the caches are still valid for the model's present weights."""
        return self._weights.is_still_of(model)
