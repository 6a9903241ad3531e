"""The engine: (model, processor, conversation, settings) -> a stream of text.

`AnswerStream` is the only place that generates text for a front-end. It runs transformers' `generate` in a thread of
its own, can be stopped from any thread, and raises the generation's errors where the text is read. `generate` and
`deepseek_generate` are the reference's names for it.
"""

import atexit
import queue
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from PIL import Image
from tokenizers.decoders import DecodeStream
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.models.processing_vlm import BatchedVLChatProcessorOutput
from deepseek_vl.serve.settings import GenerationSettings
from deepseek_vl.utils.conversation import Conversation
from deepseek_vl.utils.io import load_pretrained_model


def load_model(
    model_path: str, **kwargs: Any
) -> tuple[PreTrainedTokenizerBase, MultiModalityCausalLM, VLChatProcessor]:
    """`load_pretrained_model` with the reference's order: (tokenizer, model, processor)."""
    tokenizer, processor, model = load_pretrained_model(model_path, **kwargs)
    return tokenizer, model, processor


def sampling_arguments(settings: GenerationSettings) -> dict[str, Any]:
    """The settings for transformers' `generate`; each is given, so that no checkpoint default takes its place."""
    if settings.temperature > 0:
        # As an argument, `repetition_penalty` would draw a warning that it leaves the prompt alone, as it should.
        penalty = RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty))
        return {
            "do_sample": True,
            "temperature": float(settings.temperature),
            "top_p": settings.top_p,
            "top_k": 50,  # transformers' default, and so the reference's
            "repetition_penalty": 1.0,
            "logits_processor": LogitsProcessorList([penalty]),
        }
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "repetition_penalty": 1.0}


def as_stop_words(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop words as templates and callers give them: none, one or several."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


class StopWordFilter:
    """Lets text through up to the first stop word, holding back what may still become one."""

    def __init__(self, stop_words: Sequence[str]):
        self._stop_words = [word for word in stop_words if word]
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Take more text; returns the text that may be shown, and whether a stop word was met."""
        self._held += text
        found = [index for word in self._stop_words if (index := self._held.find(word)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        longest = max((self._overlap(word) for word in self._stop_words), default=0)
        split = len(self._held) - longest
        shown, self._held = self._held[:split], self._held[split:]
        return shown, False

    def _overlap(self, word: str) -> int:
        """Length of the longest end of the held text that begins `word`."""
        longest = min(len(word) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(word[:n])), 0)

    def flush(self) -> str:
        """The text still held back, once it is certain that no more follows."""
        held, self._held = self._held, ""
        return held


_END = object()
_running: dict["_Generation", threading.Thread] = {}


@atexit.register
def _stop_running() -> None:
    """The interpreter must not end below a thread that computes."""
    for generation, thread in list(_running.items()):
        generation.cancelled.set()
        thread.join()


class _Generation(BaseStreamer, StoppingCriteria):
    """One run of `generate`: takes its tokens, tells it when to stop, and queues text, errors and the end.

    The thread holds this object, and not the `AnswerStream` that reads it, so that a reader that is dropped is noticed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings, max_new_tokens: int):
        self.queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.cancelled = threading.Event()
        self.finish_reason: str | None = None
        self.token_ids: list[int] = []
        self._settings = settings
        self._max_new_tokens = max_new_tokens
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._decoded = ""
        self._filter = StopWordFilter(settings.stop)
        self._seen_prompt = False
        self._stop_word_met = False

    def run(self, model: MultiModalityCausalLM, inputs: BatchedVLChatProcessorOutput) -> None:
        """The thread's body."""
        try:
            self._generate(model, inputs)
            self._finish()
        except BaseException as error:  # raised again in the reader, by AnswerStream.__next__
            self.queue.put(error)
        finally:
            _running.pop(self, None)
            self.queue.put(_END)

    @torch.inference_mode()
    def _generate(self, model: MultiModalityCausalLM, inputs: BatchedVLChatProcessorOutput) -> None:
        if self.cancelled.is_set():
            return
        inputs_embeds = model.prepare_inputs_embeds(**inputs)
        if self.cancelled.is_set():
            return
        if self._settings.seed is not None:
            torch.manual_seed(self._settings.seed)
        model.language_model.generate(
            inputs_embeds=inputs_embeds,
            attention_mask=inputs["attention_mask"].to(inputs_embeds.device),
            bos_token_id=self._tokenizer.bos_token_id,
            eos_token_id=self._tokenizer.eos_token_id,
            pad_token_id=self._tokenizer.eos_token_id,
            max_new_tokens=self._max_new_tokens,
            use_cache=True,
            streamer=self,
            stopping_criteria=StoppingCriteriaList([self]),
            **sampling_arguments(self._settings),
        )

    def put(self, value: torch.Tensor) -> None:
        """transformers' streamer: the prompt's ids first (none, as it is given as embeddings), then each new id."""
        if not self._seen_prompt:
            self._seen_prompt = True
            return
        for token_id in value.flatten().tolist():
            self.token_ids.append(token_id)
            # None while the bytes so far do not end with a whole character.
            self._emit(self._decoder.step(self._tokenizer.backend_tokenizer, token_id) or "")

    def end(self) -> None:
        """transformers' streamer: generation is over, for whichever reason."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """transformers' stopping criterion, asked after every token."""
        stop = self._stop_word_met or self.cancelled.is_set()
        return torch.full((input_ids.shape[0],), stop, dtype=torch.bool, device=input_ids.device)

    def _emit(self, text: str) -> None:
        self._decoded += text
        if self._stop_word_met:
            return
        shown, self._stop_word_met = self._filter.feed(text)
        if shown:
            self.queue.put(shown)

    def _finish(self) -> None:
        if self._stop_word_met or self.token_ids[-1:] == [self._tokenizer.eos_token_id]:
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self._max_new_tokens:
            self.finish_reason = "length"
        else:
            self.finish_reason = "cancelled"
        whole = self._tokenizer.decode(self.token_ids, skip_special_tokens=True)
        self._emit(whole[len(self._decoded) :])  # a character whose bytes never became complete
        if not self._stop_word_met and (held := self._filter.flush()):
            self.queue.put(held)


