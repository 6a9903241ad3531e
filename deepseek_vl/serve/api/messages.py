"""Messages of the chat completions API, and the conversation that the processor renders from them."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, create_model

from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.fields import Labels, Strict, optional

LABELS = optional(id=str, name=str, cache_control=Labels, metadata=Labels, prompt_cache_breakpoint=Labels)
Labelled = create_model("Labelled", __base__=Strict, **LABELS)
"""Fields in which a client labels a message, a part or a picture; they change nothing."""

LabelledMessage = create_model(
    "LabelledMessage",
    __base__=Labelled,
    **optional(type=Literal["message"], status=str, phase=str, created_at=float, timestamp=float | str),
)


class TextPart(Labelled):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageURL(Labelled):
    """Where an image is: a data URL or, if the server allows it, an address."""

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None
    format: str | None = None


def _as_image_url(url: Any) -> Any:
    return {"url": url} if isinstance(url, str) else url


class ImagePart(Labelled):
    """An image. `detail` makes no difference to this model.

    Attributes:
        image_url: where it is; also the address alone, as some clients send it.
    """

    type: Literal["image_url"]
    image_url: Annotated[ImageURL, BeforeValidator(_as_image_url, json_schema_input_type=str | ImageURL)]
    uuid: str | None = None


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Parts = Annotated[
    list[Part], Field(fail_fast=True), BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])
]
TextParts = Annotated[
    list[TextPart], Field(fail_fast=True), BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart])
]


class SystemMessage(LabelledMessage):
    """Replaces the system prompt; it must stand before all messages of other roles."""

    role: Literal["system", "developer"]
    content: TextParts


class UserMessage(LabelledMessage):
    """What the user says and shows."""

    role: Literal["user"]
    content: Parts


class AssistantMessage(LabelledMessage):
    """What the model has answered before."""

    role: Literal["assistant"]
    content: TextParts = []


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(fail_fast=True, min_length=1)]


class Turn(NamedTuple):
    """A message, in the form that all APIs share.

    Attributes:
        role: system, developer, user or assistant.
        content: its parts in order: texts, and images.
        field: where it stands in the request.
    """

    role: str
    content: Sequence[str | ImageURL]
    field: str


class Conversation(NamedTuple):
    """A conversation that can be rendered.

    Attributes:
        messages: as `render` takes them, user and assistant in turn behind an optional system message.
        urls: where its images are, in order.
        unfinished: the last message's text if the answer is to go on with it; else None.
    """

    messages: list[dict[str, Any]]
    urls: list[str]
    unfinished: str | None


def turns_of(messages: Sequence[SystemMessage | UserMessage | AssistantMessage]) -> list[Turn]:
    """A chat's messages as turns."""
    return [
        Turn(
            message.role,
            [part.image_url if isinstance(part, ImagePart) else part.text for part in message.content],
            f"messages.{i}",
        )
        for i, message in enumerate(messages)
    ]


def conversation_of(turns: Sequence[Turn], goes_on: bool = False, answers: bool = True) -> Conversation:
    """Turns as one conversation: several of one role in a row become one message, and empty answers are left out.

    Args:
        goes_on: whether the answer goes on with the last message, which must be the assistant's.
        answers: whether an answer follows.

    Raises:
        APIError: if they are no conversation.
    """
    messages: list[dict[str, Any]] = []
    for turn in turns:
        role = "system" if turn.role == "developer" else turn.role
        texts = [part for part in turn.content if isinstance(part, str)]
        is_empty = len(texts) == len(turn.content) and not "".join(texts).strip()
        if is_empty and role == "user":
            raise APIError("A user message is empty.", turn.field)
        if role == "system" and any(message["role"] != "system" for message in messages):
            if is_empty:
                continue
            reason = "the model's template has a place for system messages at the beginning only"
            raise APIError(f"A system message stands behind another message, but {reason}.", f"{turn.field}.role")
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in turn.content
        ]
        if is_empty and role == "assistant":
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += [{"type": "text", "text": "\n"}, *parts]
        else:
            messages.append({"role": role, "content": parts})
    field = turns[0].field.partition(".")[0] if turns else None
    last = messages[-1]["role"] if messages else None
    is_last = bool(turns) and turns[-1].role == "assistant"
    if goes_on and not is_last:
        raise APIError("continue_final_message needs a message of the assistant at the end.", "continue_final_message")
    urls = [part.url for turn in turns for part in turn.content if not isinstance(part, str)]
    if goes_on and last == "assistant" and "".join(turns[-1].content).strip():
        return Conversation(messages, urls, turns[-1].content[-1])
    if last not in ("user", "assistant"):
        raise APIError("The conversation has no message of the user.", field)
    if answers:
        if last == "assistant":
            message = "The conversation ends with a message of the assistant; continue_final_message has it continued."
            raise APIError(message, field)
        messages.append({"role": "assistant", "content": ""})
    return Conversation(messages, urls, None)
