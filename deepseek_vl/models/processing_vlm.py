"""Conversation + images -> model inputs."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.processing_utils import BatchFeature

from deepseek_vl.checkpoints.find import FromCheckpoint
from deepseek_vl.checkpoints.text_inputs import TextOptions, TextProcessor
from deepseek_vl.checkpoints.tokenizer import Spans, encode, load_tokenizer
from deepseek_vl.models.image_processing_vlm import VLMImageProcessor, flat_images
from deepseek_vl.utils.conversation import (
    DEFAULT_SYSTEM_PROMPT,
    IMAGE_TAG,
    Conversation,
    Rendered,
    get_conv_template,
    jinja_template,
    render,
    text_of,
)

NO_CHANGE = {
    "add_special_tokens": (None, True),
    "padding": (None, True, "longest"),
    "return_tensors": (None, "pt"),
    "truncation": (None, False),
}
"""Arguments of transformers' processors that are accepted with these values, which change nothing."""


class DictOutput:
    """A dataclass that can also be read, written and unpacked (`**output`) like a dict of its fields.

    `len()` is not the number of fields: each subclass says what it counts.
    """

    def keys(self) -> Any:
        return self.__dict__.keys()

    def values(self) -> Any:
        return self.__dict__.values()

    def items(self) -> Any:
        return self.__dict__.items()

    def get(self, key: str, default: Any = None) -> Any:
        return self.__dict__.get(key, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__)

    def __contains__(self, key: object) -> bool:
        return key in self.__dict__

    def __getitem__(self, key: str) -> Any:
        return self.__dict__[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.__dict__[key] = value


@dataclass
class VLChatProcessorOutput(DictOutput):
    """One conversation, processed. T tokens, n images.

    Attributes:
        sft_format: the prompt string.
        input_ids: int64 [T], with `num_image_tokens` placeholder ids per image.
        pixel_values: float32 [n, 3, S, S]; may be None if there are no images.
        num_image_tokens: int32 [n].
    """

    sft_format: str
    input_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    num_image_tokens: torch.Tensor

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.input_ids)


@dataclass
class BatchedVLChatProcessorOutput(DictOutput):
    """A padded batch of b conversations, of T tokens and n = max(1, most images in a row).

    Attributes:
        sft_format: the b prompt strings.
        input_ids: int64 [b, T].
        pixel_values: float32 [b, n, 3, S, S], zeros where a row has fewer images.
        attention_mask: int64 [b, T], 0 on padding.
        images_seq_mask: bool [b, T], True where an image feature replaces the token's embedding.
        images_emb_mask: bool [b, n, num_image_tokens], True for the features that are real.
    """

    sft_format: list[str]
    input_ids: torch.Tensor
    pixel_values: torch.Tensor
    attention_mask: torch.Tensor
    images_seq_mask: torch.Tensor
    images_emb_mask: torch.Tensor

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.input_ids)

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> "BatchedVLChatProcessorOutput":
        """Move every tensor to `device`, cast the pixels (and only them) to `dtype`, and return this same object."""
        for key, value in self.items():
            if isinstance(value, torch.Tensor):
                self[key] = value.to(device, dtype) if key == "pixel_values" else value.to(device)
        return self


