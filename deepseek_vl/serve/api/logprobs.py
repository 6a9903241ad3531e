"""Tokens of an answer with their log probabilities, as the APIs give them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from deepseek_vl.engine.detokenizer import TokenBytes
from deepseek_vl.engine.generation import Generation

LEAST = -9999.0
"""The log probability that OpenAI's API gives tokens that are next to impossible."""


class Token(NamedTuple):
    """A token's bytes, its log probability, and the likeliest tokens in its place."""

    text: bytes
    logprob: float
    likeliest: Sequence["Token"] = ()


class ShownTokens:
    """Selects the tokens of the text that is shown, which ends before a stop word.

    Args:
        generation: the answer, whose settings ask for log probabilities.
        token_bytes: those of its tokenizer.
    """

    def __init__(self, generation: Generation, token_bytes: TokenBytes):
        self._generation = generation
        self._bytes = token_bytes
        self._next = 0
        self._start = 0  # of the next token in the answer's bytes
        self._shown = 0

    def take(self, text: str, dropped: int = 0) -> list[Token]:
        """The tokens that begin in one more piece of text.

        Args:
            dropped: how many bytes in front of it are not shown.
        """
        self._shown += dropped + len(text.encode("utf-8"))
        tokens: list[Token] = []
        while self._next < len(self._generation.logprobs) and self._start < self._shown:
            entry = self._generation.logprobs[self._next]
            self._next += 1
            if self._bytes.is_special(entry.token_id):
                continue
            data = self._bytes(entry.token_id)
            hidden = max(dropped - self._start, 0)
            self._start += len(data)
            likeliest = [(self._bytes(number), logprob) for number, logprob in entry.likeliest]
            likeliest = [Token(other.lstrip() if hidden else other, logprob) for other, logprob in likeliest]
            tokens.append(Token(data[hidden:], entry.logprob, likeliest))
        return tokens


class TopToken(BaseModel):
    """A token and its log probability; also its bytes, because it need not be whole characters."""

    token: str
    bytes: list[int]
    logprob: float


class ChatToken(TopToken):
    """A token of an answer, and the likeliest ones in its place."""

    top_logprobs: list[TopToken]

    @classmethod
    def of(cls, token: Token) -> "ChatToken":
        """The token as the API gives it."""

        def fields(token: Token) -> dict[str, Any]:
            return {"token": text_of(token), "bytes": list(token.text), "logprob": max(token.logprob, LEAST)}

        return cls(**fields(token), top_logprobs=[TopToken(**fields(other)) for other in token.likeliest])


class ChatLogprobs(BaseModel):
    """An answer's tokens."""

    content: list[ChatToken]
    refusal: None = None

    @classmethod
    def of(cls, tokens: Sequence[Token]) -> "ChatLogprobs":
        """The tokens as the API gives them."""
        return cls(content=[ChatToken.of(token) for token in tokens])


def text_of(token: Token) -> str:
    """A token as text; bytes that are not a whole character become U+FFFD."""
    return token.text.decode("utf-8", errors="replace")
