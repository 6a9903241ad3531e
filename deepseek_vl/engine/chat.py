"""A user's chat session: the messages so far, and the next answer. The terminal and the page hold one per user."""

import bisect
import itertools
import json
import os
import threading
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from deepseek_vl.data.errors import BadRow
from deepseek_vl.data.files import whole_file
from deepseek_vl.data.rows import read_rows
from deepseek_vl.engine.attribution import TokenAttribution, attribute_answer
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.generation import AnswerStream
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import image_data_url, load_image
from deepseek_vl.models import VLChatProcessor
from deepseek_vl.utils.conversation import Rendered
from deepseek_vl.utils.io import load_pil_images


def with_image_tags(text: str, images: int, tag: str) -> str:
    """`text` with one tag per image: missing tags are put in front, each on a line of its own.

    Raises:
        ValueError: if it has more tags than images.
    """
    tags = text.count(tag)
    if tags > images:
        raise ValueError(f"The message has {tags} {tag} and {images} images; there must be one tag per image.")
    return f"{tag}\n" * (images - tags) + text


def _is_one_conversation(path: Path) -> bool:
    try:
        rows = list(itertools.islice(read_rows(path), 2))
    except ValueError:
        return False
    return len(rows) <= 1 and not any(isinstance(row, BadRow) for row in rows)


