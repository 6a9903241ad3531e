"""Which tokens begin, end and pad a text, as a checkpoint's files say."""

from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from deepseek_vl.checkpoints.find import read_json
from deepseek_vl.checkpoints.layout_configs import IMAGE_TAG

_NAMES = ("bos_token", "eos_token", "pad_token")


def config_special_tokens(config: LlamaConfig) -> dict[str, int]:
    """The ids that a language model's config names: `bos_token_id`, `eos_token_id` and `pad_token_id`."""
    return _complete({f"{name}_id": getattr(config, f"{name}_id") for name in _NAMES})


def checkpoint_special_tokens(directory: str | Path, config: LlamaConfig) -> dict[str, Any]:
    """The ids of the tokens that begin, end and pad a text, as a checkpoint's files say.

    An id is taken from `generation_config.json`, unless that only repeats the config; else from the tokenizer; else
    from the config, whose ids in the published checkpoints are Llama's by oversight.
    """
    declared, generation = (
        read_json(Path(directory, name)) for name in ("tokenizer_config.json", "generation_config.json")
    )
    added, from_config = _added_tokens(directory), config_special_tokens(config)
    ids = {}
    for name in _NAMES:
        token, key = declared.get(name), f"{name}_id"
        content = token["content"] if isinstance(token, dict) else token
        ids[key] = added.get(content, getattr(config, key))
        if generation.get(key) not in (None, from_config.get(key)):
            ids[key] = generation[key]
    return _complete(ids)


def _complete(ids: dict[str, Any]) -> dict[str, Any]:
    """The ids that are given; the end token pads if no padding token is given."""
    if ids["pad_token_id"] is None:
        ends = ids["eos_token_id"]
        ids["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    return {name: token_id for name, token_id in ids.items() if token_id is not None}


def token_id_of(token: str, directory: str | Path) -> int:
    """The id of a special token in a checkpoint's `tokenizer.json`.

    Raises:
        ValueError: if there is no such token.
    """
    added = _added_tokens(directory)
    if token not in added:
        raise ValueError(f"{str(directory)!r} has no tokenizer.json with a token {token!r}.")
    return added[token]


def image_token_id(directory: str | Path) -> int | None:
    """The id of the tag that stands for an image's features; None if the tokenizer's file has none."""
    processor = read_json(Path(directory, "processor_config.json"))
    return _added_tokens(directory).get(processor.get("image_tag", IMAGE_TAG))


def _added_tokens(directory: str | Path) -> dict[str, int]:
    return {
        token["content"]: token["id"] for token in read_json(Path(directory, "tokenizer.json")).get("added_tokens", [])
    }
