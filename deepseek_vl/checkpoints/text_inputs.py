"""Encoding texts with image tags as token ids, with the arguments of transformers' processors."""

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.processing_utils import BatchFeature, ProcessorMixin

from deepseek_vl.checkpoints.tokenizer import Spans, encode

PADDINGS = {True: "longest", False: "do_not_pad", None: "do_not_pad"}
TRUNCATIONS = {True: True, "longest_first": True, "only_first": True, False: False, "do_not_truncate": False}
HANDS_ALL_ON = "processor_kwargs" not in inspect.signature(ProcessorMixin.apply_chat_template).parameters
"""Whether transformers passes a chat template's variables to the processor's call too, as it did before 5.4."""
WITHOUT_EFFECT = {
    *("return_text_replacement_offsets", "return_mm_token_type_ids", "return_attention_mask", "verbose"),
    *(["system_prompt"] if HANDS_ALL_ON else []),
}
"""Arguments that are accepted and change nothing."""


@dataclass(frozen=True)
class TextOptions:
    """How texts are made into a batch; the names are those of transformers' tokenizers.

    Attributes:
        add_special_tokens: let the tokenizer add its begin token, unless the text brings it.
        padding: "longest", "max_length" or "do_not_pad"; True and False mean the first and the last.
        padding_side: "left" or "right".
        pad_to_multiple_of: rows are padded to a multiple of so many tokens.
        truncation: cut texts to `max_length`, but no image in part; None cuts if there is a `max_length`, unless
            that is the length to pad to.
        max_length: in tokens; None, with truncation, is the tokenizer's `model_max_length`.
        return_tensors: "pt", "np" or None, for lists.
        return_offsets_mapping: give the characters of each token as well.
    """

    add_special_tokens: bool = True
    padding: str | bool = "longest"
    padding_side: str = "left"
    pad_to_multiple_of: int | None = None
    truncation: bool | str | None = None
    max_length: int | None = None
    return_tensors: str | None = "pt"
    return_offsets_mapping: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "padding", PADDINGS.get(self.padding, self.padding))
        if self.padding not in ("longest", "max_length", "do_not_pad"):
            allowed = "True, False, 'longest', 'max_length' or 'do_not_pad'"
            raise ValueError(f"padding must be {allowed}, not {self.padding!r}.")
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', not {self.padding_side!r}.")
        if self.truncation is None:
            object.__setattr__(self, "truncation", self.max_length is not None and self.padding != "max_length")
        if self.truncation not in TRUNCATIONS:
            raise ValueError(f"truncation must be one of {', '.join(map(repr, TRUNCATIONS))}, not {self.truncation!r}.")
        object.__setattr__(self, "truncation", TRUNCATIONS[self.truncation])
        if self.padding == "max_length" and self.max_length is None:
            raise ValueError("padding='max_length' needs a max_length.")

    @classmethod
    def of(cls, arguments: Mapping[str, Any], **defaults: Any) -> "TextOptions":
        """Read the arguments of a processor's call.

        Args:
            arguments: by name; `text_kwargs` and `common_kwargs` hold more of them.
            defaults: of this processor.

        Raises:
            ValueError: for an argument or a value that is not accepted; the message names it.
        """
        flat = dict(arguments)
        for group in ("common_kwargs", "text_kwargs"):
            flat |= flat.pop(group, None) or {}
        known = {option.name for option in fields(cls)}
        unknown = {name for name in flat if name not in known and name not in WITHOUT_EFFECT}
        if refused := sorted(name for name in unknown if flat[name] is not None and flat[name] is not False):
            raise ValueError(f"This processor does not take {', '.join(refused)}; it takes {', '.join(sorted(known))}.")
        return cls(**{**defaults, **{name: value for name, value in flat.items() if name in known}})


@dataclass(frozen=True)
class TextRow:
    """One tokenized text.

    Attributes:
        input_ids: with as many copies of the tag's id as an image has positions.
        is_feature: for each token, whether an image's feature replaces its embedding.
        offsets: the characters of each token; an image's are those of its tag.
        images: how many of the text's images were kept; what is cut are the last ones.
    """

    input_ids: list[int]
    is_feature: list[bool]
    offsets: Spans
    images: int


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    images: Sequence[Any],
    tag: str,
    features: int,
    options: TextOptions,
    own_tag: bool = False,
) -> tuple[list[TextRow], list[list[Any]]]:
    """Tokenize texts, make room for their images' features, and cut what the options say is too long.

    Args:
        images: of all texts, in reading order.
        tag: what stands for an image in a text; one of the tokenizer's tokens.
        features: how many an image has.
        own_tag: keep the tag's own token in front of an image's features.

    Returns:
        The rows, and the images of each.

    Raises:
        ValueError: unless there is one tag per image.
    """
    tags = [text.count(tag) for text in texts]
    if sum(tags) != len(images):
        raise ValueError(
            f"The prompt has {sum(tags)} {tag} and {len(images)} images were given; there must be one tag per image."
        )
    remaining = iter(images)
    rows = [_encode_text(tokenizer, text, tag, features, options, own_tag) for text in texts]
    each = [list(islice(remaining, count)) for count in tags]
    return rows, [group[: row.images] for row, group in zip(rows, each, strict=True)]


