"""Decoding token ids, one at a time, to the text that a reader sees."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode


class StopWordFilter:
    """Lets text through up to the first stop word, holding back what may still become one."""

    def __init__(self, stop_words: Sequence[str]):
        self._stop_words = [word for word in stop_words if word]
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """Take more text; returns the text that may be shown, and whether a stop word was met."""
        self._held += text
        found = [index for word in self._stop_words if (index := self._held.find(word)) >= 0]
        if found:
            shown, self._held = self._held[: min(found)], ""
            return shown, True
        longest = max((self._overlap(word) for word in self._stop_words), default=0)
        split = len(self._held) - longest
        shown, self._held = self._held[:split], self._held[split:]
        return shown, False

    def _overlap(self, word: str) -> int:
        """The length of the longest suffix of the held text that is a prefix of `word`."""
        longest = min(len(word) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(word[:n])), 0)

    def flush(self) -> str:
        """The text still held back, once it is certain that no more follows."""
        held, self._held = self._held, ""
        return held


class Detokenizer:
    """Turns ids that come one at a time into an answer's text: whole characters only, no special tokens, no stop word.

    Attributes:
        token_ids: all ids so far.
        stopped: whether a stop word was met; there is no more text then.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_words: Sequence[str]):
        self.token_ids: list[int] = []
        self.stopped = False
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._decoded = ""
        self._filter = StopWordFilter(stop_words)

    def feed(self, token_id: int) -> str:
        """Take the next id; returns the text that is certain by now."""
        self.token_ids.append(token_id)
        # None while the bytes so far do not end with a whole character.
        piece: Any = self._decoder.step(self._tokenizer.backend_tokenizer, token_id)
        return self._show(piece or "")

    def flush(self) -> str:
        """The text still held back, after the last id."""
        whole: Any = self._tokenizer.decode(self.token_ids, skip_special_tokens=True)
        rest = self._show(whole[len(self._decoded) :])  # a character whose bytes never became complete
        return rest if self.stopped else rest + self._filter.flush()

    def _show(self, text: str) -> str:
        self._decoded += text
        if self.stopped:
            return ""
        shown, self.stopped = self._filter.feed(text)
        return shown


class TokenBytes:
    """The bytes of single tokens of a byte-level tokenizer, which need not be whole characters."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._backend = tokenizer.backend_tokenizer
        self._added = tokenizer.added_tokens_decoder

    def is_special(self, token_id: int) -> bool:
        """Whether a token is special, and therefore left out of decoded text."""
        return token_id in self._added and self._added[token_id].special

    def __call__(self, token_id: int) -> bytes:
        """A token's bytes; for an added token, those of its name."""
        if token_id in self._added:
            return self._added[token_id].content.encode("utf-8")
        token = self._backend.id_to_token(token_id) or ""  # a model may have logits for more than there are tokens
        byte_of = _byte_of()
        if all(character in byte_of for character in token):
            return bytes(byte_of[character] for character in token)
        return self._backend.decode([token_id]).encode("utf-8")


@functools.cache
def _byte_of() -> Mapping[str, int]:
    """The characters that byte-level tokenizers write for bytes -> those bytes."""
    return {character: byte for byte, character in bytes_to_unicode().items()}
