"""(model, processor, conversation, settings) -> a stream of text.

`AnswerStream` reads an answer from the model's engine, can stop it from any thread, and raises its errors where the
text is read. `generate` and `deepseek_generate` are the reference's names for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.engine.stream import AnswerStream, as_stop_words, message_images, stream_answer
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.models.processing_vlm import BatchedVLChatProcessorOutput
from deepseek_vl.utils.conversation import Conversation
from deepseek_vl.utils.io import load_pretrained_model

__all__ = [
    "AnswerStream",
    "GenerationSettings",
    "StoppingCriteriaSub",
    "convert_conversation_to_prompts",
    "deepseek_generate",
    "generate",
    "load_model",
    "stream_answer",
]


def load_model(
    model_path: str, **kwargs: Any
) -> tuple[PreTrainedTokenizerBase, MultiModalityCausalLM, VLChatProcessor]:
    """`load_pretrained_model` with the reference's order: (tokenizer, model, processor)."""
    tokenizer, processor, model = load_pretrained_model(model_path, **kwargs)
    return tokenizer, model, processor


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