class ChatSession:
    """One user's conversation with a model.

    Special tokens that the user writes are plain text, except the image tag.

    Args:
        engine: generates the answers; may be shared by many sessions.
        processor: the model's.
        settings: how answers are generated; the conversation template's stop words are added.
        max_history_tokens: the oldest turns are left out of longer prompts; None for the model's own limit.
        open_image: opens the images of the messages, each time they are part of a prompt.

    Attributes:
        messages: `{"role", "content", "images"}`, user and assistant in turn; `images` holds what `open_image` takes.
        system_prompt: what the conversation begins with.
        dropped_turns: how many of the oldest turns the last question left out because there was no room for them.
        answer: the stream of the last answer, which says why it ended and can be stopped; None before the first.
    """

    def __init__(
        self,
        engine: Engine,
        processor: VLChatProcessor,
        settings: GenerationSettings,
        max_history_tokens: int | None = None,
        open_image: Callable[[Any], Image.Image] = load_image,
    ):
        self.engine = engine
        self.processor = processor
        self.settings = settings.with_stop_words(processor.new_chat_template().stop_str)
        self.max_history_tokens = max_history_tokens
        self.open_image = open_image
        self.system_prompt = processor.system_prompt
        self.messages: list[dict[str, Any]] = []
        self.dropped_turns = 0
        self.answer: AnswerStream | None = None
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End the current answer within one token, or when its prompt is prepared. May be called from any thread."""
        self._stopped.set()
        if self.answer is not None:
            self.answer.stop()

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages = []
        self.system_prompt = self.processor.system_prompt
        self.dropped_turns = 0
        self.answer = None

    def ask(self, text: str, images: Sequence[Any] = ()) -> Generator[str]:
        """Answer one more message; yields the answer piece by piece.

        An answer that is stopped half-way (by closing the iterator or by an interrupt) stays in the conversation as far
        as it got; a message that fails, or has no answer, leaves the conversation as it was.

        Args:
            text: the message, with an image tag where each image belongs; missing tags are put in front.
            images: what `open_image` takes, PIL images among others.

        Raises:
            ValueError: for more tags than images, a message too long for the model, or an image that cannot be opened.
        """
        tagged = with_image_tags(text, len(images), self.processor.image_tag)
        return self._answer(self.messages, {"content": tagged, "images": list(images)})

    def retry(self) -> Generator[str]:
        """Answer the last message again. The old answer stays until there is a new one.

        Raises:
            ValueError: if nothing was asked yet; and as `ask`.
        """
        if not self.messages:
            raise ValueError("There is no answer yet to try again.")
        return self._answer(self.messages[:-2], self.messages[-2])

    def undo(self) -> dict[str, Any]:
        """Forget the last message and its answer; returns that message.

        Raises:
            ValueError: if nothing was asked yet.
        """
        if not self.messages:
            raise ValueError("There is no message to take back.")
        question = self.messages[-2]
        self.messages = self.messages[:-2]
        return question

    def attribution(self) -> list[TokenAttribution]:
        """The attention that the last answer pays to the pictures, token by token; see `attribute_answer`.

        Raises:
            ValueError: if nothing was asked yet, there is no picture, or one cannot be opened.
        """
        if not self.messages:
            raise ValueError("There is no answer yet that could have looked at a picture.")
        *asked, answer = self.messages
        seen, _, _ = self._fit([*asked, {**answer, "content": ""}])
        opened = [{**message, "images": load_pil_images([message], self.open_image)} for message in seen[:-1]]
        return attribute_answer(
            self.engine.model, self.processor, [*opened, answer], self.system_prompt, untrusted=True
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the conversation as a row of training data, images included; `load` reads it back.

        Args:
            path: a `.json` or `.jsonl` file; an existing file is replaced only if it is a saved conversation.

        Raises:
            ValueError: for another kind of file, an existing file that is no saved conversation, or if there is
                nothing to save.
            OSError: if it cannot be written.
        """
        path = Path(os.path.expanduser(path))  # noqa: PTH111  Path's raises for unknown users
        if path.suffix.lower() not in (".json", ".jsonl"):
            raise ValueError(f"Conversations are saved as .json or .jsonl files, not as {path.name!r}.")
        if not self.messages:
            raise ValueError("There is no conversation yet to save.")
        messages = []
        for message in self.messages:
            saved = {key: message[key] for key in ("role", "content", "weight") if key in message}
            if message["role"] == "User":
                # In messages with a list of images, even an empty one, `<image>` is read as ordinary text.
                saved["images"] = [image_data_url(image) for image in load_pil_images([message], self.open_image)]
            messages.append(saved)
        row: dict[str, Any] = {"messages": messages}
        if self.system_prompt != self.processor.system_prompt:
            row["system"] = self.system_prompt
        data = (json.dumps([row] if path.suffix.lower() == ".json" else row, ensure_ascii=False) + "\n").encode("utf-8")
        if path.exists() and not _is_one_conversation(path):
            raise ValueError(f"{str(path)!r} is there, and is no saved conversation; give another name.")
        with whole_file(path) as part:
            part.write_bytes(data)

    def load(self, path: str | os.PathLike) -> None:
        """Replace this conversation by a saved one, or by any row of training data.

        Args:
            path: a file with one conversation, see `deepseek_vl.data.rows`.

        Raises:
            ValueError: if the file has no or several conversations, or an image cannot be read; this conversation then
                stays.
            OSError: if there is no such file.
        """
        rows = []
        for row in read_rows(path, self.processor.image_tag):
            if isinstance(row, BadRow):
                raise ValueError(str(row))
            rows.append(row)
        if len(rows) != 1:
            raise ValueError(f"{str(path)!r} has {len(rows)} conversations; a chat goes on with one.")
        (row,) = rows
        messages = [{**message, "images": load_pil_images([message])} for message in row.messages]
        self.reset()
        self.messages = messages
        if row.system is not None:
            self.system_prompt = row.system

    def _answer(self, history: list[dict[str, Any]], question: dict[str, Any]) -> Generator[str]:
        """Answer a question. The conversation becomes the history, the question and its answer."""
        self._stopped.clear()
        question = {**question, "role": "User"}
        answer = {"role": "Assistant", "content": ""}
        messages, prompt, ids = self._fit([*history, question, answer])
        self.engine.check_prompt(self.processor.count_tokens(prompt, ids))  # before any picture is opened
        inputs = self.processor(prompt=prompt, ids=ids, images=load_pil_images(messages, self.open_image))
        inputs = inputs.to("cpu", dtype=self.engine.model.dtype)  # the engine moves what it computes with
        pieces: list[str] = []
        failed = True
        try:
            with AnswerStream(self.engine, inputs, self.settings) as self.answer:
                if self._stopped.is_set():  # while the prompt was made
                    self.answer.stop()
                for piece in self.answer:
                    pieces.append(piece)
                    yield piece
            failed = False
        except (GeneratorExit, KeyboardInterrupt):
            failed = False
            raise
        finally:
            # The model can spell the image tag, which would ask for an image in the next prompt.
            content = "".join(pieces).replace(self.processor.image_tag, "").strip()
            if content and not failed:
                self.messages = [*history, question, {**answer, "content": content}]

    def _fit(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], Rendered, list[int]]:
        """Drop the oldest turns until there is room for an answer; a system message and the newest turn stay.

        Returns:
            The messages that are left, the prompt for them, and its ids.
        """
        positions = self.engine.positions
        room = positions - min(self.settings.max_new_tokens, positions // 2)
        if self.max_history_tokens is not None:
            room = min(room, self.max_history_tokens)
        first = int(messages[0]["role"].lower() == "system")

        def without(turns: int) -> tuple[list[dict[str, Any]], Rendered, list[int]]:
            left = messages[:first] + messages[first + 2 * turns :]
            prompt = self._render(left)
            return left, prompt, self.processor.encode(prompt)[0]

        def is_short(turns: int) -> bool:
            return self.processor.count_tokens(*without(turns)[1:]) <= room

        whole, most = without(0), (len(messages) - first) // 2 - 1
        self.dropped_turns = 0
        if most < 1 or self.processor.count_tokens(*whole[1:]) <= room:
            return whole
        # By halves, as there may be thousands of turns.
        self.dropped_turns = bisect.bisect_left(range(most), True, 1, key=is_short)
        return without(self.dropped_turns)

    def count_tokens(self, messages: Sequence[dict[str, Any]]) -> int:
        """The length of the prompt for `messages`, image features included."""
        return self.processor.count_tokens(self._render(messages))

    def _render(self, messages: Sequence[dict[str, Any]]) -> Rendered:
        """The prompt for `messages`."""
        return self.processor.render(messages, self.system_prompt, untrusted=True)
