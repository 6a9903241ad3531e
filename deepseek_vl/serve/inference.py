"""Answers as streams of text: from a model, its processor, a conversation and settings.

`stream_answer` is the function to call; `generate` and `deepseek_generate` keep the reference's signatures.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from deepseek_vl.engine.engine import engine_of
from deepseek_vl.engine.generation import AnswerStream
from deepseek_vl.engine.settings import GenerationSettings, as_stop_words
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
    inputs = processor(prompt=processor.render(messages), images=message_images(messages))
    inputs = inputs.to(model.device, dtype=model.dtype)
    return AnswerStream(engine_of(model, processor.tokenizer), inputs, settings)


def convert_conversation_to_prompts(conversation: Conversation) -> list[dict[str, Any]]:
    """Convert a template's messages to those that `deepseek_generate` takes.

    Messages at even indices get `images`: the image of a `(text, image)` tuple, or an empty list. Others get none.
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
        encounters: how often a stop must occur.
    """

    def __init__(self, stops: Sequence[torch.Tensor] = (), encounters: int = 1):
        super().__init__()
        self.stops = [torch.as_tensor(stop).flatten() for stop in stops]
        self.encounters = encounters

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
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
    settings = GenerationSettings(
        max_new_tokens=max_gen_len,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        stop=as_stop_words(stop_words),
    )
    with AnswerStream(engine_of(vl_gpt, tokenizer), prepare_inputs, settings) as stream:
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
