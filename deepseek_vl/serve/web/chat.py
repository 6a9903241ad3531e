"""What the page's controls do."""

import collections
import contextlib
import functools
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from deepseek_vl.engine.chat import ChatSession, with_image_tags
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.limits import PAGE_LIMITS
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import ImageLoadError, ImageTooLargeError
from deepseek_vl.imaging.square import Square
from deepseek_vl.imaging.worker import PictureClient, PictureDecoder
from deepseek_vl.models import VLChatProcessor
from deepseek_vl.serve.arguments import SAMPLING
from deepseek_vl.serve.markdown import safe_markdown

logger = logging.getLogger(__name__)

SECONDS_PER_UPDATE = 0.05
ABANDON_SECONDS = 5.0
BUSY = "An answer is still coming; press Stop first."


@dataclass(frozen=True)
class Turn:
    """One exchange.

    Attributes:
        text: the user's message, as it was typed.
        files: the paths of its images.
        answer: so far.
        error: why there is no answer. The turn is shown, but the model does not see it.
    """

    text: str
    files: tuple[str, ...] = ()
    answer: str = ""
    error: str = ""


Progress = tuple[Turn, Any]
"""What there is to show while an answer comes: the newest turn with the answer so far, and what the status becomes."""


@dataclass(frozen=True)
class Run:
    """An answer that is coming.

    Attributes:
        session: generates it.
        client: has its pictures decoded.
        stopped: is set when it is to end.
        over: is set when nothing more of it will be shown.
    """

    session: ChatSession
    client: PictureClient
    stopped: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """End it within one token."""
        self.stopped.set()
        self.session.stop()
        self.client.leave()


class WebChat:
    """What the page's controls do. Each returns or yields what its outputs are to become.

    Args:
        models: an engine and its processor, by the names that users choose from.
    """

    def __init__(self, models: Mapping[str, tuple[Engine, VLChatProcessor]]):
        self.models = models
        self.decoder = PictureDecoder(PAGE_LIMITS.pictures, PAGE_LIMITS.decoders)
        self._running: dict[str, Run] = {}
        self._line: collections.deque[Run] = collections.deque()
        self._moved = threading.Condition()

    def send(
        self, request: gr.Request, message: dict[str, Any], turns: list[Turn] | None, *controls: Any
    ) -> Iterator[tuple]:
        """Answer a message: yields (turns, chat, status, input). One that fails is in the input again."""
        kept = [turn for turn in turns or () if not turn.error]
        turn = Turn(message["text"].strip(), tuple(message["files"]))
        if not turn.text and not turn.files:
            yield gr.skip(), gr.skip(), "Write a message, or add an image.", gr.skip()
            return
        first = True
        for progress in self._answer(kept, turn, controls, request.session_hash):
            if not progress:
                yield gr.skip(), gr.skip(), BUSY if first else gr.skip(), gr.skip()
                return
            turn, status = progress
            now = [*kept, turn]
            yield now, _shown(now), status, message if turn.error else None if first else gr.skip()
            first = False

    def regenerate(self, request: gr.Request, turns: list[Turn] | None, *controls: Any) -> Iterator[tuple]:
        """Another answer to the last message: yields (turns, chat, status). One that fails leaves the old one."""
        if not turns:
            yield gr.skip(), gr.skip(), "There is no answer yet to generate again."
            return
        *before, last = turns
        first = True
        for progress in self._answer(before, replace(last, answer="", error=""), controls, request.session_hash):
            if not progress:
                yield gr.skip(), gr.skip(), BUSY if first else gr.skip()
                return
            turn, status = progress
            fails = bool(turn.error and last.answer)
            now = [*before, last if fails else turn]
            yield now, _shown(now), turn.error if fails else status
            first = False

    def remove_last(self, request: gr.Request, turns: list[Turn] | None) -> tuple:
        """Forget the last turn, even if its answer is still coming: (turns, chat, status)."""
        self._abandon(request.session_hash)
        turns = (turns or [])[:-1]
        return turns, _shown(turns), ""

    def new_conversation(self, request: gr.Request) -> tuple:
        """Stop, and forget everything: (turns, chat, status, input)."""
        self._abandon(request.session_hash)
        return [], [], "", None

    def stop(self, request: gr.Request) -> None:
        """End the answer that this tab waits for. It stays as far as it got."""
        if run := self._running.get(request.session_hash):
            run.stop()

    def _abandon(self, tab: str) -> None:
        """End a tab's answer so that nothing more of it is shown."""
        if run := self._running.pop(tab, None):
            run.stop()
            run.over.wait(ABANDON_SECONDS)

    def _answer(
        self, turns: Sequence[Turn], turn: Turn, controls: Sequence[Any], tab: str
    ) -> Iterator[Progress | None]:
        """A turn, as its answer grows. None, once, if the tab waits for another, or, at last, if it was abandoned.

        (The server sends what was yielded last once more at the end. If that is an abandoned answer, it must change
        nothing.)
        """
        try:
            client = self.decoder.client()
            run = Run(self._session(client, *controls), client)
        except ValueError as error:
            yield replace(turn, error=str(error)), ""
            return
        if self._running.setdefault(tab, run) is not run:
            yield None
            return
        last: Progress = turn, ""
        try:
            yield last
            shown_at = 0.0
            for last in self._grow(run, turns, turn):
                if self._running.get(tab) is not run:
                    break
                if time.monotonic() - shown_at > SECONDS_PER_UPDATE:
                    shown_at = time.monotonic()
                    yield last
        finally:
            run.over.set()
            was_abandoned = self._running.get(tab) is not run or self._running.pop(tab, None) is None
        yield None if was_abandoned else last

    def _grow(self, run: Run, turns: Sequence[Turn], turn: Turn) -> Iterator[Progress]:
        """A turn with its answer so far, and at last with the whole answer or an error."""
        session = run.session
        try:
            seen = [turn for turn in turns if not turn.error]
            _check(turn, seen)
            session.messages = _messages(session.processor, seen)
            before, answer = len(session.messages), ""
            with contextlib.closing(self._pieces(run, turn)) as pieces:
                for piece in pieces:
                    if run.stopped.is_set():  # perhaps before the session could take notice
                        session.stop()
                    answer += piece
                    yield replace(turn, answer=answer.strip()), gr.skip()
            if len(session.messages) == before:
                yield replace(turn, error="There was no answer."), gr.skip()
            else:
                yield replace(turn, answer=session.messages[-1]["content"]), _note(session)
        except (OSError, ValueError) as error:
            # Who stops while a picture is decoded has left it, which is the decoder's error and not the picture's.
            yield replace(turn, error="There was no answer." if run.stopped.is_set() else str(error)), gr.skip()
        except Exception:
            logger.exception("A generation failed.")
            yield replace(turn, error="The model failed on this message; the server's log says why."), gr.skip()

    def _pieces(self, run: Run, turn: Turn) -> Iterator[str]:
        """An answer's text, piece by piece. Its pixels are there when it is its turn, and not before."""
        with contextlib.closing(run.session.ask(turn.text, turn.files)) as pieces:
            with self._turn_to_prepare(run):
                first = "" if run.stopped.is_set() else next(pieces, "")
            if first:
                yield first
                yield from pieces

    @contextlib.contextmanager
    def _turn_to_prepare(self, run: Run) -> Iterator[None]:
        """Wait in line until few others prepare their prompts, or until the answer is stopped."""
        with self._moved:
            self._line.append(run)
            while self._line.index(run) >= PAGE_LIMITS.prepared and not run.stopped.is_set():
                self._moved.wait(0.1)  # who is stopped notifies nobody
        try:
            yield
        finally:
            with self._moved:
                self._line.remove(run)
                self._moved.notify_all()

    def _session(self, client: PictureClient, model_name: str, *values: float) -> ChatSession:
        """A new session, as the page's controls want it."""
        *sampling, max_new_tokens, max_history_tokens = values
        named = dict(zip(SAMPLING, sampling, strict=True))
        settings = GenerationSettings(max_new_tokens=int(max_new_tokens), **named)
        engine, processor = self.models[model_name]
        opening = functools.partial(_open, client, processor.image_processor.square)
        return ChatSession(engine, processor, settings, int(max_history_tokens), opening)


