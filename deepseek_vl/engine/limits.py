"""What may be asked, and what may be kept: every bound of the engine and its doors. Of libraries it imports Pillow."""

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
        conversation_bytes: memory for keys and values of conversations that have ended, on the model's device; 0 to
            keep none, None for a share of the weights' size (see `room_for_conversations`).
        image_bytes: memory for encoded images: 50 of the 1.3B model's in bfloat16, or 25 of the 7B model's.
    """

    max_rows: int = 16
    prefill_seconds: float = 0.2
    conversation_bytes: int | None = None
    image_bytes: int = 128 << 20

    def room_for_conversations(self, weight_bytes: int) -> int:
        """Bytes for conversations of a model whose weights take so many.

        By default a quarter of the weights, or 256 MiB if that is more: in bfloat16 that is 5,000 tokens for the 1.3B
        model and 7,500 for the 7B model.
        """
        return max(weight_bytes // 4, 256 << 20) if self.conversation_bytes is None else self.conversation_bytes


@dataclass(frozen=True)
class RequestLimits:
    """What a stranger may ask of a server.

    Attributes:
        body_bytes: of a request, or of an upload.
        body_seconds: until a request's body has arrived.
        waiting: requests that wait for a place; more are turned away.
        images: in one message or request.
        pictures: of one image.
        decoders: how many images are decoded at a time, each in a process of its own.
        fetch_bytes: of one picture that is fetched by its address.
        fetch_seconds: for one, redirects included.
        fetch_redirects: for one.
    """

    body_bytes: int = 32 << 20
    body_seconds: float = 60.0
    waiting: int = 64
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
