"""Layers for inference on CPUs: the fastest products, and narrow weights without slow ones.

One row at a time (decoding), a linear layer takes as long as its weights take to be read, so narrow ones are fast. With
many rows (a prompt, an image) it takes as long as the arithmetic, which is fast in float32 and in int8, but in bfloat16
and float16 on few processors.
"""

import math
import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from deepseek_vl.kernels.policy import MANY_ROWS, NARROW, widened_rows

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
            weight = scratch("widened", self.weight[part].shape, torch.float32).copy_(self.weight[part])
            bias = None if self.bias is None else self.bias[part].float()
            output[..., part] = F.linear(wide, weight, bias)
        return output


_held = threading.local()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor to write to, in memory that this thread keeps for the next of that name: as much is slow to get anew."""
    size = math.prod(shape) * dtype.itemsize
    held = getattr(_held, name, None)
    if held is None or len(held) < size:
        with torch.inference_mode(False):  # it may be written to within as well as without
            held = torch.empty(size, dtype=torch.uint8, device="cpu")
        setattr(_held, name, held)
    return held[:size].view(dtype).view(shape)


class WideningConv2d(nn.Conv2d):
    """An `nn.Conv2d` whose weights and inputs are narrow, and float32 to be multiplied.

    What PyTorch has for narrow ones where oneDNN has nothing is slow: the 7B model's images took 30 s of such
    convolutions. Where gradients are on, on other devices and under autocast it is an `nn.Conv2d`.
    """

    def __init__(self, convolution: nn.Conv2d):
        sizes = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)
        super().__init__(
            *(convolution.in_channels, convolution.out_channels, *sizes, convolution.groups),
            *(convolution.bias is not None, convolution.padding_mode, "meta"),  # without numbers, soon to be replaced
        )
        self.weight, self.bias = convolution.weight, convolution.bias
        self.train(convolution.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[b, in_channels, H, W] -> [b, out_channels, H', W'], in the input's dtype."""
        if input.dtype not in NARROW or not _computes_plainly(input, self):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.float()
        return self._conv_forward(input.float(), self.weight.float(), bias).to(input.dtype)


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
    return input.numel() >= many * linear.in_features and _computes_plainly(input, linear)


def _computes_plainly(input: torch.Tensor, layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether a layer is to do on the CPU what its dtype says, and nothing else."""
    return (
        input.device.type == "cpu"
        and input.dtype is layer.weight.dtype
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )


LAYERS = {
    "plain": {},
    "widening": {nn.Linear: WideningLinear, nn.Conv2d: WideningConv2d},
    "onednn": {nn.Linear: OneDNNLinear},
}
"""What takes the place of which kind of layer, by the name of the kernel."""


def replace_layers(model: nn.Module, kernel: str) -> None:
    """Have a model's layers compute by a kernel of `LAYERS`, in place.

    Their parameters and names stay as they are, and so do layers that are not, or not yet, on the CPU.
    """
    kinds = LAYERS[kernel]
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in kinds and child.weight.device.type == "cpu":
                setattr(module, name, kinds[type(child)](child))
