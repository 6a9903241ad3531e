"""What is read from checkpoint files besides configs: weights, and which tokens begin and end a text."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import GenerationConfig, LlamaConfig
from transformers.modeling_utils import load_state_dict
from transformers.utils import cached_file

from deepseek_vl.models.layout_weights import canonical
from deepseek_vl.utils.native import forget_pages

logger = logging.getLogger(__name__)

# The arguments of `from_pretrained` that say where files come from.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def hub_arguments_of(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a `from_pretrained`'s arguments that say where files come from."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}


class UnreadTensor:
    """A tensor of a safetensors file, read when it is indexed.

    Args:
        file: the opened file, which is mapped into memory.
        name: the tensor's.
        dtype: what floating point numbers are converted to as they are read; None leaves them.
    """

    def __init__(self, file: Any, name: str, dtype: torch.dtype | None = None):
        self._file, self._name, self._slice = file, name, file.get_slice(name)
        self._dtype = dtype

    def get_shape(self) -> list[int]:
        return self._slice.get_shape()

    def get_dtype(self) -> str:
        return self._slice.get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        mapped = self._file.get_tensor(self._name)[index]
        dtype = self._dtype if self._dtype is not None and mapped.is_floating_point() else mapped.dtype
        # Never the mapped numbers themselves, which would change if the file is written again.
        read = mapped.to(dtype, copy=True)
        forget_pages(mapped)
        return read


def unread_tensors(file: str, dtype: torch.dtype | None = None) -> list[tuple[str, UnreadTensor]]:
    """The names and tensors of a safetensors file, each to be read when it is indexed, as `dtype` if it is floating
    point and one is given."""
    try:
        opened = safe_open(file, framework="pt", backend="mmap")
    except SafetensorError as error:
        raise OSError(f"{file!r} is broken or truncated ({error}); download it again.") from error
    return [(name, UnreadTensor(opened, name, dtype)) for name in opened.keys()]  # noqa: SIM118  it is no dict


def unread_weights(files: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """The tensors of a checkpoint's safetensors or torch files, by their `canonical` names, read when indexed.

    Args:
        dtype: what floating point numbers of safetensors files are converted to as they are read; None leaves them.
    """
    tensors: dict[str, Any] = {}
    for file in files:
        is_safetensors = file.endswith(".safetensors")
        tensors |= unread_tensors(file, dtype) if is_safetensors else load_state_dict(file)
    return canonical(tensors)


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


def load_tower_checkpoint(tower: nn.Module, path: str, prefix: str = "") -> None:
    """Fill a tower from a weights file of its own (`ckpt_path` in the config), a `.safetensors` or a torch file.

    Keys in the file may carry `prefix`. The file may hold other parts or lack some, as a plain SAM file lacks the
    second neck: these are logged. Nothing is read while transformers builds the model on the meta device, because then
    the model's own checkpoint follows.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file fills no parameter at all, or a shape differs.
    """
    if not path or any(parameter.is_meta for parameter in tower.parameters()):
        return
    if not Path(path).is_file():
        raise FileNotFoundError(f"No tower weights at {path!r} (ckpt_path).")
    if path.endswith(".safetensors"):
        state_dict = load_file(path)
    else:
        state_dict = torch.load(path, map_location="cpu", weights_only=True)
    state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    own = tower.state_dict()
    if not own.keys() & state_dict.keys():
        raise ValueError(
            f"No key in {path!r} belongs to {type(tower).__name__}, which has {', '.join(list(own)[:3])}..."
        )
    mismatched = [key for key in own.keys() & state_dict.keys() if own[key].shape != state_dict[key].shape]
    if mismatched:
        details = ", ".join(
            f"{key} {tuple(state_dict[key].shape)} in the file, {tuple(own[key].shape)} in the tower"
            for key in sorted(mismatched)[:5]
        )
        raise ValueError(f"{path!r} is for another size: {details}.")
    missing, unexpected = tower.load_state_dict(state_dict, strict=False)
    if missing or unexpected:
        logger.warning(
            "%s: %d keys missing (%s), %d unused (%s)", path, len(missing), missing, len(unexpected), unexpected
        )
