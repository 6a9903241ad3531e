"""All limits of the engine and of the servers. The only library that this module imports is Pillow."""

from dataclasses import dataclass, replace

from deepseek_vl.imaging.open import PictureLimits

PICTURES = PictureLimits(
    formats=("PNG", "JPEG", "WEBP", "GIF", "BMP"),  # none that calls another program or holds other files
    pixels=40_000_000,
    side=16_384,
    aspect=200,
    seconds=10.0,
    memory_bytes=1 << 30,
)
"""Of one picture that a stranger sends."""


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine does at a time, and keeps.

    Attributes:
        max_rows: how many answers make up a batch.
        prefill_seconds: about so long prompts are run, piece by piece, before running answers get their next token.
        memory_bytes: memory on the model's device for everything that grows: keys and values of running answers, for
            which as much is set aside as prompt and answer may need; and in what is left, what is kept of answers that
            have ended, least recently used first to go. None for `default_memory`.
        image_bytes: how much of that may be encoded images: 50 of the 1.3B model's in bfloat16, or 25 of the 7B's.
        keeps: whether anything is kept of answers that have ended.
    """

    max_rows: int = 16
    prefill_seconds: float = 0.2
    memory_bytes: int | None = None
    image_bytes: int = 128 << 20
    keeps: bool = True


def default_memory(weight_bytes: int, free_bytes: int) -> int:
    """`EngineLimits.memory_bytes` of a model whose weights take so much, on a device with so much left beside them.

    As much as the weights (1 GiB at least), if that is at most half of what is left: in bfloat16 22,000 tokens of the
    1.3B model, and 30,000 of the 7B model. The other half is for what a step needs for itself.
    """
    return min(max(weight_bytes, 1 << 30), free_bytes // 2)


@dataclass(frozen=True)
class RequestLimits:
    """What a stranger may ask of a server.

    Attributes:
        head_seconds: until a request's head has arrived.
        body_bytes: of a request, or of an upload.
        body_seconds: until a request's body has arrived.
        bodies_bytes: of all requests together that are being read, up to their pictures.
        json_values: names and values in a body: as many as the messages that fit a model.
        json_depth: of lists and objects in each other; a JSON schema takes two for each level of what it describes.
        json_digits: of a number.
        json_escapes: backslashes in a body; Chinese text may have one for every character.
        send_seconds: for a client to take some of its answer.
        refusal_seconds: that a wrong key or password waits for its answer.
        refusals: how many wait so at a time.
        waiting: requests that wait for a place; more are turned away.
        prepared: requests that have their pixels and wait for their prompt's turn; the others wait without.
        answers: to one request.
        images: in one message or request.
        pictures: of one image.
        decoders: how many images are decoded at a time, each in a process of its own.
        fetch_bytes: of one picture that is fetched by its address.
        fetch_seconds: for one, redirects included.
        fetch_redirects: for one.
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
    pictures: PictureLimits = PICTURES
    decoders: int = 2
    fetch_bytes: int = 20 << 20
    fetch_seconds: float = 10.0
    fetch_redirects: int = 3


PAGE_LIMITS = RequestLimits(waiting=256)
"""Of the web page."""

PAGE_ANSWERS = 64
"""How many answers the web page generates or has in line at the engine at a time."""

TERMINAL_LIMITS = RequestLimits(
    fetch_bytes=50 << 20, fetch_seconds=60.0, pictures=replace(PICTURES, formats=(*PICTURES.formats, "TIFF", "AVIF"))
)
"""Of what a user of the terminal names by its address, or gives on standard input."""
