"""What the page's controls do."""

import collections
import contextlib
import functools
import html
import logging
import math
import threading
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from deepseek_vl.engine.chat import ChatSession
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.limits import PAGE_LIMITS
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import ImageLoadError, ImageTooLargeError
from deepseek_vl.imaging.square import Square
from deepseek_vl.imaging.worker import PictureClient, PictureDecoder
from deepseek_vl.models import VLChatProcessor
from deepseek_vl.serve.arguments import SAMPLING
from deepseek_vl.serve.web.conversation import Conversation, Turn, file_data
from deepseek_vl.serve.web.looked import words_of
from deepseek_vl.serve.web.marks import unmarked

logger = logging.getLogger(__name__)

SECONDS_PER_UPDATE = 0.05
ABANDON_SECONDS = 5.0
MOMENT = 4
"""Seconds that a message stays which is for a moment."""

BUSY = "An answer is still coming; press Stop first."
EMPTY = "Write a message, or add an image."

Shown = tuple[Any, ...]
"""What the page becomes: the conversation, the chat, what the browser keeps, the status and the message box."""

SAME: Shown = (gr.skip(),) * 5
SEND: dict[str, Any] = {"submit_btn": True, "stop_btn": False}
STOP: dict[str, Any] = {"submit_btn": False, "stop_btn": True}
"""The message box while an answer comes."""


