"""Narrow weights on GPUs, by torchao: int8 or int4 to be read, bfloat16 or float16 to be multiplied.

A token is as fast as the weights are read. Compiled, the conversion is a part of the product.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

GROUP_SIZES = (128, 64, 32)
"""int4 weights have a scale for so many inputs each: the first of these that divides a layer's inputs."""


def quantize_weights(language_model: PreTrainedModel, kind: str, device: torch.device | None = None) -> None:
    """Quantise a language model's linear layers, in place.

    The head, which int4 would harm most, gets int8 weights either way, and so does a layer whose inputs do not divide
    into groups.

    Args:
        language_model: for int4 in bfloat16.
        kind: `int8` (one scale per output) or `int4`, which needs a CUDA GPU.
        device: where each layer is moved to before it is quantised, so that a GPU never holds all of the model as it
            was; None to leave it where it is.

    Raises:
        ValueError: if torchao is not there, or for int4 in another dtype.
    """
    check_torchao()
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    if kind == "int4" and language_model.dtype is not torch.bfloat16:
        raise ValueError("int4 weights are multiplied in bfloat16 only; use --dtype bfloat16, or int8.")
    head = language_model.get_output_embeddings()

    def group_size(module: nn.Module) -> int | None:
        if kind != "int4" or not isinstance(module, nn.Linear) or module is head:
            return None
        return next((size for size in GROUP_SIZES if module.in_features % size == 0), None)

    for size in GROUP_SIZES if kind == "int4" else ():
        config = Int4WeightOnlyConfig(group_size=size, int4_packing_format="tile_packed_to_4d")
        quantize_(language_model, config, lambda module, _, size=size: group_size(module) == size, device)
    quantize_(
        language_model,
        Int8WeightOnlyConfig(),
        lambda module, _: isinstance(module, nn.Linear) and group_size(module) is None,
        device,
    )


def stored_bytes(weight: torch.Tensor) -> int:
    """How much memory a weight takes; `nbytes` of a quantised one is that of the weight that it stands for."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()
    return sum(stored_bytes(getattr(weight, name)) for name in names)


def check_torchao() -> None:
    """
    Raises:
        ValueError: if torchao is not there.
    """
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise ValueError("Quantised weights on a GPU need torchao; pip install torchao.") from error
