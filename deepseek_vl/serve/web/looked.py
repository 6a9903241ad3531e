"""Where an answer looked, in the form that the page shows."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_vl.engine.attribution import TokenAttribution


def words_of(tokens: Sequence[TokenAttribution]) -> list[dict[str, Any]]:
    """Tokens joined to words: each its `text`, and `maps`, the mean of its tokens' maps, one per picture.

    A map is the base64 of a byte per region, row by row; 255 is the word's largest weight.
    """
    words: list[list[TokenAttribution]] = []
    for token in tokens:
        if not words or token.text[:1].isspace():
            words.append([])
        words[-1].append(token)
    return [{"text": "".join(token.text for token in word), "maps": _bytes(word)} for word in words]


def _bytes(word: Sequence[TokenAttribution]) -> list[str]:
    means = np.stack([np.mean(maps, axis=0) for maps in zip(*(token.maps for token in word), strict=True)])
    scaled = np.rint(255 * means / max(float(means.max()), 1e-12)).astype(np.uint8)
    return [base64.b64encode(map_.tobytes()).decode() for map_ in scaled]