@dataclass(frozen=True)
class Progress:
    """What there is to show while an answer comes.

    Attributes:
        turn: the newest, with the answer so far.
        note: about the answer, once it is over; None before.
    """

    turn: Turn
    note: str | None = None


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
    """What the page's controls do. Each returns or yields what the page is to become.

    Args:
        models: an engine and its processor, by the names that users choose from.
    """

    def __init__(self, models: Mapping[str, tuple[Engine, VLChatProcessor]]):
        self.models = models
        self.decoder = PictureDecoder(PAGE_LIMITS.pictures, PAGE_LIMITS.decoders)
        # By tab: the message that is not begun to be answered yet, and the answer that is coming.
        self._sent: dict[Any, Turn] = {}
        self._running: dict[Any, Run] = {}
        self._line: collections.deque[Run] = collections.deque()
        self._moved = threading.Condition()

    def send(self, request: gr.Request, message: dict[str, Any], conversation: Conversation | None) -> Shown:
        """Take a message from the box into the conversation, for `answer` to answer."""
        turn = Turn(message["text"].strip("\r\n"), tuple(message["files"]))
        tab = request.session_hash
        if tab in self._running or tab in self._sent:
            gr.Info(BUSY, MOMENT)
            return SAME
        if turn.is_empty:
            gr.Info(EMPTY, MOMENT)
            return SAME
        self._sent[tab] = turn
        before = (conversation or Conversation()).answered()
        return _shown(before.with_turns(*before.turns, turn), "", {**STOP, "value": None}, turn)

    def answer(self, request: gr.Request, conversation: Conversation | None, *controls: Any) -> Iterator[Shown]:
        """Answer the message that was sent. If there is no answer, it goes back into the box."""
        tab, turn = request.session_hash, self._sent.pop(request.session_hash, None)
        if turn is not None and conversation is not None:
            yield from self._run(request, conversation.answered(), turn, controls)
        elif conversation is not None and conversation.is_asked and tab not in self._running:  # it was stopped
            gr.Info("Stopped.", MOMENT)
            yield _shown(conversation.answered(), "", STOP, conversation.turns[-1])
        else:
            yield SAME

    def regenerate(self, request: gr.Request, conversation: Conversation | None, *controls: Any) -> Iterator[Shown]:
        """Answer the last message again. If that fails, the old answer stays."""
        if conversation is None or not conversation.turns:
            gr.Info("There is no answer yet to generate again.", MOMENT)
            yield SAME
            return
        *before, last = conversation.turns
        turn, instead = replace(last, answer="", error=""), conversation if last.answer else None
        yield from self._run(request, conversation.with_turns(*before), turn, controls, instead, last.answer != "")

    def edit(
        self, request: gr.Request, event: gr.EditData, conversation: Conversation, *controls: Any
    ) -> Iterator[Shown]:
        """Answer an edited message; it replaces the old one and all that followed."""
        number = conversation.turn_at(event.index)
        turn = Turn(unmarked(event.value).strip("\r\n"), conversation.turns[number].files)
        if turn.is_empty:
            gr.Info(EMPTY, MOMENT)
            yield _shown(conversation)
            return
        before = conversation.with_turns(*conversation.turns[:number]).answered()
        yield from self._run(request, before, turn, controls, conversation)

    def remove_last(self, request: gr.Request, conversation: Conversation | None) -> Shown:
        """Forget the last turn, even if its answer is still coming."""
        self._abandon(request.session_hash)
        conversation = conversation or Conversation()
        return _shown(conversation.with_turns(*conversation.turns[:-1]), "", SEND)

    def new_conversation(self, request: gr.Request) -> Shown:
        """Stop, and begin another conversation. What is in the message box stays: it may have been written since."""
        self._abandon(request.session_hash)
        return _shown(Conversation(), "", SEND)

    def open(self, request: gr.Request, record: Any, current: Conversation | None, box: dict[str, Any] | None) -> Shown:
        """Go on with a conversation that the browser has kept, or that comes from a file; see `Conversation.of`.

        After a reload it comes by itself, with `isRestored`; whoever has written meanwhile goes on with that. What is
        in the message box stays there.
        """
        tab = request.session_hash
        if record.get("isRestored") and (tab in self._sent or tab in self._running or (current and current.turns)):
            return SAME
        try:
            conversation, unsent = Conversation.of(record), Turn.of(record.get("unsent"))
        except ValueError as error:
            gr.Warning(html.escape(str(error)), 2 * MOMENT)
            return SAME
        self._abandon(tab)
        is_free = unsent is not None and not (box and (box["text"] or box["files"]))
        return _shown(conversation, "", {**SEND, "value": unsent.message} if is_free else SEND, unsent)

    def look(self, conversation: Conversation | None, *controls: Any) -> Any:
        """What `looked.js` shows of where the last answer looked; nothing if there is none about a picture."""
        answered = (conversation or Conversation()).answered()
        files = [file for turn in answered.turns for file in turn.files]
        if not files:
            gr.Info("There is no answer about a picture yet.", MOMENT)
            return gr.skip()
        session = self._session(self.decoder.client(), *controls)
        _go_on(session, answered)
        try:
            _check(answered.turns[-1], answered.turns)
            words = words_of(session.attribution())
        except (OSError, ValueError) as error:
            gr.Warning(html.escape(str(error)), 2 * MOMENT)
            return gr.skip()
        kept = files[-len(words[0]["maps"]) :]  # the oldest turns may have been left out
        side = math.isqrt(session.processor.num_image_tokens)
        return {"pictures": [file_data(file) for file in kept], "side": side, "words": words}

    def settle(self, request: gr.Request) -> Any:
        """The message box once an answer is over, or was refused: it can send again."""
        self._sent.pop(request.session_hash, None)
        return gr.skip() if request.session_hash in self._running else gr.update(**SEND)

    def stop(self, request: gr.Request) -> None:
        """Stop the answer that this tab waits for, begun or not. What has come of it stays."""
        self._sent.pop(request.session_hash, None)
        if run := self._running.get(request.session_hash):
            run.stop()

    def _abandon(self, tab: str | None) -> None:
        """End a tab's answer so that nothing more of it is shown."""
        self._sent.pop(tab, None)
        if tab is not None and (run := self._running.pop(tab, None)):
            run.stop()
            run.over.wait(ABANDON_SECONDS)

    def _run(
        self,
        request: gr.Request,
        before: Conversation,
        turn: Turn,
        controls: Sequence[Any],
        instead: Conversation | None = None,
        is_kept: bool = False,
    ) -> Iterator[Shown]:
        """Answer a turn.

        The browser makes what is yielded next of what was yielded before, in place, though it may not have shown that
        yet. Nothing may therefore be said once and be left out later: the box has its Stop as long as this goes on, and
        is cleared by `send` and made ready by `settle`.

        Args:
            before: what went before it.
            instead: what is shown if there is no answer; None for the turn with the reason.
            is_kept: whether the turn's message is in there. If not, it is for the message box then.
        """
        first = True
        for progress in self._answer(before, turn, controls, request.session_hash):
            if progress is None:
                break
            newest, is_over = progress.turn, progress.note is not None
            now = before.with_turns(*before.turns, newest)
            if newest.answer and not newest.error:
                yield _shown(now, progress.note, STOP)
            elif not is_over:
                yield _shown(now, "" if first else None, STOP, turn)
            else:
                stays = instead or (now if newest.error else before)
                status = html.escape(newest.error) if instead else ""
                yield _shown(stays, status, STOP, None if is_kept else turn)
            first = False
        # The server sends what was yielded last once more at the end, when its user may be editing already.
        yield SAME

    def _answer(self, before: Conversation, turn: Turn, controls: Sequence[Any], tab: Any) -> Iterator[Progress | None]:
        """Yield the turn as its answer grows; None if the tab waits for another one, or if this one was abandoned."""
        try:
            client = self.decoder.client()
            run = Run(self._session(client, *controls), client)
        except ValueError as error:
            yield Progress(replace(turn, error=str(error)), "")
            return
        if self._running.setdefault(tab, run) is not run:
            gr.Info(BUSY, MOMENT)
            yield None
            return
        last = Progress(turn)
        try:
            yield last
            shown_at = 0.0
            for last in self._grow(run, before, turn):
                if self._running.get(tab) is not run:
                    break
                if last.note is None and time.monotonic() - shown_at > SECONDS_PER_UPDATE:
                    shown_at = time.monotonic()
                    yield last
        finally:
            run.over.set()
            was_abandoned = self._running.get(tab) is not run or self._running.pop(tab, None) is None
        if not was_abandoned and run.stopped.is_set():
            gr.Info("Stopped.", MOMENT)
        yield None if was_abandoned else replace(last, note=last.note or "")

    def _grow(self, run: Run, before: Conversation, turn: Turn) -> Iterator[Progress]:
        """A turn with its answer so far, and at last with the whole answer, an error, or nothing if it was stopped."""
        session = run.session
        try:
            _check(turn, before.turns)
            _go_on(session, before)
            length, answer = len(session.messages), ""
            with contextlib.closing(self._pieces(run, turn)) as pieces:
                for piece in pieces:
                    if run.stopped.is_set():  # perhaps before the session could take notice
                        session.stop()
                    answer += piece
                    yield Progress(replace(turn, answer=answer.strip()))
            if len(session.messages) > length:
                yield Progress(replace(turn, answer=session.messages[-1]["content"]), _note(session))
            elif run.stopped.is_set():
                yield Progress(turn, "")
            else:
                yield Progress(replace(turn, error="The model gave no answer; ask in other words."), "")
        except (OSError, ValueError) as error:
            # Who stops while a picture is decoded has left it, which is the decoder's error and not the picture's.
            yield Progress(turn if run.stopped.is_set() else replace(turn, error=str(error)), "")
        except Exception:
            logger.exception("A generation failed.")
            yield Progress(replace(turn, error="The model failed on this message; the server's log says why."), "")

    def _pieces(self, run: Run, turn: Turn) -> Generator[str]:
        """An answer's text, piece by piece. Its pictures are prepared only when it is this answer's turn."""
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
        named: dict[str, Any] = dict(zip(SAMPLING, sampling, strict=True))
        settings = GenerationSettings(max_new_tokens=int(max_new_tokens), **named)
        engine, processor = self.models[model_name]
        opening = functools.partial(_open, client, processor.image_processor.square)
        return ChatSession(engine, processor, settings, int(max_history_tokens), opening)


