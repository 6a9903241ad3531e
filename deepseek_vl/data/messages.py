"""Reading a message of a row into the reference's form."""

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

from deepseek_vl.data.errors import DataError
from deepseek_vl.data.fields import check_all_is_read, check_is_text, is_nothing, kind

ROLES = {"user": "User", "human": "User", "assistant": "Assistant", "gpt": "Assistant", "system": "System"}
WEIGHTS = ("weight", "loss", "loss_scale")
"""OpenAI's and ms-swift's keys of an answer that say whether it is learnt."""
IMAGE_PARTS = ("image", "image_url", "input_image")
SOURCES = ("path", "url", "image", "image_url")
"""Keys under which an object has an image's path, if it does not have its bytes."""


def read_message(number: int, entry: Any, directory: Path, tag: str, image_tag: str) -> dict[str, Any]:
    """One message in the reference's form; an image that the row has to supply is None."""
    name = f"message {number}"
    if not isinstance(entry, dict):
        raise DataError(f"{name} is {kind(entry)}, not an object")
    role_key, text_key = ("from", "value") if "from" in entry and "role" not in entry else ("role", "content")
    if role_key not in entry:
        raise DataError(f'{name} has neither "role" nor "from"')
    role = ROLES.get(str(entry[role_key]).strip().lower())
    if role is None:
        raise DataError(f"the role of {name} is {entry[role_key]!r}; it must be user, assistant or system")

    check_all_is_read(name, entry, (role_key, text_key, "images", *WEIGHTS))
    content = entry.get(text_key)
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    text, images = "", []
    for part in parts:
        part_type = part.get("type") if isinstance(part, dict) else None
        if part_type in IMAGE_PARTS:
            text += image_tag
            images.append(_source(part, directory, f"the image of {name}"))
        elif part_type in ("text", "input_text", "output_text"):
            check_all_is_read(f"a part of {name}", part, ("type", "text"))
            check_is_text(
                f'"text" of a part of {name}' if parts is content else f'"{text_key}" of {name}', part.get("text")
            )
            said = part["text"].replace(tag, image_tag)
            text += said
            images += [None] * said.count(image_tag)
        else:
            raise DataError(f"{name} has a part of type {part_type!r}; it must be text, image or image_url")

    own = read_sources(entry.get("images"), directory, name)
    if role != "User" and (images or own):
        raise DataError(f"{name} is the {role.lower()}'s and holds an image; images belong in the user's messages")
    if own:
        check_tags(name, images.count(None), len(own), tag)
        images = fill(images, iter(own))
    message = {"role": role, "content": text, "images": images}
    return message if _is_learnt(name, role, entry) else {**message, "weight": 0}


def has_images(entry: Any, are_beside: bool) -> bool:
    """Whether a message of a row holds images itself, or a list of none.

    Args:
        are_beside: whether the row has a list of images; an empty one in the message then means nothing.
    """
    if not isinstance(entry, dict):
        return False
    parts = entry.get("content")
    types = [part.get("type") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    has_list = bool(entry.get("images")) if are_beside else entry.get("images") is not None
    return has_list or any(part_type in IMAGE_PARTS for part_type in types)


def _is_learnt(name: str, role: str, entry: Mapping[str, Any]) -> bool:
    """Whether an answer is learnt, as its weight says; true for other messages."""
    given = {key: entry[key] for key in WEIGHTS if entry.get(key) is not None}
    for key, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(
                f'"{key}" of {name} is {value!r}; an answer is learnt (1 or true) or it is not (0 or false)'
            )
    if len(set(given.values())) > 1:
        raise DataError(f"{' and '.join(map(repr, given))} of {name} do not agree; keep one of them")
    is_learnt = all(given.values())
    if given and is_learnt and role != "Assistant":
        raise DataError(
            f"{name} is the {role.lower()}'s and is to be learnt, as its {next(iter(given))!r} says; only "
            "answers are learnt"
        )
    return is_learnt or role != "Assistant"


def fill(images: Sequence[Any], sources: Iterator[Any]) -> list[Any]:
    """The images, each None among them replaced by the next of the sources."""
    return [next(sources) if image is None else image for image in images]


def read_sources(value: Any, directory: Path, name: str) -> list[Any]:
    """The sources in an "images" value: nothing, one, or a list."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    sources = [_source(item, directory, f"image {i} of {name}") for i, item in enumerate(values, 1)]
    if None in sources:
        raise DataError(f"image {sources.index(None) + 1} of {name} has no path")
    return sources


def _source(value: Any, directory: Path, name: str) -> str | bytes | None:
    """What `load_image` takes: an absolute path, a data URL or bytes. None for an object that names no image."""
    if isinstance(value, dict):
        check_all_is_read(name, value, ("type", "bytes", "detail", *SOURCES))
        if isinstance(value.get("bytes"), bytes):  # as Parquet has them
            return value["bytes"]
        if value.get("bytes") is not None:
            try:
                return base64.b64decode(value["bytes"], validate=True)
            except (TypeError, ValueError) as error:
                raise DataError(f'"bytes" of {name} is not base64 text') from error
        given = {key: value[key] for key in SOURCES if not is_nothing(value.get(key))}
        sources = [_source(item, directory, name) for item in given.values()]
        if any(source != sources[0] for source in sources):
            raise DataError(f"{name} has {' and '.join(map(repr, given))}; keep one of them")
        return sources[0] if sources else None
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise DataError(f"{name} is {kind(value)}, not a path")
    if not value.strip():
        raise DataError(f"{name} is an empty path")
    if value.startswith(("data:", "http://", "https://")):
        return value
    if value.startswith("file://"):
        value = url2pathname(value.removeprefix("file://").removeprefix("localhost"))
    return str(directory.absolute() / os.path.expanduser(value))  # noqa: PTH111  Path's raises for unknown users


def check_tags(name: str, tags: int, images: int, tag: str) -> None:
    """Check that a message, or a conversation, has as many image tags as images.

    Raises:
        DataError: if it does not; `name` is what the error calls it.
    """
    if tags == images:
        return
    advice = f"write {tag} where each image belongs" if tags < images else "give one image per tag"
    count = f"{tags} tag{'' if tags == 1 else 's'} {tag}" if tags else f"no {tag}"
    raise DataError(f"{name} has {count} and {images or 'no'} image{'' if images == 1 else 's'}; {advice}")
