"""Linear layers for inference on CPUs: the fastest products, narrow weights without slow ones, and int8.

One row at a time (decoding), a linear layer takes as long as its weights take to be read, so narrow ones are fast. With
many rows (a prompt, an image) it takes as long as the arithmetic, which is fast in float32 and in int8, but in bfloat16
and float16 on few processors.
"""

import threading

import torch
import torch.nn.functional as F
from torch import nn

from deepseek_vl.kernels.policy import MANY_ROWS, NARROW, kernel_for, widened_rows

CHUNK_ELEMENTS = 2**22
"""So much of a weight is widened at a time, or of an input quantised: 16 MB, which stay in the cache."""


class _ReplacingLinear(nn.Linear):
    """Takes the place of a linear layer, with its parameters."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)


class WideningLinear(_ReplacingLinear):
    """An `nn.Linear` whose weights are narrow to be read, and float32 to be multiplied.

    With many rows, as much of the weight as fits in the cache is converted to float32 at a time. Sums are in float32
    and rounded once, so the result is at least as exact as the narrow product's. Where gradients are on, on other
    devices and under autocast it is an `nn.Linear`.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear)
        self._many_rows = widened_rows()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in the input's dtype."""
        if input.dtype not in NARROW or not _are_many_rows(input, self, self._many_rows):
            return super().forward(input)
        wide = input.float()
        output = input.new_empty(*input.shape[:-1], self.out_features)
        step = max(1, CHUNK_ELEMENTS // self.in_features)
        for start in range(0, self.out_features, step):
            part = slice(start, start + step)
            weight = _scratch(self.weight[part].shape).copy_(self.weight[part])
            bias = None if self.bias is None else self.bias[part].float()
            output[..., part] = F.linear(wide, weight, bias)
        return output


_held = threading.local()


def _scratch(shape: torch.Size) -> torch.Tensor:
    """A float32 tensor to write to, in memory that this thread keeps for the next: as much is slow to get anew."""
    held = getattr(_held, "tensor", None)
    if held is None or held.numel() < shape.numel():
        with torch.inference_mode(False):  # it may be written to within as well as without
            held = _held.tensor = torch.empty(shape.numel(), dtype=torch.float32, device="cpu")
    return held[: shape.numel()].view(shape)


class OneDNNLinear(_ReplacingLinear):
    """An `nn.Linear` whose products of many rows of float32 are oneDNN's, as PyTorch's narrower ones are anyway.

    The operator is the one to which PyTorch's own compiler lowers linear layers on CPUs. Where gradients are on, on
    other devices and under autocast it is an `nn.Linear`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in the input's dtype."""
        if input.dtype is not torch.float32 or not _are_many_rows(input, self, MANY_ROWS):
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def _are_many_rows(input: torch.Tensor, linear: nn.Linear, many: int) -> bool:
    """Whether a layer's input is of many rows, plainly to be multiplied on the CPU."""
    return (
        input.numel() >= many * linear.in_features
        and input.device.type == "cpu"
        and input.dtype is linear.weight.dtype
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


LINEAR = {"plain": nn.Linear, "widening": WideningLinear, "onednn": OneDNNLinear}
"""The kinds of linear layers, by the names of their kernels."""


def fastest_linear(dtype: torch.dtype) -> type[nn.Linear]:
    """The kind of linear layers to use on this processor, for weights of a floating point dtype."""
    return LINEAR[kernel_for("linear", dtype)]


def replace_linear(model: nn.Module, kind: type[nn.Linear]) -> None:
    """Replace the linear layers of a model by such of another kind, in place.

    Their parameters and names stay as they are, and so do layers that are not, or not yet, on the CPU.
    """
    if kind is nn.Linear:
        return
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear and child.weight.device.type == "cpu":
                setattr(module, name, kind(child))
