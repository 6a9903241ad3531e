"""Which tokens begin, end and pad a text, as a checkpoint's files say."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, LlamaConfig
from transformers.utils import cached_file

from deepseek_vl.checkpoints.find import hub_arguments_of


def default_special_tokens(config: LlamaConfig) -> dict[str, int]:
    """The language config's own ids, except for the published vocabulary, whose configs carry Llama's by oversight."""
    bos, eos, pad = config.bos_token_id, config.eos_token_id, config.pad_token_id
    if (bos, eos) == (1, 2) and config.vocab_size == 102400:
        bos, eos, pad = 100000, 100001, 100001
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos if pad is None else pad}
    return {name: token_id for name, token_id in ids.items() if token_id is not None}


def checkpoint_special_tokens(
    config: LlamaConfig, generation: GenerationConfig, name_or_path: str, kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The special tokens' ids that a checkpoint's files name.

    Those of a generation config of its own, except where it only repeats the defaults; else the tokenizer's.
    """
    hub_arguments = hub_arguments_of(kwargs)
    generation_config, tokenizer_config, tokenizer = (
        cached_file(name_or_path, file, _raise_exceptions_for_missing_entries=False, **hub_arguments)
        for file in ("generation_config.json", "tokenizer_config.json", "tokenizer.json")
    )
    defaults = default_special_tokens(config)
    ids = dict(defaults)
    if tokenizer_config is not None and tokenizer is not None:
        added_tokens = json.loads(Path(tokenizer).read_text(encoding="utf-8")).get("added_tokens", [])
        added = {token["content"]: token["id"] for token in added_tokens}
        declared = json.loads(Path(tokenizer_config).read_text(encoding="utf-8"))
        for name in ("bos_token", "eos_token", "pad_token"):
            token = declared.get(name)
            content = token["content"] if isinstance(token, dict) else token
            if content in added:
                ids[f"{name}_id"] = added[content]
    if generation_config is not None:
        for name in ids:
            own = getattr(generation, name)
            if own is not None and own != defaults.get(name):
                ids[name] = own
    return ids


def token_id_of(token: str, name_or_path: str, hub_arguments: Mapping[str, Any]) -> int:
    """The id of a special token in a checkpoint's `tokenizer.json`.

    Raises:
        ValueError: if there is no such token.
    """
    file = cached_file(name_or_path, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **hub_arguments)
    if file is not None:
        for added in json.loads(Path(file).read_text(encoding="utf-8")).get("added_tokens", []):
            if added["content"] == token:
                return added["id"]
    raise ValueError(f"{str(name_or_path)!r} has no tokenizer.json with a token {token!r}.")