def _go_on(session: ChatSession, conversation: Conversation) -> None:
    """Have a new session go on with a conversation."""
    session.messages = conversation.messages(session.processor.image_tag)
    if conversation.system is not None:
        session.system_prompt = conversation.system


def _check(turn: Turn, before: Sequence[Turn]) -> None:
    """
    Raises:
        ValueError: if a message has too many images, or one of its or an earlier message's is gone.
    """
    if len(turn.files) > PAGE_LIMITS.images:
        raise ValueError(f"The message has {len(turn.files)} images; at most {PAGE_LIMITS.images} are taken.")
    if not all(Path(file).is_file() for each in (*before, turn) for file in each.files):
        raise ValueError("An image of this conversation is not kept any more; begin a new one.")


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
    if session.answer is not None and session.answer.finish_reason == "length":
        notes.append(f"The answer was cut off after {session.answer.completion_tokens} tokens.")
    return " ".join(notes)


def _shown(
    conversation: Conversation,
    status: str | None = None,
    box: dict[str, Any] | None = None,
    unsent: Turn | None = None,
) -> Shown:
    """The page with a conversation.

    Args:
        status: None for as it is.
        box: what changes of the message box.
        unsent: a message for the box, if nothing else is in it by now.
    """
    record = conversation.record()
    if unsent is not None:
        record["unsent"] = unsent.message
    same = gr.skip()
    return (
        conversation,
        conversation.shown(),
        [record],  # in a list, which the browser does not make over into "as it is"; see `WebChat._run`
        same if status is None else status,
        same if box is None else gr.update(**box),
    )
