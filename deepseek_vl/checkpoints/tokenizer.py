"""Loading a checkpoint's tokenizer, and encoding text in which special tokens may be ordinary text."""

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

Spans = Sequence[tuple[int, int]]


def load_tokenizer(directory: str | Path, settings: Mapping[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """Load a checkpoint's tokenizer as its `tokenizer.json` says.

    Published checkpoints declare `LlamaTokenizerFast`. In transformers 5 that class replaces the file's byte-level
    pre-tokenizer by a SentencePiece-style one, which loses every space and newline, so the class is ignored.

    Args:
        directory: with the tokenizer's files.
        settings: replace those in `tokenizer_config.json`.

    Raises:
        OSError: if there are no tokenizer files.
    """
    if not Path(directory, "tokenizer.json").is_file():
        if not Path(directory, "tokenizer.model").is_file():
            raise OSError(f"{str(directory)!r} has no tokenizer.json.")
        tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        return tokenizer
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, **(settings or {}))
    # What LlamaTokenizerFast sets for a checkpoint that is silent about it.
    if "padding_side" not in tokenizer.init_kwargs:
        tokenizer.padding_side = "left"
    if "model_input_names" not in tokenizer.init_kwargs:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def encode(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    literal: Spans = (),
    tag: str | None = None,
    add_special_tokens: bool = True,
) -> tuple[list[int], Spans]:
    """A text's token ids, and the [start, end) characters of each; a slow tokenizer does not give the latter.

    There is one begin token, even if the text has its own, as a chat template's does, and the tokenizer adds another.

    Args:
        literal: spans of the text in which special tokens and the tag are ordinary text.
        tag: the image tag, which need not be a special token.
        add_special_tokens: let the tokenizer add its begin token.

    Raises:
        ValueError: if there are literal spans and the tokenizer is a slow one.
    """
    options = {"add_special_tokens": add_special_tokens, "return_offsets_mapping": tokenizer.is_fast}
    tokens = tokenizer(text, **options, verbose=False)
    ids, offsets = tokens["input_ids"], tokens.get("offset_mapping", [])
    if ids[:2] == [tokenizer.bos_token_id] * 2 and add_special_tokens and not (literal and literal[0][0] == 0):
        ids, offsets = ids[1:], offsets[1:]
    if not literal:
        return ids, offsets
    if not tokenizer.is_fast:
        raise ValueError("What users write can only be read by a tokenizer with a tokenizer.json (a fast one).")
    added = sorted(tokenizer.added_tokens_decoder.items())
    special = {number for number, token in added if token.special or token.content == tag}

    def special_in(ids: Sequence[int], offsets: Spans, shift: int = 0) -> list[tuple[int, tuple[int, int]]]:
        tokens = zip(ids, offsets, strict=True)
        return [(i, (shift + a, shift + b)) for i, (a, b) in tokens if i in special and a < b]

    backend = tokenizer.backend_tokenizer
    trusted = _between(literal, len(text))
    parts = backend.encode_batch([text[a:b] for a, b in trusted], add_special_tokens=False)
    found = (special_in(part.ids, part.offsets, start) for (start, _), part in zip(trusted, parts, strict=True))
    own = list(chain.from_iterable(found))
    if special_in(ids, offsets) == own:
        return ids, offsets

    # Tokens never span a special token, so the texts between special tokens can be encoded separately.
    plain = Tokenizer(backend.model)  # shares the vocabulary; added tokens get their ids by their order
    plain.normalizer, plain.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    for number, token in added:
        token.special = number in special
    plain.add_tokens([token for _, token in added])
    plain.encode_special_tokens = True
    gaps = _between(tuple(span for _, span in own), len(text))
    parts = plain.encode_batch([text[a:b] for a, b in gaps], add_special_tokens=False)
    begins = bool(own) and own[0][0] == tokenizer.bos_token_id and own[0][1][0] == 0
    ids = tokenizer.encode("") if add_special_tokens and not begins else []
    offsets = [(0, 0)] * len(ids)
    for (start, _), part, special_token in zip(gaps, parts, [*own, None], strict=True):
        ids += part.ids
        offsets += [(start + a, start + b) for a, b in part.offsets]
        if special_token:
            ids.append(special_token[0])
            offsets.append(special_token[1])
    return ids, offsets


def _between(spans: Spans, end: int) -> Spans:
    """The spans before, between and after the given ones, up to `end`."""
    borders = (0, *chain(*spans), end)
    return tuple(zip(borders[::2], borders[1::2], strict=True))