class AnswerStream(Iterator[str]):
    """Iterates over the pieces of an answer while it is generated; also a context manager that stops it at the end.

    Generation begins with the first piece asked for. The pieces joined are the answer, without special tokens and stop
    words.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        inputs: the processor's output for one conversation.
        settings: see `GenerationSettings`.

    Raises:
        ValueError: if `inputs` has several rows, or its prompt leaves no room for an answer. What goes wrong during
            generation is raised by the iteration.
    """

    def __init__(
        self,
        model: MultiModalityCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        inputs: BatchedVLChatProcessorOutput,
        settings: GenerationSettings,
    ):
        rows, self.prompt_tokens = inputs["input_ids"].shape
        if rows != 1:
            raise ValueError(f"An answer stream takes one conversation, got a batch of {rows}.")
        positions = model.config.language_config.max_position_embeddings
        if self.prompt_tokens >= positions:
            raise ValueError(
                f"The prompt has {self.prompt_tokens} tokens and the model {positions} positions, which leaves no room "
                "for an answer; shorten the text or use fewer images."
            )
        max_new_tokens = min(settings.max_new_tokens, positions - self.prompt_tokens)
        self._generation = _Generation(tokenizer, settings, max_new_tokens)
        self._thread = threading.Thread(
            target=self._generation.run, args=(model, inputs), name="deepseek_vl-generate", daemon=True
        )
        self._ended = False
        weakref.finalize(self, self._generation.cancelled.set)

    @property
    def finish_reason(self) -> str | None:
        """`stop` (end token or stop word), `length`, `cancelled`; None while it runs or after an error."""
        return self._generation.finish_reason

    @property
    def completion_tokens(self) -> int:
        """How many tokens were generated so far."""
        return len(self._generation.token_ids)

    def stop(self) -> None:
        """End the generation within one token. May be called from any thread; the iteration then ends."""
        self._generation.cancelled.set()

    def close(self) -> None:
        """Stop, and wait until the generation has ended."""
        self.stop()
        self._ended = True
        if self._thread.is_alive():
            self._thread.join()

    def __next__(self) -> str:
        if self._ended:
            raise StopIteration
        if self._thread.ident is None:
            _running[self._generation] = self._thread
            self._thread.start()
        item = self._generation.queue.get()
        if isinstance(item, str):
            return item
        self._ended = True
        self._thread.join()
        if isinstance(item, BaseException):
            raise item
        raise StopIteration

    def __enter__(self) -> "AnswerStream":
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def message_images(messages: Sequence[Mapping[str, Any]]) -> list[Image.Image]:
    """The PIL images of messages (`{"role", "content", "images"}`), in reading order."""
    return [image for message in messages for image in message.get("images") or ()]