def _check(turn: Turn, before: Sequence[Turn]) -> None:
    """
    Raises:
        ValueError: if a message has too many images, or one of its or an earlier message's is gone.
    """
    if len(turn.files) > PAGE_LIMITS.images:
        raise ValueError(f"The message has {len(turn.files)} images; at most {PAGE_LIMITS.images} are taken.")
    if not all(Path(file).is_file() for each in (*before, turn) for file in each.files):
        raise ValueError("An image of this conversation is not kept any more; begin a new one.")


def _messages(processor: VLChatProcessor, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as a session's messages."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        content = with_image_tags(turn.text, len(turn.files), processor.image_tag)
        messages.append({"role": "User", "content": content, "images": list(turn.files)})
        messages.append({"role": "Assistant", "content": turn.answer})
    return messages


def _open(client: PictureClient, square: Square, path: str) -> Image.Image:
    """An image of a message; errors name its file as the user knows it."""
    limits, file = PAGE_LIMITS.pictures, Path(path)
    try:
        return client.decode(file.read_bytes(), square)
    except ImageTooLargeError as error:
        raise ValueError(f"{file.name} has more than {limits.pixels} pixels, or too long a side.") from error
    except ImageLoadError as error:
        kinds = ", ".join(limits.formats)
        raise ValueError(f"{file.name} cannot be read: it must be a whole {kinds} picture.") from error


def _note(session: ChatSession) -> str:
    """What is to be said about an answer."""
    notes = []
    if session.dropped_turns:
        notes.append(f"The oldest {session.dropped_turns} turn(s) are too long to be kept in mind and were left out.")
    if session.answer.finish_reason == "length":
        notes.append(f"The answer was cut off after {session.answer.completion_tokens} tokens.")
    elif session.answer.finish_reason == "cancelled":
        notes.append("Stopped.")
    return " ".join(notes)


def _shown(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as the chat component takes them."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        messages += [{"role": "user", "content": {"path": file}} for file in turn.files]
        if turn.text:
            messages.append({"role": "user", "content": safe_markdown(turn.text)})
        if turn.answer:
            messages.append({"role": "assistant", "content": safe_markdown(turn.answer)})
        if turn.error:
            messages.append({"role": "assistant", "content": f"**Error:** {safe_markdown(turn.error)}"})
    return messages
