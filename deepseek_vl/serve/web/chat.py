"""What the page's controls do."""

import contextlib
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
from deepseek_vl.engine.limits import SAFE_FORMATS, SAFE_IMAGES, SAFE_PIXELS
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import ImageLoadError, ImageTooLargeError, load_image
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
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


@dataclass(frozen=True)
class Progress:
    """What there is to show while an answer comes.

    Attributes:
        turn: the newest turn, with the answer so far.
        note: what the user should know; None for no change.
    """

    turn: Turn
    note: str | None = None

    @property
    def status(self) -> Any:
        """What the status line becomes."""
        return gr.skip() if self.note is None else self.note


@dataclass(frozen=True)
class Run:
    """An answer that is coming.

    Attributes:
        session: generates it.
        stopped: is set when it is to end.
        over: is set when nothing more of it will be shown.
    """

    session: ChatSession
    stopped: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)

    def stop(self) -> None:
        """End it within one token."""
        self.stopped.set()
        self.session.stop()


class WebChat:
    """What the page's controls do. Each returns or yields what its outputs are to become.

    Args:
        models: by the names that users choose from.
    """

    def __init__(self, models: Mapping[str, tuple[MultiModalityCausalLM, VLChatProcessor]]):
        self.models = models
        self._running: dict[str, Run] = {}

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
            box = message if progress.turn.error else None if first else gr.skip()
            now = [*kept, progress.turn]
            yield now, _shown(now), progress.status, box
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
            fails = bool(progress.turn.error and last.answer)
            now = [*before, last if fails else progress.turn]
            yield now, _shown(now), progress.turn.error if fails else progress.status
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
            run = Run(self._session(*controls))
        except ValueError as error:
            yield Progress(replace(turn, error=str(error)), "")
            return
        if self._running.setdefault(tab, run) is not run:
            yield None
            return
        last = Progress(turn, "")
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
            images = _open(turn.files)
            session.messages = _messages(session.processor, [turn for turn in turns if not turn.error])
            before, answer = len(session.messages), ""
            with contextlib.closing(session.ask(turn.text, images)) as pieces:
                for piece in pieces:
                    if run.stopped.is_set():  # perhaps before the session could take notice
                        session.stop()
                    answer += piece
                    yield Progress(replace(turn, answer=answer.strip()))
            if len(session.messages) == before:
                yield Progress(replace(turn, error="There was no answer."))
            else:
                yield Progress(replace(turn, answer=session.messages[-1]["content"]), _note(session))
        except (OSError, ValueError) as error:
            yield Progress(replace(turn, error=str(error)))
        except Exception:
            logger.exception("A generation failed.")
            yield Progress(replace(turn, error="The model failed on this message; the server's log says why."))

    def _session(
        self,
        model_name: str,
        top_p: float,
        temperature: float,
        repetition_penalty: float,
        max_new_tokens: int,
        max_history_tokens: int,
    ) -> ChatSession:
        """A new session, as the page's controls want it."""
        settings = GenerationSettings(int(max_new_tokens), temperature, top_p, repetition_penalty)
        return ChatSession(*self.models[model_name], settings, int(max_history_tokens))


def _messages(processor: VLChatProcessor, turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """Turns as a session's messages. Their images are opened as far as there is room for the turns."""
    user, assistant = processor.new_chat_template().roles
    messages: list[dict[str, Any]] = []
    for turn in turns:
        if not all(Path(file).is_file() for file in turn.files):
            raise ValueError("An image of this conversation is not kept any more; begin a new one.")
        content = with_image_tags(turn.text, len(turn.files), processor.image_tag)
        messages.append({"role": user, "content": content, "images": list(turn.files)})
        messages.append({"role": assistant, "content": turn.answer})
    return messages


def _open(files: Sequence[str]) -> list[Image.Image]:
    """The images that come with a message; errors name a file as the user knows it."""
    if len(files) > SAFE_IMAGES:
        raise ValueError(f"The message has {len(files)} images; at most {SAFE_IMAGES} are taken.")
    images = []
    for file in map(Path, files):
        try:
            images.append(load_image(file.read_bytes(), SAFE_FORMATS, SAFE_PIXELS))
        except ImageTooLargeError as error:
            raise ValueError(f"{file.name} has more than {SAFE_PIXELS} pixels.") from error
        except ImageLoadError as error:
            raise ValueError(
                f"{file.name} cannot be read: it must be a whole {', '.join(SAFE_FORMATS)} picture."
            ) from error
    return images


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
