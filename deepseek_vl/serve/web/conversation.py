"""A conversation of the page: its turns, and its forms for the chat component and for the browser's memory."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gradio import FileData
from gradio.utils import get_upload_folder, is_in_or_equal
from gradio_client.utils import get_mimetype

from deepseek_vl.data.rows import DataError, parse_row
from deepseek_vl.engine.chat import with_image_tags
from deepseek_vl.serve.web.marks import marked
from deepseek_vl.utils.conversation import IMAGE_TAG


@dataclass(frozen=True)
class Turn:
    """A user's message and its answer.

    Attributes:
        text: the user's message, as it was typed.
        files: the paths of its images.
        answer: as much of it as there is yet.
        error: why there is no answer. The turn is shown, but the model does not see it.
    """

    text: str
    files: tuple[str, ...] = ()
    answer: str = ""
    error: str = ""

    @property
    def is_empty(self) -> bool:
        """Whether nothing is asked."""
        return not self.text.strip() and not self.files

    @property
    def message(self) -> dict[str, Any]:
        """What the user wrote, as the message box takes it from the browser."""
        return {"text": self.text, "files": [file_data(path) for path in self.files]}

    @classmethod
    def of(cls, message: Mapping[str, Any] | None) -> "Turn | None":
        """The turn that begins with a message which the browser has kept.

        Raises:
            ValueError: if it names a picture that was not uploaded.
        """
        if not message:
            return None
        return cls(str(message["text"]), _uploaded([file["path"] for file in message["files"]]))

    def shown(self) -> list[dict[str, Any]]:
        """The turn as messages of the chat component: one per picture, then the text, the answer and the error."""
        messages = [_said("user", {"path": path, "alt_text": Path(path).name}) for path in self.files]
        if self.text:
            messages.append(_said("user", _text(marked(self.text))))
        if self.answer:
            messages.append(_said("assistant", _text(marked(self.answer))))
        if self.error:
            messages.append(_said("assistant", _text(f"**Error:** {marked(self.error)}")))
        return messages


@dataclass(frozen=True)
class Conversation:
    """A conversation: its turns, oldest first.

    Attributes:
        system: replaces the model's system prompt; None for that.
        id: by which the browser keeps it.
    """

    turns: tuple[Turn, ...] = ()
    system: str | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def with_turns(self, *turns: Turn) -> "Conversation":
        """The same conversation with other turns."""
        return replace(self, turns=turns)

    @property
    def is_asked(self) -> bool:
        """Whether the last turn waits for its answer."""
        return bool(self.turns) and not self.turns[-1].answer and not self.turns[-1].error

    def answered(self) -> "Conversation":
        """The same conversation without the turns that have no answer."""
        return self.with_turns(*(turn for turn in self.turns if turn.answer and not turn.error))

    def messages(self, image_tag: str = IMAGE_TAG) -> list[dict[str, Any]]:
        """The answered turns as a `ChatSession`'s messages; `images` holds paths."""
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            if turn.answer and not turn.error:
                content = with_image_tags(turn.text, len(turn.files), image_tag)
                messages.append({"role": "User", "content": content, "images": list(turn.files)})
                messages.append({"role": "Assistant", "content": turn.answer})
        return messages

    def shown(self) -> list[dict[str, Any]]:
        """The conversation as messages of the chat component."""
        return [message for turn in self.turns for message in turn.shown()]

    def turn_at(self, index: Any) -> int:
        """The number of the turn that the chat component's message `index` belongs to.

        Raises:
            IndexError: if there is none.
        """
        numbers = [number for number, turn in enumerate(self.turns) for _ in turn.shown()]
        return numbers[index]

    def record(self) -> dict[str, Any]:
        """What the browser keeps: a row of training data, as `ChatSession.save` writes it, and the `id`.

        Its images are files of the server, which the browser fetches.
        """
        record: dict[str, Any] = {"id": self.id, "messages": self.messages()}
        for message in record["messages"][::2]:
            message["images"] = [file_data(path) for path in message["images"]]
        if self.system is not None:
            record["system"] = self.system
        return record

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> "Conversation":
        """The conversation that a browser has kept, or one in a file: a row of training data, or a list of one.

        Args:
            record: `{"row", "id"}`, with Gradio's uploaded files in place of pictures. Without an `id` the
                conversation is a new one; with an `id` and no row, it has no turns.

        Raises:
            ValueError: if it is no conversation, or names a picture that was not uploaded.
        """
        known: dict[str, Any] = {"id": str(record["id"])} if record.get("id") else {}
        row = record.get("row")
        if known and not row:
            return cls(**known)
        if row is None:
            raise ValueError("This is no saved conversation: it is not JSON.")
        if isinstance(row, list) and row and not (isinstance(row[0], Mapping) and {"role", "from"} & row[0].keys()):
            if len(row) != 1:
                raise ValueError(f"The file has {len(row)} conversations; a chat goes on with one.")
            row = row[0]
        try:
            parsed = parse_row(_with_paths(row), Path("/"), "")
        except DataError as error:
            raise ValueError(f"This is no saved conversation: {error}.") from error
        questions, answers = parsed.messages[::2], parsed.messages[1::2]
        turns = (
            Turn(_untagged(question), _uploaded(question["images"]), answer["content"])
            for question, answer in zip(questions, answers, strict=True)
        )
        return cls(tuple(turns), parsed.system, **known)


def _said(role: str, content: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": content}


def _text(text: str) -> dict[str, str]:
    """A text component that keeps white space, which Gradio changes in a plain string."""
    return {"type": "text", "text": text}


def file_data(path: str) -> dict[str, Any]:
    """A file of the server, as Gradio sends it to a browser."""
    return FileData(path=path, orig_name=Path(path).name, mime_type=get_mimetype(path)).model_dump()


def _with_paths(value: Any) -> Any:
    """A row with files' paths in place of Gradio's descriptions of the files."""
    if isinstance(value, list):
        return [_with_paths(item) for item in value]
    if isinstance(value, dict):
        is_file = value.get("meta") == {"_type": "gradio.FileData"}
        return value.get("path") if is_file else {key: _with_paths(item) for key, item in value.items()}
    return value


def _untagged(question: Mapping[str, Any]) -> str:
    """A question without the tags that `with_image_tags` puts in front."""
    text = question["content"]
    for _ in question["images"]:
        text = text.removeprefix(f"{IMAGE_TAG}\n")
    return text


def _uploaded(images: Sequence[Any]) -> tuple[str, ...]:
    """The paths of images, all of which are among Gradio's uploaded files."""
    folder = get_upload_folder()
    for image in images:
        if not isinstance(image, str) or not is_in_or_equal(image, folder) or not Path(image).is_file():
            raise ValueError("Its pictures must be in the file itself, as data URLs.")
    return tuple(images)
