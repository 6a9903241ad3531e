"""The requests of OpenAI's chat completions API that this server takes. Anything else is refused by its name."""

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from deepseek_vl.engine.limits import RequestLimits
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.arguments import SAMPLING

MAX_STOP_WORDS = 4
"""As in OpenAI's API."""


class _Strict(BaseModel):
    # Without `strict` the text "5" would be the number 5, and true be 1.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageURL(_Strict):
    """Where an image is: a data URL or, if the server allows it, an address."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Strict):
    """An image. `detail` makes no difference to this model."""

    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Parts = Annotated[
    list[Part], Field(fail_fast=True), BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])
]
TextParts = Annotated[
    list[TextPart], Field(fail_fast=True), BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart])
]


class SystemMessage(_Strict):
    """Takes the place of the system prompt; only as the first message."""

    role: Literal["system", "developer"]
    content: TextParts
    name: str | None = None


class UserMessage(_Strict):
    """What the user says and shows."""

    role: Literal["user"]
    content: Parts
    name: str | None = None


class AssistantMessage(_Strict):
    """What the model has answered before."""

    role: Literal["assistant"]
    content: TextParts
    refusal: None = None
    name: str | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(_Strict):
    """How a stream ends."""

    include_usage: bool = False


def _as_words(stop: Any) -> Any:
    return [] if stop is None else [stop] if isinstance(stop, str) else stop


Word = Annotated[str, Field(min_length=1)]
Words = Annotated[list[Word], Field(fail_fast=True, max_length=MAX_STOP_WORDS)]


class ChatCompletionRequest(_Strict):
    """The body of `POST /v1/chat/completions`, without the sampling parameters."""

    model: str
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[Words, BeforeValidator(_as_words, json_schema_input_type=Word | Words | None)] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    # What changes nothing is taken at the value that changes nothing.
    n: Annotated[int, Field(ge=1, le=1)] | None = 1  # a `Literal` would take true as well
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = 0
    logprobs: Literal[False] | None = False
    user: str | None = None

    def settings(self, defaults: GenerationSettings, stop_words: Sequence[str]) -> GenerationSettings:
        """How to generate: as the request says, and by default as the server was told to.

        Args:
            defaults: where the request does not say.
            stop_words: the conversation template's, beside the request's.

        Raises:
            APIError: if both names of the token limit are given, and differ.
        """
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise APIError("max_tokens and max_completion_tokens differ; give one of them.", "max_completion_tokens")

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        return GenerationSettings(
            max_new_tokens=given(next(iter(limits), None), defaults.max_new_tokens),
            stop=(*self.stop, *stop_words),
            seed=self.seed,
            **{name: given(getattr(self, name), getattr(defaults, name)) for name in SAMPLING},
        )


_SampledRequest = create_model(
    "ChatCompletionRequest",
    __base__=ChatCompletionRequest,
    **{name: (Annotated[p.type, Field(**p.bounds)] | None, None) for name, p in SAMPLING.items()},
)


class CachedTokens(BaseModel):
    """Tokens of a prompt that an earlier answer had left."""

    cached_tokens: int


class Usage(BaseModel):
    """How many tokens a request took."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The one answer."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(BaseModel):
    """The body of a whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Model(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["deepseek_vl"] = "deepseek_vl"


class ModelList(BaseModel):
    """The body of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """The body of `GET /health`."""

    status: Literal["ok"] = "ok"


_TOKEN = re.compile(
    rb"""
    (?P<separator> [\s,:]++ )
    | (?P<open> [\[{] )
    | (?P<close> [\]}] )
    | (?P<string> "(?:[^"\\]++|\\.)*+"? )
    | (?P<other> [^\s"\[\]{},:]++ )
    """,
    re.VERBOSE | re.DOTALL,
)


def request_schema(model: str, ref_template: str) -> dict[str, Any]:
    """The JSON schema of a request's body, with its parts' under `$defs`.

    Args:
        model: the name of the one that is served.
        ref_template: where the parts will be found.
    """
    schema = _SampledRequest.model_json_schema(ref_template=ref_template)
    schema["properties"]["model"]["const"] = model
    return schema


def parse(body: bytes | bytearray, limits: RequestLimits | None = None) -> ChatCompletionRequest:
    """A request from its body. It takes long for large ones, so call it in a thread; others get their turn meanwhile.

    Args:
        limits: those of JSON; None for the defaults.

    Raises:
        APIError: naming the first field that is wrong; or if it is no JSON, or too much of it.
    """
    _check_shape(body, limits or RequestLimits())
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
        if b"\\u" in body:  # only so can a lone surrogate be written, which is no text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise APIError("The body is not JSON in UTF-8.") from error
    try:
        return _SampledRequest.model_validate(value)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
    # Behind an index stands the discriminator's tag ("user", "text"), which is no field of the request.
    loc = problem["loc"]
    path = [str(item) for i, item in enumerate(loc) if i == 0 or isinstance(item, int) or isinstance(loc[i - 1], str)]
    field = _cut(".".join(path)) or None
    if problem["type"] == "extra_forbidden":
        raise APIError(f"Unsupported parameter {field!r}.", field, "unsupported_parameter")
    where = f"{field!r}: " if field else "The request: "
    what = problem["msg"]
    if problem["type"] == "union_tag_invalid":  # whose message repeats the tag, however long
        what = f"{problem['ctx']['discriminator']} should be one of {problem['ctx']['expected_tags']}"
    raise APIError(f"{where}{what}.", field, "invalid_value")


def _check_shape(body: bytes | bytearray, limits: RequestLimits) -> None:
    """Refuse what would take long to decode or to validate, before either.

    Raises:
        APIError: for too many values, too deep, or too long numbers.
    """
    if body.count(b"\\") > limits.json_escapes:
        raise APIError(f"The body has more than {limits.json_escapes} backslashes; send its characters as they are.")
    values = depth = 0
    for token in _TOKEN.finditer(body):
        match token.lastgroup:
            case "separator":
                continue
            case "close":
                depth -= 1
                if depth < 0:
                    raise APIError("The body is not JSON in UTF-8.")
                continue
            case "open":
                depth += 1
            case "other" if token.end() - token.start() > limits.json_digits:
                raise APIError(f"The body is not JSON, or has a number of more than {limits.json_digits} digits.")
        values += 1
        if depth > limits.json_depth:
            raise APIError(f"The body is nested deeper than {limits.json_depth} levels.")
        if values > limits.json_values:
            message = f"The body has more than {limits.json_values} names and values; send fewer messages."
            raise APIError(message, code="too_many_values")


def _cut(name: str) -> str:
    """A name that a client chose, short enough for an answer."""
    return name if len(name) <= 64 else f"{name[:64]}…"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
