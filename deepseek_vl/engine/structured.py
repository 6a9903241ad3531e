"""Answers of a given form: JSON of a schema, or text that an expression matches. By llguidance, if one is asked for.

In each step the matcher of an answer says which tokens may come next, and the others' logits become minus infinity. It
knows nothing of the rows beside it.
"""

import json
import re
import threading
import weakref
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from deepseek_vl.engine.settings import StructuredOutput

_JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Small models, left the choice of white space, write it without end."""


class StructureError(ValueError):
    """No answer can have the form that is asked for, or it uses what is not supported."""


class Structure:
    """Which tokens an answer may go on with, so that it has a given form.

    Args:
        tokenizer: the model's.
        vocabulary: how many logits the model has for a token.
        form: what is asked for.
        after_space: whether the answer begins with a space that is not of that form, as behind "Assistant:".

    Raises:
        StructureError: for a form that is not supported, or without llguidance.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, form: StructuredOutput, after_space: bool = True
    ):
        llguidance = _library()
        readable = _readable(tokenizer, vocabulary)
        self._matcher = llguidance.LLMatcher(
            readable,
            _grammar(form, after_space),
            log_level=0,
            limits=llguidance.LLParserLimits(verbose_errors=False),
        )
        if self._matcher.is_error():
            raise StructureError(_reason(self._matcher.get_error()))
        self._bits = np.zeros((readable.vocab_size + 31) // 32, dtype=np.int32)
        self._compute()  # what is not possible shows here, and what takes longest is done

    @property
    def is_whole(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits [vocabulary], with minus infinity for what may not come next.

        Raises:
            StructureError: if that takes too long to find out.
        """
        self._compute()
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits)].view(bool)
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), float("-inf"))

    def accept(self, token_id: int) -> None:
        """Go on with a token, which `masked` has allowed."""
        self._matcher.consume_token(token_id)
        self._check()

    def _compute(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise StructureError("No answer can have the form that is asked for, or it is too complex.")


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise StructureError("Answers of a given form need the package llguidance: pip install llguidance.") from error
    return llguidance


_lock = threading.Lock()
_known: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, Any]] = weakref.WeakKeyDictionary()


def _readable(tokenizer: Any, vocabulary: int) -> Any:
    """A tokenizer as llguidance reads it, which takes a second for a large one, once."""
    from llguidance.hf import from_tokenizer

    with _lock:
        size, readable = _known.get(tokenizer, (0, None))
        if size != vocabulary:
            try:
                readable = from_tokenizer(tokenizer, n_vocab=max(vocabulary, len(tokenizer)))
            except ValueError as error:
                raise StructureError("Answers of a given form need a tokenizer with a tokenizer.json.") from error
            _known[tokenizer] = (vocabulary, readable)
        return readable


def _grammar(form: StructuredOutput, after_space: bool) -> str:
    """A form in llguidance's dialect of Lark."""
    start = 'start: " " FORM\n' if after_space else "start: FORM\n"
    if form.json_object or form.json_schema is not None:
        schema = {"type": "object"} if form.json_object else form.json_schema or {}
        # `x-guidance` is llguidance's own, by which a schema could turn its checks off.
        return f"{start.replace('FORM', 'form')}form: %json {json.dumps({**schema, 'x-guidance': _JSON_STYLE})}\n"
    if form.regex is not None:
        expression = _library().regex_to_lark(form.regex, "d")
    else:
        expression = "|".join("".join(map(_literal, text)) for text in form.choice or ())
    return f"{start}FORM: /{expression}/\n"


def _literal(character: str) -> str:
    """A character as a regular expression."""
    return character if character.isascii() and character.isalnum() else f"\\x{{{ord(character):x}}}"


def _reason(error: str) -> str:
    """What llguidance says of a form, without where in our grammar it stands."""
    unsupported = re.search(r"Unimplemented keys: \[(.*?)\]", error)
    if unsupported:
        return f"JSON schema: the keyword {unsupported[1][:100]} is not supported."
    if "oneOf constraints" in error:
        return 'JSON schema: the keyword "oneOf" is not supported where several of its schemas may fit; use "anyOf".'
    if found := re.search(r"failed to compile JSON schema: (.*?)(?:$|\. )", error, re.MULTILINE):
        expression = re.search(r"^error: (.*)", error, re.MULTILINE)
        return f"JSON schema: {found[1][:150].rstrip(':.')}{f': {expression[1][:100]}' if expression else ''}."
    if "invalid regex" in error:
        found = re.search(r"^error: (.*)", error, re.MULTILINE) or re.search(r"\(in regex\): (.*?)(?:;|$)", error)
        return f"Regular expression: {found[1][:150] if found else 'it cannot be read'}."
    return "The form that the answer is to have is too large or too complex."
