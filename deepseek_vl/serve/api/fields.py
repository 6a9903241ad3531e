"""What all requests share: how strictly they are read, and the fields that say how an answer is generated.

A field that is not known is refused by its name, unless its value says nothing: null, or an empty text, list or object.
An optional field with such a value counts as not given.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from deepseek_vl.engine.limits import RequestLimits
from deepseek_vl.engine.settings import GenerationSettings, StructuredOutput
from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.arguments import SAMPLING

MAX_ANSWERS = RequestLimits.answers
MAX_STOP_WORDS = 4
"""The most stop words of a request, as in OpenAI's API."""

MAX_LOGPROBS = 20
"""The most tokens that are listed in place of one, as in OpenAI's API."""

NOTHING = [None, "", [], {}]
"""Values that say nothing: an optional field with one of them counts as not given."""


def _describe(schema: dict[str, Any], model: type["Strict"]) -> None:
    """Extend a model's JSON schema by what `Strict` accepts."""
    nothing = {"enum": NOTHING}
    schema["additionalProperties"] = nothing
    for name, field in schema.get("properties", {}).items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [field, nothing]}


class Strict(BaseModel):
    """An object of a request.

    Attributes:
        example: of a request's body, what `/openapi.json` shows of it beside the model's name.
    """

    example: ClassVar[dict[str, Any]] = {}
    # Without `strict` the text "5" would be the number 5, and true be 1.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, json_schema_extra=_describe)

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        needed = {field.alias or name for name, field in cls.model_fields.items() if field.is_required()}
        return {name: value for name, value in data.items() if name in needed or not _is_nothing(value)}


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def optional(**types: Any) -> dict[str, Any]:
    """Fields for `pydantic.create_model` that need not be given."""
    return {name: (kind | None, None) for name, kind in types.items()}


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):  # a `Literal` would take 0 and 1 as well
        raise PydanticCustomError("bool_type", "Input should be a valid boolean")
    return value


Labels = dict[str, Any]
No = Annotated[Literal[False], BeforeValidator(_boolean)]
Yes = Annotated[Literal[True], BeforeValidator(_boolean)]


def _only(kind: Any, number: int) -> Any:
    """The type of a field that takes one number. (A `Literal` of it would take a boolean as well.)"""

    def check(value: Any) -> Any:
        if isinstance(value, int | float) and not isinstance(value, bool) and value != number:
            raise PydanticCustomError("unsupported", "This server takes only {number} here", {"number": number})
        return value

    return Annotated[kind, Field(ge=number, le=number), BeforeValidator(check)]


Zero = _only(float, 0)

Unused = create_model(
    "Unused",
    __base__=Strict,
    **optional(
        # Labels, and where and when an answer is generated.
        user=str,
        metadata=Labels,
        safety_identifier=str,
        prompt_cache_key=str,
        prompt_cache_retention=str,
        prompt_cache_options=Labels,
        service_tier=Literal["auto", "default", "flex", "scale", "priority"],
        request_id=str,
        priority=int,
        # Values that ask for what is done anyway.
        store=No,
        tool_choice=Literal["none", "auto"],
        parallel_tool_calls=bool,
    ),
)
"""Fields of all requests for answers that change nothing."""

UnusedInCompletions = create_model(
    "UnusedInCompletions",
    __base__=Unused,
    **optional(
        frequency_penalty=Zero,
        presence_penalty=Zero,
        length_penalty=_only(float, 1),
        best_of=_only(int, 1),
        use_beam_search=No,
        ignore_eos=No,
        min_tokens=_only(int, 0),
        skip_special_tokens=Yes,
        spaces_between_special_tokens=bool,
        include_stop_str_in_output=No,
        echo=No,
        return_token_ids=No,
        return_tokens_as_token_ids=No,
    ),
)
"""Fields of chats and completions that change nothing, OpenAI's and vLLM's."""


class TextFormat(Strict):
    """An answer of any form."""

    type: Literal["text"]

    def structured(self) -> StructuredOutput | None:
        """The form as the engine takes it."""
        return None


