"""Training data: files of conversations -> checked rows.

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
import logging
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import url2pathname

from torch.utils.data import Dataset

from deepseek_vl.utils.io import ImageLoadError, load_image

if TYPE_CHECKING:
    from deepseek_vl.models import VLChatProcessor

logger = logging.getLogger(__name__)

IMAGE_TAG = "<image_placeholder>"
ROW_IMAGE_TAG = "<image>"
ROLES = {"user": "User", "human": "User", "assistant": "Assistant", "gpt": "Assistant", "system": "System"}
LISTED = 20
"""How many bad rows an error lists."""


class DataError(ValueError):
    """Data that cannot be trained on. The message says what is wrong and what to do."""


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


@dataclass(frozen=True)
class DataReport:
    """What a check found.

    Attributes:
        rows: the good rows, in order.
        bad: the bad rows, in order.
        lengths: the number of tokens of each good row, with the images' positions.
    """

    rows: list[TrainingRow] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @property
    def images(self) -> int:
        """The number of images in the good rows."""
        return sum(len(row.images) for row in self.rows)

    @property
    def answers(self) -> int:
        """The number of answers in the good rows."""
        return sum(len(row.types) for row in self.rows)

    def summary(self) -> str:
        """One line of numbers."""
        text = f"{len(self.rows)} good rows, {len(self.bad)} bad; {self.answers} answers, {self.images} images"
        if not self.lengths:
            return text
        shortest, median, longest = min(self.lengths), statistics.median_low(self.lengths), max(self.lengths)
        return f"{text}; tokens per row: shortest {shortest}, median {median}, longest {longest}"


class ConversationDataset(Dataset[TrainingRow]):
    """Rows as a map-style data set; item i is row i."""

    def __init__(self, rows: Sequence[TrainingRow]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TrainingRow:
        return self.rows[index]


# Files


def load_data(
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    processor: "VLChatProcessor",
    max_length: int | None = None,
    skip_bad: bool = False,
    truncate: bool = False,
) -> tuple[list[TrainingRow], list[BadRow]]:
    """Read and check every row, before training.

    Args:
        paths: one file, or several.
        processor: renders and counts tokens.
        max_length: most tokens in a row; None for any number.
        skip_bad: log a warning about bad rows, and go on without them.
        truncate: longer rows are good as long as an answer begins within `max_length`.

    Returns:
        The good rows and the bad ones; the latter are none unless `skip_bad`.

    Raises:
        DataError: listing the bad rows, for a file that cannot be read as rows, or if there is no good row.
        OSError: if a file is missing or cannot be opened.
    """
    report = check_data(paths, processor, max_length, truncate)
    if report.bad and not (skip_bad and report.rows):
        raise DataError(_list_bad(report))
    if not report.rows:
        raise DataError(f"There are no rows in {', '.join(str(path) for path in _files(paths)) or 'no files'}.")
    if report.bad:
        total = len(report.rows) + len(report.bad)
        logger.warning("Left out %d bad rows of %d, such as %s", len(report.bad), total, report.bad[0])
    end = processor.tokenizer.eos_token
    if not render(report.rows[0], processor).endswith(end):
        logger.warning(
            "The template %r ends answers without %s: when to stop is not learnt.", processor.sft_format, end
        )
    return report.rows, report.bad


def _list_bad(report: DataReport) -> str:
    """The text of the error about bad rows."""
    total = len(report.rows) + len(report.bad)
    lines = [f"{len(report.bad)} of {total} rows cannot be trained on:", *(f"  {bad}" for bad in report.bad[:LISTED])]
    advice = "Correct them"
    if len(report.bad) > LISTED:
        lines.append(f"  and {len(report.bad) - LISTED} more")
        advice += " (--check lists all)"
    advice += ", or train without them: --skip-bad." if report.rows else "; no row is left to train on."
    return "\n".join([*lines, advice])


def check_data(
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    processor: "VLChatProcessor",
    max_length: int | None = None,
    truncate: bool = False,
) -> DataReport:
    """Read and check every row; bad rows are no error here. Each image file is opened once, several at a time.

    The arguments are those of `load_data`.

    Raises:
        DataError: for a file that cannot be read as rows.
        OSError: if a file is missing or cannot be opened.
    """
    check_tokenizer(processor)
    read = list(read_rows(paths, processor.image_tag))
    sources = list(dict.fromkeys(source for row in read if isinstance(row, TrainingRow) for source in row.images))
    if sources:
        logger.info("Checking %d images.", len(sources))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        problems = dict(zip(sources, pool.map(_image_problem, sources), strict=True))

    report = DataReport()
    for row in read:
        if isinstance(row, BadRow):
            report.bad.append(row)
            continue
        try:
            length = _check_row(row, processor, max_length, truncate, problems.__getitem__)
        except DataError as error:
            report.bad.append(BadRow(row.origin, str(error)))
        else:
            report.rows.append(row)
            report.lengths.append(length)
    return report


def read_rows(
    paths: str | os.PathLike | Iterable[str | os.PathLike], image_tag: str = IMAGE_TAG
) -> Iterator[TrainingRow | BadRow]:
    """The rows of files, in order, read but not yet checked against a processor; blank lines are passed over.

    Raises:
        DataError: for a file that is not UTF-8, or a `.json` file that is not a list.
        OSError: if a file is missing or cannot be opened.
    """
    for path in _files(paths):
        rows = _json_rows(path) if path.suffix.lower() == ".json" else _jsonl_rows(path)
        for origin, row in rows:
            try:
                yield row if isinstance(row, BadRow) else parse_row(row, path.parent, origin, image_tag)
            except DataError as error:
                yield BadRow(origin, str(error))


def _files(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Path]:
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


def check_tokenizer(processor: "VLChatProcessor") -> None:
    """
    Raises:
        DataError: if the tokenizer cannot tell where in the text its tokens are.
    """
    if not processor.tokenizer.is_fast:
        raise DataError("Training needs a tokenizer with a tokenizer.json (a fast one), to find the answers' tokens.")


def check_row(row: TrainingRow, processor: "VLChatProcessor", max_length: int | None = None) -> int:
    """Check one row against a processor: every image opens, each has its tag, and the row is not too long.

    Returns:
        Its number of tokens, with the images' positions.

    Raises:
        DataError: with the reason.
    """
    return _check_row(row, processor, max_length, False, _image_problem)


def _image_problem(source: Any) -> str | None:
    """Why an image cannot be used, None if it can. The whole file is decoded, so that truncation shows."""
    try:
        load_image(source)
    except ImageLoadError as error:
        return str(error)
    return None


def _check_row(
    row: TrainingRow,
    processor: "VLChatProcessor",
    max_length: int | None,
    truncate: bool,
    image_problem: Callable[[Any], str | None],
) -> int:
    """`check_row`, with what it asks about each image."""
    tag = processor.image_tag
    added = set(processor.tokenizer.all_special_tokens) - {tag}
    for number, message in enumerate(row.messages, 1):
        _match(f"message {number}", message["content"].count(tag), len(message.get("images") or ()), tag)
        if held := [token for token in added if token in message["content"]]:
            raise DataError(f"message {number} holds the special token {held[0]}; the template adds it, so remove it")
    if held := [token for token in added if token in (row.system or "")]:
        raise DataError(f"the system text holds the special token {held[0]}; the template adds it, so remove it")
    if tag in (row.system or ""):
        raise DataError(f"the system text holds {tag}; images belong in the user's messages")
    for source in row.images:
        if problem := image_problem(source):
            raise DataError(problem)
    length = _length(row, processor)
    if max_length is not None and length > max_length:
        if not truncate:
            raise DataError(f"too long: {length} tokens, --max_length is {max_length}")
        unanswered = replace(row, messages=[row.messages[0], {**row.messages[1], "content": ""}])
        if (asked := _length(unanswered, processor)) >= max_length:
            raise DataError(f"too long: the first answer begins after {asked} tokens, --max_length is {max_length}")
    return length


def _length(row: TrainingRow, processor: "VLChatProcessor") -> int:
    """The number of tokens, with the images' positions."""
    ids = processor.tokenizer.encode(render(row, processor), verbose=False)
    images = sum(len(message.get("images") or ()) for message in row.messages)
    return len(ids) + images * (processor.num_image_tokens + int(processor.add_special_token) - 1)


