"""Batches for training: tokens, pixels, and labels for the assistant's answers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepseek_vl.checkpoints.tokenizer import Spans
from deepseek_vl.data.checks import check_tokenizer
from deepseek_vl.data.errors import DataError
from deepseek_vl.data.rows import TrainingRow
from deepseek_vl.models.processing_vlm import VLChatProcessor, VLChatProcessorOutput
from deepseek_vl.utils.conversation import Rendered
from deepseek_vl.utils.io import load_pil_images

NOT_LEARNT = -100
"""The label that torch's and transformers' losses leave out."""


@dataclass(frozen=True)
class EncodedRow:
    """One conversation of T tokens, ready to learn from.

    Attributes:
        item: what the processor makes of the conversation.
        labels: int64 [T]; `processor.ignore_id` where nothing is learnt.
    """

    item: VLChatProcessorOutput
    labels: torch.Tensor


def encode_row(row: TrainingRow, processor: VLChatProcessor, max_length: int | None = None) -> EncodedRow:
    """Tokens, pixels and labels of one conversation.

    Learnt are the answers and their end tokens; with `processor.mask_prompt` false, all text. An answer with
    `"weight": 0` is not learnt, either way.

    Args:
        max_length: cut the conversation after so many tokens. An image that does not fit whole is left out, with all
            that follows it.

    Raises:
        DataError: if nothing is left to learn, or the tokenizer cannot tell where its tokens are (a slow one).
        ImageLoadError: if an image cannot be read.
        ValueError: if the images are not as many as their tags.
    """
    check_tokenizer(processor)
    prompt = processor.render(row.messages, row.system)
    ids, offsets = processor.encode(prompt)
    item = processor.process_one(prompt, images=load_pil_images(row.messages), ids=ids)
    learnt = _learnt_tokens(row, processor, prompt, offsets)

    is_tag = torch.tensor(ids) == processor.image_id
    copies = torch.where(is_tag, processor.positions_per_image, 1)
    is_learnt = (torch.tensor(learnt) & ~is_tag).repeat_interleave(copies)
    labels = torch.where(is_learnt, item.input_ids, processor.ignore_id)
    encoded = EncodedRow(item, labels)
    if max_length is not None and len(labels) > max_length:
        encoded = _cut(encoded, processor, max_length)
    if (encoded.labels == processor.ignore_id).all():
        raise DataError(f"{row.origin}: nothing to learn: no answer begins within {max_length} tokens.")
    return encoded


def _learnt_tokens(row: TrainingRow, processor: VLChatProcessor, prompt: Rendered, offsets: Spans) -> list[bool]:
    """For each token of a rendered row, whether it is learnt; image tags are left out by the caller."""

    def in_any(spans: Spans) -> list[bool]:
        return [any(start < last and end > first for first, last in spans) for start, end in offsets]

    if processor.mask_prompt:
        return in_any(prompt.learnt)
    answers = processor.render([{**message, "weight": 1} for message in row.messages], row.system).learnt
    withheld = in_any([span for span in answers if span not in prompt.learnt])
    is_text = in_any([(0, len(prompt.text))])
    return [text and not out for text, out in zip(is_text, withheld, strict=True)]


def _cut(encoded: EncodedRow, processor: VLChatProcessor, max_length: int) -> EncodedRow:
    """The first `max_length` tokens, or fewer if that would cut an image."""
    item = encoded.item
    run = processor.positions_per_image
    positions = (item.input_ids == processor.image_id).nonzero().flatten().tolist()
    starts = positions[::run]
    whole = [start for start in starts if start + run <= max_length]
    if len(whole) < len(starts):
        max_length = min(max_length, starts[len(whole)])
    kept = VLChatProcessorOutput(
        sft_format=item.sft_format,
        input_ids=item.input_ids[:max_length],
        pixel_values=item.pixel_values[: len(whole)] if whole and item.pixel_values is not None else None,
        num_image_tokens=item.num_image_tokens[: len(whole)],
    )
    return EncodedRow(kept, encoded.labels[:max_length])


class TrainingCollator:
    """Makes batches for `MultiModalityCausalLM.forward`: `{"input_ids", "pixel_values", ..., "labels"}`.

    Args:
        processor: of the model that is trained.
        max_length: see `encode_row`.
        pack: put all conversations of a batch into one row without padding. The positions of each begin at 0, and none
            attends to another, so the loss is that of the padded batch.
    """

    def __init__(self, processor: VLChatProcessor, max_length: int | None = None, pack: bool = False):
        self.processor = processor
        self.max_length = max_length
        self.pack = pack

    def __call__(self, rows: Sequence[TrainingRow]) -> dict[str, Any]:
        """A batch of tensors from rows.

        Raises:
            DataError: see `encode_row`.
            ImageLoadError: see `encode_row`.
            ValueError: see `encode_row`.
        """
        encoded = [encode_row(row, self.processor, self.max_length) for row in rows]
        # transformers' losses know one label for what is not learnt, whatever the processor's `ignore_id` is.
        labels = [row.labels.masked_fill(row.labels == self.processor.ignore_id, NOT_LEARNT) for row in encoded]
        items = [row.item for row in encoded]
        if self.pack:
            for row in labels:
                row[0] = NOT_LEARNT  # nothing to predict it from: what precedes it is another row
            batch = dict(self.processor.batchify([_join(items)]))
            batch["labels"] = torch.cat(labels)[None]
            batch["position_ids"] = torch.cat([torch.arange(len(item.input_ids)) for item in items])[None]
            # Instead of a mask: transformers finds the borders of conversations where the positions restart.
        else:
            batch = dict(self.processor.batchify(items, padding_side="right"))
            batch["labels"] = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=NOT_LEARNT)
            # Padding is at the end, so causal attention hides it without a mask, which is faster.
        del batch["sft_format"], batch["attention_mask"]
        return batch


def _join(items: Sequence[VLChatProcessorOutput]) -> VLChatProcessorOutput:
    """Join conversations to one sequence."""
    pixels = [item.pixel_values for item in items if item.pixel_values is not None]
    return VLChatProcessorOutput(
        sft_format="".join(item.sft_format for item in items),
        input_ids=torch.cat([item.input_ids for item in items]),
        pixel_values=torch.cat(pixels) if pixels else None,
        num_image_tokens=torch.cat([item.num_image_tokens for item in items]),
    )
