"""The requests of `POST /v1/responses`: OpenAI's newer API, without what a server would have to remember."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model

from deepseek_vl.engine.settings import GenerationSettings, StructuredOutput
from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.fields import (
    MAX_LOGPROBS,
    GenerationRequest,
    JSONObjectFormat,
    NamedSchema,
    No,
    Strict,
    TextFormat,
    Unused,
    optional,
)
from deepseek_vl.serve.api.messages import ImageURL, Labelled, LabelledMessage, Turn, conversation_of
from deepseek_vl.serve.api.service import Question, Service


class InputText(Labelled):
    """A piece of text: of a message, or of an earlier response."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputImage(Labelled):
    """An image; `detail` makes no difference to this model."""

    type: Literal["input_image"]
    image_url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


InputPart = Annotated[InputText | InputImage, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


InputParts = Annotated[
    list[InputPart], Field(fail_fast=True), BeforeValidator(_as_parts, json_schema_input_type=str | list[InputPart])
]


class InputMessage(LabelledMessage):
    """A message, or an item of an earlier response's output."""

    role: Literal["user", "assistant", "system", "developer"]
    content: InputParts


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Items = Annotated[list[InputMessage], Field(fail_fast=True, min_length=1)]


class JSONSchemaTextFormat(NamedSchema):
    """An answer that is JSON of a schema."""

    type: Literal["json_schema"]

    def structured(self) -> StructuredOutput:
        """The form as the engine takes it."""
        return StructuredOutput(json_schema=self.schema_ or {})


class TextOptions(Strict):
    """The form of the answer."""

    format: Annotated[TextFormat | JSONObjectFormat | JSONSchemaTextFormat, Field(discriminator="type")] | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Strict):
    """How the model is to reason, which this model does not."""

    effort: Literal["none", "medium"] | None = None
    summary: Literal["auto"] | None = None


class ResponseStreamOptions(Strict):
    """Options of a stream; they change nothing."""

    include_obfuscation: bool | None = None


UnusedInResponses = create_model(
    "UnusedInResponses",
    __base__=Unused,
    **optional(
        background=No,
        truncation=Literal["disabled"],
        max_tool_calls=int,
        reasoning=Reasoning,
        stream_options=ResponseStreamOptions,
    ),
)
"""Fields of responses that change nothing."""


class ResponseRequest(GenerationRequest, UnusedInResponses):
    """The body of `POST /v1/responses`."""

    example = {"input": "What is a boat?"}
    input: Annotated[Items, BeforeValidator(_as_items, json_schema_input_type=str | Items)]
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    text: TextOptions | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=1)] | None = None

    @property
    def count(self) -> int:
        """How many answers are asked for."""
        return 1

    def questions(self, service: Service) -> list[Question]:
        """The question that the request asks.

        Raises:
            APIError: for messages that are no conversation or too long, or fields that do not go together.
        """
        turns = [] if self.instructions is None else [Turn("system", [self.instructions], "instructions")]
        for i, message in enumerate(self.input):
            content = [
                part.text if isinstance(part, InputText) else ImageURL(url=part.image_url) for part in message.content
            ]
            if message.role != "user" and not all(isinstance(part, str) for part in content):
                raise APIError("Only messages of the user may have images.", f"input.{i}.content")
            turns.append(Turn(message.role, content, f"input.{i}"))
        return [service.question(conversation_of(turns), self.settings_from(service.settings), 1, "input")]

    def settings_from(self, defaults: GenerationSettings) -> GenerationSettings:
        """The generation settings: the request's, and for what it leaves out the server's.

        Raises:
            APIError: for several forms of one answer.
        """
        text_format = None if self.text is None else self.text.format
        form = None if text_format is None else text_format.structured()
        asked = self.top_logprobs is not None or bool(self.include)
        return self.settings(defaults, self.max_output_tokens, (self.top_logprobs or 0) if asked else None, form)
