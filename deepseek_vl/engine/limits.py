"""What a stranger may ask for."""

SAFE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Kinds of pictures to decode for strangers: none that calls another program or holds other files."""

SAFE_PIXELS = 40_000_000
"""Of one picture of a stranger's."""

SAFE_IMAGES = 16
"""In one message or request of a stranger's."""
