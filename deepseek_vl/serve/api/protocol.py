"""The requests of OpenAI's chat completions API that this server takes. Anything else is refused by its name."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

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


Parts = Annotated[list[Part], BeforeValidator(_as_parts)]
TextParts = Annotated[list[TextPart], BeforeValidator(_as_parts)]


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


class ChatCompletionRequest(_Strict):
    """The body of `POST /v1/chat/completions`, without the sampling parameters."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]], BeforeValidator(_as_words), Field(max_length=MAX_STOP_WORDS)
    ] = []
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    # What changes nothing is taken at the value that changes nothing.
    n: Literal[1] | None = 1
    frequency_penalty: Literal[0] | None = 0
    presence_penalty: Literal[0] | None = 0
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


def parse(body: Any) -> ChatCompletionRequest:
    """A request from decoded JSON.

    Raises:
        APIError: naming the first field that is wrong.
    """
    try:
        return _SampledRequest.model_validate(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # Behind an index stands the discriminator's tag ("user", "text"), which is no field of the request.
    loc = problem["loc"]
    path = [str(item) for i, item in enumerate(loc) if i == 0 or isinstance(item, int) or isinstance(loc[i - 1], str)]
    field = ".".join(path) or None
    if problem["type"] == "extra_forbidden":
        raise APIError(f"Unsupported parameter {field!r}.", field, "unsupported_parameter")
    where = f"{field!r}: " if field else "The request: "
    raise APIError(f"{where}{problem['msg']}.", field, "invalid_value")
