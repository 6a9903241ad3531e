"""Linear and convolution layers for inference on CPUs, which multiply in the dtype that is fastest.

With one row (decoding), a linear layer takes as long as reading its weights, so narrow weights are fast. With many rows
(a prompt, an image) it takes as long as the arithmetic, which is fast in float32 and in int8, but in bfloat16 and
float16 on few processors.
"""

import math
import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from deepseek_vl.kernels.policy import MANY_ROWS, NARROW, widened_rows

CHUNK_ELEMENTS = 2**22
"""The most elements of a weight widened, or of an input quantised, at a time: 16 MB, which stay in the CPU's cache."""


class _ReplacingLinear(nn.Linear):
    """A layer that replaces a linear layer and takes over its parameters."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.train(linear.training)


class WideningLinear(_ReplacingLinear):
    """An `nn.Linear` with narrow weights, which multiplies many rows in float32.

    As much of the weight as fits in the CPU's cache is converted to float32 at a time. Sums are in float32 and rounded
    once, so the result is at least as exact as the narrow product's. With few rows, with gradients, on other devices
    and under autocast it computes as `nn.Linear`.
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
    """An uninitialised tensor, in memory that each thread reuses for this name, as allocating so much anew is slow."""
    size = math.prod(shape) * dtype.itemsize
    held = getattr(_held, name, None)
    if held is None or len(held) < size:
        with torch.inference_mode(False):  # so that it can be written to inside and outside of inference mode
            held = torch.empty(size, dtype=torch.uint8, device="cpu")
        setattr(_held, name, held)
    return held[:size].view(dtype).view(shape)


class WideningConv2d(nn.Conv2d):
    """An `nn.Conv2d` with narrow weights and inputs, which computes in float32.

    PyTorch's own narrow convolutions, which it uses where oneDNN has none, are slow: in the 7B model they took 30 s.
    With gradients, on other devices and under autocast it computes as `nn.Conv2d`.
    """

    def __init__(self, convolution: nn.Conv2d):
        sizes = (convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation)
        super().__init__(
            *(convolution.in_channels, convolution.out_channels, *sizes, convolution.groups),
            *(convolution.bias is not None, convolution.padding_mode, "meta"),  # parameters are replaced below
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
    """An `nn.Linear` that multiplies many rows in float32 with oneDNN, which PyTorch uses for narrow dtypes anyway.

    The operator is the one to which PyTorch's own compiler lowers linear layers on CPUs. With few rows, with gradients,
    on other devices and under autocast it computes as `nn.Linear`.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in the input's dtype."""
        if input.dtype is not torch.float32 or not _are_many_rows(input, self, MANY_ROWS):
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def _are_many_rows(input: torch.Tensor, linear: nn.Linear, many: int) -> bool:
    """Whether a layer's input has `many` rows or more, and `_computes_plainly`."""
    return input.numel() >= many * linear.in_features and _computes_plainly(input, linear)


def _computes_plainly(input: torch.Tensor, layer: nn.Linear | nn.Conv2d) -> bool:
    """Whether a layer runs on the CPU in its own dtype, without gradients and autocast."""
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
"""The layers to replace and their replacements, by the name of the kernel."""


def replace_layers(model: nn.Module, kernel: str) -> None:
    """Replace a model's layers by those of a kernel in `LAYERS`, in place.

    Parameters and their names stay the same. Layers that are not on the CPU are not replaced.
    """
    kinds = LAYERS[kernel]
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) in kinds and child.weight.device.type == "cpu":
                setattr(module, name, kinds[type(child)](child))
