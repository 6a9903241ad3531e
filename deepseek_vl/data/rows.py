"""Reading conversations from files, in any of several common forms, as rows in the reference's form.

A JSON Lines file has one row per line, and a `.json` file is one list of rows; both may be compressed (gzip, bzip2,
xz). Parquet files are read too. Each row is in one of these forms, with image paths relative to the file:

    [{"role": "User", "content": "<image_placeholder>What?", "images": ["a.png"]}, {"role": "Assistant", ...}]
    {"messages": the same list}
    {"conversations": [{"from": "human", "value": "<image>\\nWhat?"}, {"from": "gpt", ...}], "image": "a.png"}
    {"messages": [{"role": "user", "content": "<image>What?"}, {"role": "assistant", ...}], "images": ["a.png"]}
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}},
                                               {"type": "text", "text": "What?"}]}, ...]}
    {"query": "<image>What?", "response": "It.", "history": [["A question", "Its answer"]], "images": ["a.png"]}
    {"instruction": "Translate.", "input": "Haus", "output": "House"}

Text is kept as it is, and parts are joined with nothing between them. Images that stand beside the messages are taken
in reading order. Where images stand in the messages, and in a bare list, `<image>` is ordinary text. An object may also
have a `"system"` text, and a `"type"`: the last question's, or a list with one per answer. An answer with `"weight": 0`
(or `"loss": false`) is not learnt. A row with another key that holds something, such as videos or tool calls, is a bad
row; `fields.NOTES` lists the keys that are ignored.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek_vl.data.decoding import data_files, decoded_rows
from deepseek_vl.data.errors import BadRow, DataError
from deepseek_vl.data.fields import ROW, check_all_is_read, check_is_text, check_needs_no_image, kind
from deepseek_vl.data.messages import check_tags, fill, has_images, read_message, read_sources
from deepseek_vl.utils.conversation import IMAGE_TAG

ROW_IMAGE_TAG = "<image>"
LISTS = ("conversations", "messages")
"""Keys under which a row has its messages."""
PAIRS = (("query", "response"), ("instruction", "output"), ("prompt", "completion"), ("question", "answer"))
"""Keys under which other rows have their last, or only, question and its answer: ms-swift's, Alpaca's and others'."""


@dataclass(frozen=True)
class TrainingRow:
    """One conversation to learn from, in the reference's form.

    Attributes:
        messages: `{"role", "content", "images"}`, User and Assistant in turn, from the first question to the last
            answer. A question's content has one image tag per entry of `images`: anything that `load_image` takes. An
            answer with `"weight": 0` is not learnt.
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


def read_rows(
    paths: str | os.PathLike | Iterable[str | os.PathLike], image_tag: str = IMAGE_TAG
) -> Iterator[TrainingRow | BadRow]:
    """The rows of files, in order, read but not yet checked against a processor.

    Raises:
        DataError: for a file that does not hold rows.
        OSError: if a file is missing or cannot be opened.
    """
    for path in data_files(paths):
        for origin, row in decoded_rows(path):
            try:
                yield row if isinstance(row, BadRow) else parse_row(row, path.parent, origin, image_tag)
            except DataError as error:
                yield BadRow(origin, str(error))


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
    row_images = read_sources(beside[0] if beside else None, directory, ROW)
    messages_hold_images = isinstance(row, list) or any(has_images(entry, are_beside=bool(beside)) for entry in entries)
    tag = image_tag if messages_hold_images and not row_images else ROW_IMAGE_TAG
    messages = [read_message(i, entry, directory, tag, image_tag) for i, entry in enumerate(entries, 1)]

    system = fields.get("system")
    if system is not None:
        check_is_text('"system"', system)
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
    if not any(message["images"] for message in messages[::2]):
        check_needs_no_image(fields, ("image", "images"))
    if not any(message.get("weight", 1) for message in messages[1::2]):
        raise DataError("there is nothing to learn: no answer has a weight")
    return TrainingRow(messages, system, _types(fields.get("type"), len(messages) // 2), origin)


def _open_row(row: Any) -> tuple[dict[str, Any], list[Any]]:
    """The row's fields, none for a bare list, and its messages, still undecoded."""
    if isinstance(row, list):
        if row and isinstance(row[0], dict) and row[0].keys() & set(LISTS):
            raise DataError("the line is a list of rows; give each row a line, or name the file .json")
        fields, entries = {}, row
    elif isinstance(row, dict):
        names = [name for name in LISTS if row.get(name) is not None]
        pair: Any = next((pair for pair in PAIRS if any(row.get(key) is not None for key in pair)), None)
        if len(names) > 1 or not (names or pair):
            keys = "" if names or not row else f", not under {', '.join(map(repr, row))}"
            raise DataError(
                f'the row has {"both" if names else "neither"} "conversations" {"and" if names else "nor"} '
                f'"messages"; give the messages under one of them{keys}'
            )
        read = names or (*pair, "input", "history")
        check_all_is_read(ROW, row, (*read, "image", "images", "system", "type"))
        fields, entries = row, row[names[0]] if names else _turns_of(row, *pair)
        if not isinstance(entries, list):
            raise DataError(f'"{names[0]}" is {kind(entries)}, not a list of messages')
    else:
        raise DataError(f"the row is {kind(row)}, not an object or a list of messages")
    if not entries:
        raise DataError("the conversation has no messages")
    return fields, entries


def _turns_of(row: Mapping[str, Any], asked: str, answered: str) -> list[dict[str, Any]]:
    """The messages of a row that has its last question and answer under two keys, and older pairs under "history"."""
    for key in (asked, answered):
        check_is_text(f'"{key}"', row.get(key))
    question = row[asked]
    if row.get("input") is not None:
        check_is_text('"input"', row["input"])
        question = "\n".join(filter(None, (question, row["input"])))  # as the form's authors join them
    history = row.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
        raise DataError('"history" is not a list of [question, answer] pairs')
    messages = []
    for turn in (*history, (question, row[answered])):
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]
    return messages


def _check_turns(messages: Sequence[dict[str, Any]], offset: int) -> None:
    """Check that User and Assistant alternate, up to an answer, none empty; `offset` is the first message's number."""
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
        message["images"] = fill(sources, remaining)


def _types(value: Any, answers: int) -> tuple[str | None, ...]:
    """One question type per answer."""
    types = value if isinstance(value, list) else [None] * (answers - 1) + [value]
    if len(types) != answers:
        raise DataError(f'"type" has {len(types)} entries for {answers} answers')
    for item in types:
        if item is not None:
            check_is_text('"type"', item)
    return tuple(types)
