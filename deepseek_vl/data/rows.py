"""Conversations in files: the forms that people have -> rows in the reference's form.

A JSON Lines file has one row per line; a `.json` file is one list of rows. Each row is in one of these forms, with
image paths relative to the file:

    [{"role": "User", "content": "<image_placeholder>What?", "images": ["a.png"]}, {"role": "Assistant", ...}]
    {"messages": the same list}
    {"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", ...}], "image": "a.png"}
    {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", ...}], "images": ["a.png"]}
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}},
                                               {"type": "text", "text": "What?"}]}, ...]}

Text is kept as it is, and parts are joined with nothing between them. Images that stand beside the messages are taken
in reading order. Where images stand in the messages, and in a bare list, `<image>` is ordinary text. An object may also
have a `"system"` text, and a `"type"`: the last question's, or a list with one per answer. Other keys are ignored.
"""

import base64
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

from deepseek_vl.utils.conversation import IMAGE_TAG

ROW_IMAGE_TAG = "<image>"
ROLES = {"user": "User", "human": "User", "assistant": "Assistant", "gpt": "Assistant", "system": "System"}


class DataError(ValueError):
    """Rows that cannot be used. The message says what is wrong and what to do."""


@dataclass(frozen=True)
class TrainingRow:
    """One conversation to learn from, in the reference's form.

    Attributes:
        messages: `{"role", "content", "images"}`, User and Assistant in turn, from the first question to the last
            answer. A question's content has one image tag per entry of `images`: anything that `load_image` takes.
        system: replaces the processor's system prompt; None for the processor's own, empty for none.
        types: for evaluation, the type of each answer's question, None where it has none.
        origin: where the row is from, for error messages: "file.jsonl:12".
    """

    messages: list[dict[str, Any]]
    system: str | None = None
    types: tuple[str | None, ...] = ()
    origin: str = ""

    def __post_init__(self) -> None:
        if not self.types:
            object.__setattr__(self, "types", (None,) * (len(self.messages) // 2))

    @property
    def images(self) -> list[Any]:
        """The sources of all its images, in reading order."""
        return [source for message in self.messages for source in message.get("images") or ()]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be trained on: where it is, and why."""

    origin: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.reason}"


# Files


def read_rows(
    paths: str | os.PathLike | Iterable[str | os.PathLike], image_tag: str = IMAGE_TAG
) -> Iterator[TrainingRow | BadRow]:
    """The rows of files, in order, read but not yet checked against a processor; blank lines are passed over.

    Raises:
        DataError: for a file that is not UTF-8, or a `.json` file that is not a list.
        OSError: if a file is missing or cannot be opened.
    """
    for path in data_files(paths):
        rows = _json_rows(path) if path.suffix.lower() == ".json" else _jsonl_rows(path)
        for origin, row in rows:
            try:
                yield row if isinstance(row, BadRow) else parse_row(row, path.parent, origin, image_tag)
            except DataError as error:
                yield BadRow(origin, str(error))


def data_files(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
    """The data files, each of which is there."""
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    files = [Path(os.path.expanduser(path)) for path in paths]  # noqa: PTH111  Path's raises for unknown users
    for file in files:
        if file.is_dir():
            raise IsADirectoryError(f"{str(file)!r} is a directory; name the data files in it.")
        if not file.exists():
            raise FileNotFoundError(f"There is no data file {str(file)!r}.")
    return files


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(origin, decoded row or BadRow) of each line. Lines end at newlines only: JSON text may have other breaks."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            text = _decode(line, path, number)
            if not text.strip():
                continue
            origin = f"{path}:{number}"
            try:
                yield origin, json.loads(text)
            except (ValueError, RecursionError) as error:
                yield origin, BadRow(origin, f"not JSON ({_json_problem(error)}); each line must be one whole row")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(origin, decoded row) of each item of a list."""
    advice = "name a file with one row per line .jsonl"
    text = _decode(path.read_bytes(), path, 1)
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{str(path)!r} is not JSON ({_json_problem(error)}); {advice}.") from error
    if not isinstance(rows, list):
        raise DataError(f"{str(path)!r} is {_kind(rows)}, not a list of rows; {advice}.")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _decode(data: bytes, path: Path, line: int) -> str:
    """UTF-8 text, without a byte order mark in front of the file's first line."""
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(f"{str(path)!r} is not UTF-8 text (line {line}); save it as UTF-8.") from error


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return f"{error.msg} at {line}column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


# Rows


def parse_row(row: Any, directory: Path, origin: str, image_tag: str = IMAGE_TAG) -> TrainingRow:
    """Recognise a row's form, and bring it into the reference's.

    Args:
        row: decoded JSON, see the module.
        directory: what image paths are relative to.
        origin: see `TrainingRow`.
        image_tag: the processor's tag.

    Raises:
        DataError: with the reason, without the origin.
    """
    fields, entries = _open_row(row)
    beside = [fields[key] for key in ("image", "images") if fields.get(key) is not None]
    if len(beside) == 2:
        raise DataError('the row has both "image" and "images"; give its images under one of them')
    row_images = _sources(beside[0] if beside else None, directory, "the row")
    messages_hold_images = isinstance(row, list) or any(
        isinstance(entry, dict) and ("images" in entry or isinstance(entry.get("content"), list)) for entry in entries
    )
    tag = image_tag if messages_hold_images and not row_images else ROW_IMAGE_TAG
    messages = [_read_message(i, entry, directory, tag, image_tag) for i, entry in enumerate(entries, 1)]

    system = fields.get("system")
    if system is not None:
        _check_is_text('"system"', system)
    offset = 1
    if messages[0]["role"] == "System":
        if system is not None:
            raise DataError('there is a system message and a "system" text; keep one of them')
        system = messages.pop(0)["content"]
        offset = 2
    _check_turns(messages, offset)
    _place_row_images(messages, row_images, offset, tag)
    for message in messages[1::2]:
        del message["images"]
    return TrainingRow(messages, system, _types(fields.get("type"), len(messages) // 2), origin)


def _open_row(row: Any) -> tuple[dict[str, Any], list[Any]]:
    """The row's fields, none for a bare list, and its messages, still undecoded."""
    if isinstance(row, list):
        if row and isinstance(row[0], dict) and row[0].keys() & {"conversations", "messages"}:
            raise DataError("the line is a list of rows; give each row a line, or name the file .json")
        fields, entries = {}, row
    elif isinstance(row, dict):
        names = [name for name in ("conversations", "messages") if row.get(name) is not None]
        if len(names) != 1:
            raise DataError(
                f'the row has {"both" if names else "neither"} "conversations" {"and" if names else "nor"} '
                '"messages"; give the messages under one of them'
            )
        fields, entries = row, row[names[0]]
        if not isinstance(entries, list):
            raise DataError(f'"{names[0]}" is {_kind(entries)}, not a list of messages')
    else:
        raise DataError(f"the row is {_kind(row)}, not an object or a list of messages")
    if not entries:
        raise DataError("the conversation has no messages")
    return fields, entries


def _read_message(number: int, entry: Any, directory: Path, tag: str, image_tag: str) -> dict[str, Any]:
    """One message in the reference's form; an image that the row has to supply is None."""
    name = f"message {number}"
    if not isinstance(entry, dict):
        raise DataError(f"{name} is {_kind(entry)}, not an object")
    role_key, text_key = ("from", "value") if "from" in entry and "role" not in entry else ("role", "content")
    if role_key not in entry:
        raise DataError(f'{name} has neither "role" nor "from"')
    role = ROLES.get(str(entry[role_key]).strip().lower())
    if role is None:
        raise DataError(f"the role of {name} is {entry[role_key]!r}; it must be user, assistant or system")

    content = entry.get(text_key)
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    text, images = "", []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "image_url", "input_image"):
            text += image_tag
            images.append(_source(part, directory, f"the image of {name}"))
        elif kind in ("text", "input_text", "output_text"):
            _check_is_text(
                f'"text" of a part of {name}' if parts is content else f'"{text_key}" of {name}', part.get("text")
            )
            said = part["text"].replace(tag, image_tag)
            text += said
            images += [None] * said.count(image_tag)
        else:
            raise DataError(f"{name} has a part of type {kind!r}; it must be text, image or image_url")

    own = _sources(entry.get("images"), directory, name)
    if role != "User" and (images or own):
        raise DataError(f"{name} is the {role.lower()}'s and holds an image; images belong in the user's messages")
    if own:
        check_tags(name, images.count(None), len(own), tag)
        images = _fill(images, iter(own))
    return {"role": role, "content": text, "images": images}


def _fill(images: Sequence[Any], sources: Iterator[Any]) -> list[Any]:
    """The images, with the next source in place of each None."""
    return [next(sources) if image is None else image for image in images]


def _sources(value: Any, directory: Path, name: str) -> list[Any]:
    """The sources in an "images" value: nothing, one, or a list."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    sources = [_source(item, directory, f"image {i} of {name}") for i, item in enumerate(values, 1)]
    if None in sources:
        raise DataError(f"image {sources.index(None) + 1} of {name} has no path")
    return sources


def _source(value: Any, directory: Path, name: str) -> str | bytes | None:
    """What `load_image` takes: an absolute path, a data URL or bytes. None for an object that names no image."""
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            try:
                return base64.b64decode(value["bytes"], validate=True)
            except (TypeError, ValueError) as error:
                raise DataError(f'"bytes" of {name} is not base64 text') from error
        inner = (value.get(key) for key in ("path", "url", "image", "image_url"))
        value = next((item for item in inner if item is not None), None)
        return None if value is None else _source(value, directory, name)
    if not isinstance(value, str):
        raise DataError(f"{name} is {_kind(value)}, not a path")
    if not value.strip():
        raise DataError(f"{name} is an empty path")
    if value.startswith(("data:", "http://", "https://")):
        return value
    if value.startswith("file://"):
        value = url2pathname(value.removeprefix("file://").removeprefix("localhost"))
    return str(directory.absolute() / os.path.expanduser(value))  # noqa: PTH111  Path's raises for unknown users


def _check_turns(messages: Sequence[dict[str, Any]], offset: int) -> None:
    """User and Assistant in turn, to the last answer, none of them empty; `offset` is the first one's number."""
    if not messages:
        raise DataError("the conversation has a system message only")
    for i, message in enumerate(messages):
        number, role = i + offset, message["role"]
        if role == "System":
            raise DataError(f"message {number} is the system's; that must be the first")
        if i == 0 and role == "Assistant":
            raise DataError(f"message {number} is the assistant's; a conversation begins with the user's")
        if i and role == messages[i - 1]["role"]:
            raise DataError(f"messages {number - 1} and {number} are both the {role.lower()}'s; they must alternate")
        if not message["content"].strip():
            raise DataError(f"message {number}, the {role.lower()}'s, is empty")
    if messages[-1]["role"] == "User":
        raise DataError("the last message is the user's; the answer to learn is missing")


def _place_row_images(messages: Sequence[dict[str, Any]], images: Sequence[Any], offset: int, tag: str) -> None:
    """Give the images that stand beside the messages to the messages' tags, in reading order."""
    if images:
        if any(source is not None for message in messages for source in message["images"]):
            raise DataError("there are images in the messages and beside them; give all in one place")
        check_tags("the conversation", sum(len(message["images"]) for message in messages), len(images), tag)
    remaining = iter(images)
    for number, message in enumerate(messages, offset):
        sources = message["images"]
        if not images:
            check_tags(f"message {number}", len(sources), len(sources) - sources.count(None), tag)
        message["images"] = _fill(sources, remaining)


def _types(value: Any, answers: int) -> tuple[str | None, ...]:
    """One question type per answer."""
    types = value if isinstance(value, list) else [None] * (answers - 1) + [value]
    if len(types) != answers:
        raise DataError(f'"type" has {len(types)} entries for {answers} answers')
    for item in types:
        if item is not None:
            _check_is_text('"type"', item)
    return tuple(types)


def check_tags(name: str, tags: int, images: int, tag: str) -> None:
    """
    Raises:
        DataError: unless what is called `name` has as many tags as images.
    """
    if tags == images:
        return
    advice = f"write {tag} where each image belongs" if tags < images else "give one image per tag"
    count = f"{tags} tag{'' if tags == 1 else 's'} {tag}" if tags else f"no {tag}"
    raise DataError(f"{name} has {count} and {images or 'no'} image{'' if images == 1 else 's'}; {advice}")


def _check_is_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise DataError(f"{name} is {_kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} has half a surrogate pair, {value[error.start]!r}, which is no character") from error


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null or missing"}
    return names.get(type(value), "a number")
