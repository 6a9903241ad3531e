"""One answer in the making."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deepseek_vl.engine.detokenizer import AnswerText
from deepseek_vl.engine.kv_cache import RowCache
from deepseek_vl.engine.prefix_cache import Memory
from deepseek_vl.engine.prompt import Prompt
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.kernels.native import release_threads
from deepseek_vl.models import MultiModalityCausalLM
from deepseek_vl.models.processing_vlm import BatchedVLChatProcessorOutput

TOP_K = 50
"""Sampling is among so many tokens: transformers' default, and so the reference's."""

END = object()
"""The last that a generation's sink gets."""


class PromptTooLongError(ValueError):
    """A prompt leaves the model no room for an answer.

    Attributes:
        tokens: length of the prompt.
        positions: how many tokens the model takes, prompt and answer together.
    """

    def __init__(self, tokens: int, positions: int):
        super().__init__(
            f"The prompt has {tokens} tokens and the model {positions} positions, which leaves no room for an answer; "
            "shorten the text or use fewer images."
        )
        self.tokens = tokens
        self.positions = positions


class Generation:
    """One answer in the making.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        inputs: the processor's output for one conversation.
        settings: see `GenerationSettings`.
        sink: gets pieces of text; then an exception, if there was one; then `END`. Called in the engine's thread; must
            not raise.

    Attributes:
        prompt_tokens: length of the prompt.
        cached_tokens: how many of them an earlier answer had left, so that they did not run again.
        cancelled: set it to end the answer within one token.
        done: is set when the engine has let go of it.
        finish_reason: `stop` (end token or stop word), `length` or `cancelled`; None while it runs or after an error.

    Raises:
        ValueError: if `inputs` has several rows.
        PromptTooLongError: if its prompt leaves no room for an answer.
    """

    def __init__(
        self,
        model: MultiModalityCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        inputs: BatchedVLChatProcessorOutput,
        settings: GenerationSettings,
        sink: Callable[[Any], None],
    ):
        rows, self.prompt_tokens = inputs["input_ids"].shape
        if rows != 1:
            raise ValueError(f"An answer stream takes one conversation, got a batch of {rows}.")
        positions = model.config.language_config.max_position_embeddings
        if self.prompt_tokens >= positions:
            raise PromptTooLongError(self.prompt_tokens, positions)
        self.model = model
        self.inputs = inputs
        self.text = AnswerText(tokenizer, settings.stop)
        self.cached_tokens = 0
        self._begun_with: tuple[np.ndarray, weakref.ref[Memory]] | None = None
        self._sink = sink
        self.cancelled = threading.Event()
        self.done = threading.Event()
        self.finish_reason: str | None = None
        self._end_token = tokenizer.eos_token_id
        self._max_new_tokens = min(settings.max_new_tokens, positions - self.prompt_tokens)
        self._processors = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        if not settings.greedy:
            self._processors += [
                RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty)),
                TemperatureLogitsWarper(float(settings.temperature)),
                TopKLogitsWarper(TOP_K),
                TopPLogitsWarper(float(settings.top_p)),
            ]
            if settings.seed is not None:
                self._generator = torch.Generator(model.device).manual_seed(settings.seed)
        release_threads()  # this thread has processed the inputs; it is the engine's that needs the cores now

    def begin(self, prompt: Prompt, memory: Memory) -> None:
        """Note what the answer begins with, for `remember`."""
        self._begun_with = prompt.content, weakref.ref(memory)

    def remember(self, cache: RowCache, row: int) -> None:
        """Put what the answer has left in a row of a cache into the memory that it began with.

        If it is the cache's only row, then the cache is no longer the caller's.
        """
        content, memory = self._begun_with[0], self._begun_with[1]()
        if self.finish_reason is None or memory is None or not memory.holds_for(self.model):
            return
        length = cache.lengths[row]  # without the last token, which never ran
        content = np.concatenate([content, np.array(self.text.token_ids, dtype=np.int64)])[:length]
        is_given = len(cache.lengths) == 1 and not cache.is_borrowed
        memory.conversations.keep(content, cache if is_given else cache.prefix(row, length))

    def choose(self, logits: torch.Tensor) -> int:
        """The next token, from float logits [vocabulary]."""
        if not self._processors:
            return int(logits.argmax())
        # The repetition penalty is for the answer's tokens, not for the prompt's.
        answer = torch.tensor([self.text.token_ids], dtype=torch.long, device=logits.device)
        probabilities = self._processors(answer, logits[None]).softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def take(self, token_id: int) -> bool:
        """Pass the next token on; returns whether there are to be more."""
        if text := self.text.feed(token_id):
            self._sink(text)
        if self.text.stopped or token_id == self._end_token:
            self.finish_reason = "stop"
        elif len(self.text.token_ids) >= self._max_new_tokens:
            self.finish_reason = "length"
        else:
            return True
        self.end()
        return False

    def end(self, error: BaseException | None = None) -> None:
        """Let go of it: finished, cancelled, or failed with an error."""
        if error is None:
            try:
                rest = self.text.flush()
            except Exception as failure:  # raised again in the reader
                error = failure
            else:
                self.finish_reason = self.finish_reason or "cancelled"
                if rest:
                    self._sink(rest)
        if error is not None:
            self._sink(error)
        self.done.set()
        self._sink(END)
