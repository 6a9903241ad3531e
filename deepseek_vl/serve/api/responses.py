"""The answers of `POST /v1/responses`."""

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

from pydantic import BaseModel

from deepseek_vl.serve.api.answer import Answer, CachedTokens, Usage, WholeAnswer
from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.events import event, new_head
from deepseek_vl.serve.api.logprobs import ChatToken, Token
from deepseek_vl.serve.api.responses_request import ResponseRequest
from deepseek_vl.serve.api.service import Service

Status = Literal["in_progress", "completed", "incomplete"]


class OutputText(BaseModel):
    """What the model says."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = []
    logprobs: list[ChatToken] = []


class OutputMessage(BaseModel):
    """The answer."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    status: Status
    content: list[OutputText]


class InputTokens(CachedTokens):
    """How many tokens of the prompt were reused."""

    cache_write_tokens: Literal[0] = 0


class OutputTokens(BaseModel):
    """How many tokens of the answer are not shown."""

    reasoning_tokens: Literal[0] = 0


class ResponseUsage(BaseModel):
    """How many tokens a request took."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens = OutputTokens()
    total_tokens: int


class Incomplete(BaseModel):
    """Why an answer does not end by itself."""

    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseError(BaseModel):
    """Why there is no whole answer."""

    code: Literal["server_error"] = "server_error"
    message: str


class Response(BaseModel):
    """The body of an answer. Nothing of it is stored."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: ResponseError | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    model: str
    output: list[OutputMessage] = []
    parallel_tool_calls: bool = False
    previous_response_id: None = None
    reasoning: None = None
    store: Literal[False] = False
    background: Literal[False] = False
    temperature: float
    top_p: float
    text: dict[str, Any]
    tool_choice: Literal["none"] = "none"
    tools: list[Any] = []
    top_logprobs: int | None = None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, Any] | None = None


_REPEATED = (
    "instructions", "max_output_tokens", "metadata", "prompt_cache_key", "safety_identifier", "top_logprobs", "user"
)  # fmt: skip
"""Fields of the request that the answer repeats."""


class ResponseReply:
    """An answer, whole or as events."""

    def __init__(self, service: Service, request: ResponseRequest):
        self.streams = bool(request.stream)
        head = new_head("resp_", service.name)
        self._item = head["id"].replace("resp_", "msg_", 1)
        text_format = {"type": "text"}
        if request.text is not None and request.text.format is not None:
            text_format = request.text.format.model_dump(by_alias=True, exclude_none=True)
        settings = request.settings_from(service.settings)
        self._response = Response(
            created_at=head.pop("created"),
            **head,
            **{name: getattr(request, name) for name in _REPEATED},
            status="in_progress",
            temperature=settings.temperature if request.temperature is None else request.temperature,
            top_p=settings.top_p if request.top_p is None else request.top_p,
            text={"format": text_format},
        )

    def whole(self, answers: Sequence[WholeAnswer], usage: Usage) -> dict[str, Any]:
        """The body of the answer."""
        (answer,) = answers
        return self._ended(answer, usage).model_dump()

    def _message(self, text: str, logprobs: Sequence[Token] | None, status: Status) -> OutputMessage:
        tokens = [ChatToken.of(token) for token in logprobs or ()]
        return OutputMessage(id=self._item, status=status, content=[OutputText(text=text, logprobs=tokens)])

    def _ended(self, answer: WholeAnswer, usage: Usage) -> Response:
        is_whole = answer.finish_reason == "stop"
        status: Status = "completed" if is_whole else "incomplete"
        counts = ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputTokens(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            total_tokens=usage.total_tokens,
        )
        return self._response.model_copy(
            update={
                "status": status,
                "completed_at": int(time.time()) if is_whole else None,
                "incomplete_details": None if is_whole else Incomplete(),
                "output": [self._message(answer.text, answer.logprobs, status)],
                "usage": counts,
            }
        )

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        """The answer, piece by piece, each event with its number."""
        count = 0

        def named(kind: str, **fields: Any) -> bytes:
            nonlocal count
            count += 1
            return event({"type": f"response.{kind}", "sequence_number": count - 1, **fields}, f"response.{kind}")

        place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        said: list[Token] = []
        so_far = WholeAnswer(logprobs=said)
        try:
            for kind in ("created", "in_progress"):
                yield named(kind, response=self._response.model_dump())
            item = OutputMessage(id=self._item, status="in_progress", content=[])
            yield named("output_item.added", output_index=0, item=item.model_dump())
            yield named("content_part.added", **place, part=OutputText(text="").model_dump())
            async for piece in answer.pieces():
                if piece.text or piece.logprobs:
                    tokens = [ChatToken.of(token).model_dump() for token in piece.logprobs or ()]
                    yield named("output_text.delta", **place, delta=piece.text, logprobs=tokens)
                so_far.text += piece.text
                so_far.finish_reason = piece.finish_reason or ""
                said += piece.logprobs or ()
        except APIError as error:  # the status has been sent
            failed = {"status": "failed", "error": ResponseError(message=str(error))}
            yield named("failed", response=self._response.model_copy(update=failed).model_dump())
            return
        ended = self._ended(so_far, answer.usage())
        message = ended.output[0].model_dump()
        (part,) = message["content"]
        yield named("output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
        yield named("content_part.done", **place, part=part)
        yield named("output_item.done", output_index=0, item=message)
        yield named(ended.status, response=ended.model_dump())