class VLChatProcessor(FromCheckpoint, TextProcessor):
    """Renders a conversation, tokenizes it and prepares its images.

    Args:
        image_processor: PIL images -> pixels.
        tokenizer: the checkpoint's tokenizer.
        image_tag: the placeholder for an image in the text; added to the tokenizer if it lacks it.
        num_image_tokens: how many features an image has.
        add_special_token: keep the tag's own token in front of each image's positions.
        sft_format: name of the conversation template.
        mask_prompt: in training, learn the answers only.
        ignore_id: in training, the label of positions that are not learnt.
    """

    system_prompt = DEFAULT_SYSTEM_PROMPT

    def __init__(
        self,
        image_processor: VLMImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        image_tag: str = IMAGE_TAG,
        num_image_tokens: int = 576,
        add_special_token: bool = False,
        sft_format: str = "deepseek",
        mask_prompt: bool = True,
        ignore_id: int = -100,
        chat_template: str | None = None,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_tag = image_tag
        self.num_image_tokens = num_image_tokens
        self.add_special_token = add_special_token
        self.sft_format = sft_format
        self.mask_prompt = mask_prompt
        self.ignore_id = ignore_id
        if self.image_id is None:
            tokenizer.add_special_tokens({"extra_special_tokens": [image_tag]}, replace_extra_special_tokens=False)

    @property
    def image_token(self) -> str:
        """The image tag."""
        return self.image_tag

    @property
    def image_id(self) -> Any:
        """The image tag's token id, or None if the tokenizer lacks the tag."""
        token_id = self.tokenizer.convert_tokens_to_ids(self.image_tag)
        known = token_id is not None and self.tokenizer.convert_ids_to_tokens(token_id) == self.image_tag
        return token_id if known else None

    @property
    def positions_per_image(self) -> int:
        """How many tokens of the prompt an image becomes."""
        return self.num_image_tokens + int(self.add_special_token)

    def new_chat_template(self) -> Conversation:
        """An empty conversation in this processor's format, with its system prompt."""
        conversation = get_conv_template(self.sft_format)
        conversation.set_system_message(self.system_prompt)
        return conversation

    def apply_sft_template_for_multi_turn_prompts(
        self, conversations: Sequence[Mapping[str, Any]], sft_format: str = "deepseek", system_prompt: str = ""
    ) -> str:
        """Render messages (`{"role", "content"}`) as the reference does, with their roles unchanged.

        Each content and the whole prompt are stripped. A content may also be None, or parts as in `render`.
        """
        conversation = get_conv_template(sft_format)
        conversation.set_system_message(system_prompt)
        for message in conversations:
            conversation.append_message(message["role"], text_of(message.get("content"), self.image_tag).strip())
        return conversation.get_prompt().strip()

    def render(
        self, messages: Sequence[Mapping[str, Any]], system_prompt: str | None = None, untrusted: bool = False
    ) -> Rendered:
        """`deepseek_vl.utils.conversation.render` in this processor's format, by default with its system prompt."""
        system_prompt = self.system_prompt if system_prompt is None else system_prompt
        return render(messages, self.sft_format, system_prompt, untrusted, self.image_tag)

    def add_image_token(
        self, image_indices: Sequence[int] | torch.Tensor, input_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Make room for the image features.

        Args:
            image_indices: positions of the image tag in `input_ids`, in order.
            input_ids: int64 [t].

        Returns:
            The ids with every tag replaced by `num_image_tokens` copies of it (one more with `add_special_token`),
            int64 [T]; and the number of features of each image, int32 [n].
        """
        indices = torch.as_tensor(image_indices, dtype=torch.int64).flatten()
        copies = torch.ones_like(input_ids)
        copies[indices] = self.positions_per_image
        counts = torch.full((len(indices),), self.num_image_tokens, dtype=torch.int32)
        return input_ids.repeat_interleave(copies), counts

    def encode(self, prompt: str | Rendered) -> tuple[list[int], Spans]:
        """A prompt's token ids, and the [start, end) characters of each; see `deepseek_vl.checkpoints.tokenizer`."""
        rendered = Rendered(prompt) if isinstance(prompt, str) else prompt
        return encode(self.tokenizer, rendered.text, rendered.literal, self.image_tag)

    def count_tokens(self, prompt: str | Rendered, ids: Sequence[int] | None = None) -> int:
        """The length of a prompt, image features included; `ids` as in `process_one`."""
        ids = self.encode(prompt)[0] if ids is None else ids
        return len(ids) + ids.count(self.image_id) * (self.positions_per_image - 1)

    def process_one(
        self,
        prompt: str | Rendered | None = None,
        conversations: Sequence[Mapping[str, Any]] | None = None,
        images: Sequence[Image.Image] | None = None,
        ids: Sequence[int] | None = None,
        system_prompt: str | None = None,
        **kwargs: Any,
    ) -> VLChatProcessorOutput:
        """Process one prompt or conversation.

        Args:
            prompt: a rendered prompt, used as it is.
            conversations: the messages of one conversation, rendered with this processor's template and system prompt.
            images: its PIL images, in the order of their tags.
            ids: the prompt's ids, if `encode` has been called already.
            system_prompt: the conversation's system prompt, in place of the processor's; empty for none.
            kwargs: arguments of transformers' processors, if they change nothing (see `NO_CHANGE`).

        Raises:
            ValueError: unless exactly one of `prompt` and `conversations` is given, for malformed messages, for
                arguments that are not taken, or if the number of images is not the number of tags.
        """
        if (prompt is None) == (conversations is None):
            raise ValueError("Give exactly one of `prompt` and `conversations`.")
        if refused := [name for name, value in kwargs.items() if value not in NO_CHANGE.get(name, (None,))]:
            raise ValueError(f"{', '.join(refused)}: not taken with a prompt or conversations, but perhaps with text=.")
        if prompt is None:
            messages: Any = conversations
            if not all(isinstance(message, Mapping) and "role" in message for message in messages):
                raise ValueError('A conversation is a list of messages: {"role": ..., "content": ...}.')
            system_prompt = self.system_prompt if system_prompt is None else system_prompt
            prompt = self.apply_sft_template_for_multi_turn_prompts(messages, self.sft_format, system_prompt)
        elif system_prompt is not None:
            raise ValueError("system_prompt is of conversations; a prompt is used as it is.")
        elif not isinstance(prompt, str | Rendered):
            raise ValueError(f"A prompt is one text, not a {type(prompt).__name__}; for several, give text=.")
        if isinstance(images, str | bytes | os.PathLike):
            raise ValueError("Images must be PIL images; load them with load_pil_images.")
        images = [images] if isinstance(images, Image.Image) else list(images or [])
        input_ids = torch.tensor(self.encode(prompt)[0] if ids is None else ids, dtype=torch.int64)
        image_indices = (input_ids == self.image_id).nonzero()
        if len(image_indices) != len(images):
            raise ValueError(
                f"The prompt has {len(image_indices)} {self.image_tag} and {len(images)} images were given; "
                "there must be one tag per image."
            )
        input_ids, num_image_tokens = self.add_image_token(image_indices, input_ids)
        pixel_values = self.image_processor(images, return_tensors="pt")["pixel_values"]
        text = prompt if isinstance(prompt, str) else prompt.text
        return VLChatProcessorOutput(text, input_ids, pixel_values, num_image_tokens)

    def __call__(
        self,
        *,
        prompt: str | Rendered | None = None,
        conversations: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]] | None = None,
        images: Sequence[Image.Image] | None = None,
        force_batchify: bool = True,
        text: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Process one prompt or conversation, or several; returns a batch, or without `force_batchify` the items.

        One prompt or conversation is processed as in `process_one`. `conversations` may also be a list of
        conversations, with all images in reading order, or in one list for each; the items are then a list. With
        `text`, as from transformers' pipelines, rendered prompts and their images become a batch, under the arguments
        of `TextOptions`.
        """
        if text is not None:
            return self._process_texts([text] if isinstance(text, str) else text, images, kwargs)
        if conversations and isinstance(conversations, list | tuple) and isinstance(conversations[0], list | tuple):
            several = cast(Sequence[Sequence[Mapping[str, Any]]], conversations)
            tags = [self._count_tags(messages) for messages in several]
            remaining = iter(flat_images(images, tags))
            outputs = []
            for messages, count in zip(several, tags, strict=True):
                own = list(islice(remaining, count))
                outputs.append(self.process_one(prompt=prompt, conversations=messages, images=own, **kwargs))
            if left := len(list(remaining)):
                raise ValueError(f"There are {left} images more than {self.image_tag} in the conversations.")
            return self.batchify(outputs) if force_batchify else outputs
        single: Any = conversations
        output = self.process_one(prompt=prompt, conversations=single, images=images, **kwargs)
        return self.batchify([output]) if force_batchify else output

    def _count_tags(self, messages: Sequence[Mapping[str, Any]]) -> int:
        known = (message for message in messages if isinstance(message, Mapping))  # `process_one` refuses others
        return sum(text_of(message.get("content"), self.image_tag).count(self.image_tag) for message in known)

    def _process_texts(self, texts: Sequence[str], images: Any, arguments: Mapping[str, Any]) -> BatchFeature:
        """Rendered prompts -> a batch with the keys that transformers' trainers expect.

        Returns:
            `input_ids`, `attention_mask` and `mm_token_type_ids` [b, T]; with images `pixel_values` [b, n, 3, S, S].

        Raises:
            ValueError: if there are not as many images as tags, or for an argument that is not taken.
        """
        flat = flat_images(images, [each.count(self.image_tag) for each in texts])
        batch, each = self.text_batch(texts, flat, TextOptions.of(arguments), self.add_special_token)
        if most := max(map(len, each), default=0):
            pixels = torch.zeros(len(each), most, *self.image_processor.default_shape)
            for slots, group in zip(pixels, each, strict=True):
                slots[: len(group)] = self.image_processor(group, return_tensors="pt")["pixel_values"]
            batch["pixel_values"] = pixels.numpy() if arguments.get("return_tensors") == "np" else pixels
        return batch

    @property
    def chat_template(self) -> str:
        """The Jinja template: the one that was set, or one for this processor's format and system prompt."""
        return self._chat_template or jinja_template(self.new_chat_template(), self.image_tag)

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self._chat_template = template

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """`TextProcessor.apply_chat_template`, with this processor's system prompt unless there is a system message."""
        return super().apply_chat_template(conversation, *args, **{"system_prompt": self.system_prompt, **kwargs})

    def batchify(
        self, prepare_list: Sequence[VLChatProcessorOutput], padding_side: str = "left"
    ) -> BatchedVLChatProcessorOutput:
        """Pad processed conversations to one batch; generation needs padding on the left, training on the right.

        Raises:
            ValueError: for an empty list, an item whose image positions, images and feature counts disagree, or a
                side that is neither left nor right.
        """
        if not prepare_list:
            raise ValueError("There is nothing to batch: the list is empty.")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', not {padding_side!r}.")
        rows, most_tokens = len(prepare_list), max(len(item.input_ids) for item in prepare_list)
        most_images = max(1, *(len(item.num_image_tokens) for item in prepare_list))

        batch = BatchedVLChatProcessorOutput(
            sft_format=[item.sft_format for item in prepare_list],
            input_ids=torch.full((rows, most_tokens), self.pad_id, dtype=torch.int64),
            pixel_values=torch.zeros((rows, most_images, *self.image_processor.default_shape)),
            attention_mask=torch.zeros((rows, most_tokens), dtype=torch.int64),
            images_seq_mask=torch.zeros((rows, most_tokens), dtype=torch.bool),
            images_emb_mask=torch.zeros((rows, most_images, self.num_image_tokens), dtype=torch.bool),
        )
        for row, item in enumerate(prepare_list):
            start = most_tokens - len(item.input_ids) if padding_side == "left" else 0
            span = slice(start, start + len(item.input_ids))
            batch.images_seq_mask[row, span] = self._image_positions(row, item)
            batch.input_ids[row, span] = torch.as_tensor(item.input_ids)
            batch.attention_mask[row, span] = 1
            pixels: Any = item.pixel_values
            for slot, count in enumerate(item.num_image_tokens):
                batch.pixel_values[row, slot] = pixels[slot]
                batch.images_emb_mask[row, slot, :count] = True
        return batch

    def _image_positions(self, row: int, item: VLChatProcessorOutput) -> torch.Tensor:
        """Bool [T]: where image features go, which excludes the tags that `add_special_token` keeps."""
        counts = torch.as_tensor(item.num_image_tokens, dtype=torch.int64)
        pixels: Any = () if item.pixel_values is None else item.pixel_values
        images = len(pixels)
        if images != len(counts):
            raise ValueError(f"Item {row} has {images} images and {len(counts)} entries in num_image_tokens.")
        if images and list(pixels.shape[1:]) != self.image_processor.default_shape:
            raise ValueError(
                f"Item {row} has images of shape {list(pixels.shape[1:])}, this processor's have "
                f"{self.image_processor.default_shape}."
            )
        if (counts > self.num_image_tokens).any():
            raise ValueError(
                f"Item {row} has an image of {int(counts.max())} features; this processor's images have "
                f"{self.num_image_tokens}."
            )
        is_tag = torch.as_tensor(item.input_ids) == self.image_id
        positions = is_tag.nonzero().flatten()
        if self.add_special_token and len(positions) == counts.sum() + images:
            own_tags = torch.cumsum(torch.cat([counts.new_zeros(1), counts + 1]), 0)[:-1]  # first of each image's run
            is_tag[positions[own_tags]] = False
        elif len(positions) != counts.sum():
            raise ValueError(
                f"Item {row} has {len(positions)} {self.image_tag} positions, and its {images} images have "
                f"{int(counts.sum())} features; there must be one position per feature."
            )
        return is_tag

    def to_dict(self) -> dict[str, Any]:
        """The settings, as published `processor_config.json` files have them."""
        names = ("add_special_token", "ignore_id", "image_tag", "mask_prompt", "num_image_tokens", "sft_format")
        return {**{name: getattr(self, name) for name in names}, "processor_class": type(self).__name__}

    def save_pretrained(self, save_directory: str, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Save in the published layout: processor, image processor and tokenizer, each in files of its own."""
        self.image_processor.save_pretrained(save_directory)
        files = super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        if self._chat_template is None:  # the template follows from the settings
            Path(save_directory, "chat_template.jinja").unlink(missing_ok=True)
        return files

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers' hook that reads the settings, which may be in transformers' layout of this model."""
        settings, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if str(settings.get("processor_class", "")).startswith("DeepseekVL"):
            settings = {"num_image_tokens": settings.get("num_image_tokens", 576)}
        return settings, unused

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, processor_dict: dict | None = None, **kwargs: Any
    ) -> list[Any]:
        """transformers' hook that loads the parts; it bypasses the Auto classes to use `load_tokenizer`."""
        directory = pretrained_model_name_or_path
        return [VLMImageProcessor.from_pretrained(directory), load_tokenizer(directory)]