def stream_answer(
    model: MultiModalityCausalLM,
    processor: VLChatProcessor,
    messages: Sequence[Mapping[str, Any]],
    settings: GenerationSettings,
) -> AnswerStream:
    """Stream the answer to a conversation.

    Args:
        messages: `{"role", "content", "images"}`, `images` holding PIL images, one per tag in the contents. The last is
            the assistant's, with an empty content.

    Raises:
        ValueError: if images and tags do not match, or the prompt is too long.
    """
    inputs = processor(conversations=messages, images=message_images(messages)).to(model.device, dtype=model.dtype)
    return AnswerStream(model, processor.tokenizer, inputs, settings)


def convert_conversation_to_prompts(conversation: Conversation) -> list[dict[str, Any]]:
    """A template's messages as `deepseek_generate` takes them.

    Even messages get `images`: that of a `(text, image)` tuple, or none. Odd ones have none.
    """
    prompts = []
    for i, (role, message) in enumerate(conversation.messages):
        content, images = (message[0], [message[1]]) if isinstance(message, tuple) else (message, [])
        prompts.append({"role": role, "content": content or ""} | ({"images": images} if i % 2 == 0 else {}))
    return prompts


class StoppingCriteriaSub(StoppingCriteria):
    """Stops a row whose ids end with one of `stops`, once that stop has occurred `encounters` times in it.

    Args:
        stops: int64 tensors of token ids.
        encounters: how often.
    """

    def __init__(self, stops: Sequence[torch.Tensor] = (), encounters: int = 1):
        super().__init__()
        self.stops = [torch.as_tensor(stop).flatten() for stop in stops]
        self.encounters = encounters

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        done = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        for stop in self.stops:
            if 0 < len(stop) <= input_ids.shape[1]:
                windows = input_ids.unfold(1, len(stop), 1)  # [b, windows, len(stop)]
                hits = (windows == stop.to(input_ids.device)).all(dim=-1)
                done |= hits[:, -1] & (hits.sum(dim=-1) >= self.encounters)
        return done


def generate(
    vl_gpt: MultiModalityCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prepare_inputs: BatchedVLChatProcessorOutput,
    max_gen_len: int = 256,
    temperature: float = 0,
    repetition_penalty: float = 1.1,
    top_p: float = 0.95,
    stop_words: Sequence[str] = (),
) -> Iterator[str]:
    """The answer to a processed conversation, piece by piece (the reference's signature for `AnswerStream`).

    Closing the iterator ends the generation.
    """
    settings = GenerationSettings(max_gen_len, temperature, top_p, repetition_penalty, as_stop_words(stop_words))
    with AnswerStream(vl_gpt, tokenizer, prepare_inputs, settings) as stream:
        yield from stream


def deepseek_generate(
    prompts: Sequence[Mapping[str, Any]],
    vl_gpt: MultiModalityCausalLM,
    vl_chat_processor: VLChatProcessor,
    tokenizer: PreTrainedTokenizerBase,
    stop_words: Sequence[str],
    max_length: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.1,
) -> Iterator[str]:
    """The answer to a conversation, piece by piece (the reference's signature for `stream_answer`)."""
    inputs = vl_chat_processor(conversations=prompts, images=message_images(prompts)).to(vl_gpt.device, vl_gpt.dtype)
    return generate(vl_gpt, tokenizer, inputs, max_length, temperature, repetition_penalty, top_p, stop_words)
