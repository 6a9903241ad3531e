"""All limits of the engine and of the servers. The only library that this module imports is Pillow."""

from dataclasses import dataclass, replace

from deepseek_vl.imaging.open import PictureLimits

PICTURES = PictureLimits(
    formats=("PNG", "JPEG", "WEBP", "GIF", "BMP"),  # none that calls other programs or contains other files
    pixels=40_000_000,
    side=16_384,
    aspect=200,
    seconds=10.0,
    memory_bytes=1 << 30,
)
"""Limits of one picture that a server's client sends."""


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine computes at a time, and how much it caches.

    Attributes:
        max_rows: the most answers in a batch.
        prefill_seconds: about how long prompts run, piece by piece, before running answers get their next token.
        memory_bytes: memory on the model's device for everything that grows. For each running answer, all that its
            prompt and answer may need is set aside. The rest is for caches of ended answers, of which the least
            recently used are dropped first. None for `default_memory`.
        image_bytes: how much of `memory_bytes` may be encoded images. The default is for 56 of the 1.3B model's in
            bfloat16, or 28 of the 7B model's.
        keeps: whether anything is cached of ended answers.
    """

    max_rows: int = 16
    prefill_seconds: float = 0.2
    memory_bytes: int | None = None
    image_bytes: int = 128 << 20
    keeps: bool = True


def default_memory(weight_bytes: int, free_bytes: int) -> int:
    """The default of `EngineLimits.memory_bytes`, by the size of the weights and the memory that is left beside them.

    It is the size of the weights, 1 GiB at least, but at most half of the memory that is left: steps need memory of
    their own. In bfloat16 this is enough for 22,000 tokens of the 1.3B model, or 30,000 of the 7B model.
    """
    return min(max(weight_bytes, 1 << 30), free_bytes // 2)


@dataclass(frozen=True)
class RequestLimits:
    """Limits on what an untrusted client may ask of a server.

    Attributes:
        head_seconds: time in which a request's head must arrive.
        body_bytes: size of a request's body, or of an upload.
        body_seconds: time in which a request's body must arrive.
        bodies_bytes: total size of the bodies of all requests whose text and pictures are being read.
        json_values: number of names and values in a body, enough for all the messages that fit a model.
        json_depth: nesting of lists and objects; a JSON schema takes two levels for each level that it describes.
        json_digits: digits of a number.
        json_escapes: number of backslashes in a body; Chinese text may have one for every character.
        send_seconds: time in which a client must receive some of its answer.
        refusal_seconds: delay of the answer to a wrong key or password.
        refusals: number of such delayed answers at a time.
        waiting: number of requests that wait for a place; more are turned away.
        prepared: number of waiting requests whose pixels are in memory; the others wait without pixels.
        answers: number of answers to one request.
        images: number of images in one message or request.
        images_seconds: time for fetching and decoding all images of a request.
        pictures: limits of each image.
        decoders: number of images decoded at a time, each in a process of its own.
        fetch_bytes: size of a picture that is fetched by its address.
        fetch_seconds: time for fetching a picture, redirects included.
        fetch_redirects: number of redirects for a picture.
    """

    head_seconds: float = 10.0
    body_bytes: int = 32 << 20
    body_seconds: float = 60.0
    bodies_bytes: int = 256 << 20
    json_values: int = 20_000
    json_depth: int = 64
    json_digits: int = 1000
    json_escapes: int = 1_000_000
    send_seconds: float = 60.0
    refusal_seconds: float = 1.0
    refusals: int = 64
    waiting: int = 64
    prepared: int = 4
    answers: int = 8
    images: int = 16
    images_seconds: float = 60.0
    pictures: PictureLimits = PICTURES
    decoders: int = 2
    fetch_bytes: int = 20 << 20
    fetch_seconds: float = 10.0
    fetch_redirects: int = 3


PAGE_LIMITS = RequestLimits(waiting=256)
"""Limits of the web page."""

PAGE_BODY_BYTES = 8 << 20
"""The largest body of the web page's requests, except uploads: a whole conversation's text."""

PAGE_ANSWERS = 64
"""The most answers of the web page that are generated or wait for the engine at a time."""

TERMINAL_LIMITS = RequestLimits(
    fetch_bytes=50 << 20, fetch_seconds=60.0, pictures=replace(PICTURES, formats=(*PICTURES.formats, "TIFF", "AVIF"))
)
"""Limits of pictures that a terminal's user names by address or gives on standard input."""
