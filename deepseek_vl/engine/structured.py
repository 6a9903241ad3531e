"""Structured answers, by llguidance: JSON of a schema, text that a regular expression matches, or one of some texts.

At each step the answer's matcher says which tokens may come next, and the others' logits become minus infinity. Each
answer has a matcher of its own.
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
"""Fixed white space in JSON, which small models would otherwise write without end."""


class StructureError(ValueError):
    """No answer can have the form that is asked for, or the form uses what is not supported."""


class Structure:
    """The state of one structured answer: which tokens may come next.

    Args:
        tokenizer: the model's.
        vocabulary: the number of the model's logits.
        form: the form that the answer is to have.
        after_space: whether a space that is not part of the form comes first, as after "Assistant:".

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
        self._compute()  # finds forms that are not possible, and does the slowest part

    @property
    def is_whole(self) -> bool:
        """Whether the answer is complete, so that no token can follow."""
        return self._matcher.is_stopped()

    def masked(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits [vocabulary], with minus infinity for tokens that may not come next.

        Raises:
            StructureError: if the form is too complex.
        """
        self._compute()
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")[: len(logits)].view(bool)
        return logits.masked_fill(~torch.from_numpy(allowed).to(logits.device), float("-inf"))

    def accept(self, token_id: int) -> None:
        """Add the next token, which must be one that `masked` allows."""
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
    """A tokenizer in llguidance's form. It is cached, as a large one takes a second."""
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
        # `x-guidance` has llguidance's options, by which a schema could turn checks off; ours replace them.
        return f"{start.replace('FORM', 'form')}form: %json {json.dumps({**schema, 'x-guidance': _JSON_STYLE})}\n"
    if form.regex is not None:
        expression = _library().regex_to_lark(form.regex, "d")
    else:
        expression = "|".join("".join(map(_literal, text)) for text in form.choice or ())
    return f"{start}FORM: /{expression}/\n"


def _literal(character: str) -> str:
    """The regular expression of a single character."""
    return character if character.isascii() and character.isalnum() else f"\\x{{{ord(character):x}}}"


def _reason(error: str) -> str:
    """llguidance's message about a form, without positions in our grammar."""
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