def render(row: TrainingRow, processor: "VLChatProcessor") -> str:
    """The whole conversation as the processor's prompt, with the row's system text if it has one."""
    return processor.apply_sft_template_for_multi_turn_prompts(
        row.messages,
        sft_format=processor.sft_format,
        system_prompt=processor.system_prompt if row.system is None else row.system,
    )


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
    row_images = _row_images(fields, directory)
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


def _row_images(fields: dict[str, Any], directory: Path) -> list[Any]:
    """The sources of the images that stand beside the messages."""
    if fields.get("image") is not None and fields.get("images") is not None:
        raise DataError('the row has both "image" and "images"; give its images under one of them')
    value = fields["image"] if fields.get("image") is not None else fields.get("images")
    return _sources(value, directory, "the row")


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

    content, images = entry.get(text_key), []
    if isinstance(content, list):
        texts = []
        for part in content:
            text, sources = _read_part(name, part, directory, tag, image_tag)
            texts.append(text)
            images += sources
        content = "".join(texts)
    else:
        _check_is_text(f'"{text_key}" of {name}', content)
        content = content.replace(tag, image_tag)
        images = [None] * content.count(image_tag)

    own = _sources(entry.get("images"), directory, name)
    if role != "User" and (images or own):
        raise DataError(f"{name} is the {role.lower()}'s and holds an image; images belong in the user's messages")
    if own:
        _match(name, images.count(None), len(own), tag)
        remaining = iter(own)
        images = [next(remaining) if source is None else source for source in images]
    return {"role": role, "content": content, "images": images}


def _read_part(name: str, part: Any, directory: Path, tag: str, image_tag: str) -> tuple[str, list[Any]]:
    """The text of one part of an OpenAI message, and its images, None for each that has no source of its own."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "input_text", "output_text"):
        _check_is_text(f'"text" of a part of {name}', part.get("text"))
        text = part["text"].replace(tag, image_tag)
        return text, [None] * text.count(image_tag)
    if kind in ("image", "image_url", "input_image"):
        return image_tag, [_source(part, directory, f"the image of {name}")]
    raise DataError(f"{name} has a part of type {kind!r}; it must be text, image or image_url")


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
        _match("the conversation", sum(len(message["images"]) for message in messages), len(images), tag)
    remaining = iter(images)
    for number, message in enumerate(messages, offset):
        sources = message["images"]
        if not images:
            _match(f"message {number}", len(sources), len(sources) - sources.count(None), tag)
        message["images"] = [next(remaining) if source is None else source for source in sources]


def _types(value: Any, answers: int) -> tuple[str | None, ...]:
    """One question type per answer."""
    types = value if isinstance(value, list) else [None] * (answers - 1) + [value]
    if len(types) != answers:
        raise DataError(f'"type" has {len(types)} entries for {answers} answers')
    for item in types:
        if item is not None:
            _check_is_text('"type"', item)
    return tuple(types)


def _match(name: str, tags: int, images: int, tag: str) -> None:
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
