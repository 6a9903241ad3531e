"""Checks of a row's JSON values: their types, in words for errors, and keys that are not used."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from deepseek_vl.data.errors import DataError

NOTES = {
    *("annotator", "author", "authors", "categories", "category", "comment", "comments", "created", "creator"),
    *("dataset", "date", "detail", "difficulty", "domain", "hash", "height", "id", "ids", "idx", "index"),
    *("key", "keywords", "lang", "language", "length", "level", "licence", "license", "locale", "md5", "meta"),
    *("metadata", "model", "note", "notes", "origin", "quality", "remark", "score", "scores", "sha1", "sha256"),
    *("size", "source", "sources", "split", "stage", "status", "subject", "subset", "tag", "tags", "task", "time"),
    *("timestamp", "topic", "updated", "uid", "uuid", "version", "width"),
}
"""Last words of the names of keys that say something about a row, and hold nothing to learn."""

CONTENT = {
    *("audio", "audios", "chosen", "kto", "label", "labels", "learn", "loss", "margin", "mask", "masked", "rejected"),
    *("reward", "scale", "train", "trainable", "training", "video", "videos", "weight", "weights"),
}
"""Words in the names of keys that change what is to be learnt, whatever their value is."""

VERDICTS = {
    *("bad", "correct", "drop", "exclude", "excluded", "good", "ignore", "ignored", "incorrect", "invalid", "keep"),
    *("learnable", "learned", "learnt", "negative", "positive", "preferred", "skip", "skipped", "supervised"),
    *("target", "use", "used", "valid", "wrong", "is", "be", "should", "to"),
}
"""Names of keys, or parts of such as `is_correct`, that say whether something is to be learnt."""

IMAGES = {"image", "images", "img", "imgs", "photo", "photos", "picture", "pictures"}
"""Words in the names of keys that say which image a row is about."""

ROW = "the row"
"""What errors call a row, which has more notes than its messages."""


def check_all_is_read(name: str, entry: Mapping[str, Any], read: Collection[str]) -> None:
    """Check that a JSON object has no key that would be ignored.

    Allowed are empty values, numbers (sizes, scores) and notes, such as an id or a source. In a message, true and false
    are switches, and no notes.

    Args:
        entry: an object of a row.
        read: the keys that are read elsewhere.

    Raises:
        DataError: if any other key holds something.
    """
    for key, value in entry.items():
        if key in read or is_nothing(value):
            continue
        words = _words(key)
        name_ends = [word for word in words if word != "list"][-1:]
        is_switch = isinstance(value, bool) and name != ROW
        is_note = (isinstance(value, int | float) and not is_switch) or not NOTES.isdisjoint(name_ends)
        if not is_note or not CONTENT.isdisjoint(words) or (words and VERDICTS.issuperset(words)):
            raise DataError(
                f'{name} has "{key}", which is not used in training; remove the key, or the row (notes may stand '
                'under "metadata")'
            )


def check_needs_no_image(row: Mapping[str, Any], read: Collection[str]) -> None:
    """Check that a row without images does not speak of one, such as by an `image_id`.

    Raises:
        DataError: if it does.
    """
    for key, value in row.items():
        if key not in read and value and not IMAGES.isdisjoint(_words(key)):
            raise DataError(f'{ROW} has "{key}", but no image; give its path as "image", or remove the key')


def is_nothing(value: Any) -> bool:
    """Whether a value says no more than a key that is left out: null, or an empty text, list or object."""
    return value is None or value == "" or value == [] or value == {}


def _words(key: Any) -> list[str]:
    """The words in a key's name."""
    return re.findall(r"[a-z0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", str(key)).lower())


def check_is_text(name: str, value: Any) -> None:
    """Check that a value is text that can be encoded as UTF-8.

    Raises:
        DataError: if it is not.
    """
    if not isinstance(value, str):
        raise DataError(f"{name} is {kind(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name} has half a surrogate pair, {value[error.start]!r}, which is no character") from error


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null or missing"}
    return names.get(type(value), "binary data" if isinstance(value, bytes) else "a number")
