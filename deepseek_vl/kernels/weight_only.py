"""Weight-only quantisation on GPUs, by torchao: weights are int8 or int4, products bfloat16 or float16.

A token takes as long as reading the weights. In compiled models the conversion is fused into the product.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

GROUP_SIZES = (128, 64, 32)
"""Numbers of inputs that share a scale in int4 weights; a layer uses the first that divides its number of inputs."""


def quantize_weights(language_model: PreTrainedModel, kind: str, device: torch.device | None = None) -> None:
    """Quantise a language model's linear layers, in place.

    With int4, the head, which int4 would harm most, still gets int8 weights, and so do layers whose inputs do not
    divide into groups.

    Args:
        language_model: for int4, it must be in bfloat16.
        kind: `int8` (one scale per output) or `int4`, which needs a CUDA GPU.
        device: where each layer is moved to before it is quantised, so that a GPU never holds the whole unquantised
            model; None to leave layers where they are.

    Raises:
        ValueError: if torchao is not installed, or for int4 in another dtype.
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
    """How much memory a weight takes. (`nbytes` of a quantised weight is the size of the unquantised one.)"""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    names, _ = weight.__tensor_flatten__()
    return sum(stored_bytes(getattr(weight, name)) for name in names)


def check_torchao() -> None:
    """Check that torchao is installed.

    Raises:
        ValueError: if it is not.
    """
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise ValueError("Quantised weights on a GPU need torchao; pip install torchao.") from error
