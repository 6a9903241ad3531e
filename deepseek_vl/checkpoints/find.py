"""Where a checkpoint is: a directory, the name of a bundled model, or an id on the Hugging Face Hub.

`find_checkpoint` turns each of them into a directory on this machine, from which checkpoints are read.
"""

import contextlib
import functools
import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BUNDLED = Path(__file__).resolve().parents[1] / "bundled"
"""The directory of the models that come with the package, each in a directory of its own."""

HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""The arguments of a `from_pretrained` that say where files come from."""

HUB_SECONDS = 5.0
"""How many seconds the Hub may take to answer before the download cache alone is used."""

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt")


def bundled_or_same(name_or_path: str | os.PathLike) -> str:
    """The directory of a bundled model for its name; any other path or Hub id as it is.

    A checkpoint directory of the same name has precedence.
    """
    name = os.fspath(name_or_path)
    bundled = BUNDLED / name
    is_name = bundled.parent == BUNDLED and (bundled / "config.json").is_file()
    return str(bundled) if is_name and not Path(name, "config.json").is_file() else name


def find_checkpoint(
    name_or_path: str | os.PathLike, hub_arguments: Mapping[str, Any] | None = None, weights: bool = True
) -> str:
    """The directory of a checkpoint, downloaded if necessary; the path of a file is returned as it is.

    Args:
        name_or_path: a directory, the name of a bundled model, or an id on the Hub.
        hub_arguments: those of `HUB_ARGUMENTS` that were given.
        weights: download the weights too, not only configs and tokenizer.

    Raises:
        OSError: in one line, if there is no such checkpoint, here or on the Hub, or the Hub does not answer within
            `HUB_SECONDS` and the download cache does not have it.
    """
    arguments = {name: value for name, value in (hub_arguments or {}).items() if value is not None}
    subfolder = arguments.pop("subfolder", "")
    path = os.path.expanduser(bundled_or_same(name_or_path))  # noqa: PTH111  Path's raises for unknown users
    if not Path(path).exists():
        if not _HUB_ID.fullmatch(path):
            raise FileNotFoundError(f"There is no checkpoint directory {os.fspath(name_or_path)!r}.")
        path = _download(path, subfolder, weights, **arguments)
    return str(Path(path, subfolder)) if subfolder else path


def given_name(name_or_path: str | os.PathLike) -> str:
    """The path as it was given; for a bundled model's directory its name, which is the same on every machine."""
    path = Path(name_or_path)
    return path.name if path.parent == BUNDLED else os.fspath(name_or_path)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint; empty if there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def take_hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove from a `from_pretrained`'s arguments those that say where files come from, and return them."""
    return {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}


class FromCheckpoint:
    """Mixin for transformers' classes: `from_pretrained` finds the checkpoint first, and reads only its directory."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`, for a directory, a bundled model's name, or an id on the Hub.

        Raises:
            OSError: see `find_checkpoint`.
        """
        directory = find_checkpoint(pretrained_model_name_or_path, take_hub_arguments(kwargs), weights=False)
        return super().from_pretrained(directory, *args, **kwargs)  # ty: ignore[missing-attribute]  of the class beside


def open_bundled_names(auto: Any) -> None:
    """Let an Auto class open a bundled model by its name.

    Auto classes read a checkpoint's config before they choose a class, and look for it on the Hub if the name is no
    directory; transformers has no registry of names. So this public method is wrapped: a bundled model's name becomes
    its directory, and every other argument stays as it is.
    """
    original = auto.from_pretrained.__func__
    if hasattr(original, "takes_bundled_names"):
        return

    @functools.wraps(original)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        name = pretrained_model_name_or_path
        return original(cls, bundled_or_same(name) if isinstance(name, str) else name, *args, **kwargs)

    setattr(from_pretrained, "takes_bundled_names", True)  # noqa: B010
    auto.from_pretrained = classmethod(from_pretrained)


def _download(
    name: str, subfolder: str, weights: bool, local_files_only: bool = False, proxies: Any = None, **arguments: Any
) -> str:
    """The directory in the download cache of a model on the Hub, with its newest files if the Hub answers."""
    from huggingface_hub import constants, snapshot_download

    inside = f"{subfolder}/" if subfolder else ""
    arguments["ignore_patterns"] = None if subfolder else ["*/*"]  # what lies in folders is no part of the checkpoint

    def fetch(*patterns: str, **more: Any) -> str:
        return snapshot_download(name, allow_patterns=[inside + pattern for pattern in patterns], **arguments, **more)

    try:
        if local_files_only or constants.HF_HUB_OFFLINE:
            why = "downloads are switched off, and the download cache does not have it"
        elif not _hub_answers():
            why = f"{constants.ENDPOINT} does not answer, and the download cache does not have it"
        else:
            why = None
            directory = fetch(*_SETTINGS, "*.safetensors") if weights else fetch(*_SETTINGS)
            if weights and not any(Path(directory, subfolder).glob("*.safetensors")):
                directory = fetch(*_SETTINGS, "*.bin")
            return directory
        return fetch("config.json", local_files_only=True)  # others may not be cached: programs fetch what they need
    except (OSError, ValueError) as error:
        why = why or str(error).strip().splitlines()[0]
        raise OSError(f"{name!r} is not a directory, and could not be fetched from the Hub: {why}.") from error


def _hub_answers() -> bool:
    """Whether the Hub can be reached within `HUB_SECONDS`; huggingface_hub itself would retry for half a minute."""
    from huggingface_hub import constants, get_session

    answered = threading.Event()

    def ask() -> None:
        # huggingface_hub's HTTP client, and so the class of its errors, depends on the version.
        with contextlib.suppress(Exception):
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
            answered.set()

    # In a thread, because the timeout does not limit name resolution, and starts anew for every address.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_SECONDS)
    return answered.is_set()
