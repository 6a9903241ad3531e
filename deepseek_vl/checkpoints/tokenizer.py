"""A checkpoint's tokenizer, as its `tokenizer.json` says."""

from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file


def load_tokenizer(
    name_or_path: str, settings: Mapping[str, Any] | None = None, **hub_arguments: Any
) -> PreTrainedTokenizerBase:
    """The tokenizer as its `tokenizer.json` says.

    Published checkpoints declare `LlamaTokenizerFast`. In transformers 5 that class replaces the file's byte-level
    pre-tokenizer by a SentencePiece-style one, which loses every space and newline, so it is passed over.

    Args:
        name_or_path: a directory, or an id on the Hub.
        settings: replace those in `tokenizer_config.json`.
        hub_arguments: where files come from.

    Raises:
        OSError: if there are no tokenizer files.
    """
    files = {
        file: cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub_arguments)
        for file in ("tokenizer.json", "tokenizer.model")
    }
    if files["tokenizer.json"] is None:
        if files["tokenizer.model"] is None:
            raise OSError(f"{str(name_or_path)!r} has no tokenizer.json.")
        return AutoTokenizer.from_pretrained(name_or_path, **hub_arguments)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(name_or_path, **(settings or {}), **hub_arguments)
    # What LlamaTokenizerFast sets for a checkpoint that is silent about it.
    if "padding_side" not in tokenizer.init_kwargs:
        tokenizer.padding_side = "left"
    if "model_input_names" not in tokenizer.init_kwargs:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer
