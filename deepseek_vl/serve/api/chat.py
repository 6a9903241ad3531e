"""`POST /v1/chat/completions`: its requests and answers."""

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, create_model

from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.serve.api.answer import Answer, Usage, WholeAnswer
from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.fields import (
    MAX_ANSWERS,
    MAX_LOGPROBS,
    GenerationRequest,
    No,
    ResponseFormat,
    UnusedInCompletions,
    limit_of,
    optional,
)
from deepseek_vl.serve.api.logprobs import ChatLogprobs, ChatToken
from deepseek_vl.serve.api.messages import Messages, conversation_of, turns_of
from deepseek_vl.serve.api.reply import CompletionEvents, StreamOptions
from deepseek_vl.serve.api.service import Question, Service

UnusedInChats = create_model(
    "UnusedInChats",
    __base__=UnusedInCompletions,
    **optional(
        modalities=Annotated[list[Literal["text"]], Field(max_length=1)],
        reasoning_effort=Literal["none", "medium"],
        verbosity=Literal["medium"],
        function_call=Literal["none", "auto"],
        add_special_tokens=No,
        include_reasoning=bool,
    ),
)
"""Fields of chats that change nothing."""


class ChatCompletionRequest(GenerationRequest, UnusedInChats):
    """The body of `POST /v1/chat/completions`."""

    example = {"messages": [{"role": "user", "content": "What is a boat?"}]}
    messages: Messages
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def settings(self, defaults: GenerationSettings) -> GenerationSettings:
        """The generation settings: the request's, and for what it leaves out the server's.

        Raises:
            APIError: for fields that do not go together.
        """
        if self.top_logprobs and not self.logprobs:
            raise APIError("top_logprobs needs logprobs to be true.", "top_logprobs")
        max_tokens = limit_of(("max_tokens", "max_completion_tokens"), self.max_tokens, self.max_completion_tokens)
        form = None if self.response_format is None else self.response_format.structured()
        return super().settings(defaults, max_tokens, (self.top_logprobs or 0) if self.logprobs else None, form)

    @property
    def count(self) -> int:
        """How many answers are asked for."""
        return self.n or 1

    def questions(self, service: Service) -> list[Question]:
        """The question that the request asks.

        Raises:
            APIError: for messages that are no conversation or too long, or fields that do not go together.
        """
        goes_on = bool(self.continue_final_message)
        check_prompt_fields(self.add_generation_prompt, goes_on)
        settings = self.settings(service.settings)
        return [service.question(conversation_of(turns_of(self.messages), goes_on), settings, self.count, "messages")]


def check_prompt_fields(add_generation_prompt: bool | None, goes_on: bool) -> None:
    """Check vLLM's two fields for how a prompt ends.

    Raises:
        APIError: if they do not go together.
    """
    if goes_on and add_generation_prompt:
        message = "continue_final_message and add_generation_prompt cannot both be true."
        raise APIError(message, "add_generation_prompt")
    if add_generation_prompt is False and not goes_on:
        message = "add_generation_prompt can be false only where continue_final_message is true."
        raise APIError(message, "add_generation_prompt")


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """An answer."""

    index: int
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: ChatLogprobs | None = None


class ChatCompletion(BaseModel):
    """The body of a whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class ChatReply(CompletionEvents):
    """A chat's answers, whole or as events."""

    PREFIX = "chatcmpl-"
    KIND = "chat.completion.chunk"

    def __init__(self, service: Service, request: ChatCompletionRequest):
        super().__init__(service.name, request.stream, request.stream_options)

    def whole(self, answers: Sequence[WholeAnswer], usage: Usage) -> dict[str, Any]:
        """The body of all answers."""
        choices = [
            Choice(
                index=i,
                message=AnswerMessage(content=answer.text),
                finish_reason=answer.finish_reason,  # ty: ignore[invalid-argument-type]  one of these, once whole
                logprobs=None if answer.logprobs is None else ChatLogprobs.of(answer.logprobs),
            )
            for i, answer in enumerate(answers)
        ]
        return ChatCompletion(**self.head, choices=choices, usage=usage).model_dump()

    async def choices(self, answer: Answer) -> AsyncIterator[dict[str, Any]]:
        def choice(index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None) -> Any:
            if logprobs is not None:
                logprobs = {"content": [ChatToken.of(token).model_dump() for token in logprobs], "refusal": None}
            return {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}

        for index in range(len(answer.generations)):
            yield choice(index, {"role": "assistant", "content": ""})
        async for piece in answer.pieces():
            if piece.text or piece.logprobs:
                yield choice(piece.index, {"content": piece.text}, piece.logprobs)
            if piece.finish_reason is not None:
                yield choice(piece.index, {}, finish_reason=piece.finish_reason)