class JSONObjectFormat(Strict):
    """An answer that is a JSON object."""

    type: Literal["json_object"]

    def structured(self) -> StructuredOutput | None:
        """The form as the engine takes it."""
        return StructuredOutput(json_object=True)


class NamedSchema(Strict):
    """A JSON schema, which the answer follows, `strict` or not."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class JSONSchemaFormat(Strict):
    """An answer that is JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema

    def structured(self) -> StructuredOutput | None:
        """The form as the engine takes it."""
        return StructuredOutput(json_schema=self.json_schema.schema_ or {})


ResponseFormat = Annotated[TextFormat | JSONObjectFormat | JSONSchemaFormat, Field(discriminator="type")]
Choices = Annotated[list[str], Field(fail_fast=True, min_length=1)]


class StructuredOutputs(Strict):
    """The form of an answer, in vLLM's fields, one of which is given."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    disable_fallback: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: No | None = None

    def forms(self) -> list[StructuredOutput]:
        """The forms that are given."""
        given: dict[str, Any] = {"json_schema": self.json_, "regex": self.regex, "choice": self.choice}
        forms = [StructuredOutput(**{name: value}) for name, value in given.items() if value is not None]
        return [*forms, StructuredOutput(json_object=True)] if self.json_object else forms


def _as_words(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _not_empty(words: list[str]) -> list[str]:
    return [word for word in words if word]


Words = Annotated[list[str], Field(fail_fast=True, max_length=MAX_STOP_WORDS)]

_sampling: dict[str, Any] = {name: (Annotated[p.type, Field(**p.bounds)] | None, None) for name, p in SAMPLING.items()}
SampledRequest = create_model("SampledRequest", __base__=Strict, **_sampling)


class GenerationRequest(SampledRequest):
    """The fields of all requests that say how answers are generated."""

    model: str
    stream: bool | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: Annotated[
        Words, BeforeValidator(_as_words, json_schema_input_type=str | Words), AfterValidator(_not_empty)
    ] = []
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None

    def settings(
        self,
        defaults: GenerationSettings,
        max_tokens: int | None = None,
        logprobs: int | None = None,
        form: StructuredOutput | None = None,
    ) -> GenerationSettings:
        """The generation settings: the request's, and for what it leaves out the server's.

        Args:
            defaults: the server's settings.
            max_tokens, logprobs, form: the request's, from fields that differ between the kinds of requests.

        Raises:
            APIError: for several forms of one answer.
        """
        guided = StructuredOutputs(json=self.guided_json, regex=self.guided_regex, choice=self.guided_choice)
        fields = (self.structured_outputs, guided)
        forms = [form, *(given for field in fields if field is not None for given in field.forms())]
        forms = [given for given in forms if given is not None]
        if len(forms) > 1:
            raise APIError("An answer has one form: give response_format or one other.", "response_format")
        named = {name: getattr(self, name) for name in (*SAMPLING, "top_k", "min_p")}
        given = {name: value for name, value in named.items() if value is not None}
        settings = GenerationSettings(
            **{name: given.get(name, getattr(defaults, name)) for name in named},
            max_new_tokens=defaults.max_new_tokens if max_tokens is None else max_tokens,
            stop=tuple(self.stop),
            seed=self.seed,
            logprobs=logprobs,
            structured=forms[0] if forms else None,
        )
        if settings.greedy and given.get("repetition_penalty", 1) != 1:
            # Greedy decoding ignores the penalty; sampling from the likeliest token alone applies it.
            return replace(settings, temperature=1.0, top_p=1.0, top_k=1, min_p=0.0)
        return settings


def check_model(name: str, served: str) -> None:
    """Check a model's name.

    Raises:
        APIError: if it is not the served model's.
    """
    if name != served:
        message = f"There is no such model here; this server has {served!r}."
        raise APIError(message, "model", "model_not_found", status=404)


def limit_of(names: Sequence[str], *values: int | None) -> int | None:
    """A limit that may be given by several names.

    Raises:
        APIError: if they differ.
    """
    given = {value for value in values if value is not None}
    if len(given) > 1:
        raise APIError(f"{' and '.join(names)} differ; give one of them.", names[-1])
    return next(iter(given), None)
