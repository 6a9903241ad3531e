"""`POST /v1/completions`: texts that the model goes on with, without a conversation's template."""

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field

from deepseek_vl.serve.api.answer import Answer, Usage, WholeAnswer
from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.fields import MAX_ANSWERS, GenerationRequest, ResponseFormat, UnusedInCompletions
from deepseek_vl.serve.api.logprobs import Token, text_of
from deepseek_vl.serve.api.reply import CompletionEvents, StreamOptions
from deepseek_vl.serve.api.service import Question, Service
from deepseek_vl.utils.conversation import Rendered

MAX_TOKENS = 16
"""`max_tokens` of a request that does not give it, as in OpenAI's API."""

TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(fail_fast=True, min_length=1)]


def _as_prompts(prompt: Any) -> Any:
    is_one = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and isinstance(prompt[0], int))
    return [prompt] if is_one else prompt


Prompts = Annotated[
    list[str | TokenIds],
    Field(fail_fast=True, min_length=1, max_length=MAX_ANSWERS),
    BeforeValidator(
        _as_prompts,
        json_schema_input_type=str
        | TokenIds
        | Annotated[list[str | TokenIds], Field(min_length=1, max_length=MAX_ANSWERS)],
    ),
]


class CompletionRequest(GenerationRequest, UnusedInCompletions):
    """The body of `POST /v1/completions`: one text or several, or their tokens."""

    example = {"prompt": "A boat is"}
    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    response_format: ResponseFormat | None = None

    @property
    def count(self) -> int:
        """How many answers are asked for."""
        return len(self.prompt) * (self.n or 1)

    def questions(self, service: Service) -> list[Question]:
        """The questions that the request asks.

        Raises:
            APIError: for too many or too long prompts, and tokens that the model does not have.
        """
        count = self.n or 1
        if count * len(self.prompt) > MAX_ANSWERS:
            raise APIError(f"The prompts and n ask for more than {MAX_ANSWERS} answers.", "n")
        form = None if self.response_format is None else self.response_format.structured()
        settings = self.settings(service.settings, self.max_tokens or MAX_TOKENS, self.logprobs, form)
        questions = []
        for i, prompt in enumerate(self.prompt):
            field = "prompt" if len(self.prompt) == 1 else f"prompt.{i}"
            ids = text_ids(service, prompt, field) if isinstance(prompt, str) else prompt
            if not ids:
                raise APIError("The prompt is empty.", field)
            if max(ids) >= len(service.processor.tokenizer) or service.processor.image_id in ids:
                raise APIError("The prompt has a token that the model's tokenizer does not have for texts.", field)
            service.check_length(len(ids), field)
            text = prompt if isinstance(prompt, str) else ""
            questions.append(Question(text, ids, (), settings, field, count, goes_on=True))
        return questions


def text_ids(service: Service, text: str, field: str) -> list[int]:
    """A client's text as token ids, with the begin token in front; special tokens in it are ordinary text.

    Raises:
        APIError: naming the field, if it is too long to be tokenized.
    """
    service.check_text(text, field)
    return service.processor.encode(Rendered(text, literal=((0, len(text)),) if text else ()))[0]


class CompletionLogprobs(BaseModel):
    """An answer's tokens, and where in its text they begin."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """An answer."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: CompletionLogprobs | None = None


class Completion(BaseModel):
    """The body of whole answers."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class CompletionReply(CompletionEvents):
    """Answers, whole or as events."""

    PREFIX = "cmpl-"
    KIND = "text_completion"

    def __init__(self, service: Service, request: CompletionRequest):
        super().__init__(service.name, request.stream, request.stream_options)

    def whole(self, answers: Sequence[WholeAnswer], usage: Usage) -> dict[str, Any]:
        """The body of all answers."""
        choices = [
            CompletionChoice(
                index=i,
                text=answer.text,
                finish_reason=answer.finish_reason,  # ty: ignore[invalid-argument-type]  one of these, once whole
                logprobs=None if answer.logprobs is None else _logprobs(answer.logprobs, 0),
            )
            for i, answer in enumerate(answers)
        ]
        return Completion(**self.head, choices=choices, usage=usage).model_dump()

    async def choices(self, answer: Answer) -> AsyncIterator[dict[str, Any]]:
        lengths = [0] * len(answer.generations)
        async for piece in answer.pieces():
            logprobs = None
            if piece.logprobs is not None:
                logprobs = _logprobs(piece.logprobs, lengths[piece.index]).model_dump()
            lengths[piece.index] += len(piece.text)
            yield {
                "index": piece.index,
                "text": piece.text,
                "finish_reason": piece.finish_reason,
                "logprobs": logprobs,
            }


def _logprobs(tokens: Sequence[Token], start: int) -> CompletionLogprobs:
    texts = [text_of(token) for token in tokens]
    return CompletionLogprobs(
        tokens=texts,
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=[{text_of(other): other.logprob for other in token.likeliest} for token in tokens],
        text_offset=[start + sum(map(len, texts[:i])) for i in range(len(texts))],
    )
