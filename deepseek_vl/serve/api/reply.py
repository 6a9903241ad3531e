"""What the answers to chats and to completions have in common."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from typing import Any, ClassVar

from deepseek_vl.serve.api.answer import Answer
from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.events import DONE, event, new_head
from deepseek_vl.serve.api.fields import No, Strict


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: No | None = None


class CompletionEvents(ABC):
    """Base class of a chat's or a completion's answers as events; subclasses make the choices in them.

    Args:
        model: the name that clients know.
        stream: whether the client asks for events.

    Attributes:
        PREFIX: of an answer's id.
        KIND: the `object` of an event.
        head: the fields that every answer and event begins with.
    """

    PREFIX: ClassVar[str]
    KIND: ClassVar[str]

    def __init__(self, model: str, stream: bool | None, options: StreamOptions | None):
        self.streams = bool(stream)
        self.head = new_head(self.PREFIX, model)
        self._with_usage = options is not None and bool(options.include_usage)

    @abstractmethod
    def choices(self, answer: Answer) -> AsyncIterator[dict[str, Any]]:
        """The answers piece by piece: each event's one choice."""

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        """The answers as server-sent events: the pieces, the usage if it is asked for, and `[DONE]`."""
        head = {**self.head, "object": self.KIND}
        try:
            async for choice in self.choices(answer):
                yield event({**head, "choices": [choice], **({"usage": None} if self._with_usage else {})})
        except APIError as error:  # the status has been sent
            yield event(error.body())
            return
        if self._with_usage:
            yield event({**head, "choices": [], "usage": answer.usage().model_dump()})
        yield DONE
