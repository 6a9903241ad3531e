"""How an answer is generated. Imports nothing heavy, so that a command line is checked before the network is loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any


def as_stop_words(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop words as templates and callers give them: none, one or several."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


@dataclass(frozen=True, kw_only=True)
class StructuredOutput:
    """The required form of an answer, by exactly one of these attributes. Answers that are cut off may not have it.

    Attributes:
        json_object: any JSON object.
        json_schema: JSON that fits this JSON schema.
        regex: text that this regular expression matches as a whole. `\\d` is the digits 0 to 9; look-around, word
            boundaries and back references are not supported.
        choice: one of these texts.

    Raises:
        ValueError: unless exactly one is given.
    """

    json_object: bool = False
    json_schema: Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        given = [name for name, value in values.items() if value is not None and value is not False]
        if len(given) != 1:
            names = ", ".join(values)
            raise ValueError(f"A structured output is exactly one of {names}; got {' and '.join(given) or 'none'}.")
        if self.choice is not None and not self.choice:
            raise ValueError("The choice of a structured output has no texts.")


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How an answer is generated.

    Attributes:
        max_new_tokens: the most tokens that an answer has.
        temperature: 0, or less than 0.0001, for greedy decoding, which ignores the next four.
        top_p: sample from the smallest set of tokens with this total probability; 0 for greedy decoding as well.
        top_k: sample from this many of the likeliest tokens; 0 or -1 for all. The default is transformers' and the
            reference's.
        min_p: sample from tokens with at least this fraction of the likeliest one's probability.
        repetition_penalty: divides the scores of tokens already generated.
        stop: the answer ends before the first of these texts; may be given as one text.
        seed: for sampling; None leaves torch's random state as it is.
        logprobs: keep each token's log probability, and those of this many of the likeliest tokens; None for neither.
        structured: the form of the answer; needs the package `llguidance`.

    Raises:
        ValueError: for a value out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 0.95
    top_k: int = 50
    min_p: float = 0.0
    repetition_penalty: float = 1.1
    stop: Sequence[str] = ()
    seed: int | None = None
    logprobs: int | None = None
    structured: StructuredOutput | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", as_stop_words(self.stop))
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}.")
        if not self.greedy and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be between 0 and 1, got {self.top_p}.")
        if self.top_k < -1:
            raise ValueError(f"top_k must be a number of tokens, or 0 or -1 for all, got {self.top_k}.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be between 0 and 1, got {self.min_p}.")
        if self.logprobs is not None and self.logprobs < 0:
            raise ValueError(f"logprobs must be a number of tokens, got {self.logprobs}.")
        # Beyond these bounds the scores of tokens can become infinite.
        if not self.greedy and not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(f"repetition_penalty must be from 0.01 to 100, got {self.repetition_penalty}.")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < 1e-4 or self.top_p == 0

    def with_stop_words(self, stop: str | Sequence[str] | None) -> "GenerationSettings":
        """These settings with more stop words; the same for structured answers, whose text may contain stop words."""
        return self if self.structured is not None else replace(self, stop=(*self.stop, *as_stop_words(stop)))