def _encode_text(
    tokenizer: PreTrainedTokenizerBase, text: str, tag: str, features: int, options: TextOptions, own_tag: bool
) -> TextRow:
    """Encode one text, cut at the first token, or whole image, that does not fit."""
    ids, offsets = encode(tokenizer, text, tag=tag, add_special_tokens=options.add_special_tokens)
    offsets = offsets or [(0, 0)] * len(ids)
    tag_id = tokenizer.convert_tokens_to_ids(tag)
    room = (options.max_length or tokenizer.model_max_length) if options.truncation else math.inf
    input_ids: list[int] = []
    is_feature: list[bool] = []
    spans: list[tuple[int, int]] = []
    images = 0
    for token, span in zip(ids, offsets, strict=True):
        places = [False] * own_tag + [True] * features if token == tag_id else [False]
        if len(input_ids) + len(places) > room:
            break
        input_ids += [token] * len(places)
        is_feature += places
        spans += [span] * len(places)
        images += token == tag_id
    return TextRow(input_ids, is_feature, spans, images)


def pad_texts(rows: Sequence[TextRow], pad_id: int, options: TextOptions) -> dict[str, list[list[Any]]]:
    """A batch of texts: `input_ids`, `attention_mask`, `mm_token_type_ids` (1 where features go), as lists.

    Raises:
        ValueError: if tensors are asked for and rows that are not padded differ in length.
    """
    lengths = [len(row.input_ids) for row in rows]
    if options.padding == "do_not_pad":
        if options.return_tensors is not None and len(set(lengths)) > 1:
            raise ValueError(f"Texts of {lengths} tokens make no tensor; give padding=True, or return_tensors=None.")
    else:
        longest = max(lengths) if options.padding == "longest" else max(options.max_length or 0, *lengths)
        multiple = options.pad_to_multiple_of or 1
        longest = -(-longest // multiple) * multiple
        lengths = [longest] * len(rows)

    def padded(values: list[Any], filler: Any, length: int) -> list[Any]:
        filling = [filler] * (length - len(values))
        return filling + values if options.padding_side == "left" else values + filling

    columns = {
        "input_ids": (pad_id, [row.input_ids for row in rows]),
        "attention_mask": (0, [[1] * len(row.input_ids) for row in rows]),
        "mm_token_type_ids": (0, [list(map(int, row.is_feature)) for row in rows]),
    }
    if options.return_offsets_mapping:
        columns["offset_mapping"] = ((0, 0), [list(row.offsets) for row in rows])
    return {
        name: [padded(values, filler, length) for values, length in zip(column, lengths, strict=True)]
        for name, (filler, column) in columns.items()
    }


class TextProcessor(ProcessorMixin):
    """Base class of this package's processors: what transformers' pipelines and trainers call.

    Attributes:
        image_token: what stands for an image in a text.
        num_image_tokens: how many features an image has.
    """

    image_token: str
    num_image_tokens: int

    @property
    def pad_id(self) -> int:
        """The id that pads batches: the tokenizer's padding token, or its end token if it has none."""
        pad_id = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad_id is None else pad_id

    def text_batch(
        self, texts: Sequence[str], images: Sequence[Any], options: TextOptions, own_tag: bool = False
    ) -> tuple[BatchFeature, list[list[Any]]]:
        """Encode and pad texts; returns the batch, in the form that `options` ask for, and the images of each text."""
        tag, features = self.image_token, self.num_image_tokens
        rows, each = encode_texts(self.tokenizer, texts, images, tag, features, options, own_tag)
        data = pad_texts(rows, self.pad_id, options)
        offsets = {name: data.pop(name) for name in ("offset_mapping",) if name in data}  # stays a list
        return BatchFeature({**BatchFeature(data, tensor_type=options.return_tensors), **offsets}), each

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' `apply_chat_template`, whose token ids are by default lists without padding.

        Trainers of other libraries pad the lists themselves.
        """
        given = {**kwargs, **(kwargs.get("processor_kwargs") or {})}
        if given.get("tokenize") and not given.keys() & {"padding", "return_tensors"}:
            plain = {"padding": False, "return_tensors": None}
            if HANDS_ALL_ON:
                kwargs |= plain
            else:
                kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), **plain}
        return super().apply_chat_template(conversation, *args, **kwargs)
