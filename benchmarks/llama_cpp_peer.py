"""llama.cpp with our GGUF files, through the package `llama-cpp-python`, for comparisons.

Prompts are given as token ids and image features, so that llama.cpp and this package run the same positions.
"""

import ctypes
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from llama_cpp import mtmd_cpp

Part = Sequence[int] | np.ndarray
"""A part of a prompt: token ids, or the embeddings of n positions as float32 [n, width]."""


@llama_cpp.llama_log_callback
def _say_nothing(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
    pass


class LlamaCpp:
    """A language model in llama.cpp and, if `mmproj` is given, its vision tower.

    Args:
        model, mmproj: the GGUF files of the language model and of the tower.
        positions: the most positions of a prompt and its answer together.
        threads: the number of CPU threads; None for as many as PyTorch takes.

    Raises:
        OSError: if llama.cpp cannot load a file.
    """

    def __init__(self, model: Path, mmproj: Path | None = None, positions: int = 1024, threads: int | None = None):
        threads = threads or torch.get_num_threads()
        llama_cpp.llama_log_set(_say_nothing, ctypes.c_void_p(0))
        mtmd_cpp.mtmd_log_set(_say_nothing, ctypes.c_void_p(0))
        self._model = llama_cpp.llama_model_load_from_file(str(model).encode(), llama_cpp.llama_model_default_params())
        if self._model is None:
            raise OSError(f"llama.cpp does not load '{model}'.")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = positions
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(self._vocabulary)
        self._width = llama_cpp.llama_model_n_embd(self._model)
        self._position = 0
        self._vision = None
        if mmproj is not None:
            vision_settings = mtmd_cpp.mtmd_context_params_default()
            vision_settings.use_gpu, vision_settings.n_threads, vision_settings.warmup = False, threads, False
            self._vision = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), self._model, vision_settings)
            if self._vision is None:
                raise OSError(f"llama.cpp does not load '{mmproj}'.")

    def close(self) -> None:
        """Free the memory of the models."""
        if self._vision is not None:
            mtmd_cpp.mtmd_free(self._vision)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def tokens(self, text: str, special: bool = False) -> list[int]:
        """A text's ids, without a begin token; `special` makes special tokens in the text special, not plain text."""
        data = text.encode()
        room = len(data) + 8
        ids = (llama_cpp.llama_token * room)()
        count = llama_cpp.llama_tokenize(self._vocabulary, data, len(data), ids, room, False, special)
        return list(ids[:count])

    def image_features(self, pixels: np.ndarray) -> np.ndarray:
        """The features of a picture, uint8 [H, W, 3], after tower and projector: float32 [n, width]."""
        height, width, _ = pixels.shape
        data = np.ascontiguousarray(pixels).tobytes()
        bitmap = mtmd_cpp.mtmd_bitmap_init(width, height, (ctypes.c_uint8 * len(data)).from_buffer_copy(data))
        chunks = mtmd_cpp.mtmd_input_chunks_init()
        try:
            marker = mtmd_cpp.mtmd_default_marker()
            text = mtmd_cpp.mtmd_input_text(marker, len(marker), False, True)
            bitmaps = (mtmd_cpp.mtmd_bitmap_p_ctypes * 1)(bitmap)
            if mtmd_cpp.mtmd_tokenize(self._vision, chunks, ctypes.byref(text), bitmaps, 1):
                raise OSError("llama.cpp does not take the picture.")
            (chunk,) = (
                mtmd_cpp.mtmd_input_chunks_get(chunks, i) for i in range(mtmd_cpp.mtmd_input_chunks_size(chunks))
            )
            count = mtmd_cpp.mtmd_input_chunk_get_n_tokens(chunk)
            if mtmd_cpp.mtmd_encode_chunk(self._vision, chunk):
                raise OSError("llama.cpp does not encode the picture.")
            output = mtmd_cpp.mtmd_get_output_embd(self._vision)
            return np.ctypeslib.as_array(output, (count, self._width)).copy()
        finally:
            mtmd_cpp.mtmd_input_chunks_free(chunks)
            mtmd_cpp.mtmd_bitmap_free(bitmap)

    def forget(self) -> None:
        """Clear the cache, to begin a new conversation."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._position = 0

    def run(self, part: Part, wanted: int = 1) -> np.ndarray:
        """Run the next part of a prompt; returns the logits of its last positions, float32 [wanted, vocabulary]."""
        count, is_features = len(part), isinstance(part, np.ndarray)
        batch = llama_cpp.llama_batch_init(count, self._width if is_features else 0, 1)
        try:
            batch.n_tokens = count
            if is_features:
                numbers = np.ascontiguousarray(part, dtype=np.float32)
                ctypes.memmove(batch.embd, numbers.ctypes.data, numbers.nbytes)
            for i in range(count):
                if not is_features:
                    batch.token[i] = part[i]
                batch.pos[i] = self._position + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = i >= count - wanted
            if code := llama_cpp.llama_decode(self._context, batch):
                raise OSError(f"llama.cpp does not run the prompt (code {code}).")
            self._position += count
            places = range(count - min(wanted, count), count)
            logits = (llama_cpp.llama_get_logits_ith(self._context, i) for i in places)
            return np.stack([np.ctypeslib.as_array(row, (self.vocabulary_size,)).copy() for row in logits])
        finally:
            llama_cpp.llama_batch_free(batch)

    def answer(self, prompt: Sequence[Part], max_tokens: int, end: int) -> list[int]:
        """The ids of the greedy answer to a prompt, without the end token."""
        self.forget()
        for part in prompt:
            logits = self.run(part)
        ids: list[int] = []
        while len(ids) < max_tokens:
            token = int(logits[-1].argmax())
            if token == end:
                break
            ids.append(token)
            logits = self.run([token])
        return ids


def positions_of(inputs: Any, features: Sequence[np.ndarray]) -> list[Part]:
    """A processor's output of one row as parts of a prompt: runs of token ids, and the features of images."""
    parts: list[Part] = []
    waiting = iter(features)
    pairs = zip(inputs.input_ids[0].tolist(), inputs.images_seq_mask[0].tolist(), strict=True)
    for is_image, run in itertools.groupby(pairs, key=lambda pair: pair[1]):
        ids = [token for token, _ in run]
        if is_image:
            parts += itertools.islice(waiting, len(ids) // len(features[0]))
        else:
            parts.append(ids)
    return parts
