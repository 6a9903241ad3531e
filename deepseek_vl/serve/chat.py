"""A chat: the messages so far, and the next answer to them. Every front-end holds one per user."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.serve.inference import as_stop_words, stream_answer
from deepseek_vl.serve.settings import GenerationSettings


def with_image_tags(text: str, images: int, tag: str) -> str:
    """`text` with a tag for every image: those it lacks are put in front, a line each.

    Raises:
        ValueError: if it has more tags than images.
    """
    tags = text.count(tag)
    if tags > images:
        raise ValueError(f"The message has {tags} {tag} and {images} images; there must be one tag per image.")
    return f"{tag}\n" * (images - tags) + text


class ChatSession:
    """One user's conversation with a model.

    Args:
        model, processor: as loaded; they may be shared by many sessions.
        settings: how answers are generated; the conversation template's stop words are added.

    Attributes:
        messages: `{"role", "content", "images"}`, user and assistant in turn.
        dropped_turns: how many of the oldest turns the last question left out because the model has no room for them.
    """

    def __init__(self, model: MultiModalityCausalLM, processor: VLChatProcessor, settings: GenerationSettings):
        self.model = model
        self.processor = processor
        stop_words = as_stop_words(processor.new_chat_template().stop_str)
        self.settings = dataclasses.replace(settings, stop=(*settings.stop, *stop_words))
        self.messages: list[dict[str, Any]] = []
        self.dropped_turns = 0

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages = []
        self.dropped_turns = 0

    def ask(self, text: str, images: Sequence[Image.Image] = ()) -> Iterator[str]:
        """The answer to one more message, piece by piece.

        An answer that is stopped half-way (by closing the iterator or by an interrupt) stays in the conversation as far
        as it got; a message that fails, or has no answer, leaves the conversation as it was.

        Args:
            text: the message, with an image tag where each image belongs; missing tags are put in front.
            images: its PIL images.

        Raises:
            ValueError: for more tags than images, or a message too long for the model.
        """
        user, assistant = self.processor.new_chat_template().roles
        tagged = with_image_tags(text, len(images), self.processor.image_tag)
        question = {"role": user, "content": tagged, "images": list(images)}
        answer = {"role": assistant, "content": ""}
        messages = self._fit([*self.messages, question, answer])
        pieces: list[str] = []
        failed = True
        try:
            with stream_answer(self.model, self.processor, messages, self.settings) as stream:
                for piece in stream:
                    pieces.append(piece)
                    yield piece
            failed = False
        except (GeneratorExit, KeyboardInterrupt):
            failed = False
            raise
        finally:
            # The model can spell the image tag, which would ask for an image in the next prompt.
            content = "".join(pieces).replace(self.processor.image_tag, "").strip()
            if content and not failed:
                self.messages += [question, {**answer, "content": content}]

    def _fit(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Drop the oldest turns until the prompt leaves room for an answer; the newest turn always stays."""
        positions = self.model.config.language_config.max_position_embeddings
        room = positions - min(self.settings.max_new_tokens, positions // 2)
        self.dropped_turns = 0
        while len(messages) > 2 and self.count_tokens(messages) > room:
            messages = messages[2:]
            self.dropped_turns += 1
        return messages

    def count_tokens(self, messages: Sequence[dict[str, Any]]) -> int:
        """The length of the prompt for `messages`, image features included."""
        processor = self.processor
        prompt = processor.apply_sft_template_for_multi_turn_prompts(
            messages, sft_format=processor.sft_format, system_prompt=processor.system_prompt
        )
        input_ids = processor.encode(prompt)
        features = processor.num_image_tokens - 1 + int(processor.add_special_token)
        return len(input_ids) + input_ids.count(processor.image_id) * features
