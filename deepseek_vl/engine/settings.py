"""How an answer is generated. Imports nothing heavy, so that a command line is checked before the network is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass


def as_stop_words(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop words as templates and callers give them: none, one or several."""
    return (stop,) if isinstance(stop, str) else tuple(stop or ())


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How an answer is generated.

    Attributes:
        max_new_tokens: the answer ends after so many tokens.
        temperature: 0, or next to it, for greedy decoding, which takes no notice of the next two.
        top_p: sample from the smallest set of tokens with this total probability.
        repetition_penalty: divides the scores of tokens already generated.
        stop: the answer ends before the first of these texts.
        seed: for sampling; None leaves torch's random state as it is.

    Raises:
        ValueError: for a value out of range.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 0.95
    repetition_penalty: float = 1.1
    stop: Sequence[str] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}.")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}.")
        if not self.greedy and not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p must be between 0 and 1, got {self.top_p}.")
        # Beyond these bounds the scores of tokens can become infinite.
        if not self.greedy and not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(f"repetition_penalty must be from 0.01 to 100, got {self.repetition_penalty}.")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < 1e-4
