"""The bodies of answers that describe the server and its model."""

from typing import Literal

from pydantic import BaseModel


class Model(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["deepseek_vl"] = "deepseek_vl"
    max_model_len: int


class ModelList(BaseModel):
    """The body of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """The body of `GET /health`."""

    status: Literal["ok"] = "ok"


class Version(BaseModel):
    """The body of `GET /version`."""

    version: str
