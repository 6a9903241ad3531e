"""`POST /v1/embeddings`: pictures as vectors."""

import base64
import threading
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field

from deepseek_vl.engine.features import embed_images
from deepseek_vl.engine.limits import RequestLimits
from deepseek_vl.serve.api.errors import APIError
from deepseek_vl.serve.api.fields import Strict
from deepseek_vl.serve.api.messages import ImagePart
from deepseek_vl.serve.api.service import Service


def _as_pictures(value: Any) -> Any:
    def picture(item: Any) -> Any:
        return {"type": "image_url", "image_url": item} if isinstance(item, str) else item

    return [picture(item) for item in value] if isinstance(value, list) else [picture(value)]


DOT = "data:image/gif;base64,R0lGODdhAQABAIEAAAAA/wAAAAAAAAAAACwAAAAAAQABAAAIBAABBAQAOw=="
"""A blue picture of one pixel."""

Pictures = Annotated[
    list[ImagePart],
    Field(fail_fast=True, min_length=1, max_length=RequestLimits.images),
    BeforeValidator(
        _as_pictures,
        json_schema_input_type=str
        | ImagePart
        | Annotated[list[str | ImagePart], Field(min_length=1, max_length=RequestLimits.images)],
    ),
]


class EmbeddingRequest(Strict):
    """The body of `POST /v1/embeddings`: a picture or several, each as a URL or as the part of a message."""

    example = {"input": DOT}
    model: str
    input: Pictures
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = None


class Embedding(BaseModel):
    """A picture's vector, of length 1; in base64 little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """How many tokens the pictures would be in a prompt."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The body of the answer."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


def embed(
    service: Service, images: list[Image.Image], encoding: str | None, has_left: threading.Event
) -> dict[str, Any]:
    """The answer's body; it takes long to compute, so call it in a thread.

    Args:
        has_left: set when the client has gone; no further picture is encoded then.

    Raises:
        APIError: if the client has gone.
    """

    def still_wanted(image: Image.Image) -> Image.Image:
        if has_left.is_set():
            raise APIError("The client has closed the connection.")
        return image

    vectors = embed_images(service.engine.model, service.processor, images, open_image=still_wanted)
    vectors = torch.nn.functional.normalize(vectors, dim=-1)
    data = [
        base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()
        for vector in vectors
    ]
    tokens = len(images) * service.processor.positions_per_image
    return EmbeddingList(
        data=[Embedding(index=i, embedding=value) for i, value in enumerate(data)],
        model=service.name,
        usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
    ).model_dump()
