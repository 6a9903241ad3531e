"""Linear layers with int8 weights and inputs, for inference on CPUs."""

import warnings

import torch
from torch import nn

from deepseek_vl.kernels.layers import CHUNK_ELEMENTS
from deepseek_vl.kernels.policy import MANY_ROWS, kernel_for
from deepseek_vl.kernels.quantized import QuantizedLinear

QUANTISED_ELEMENTS = 2**20
"""The most elements of a weight quantised at a time: 4 MB as float32, which stay in the CPU's cache."""

SMALLEST = 2.0**-100
"""The smallest maximum that rows are scaled by, so that dividing by the scale cannot overflow."""

LEVELS = {"onednn": 127, "onednn-7-bit": 63, "fbgemm": 127, "fbgemm-7-bit": 63}
"""Inputs are quantised to whole numbers from minus this to this, by the name of the kernel."""


class Int8Linear(QuantizedLinear):
    """A linear layer with int8 weights (symmetric, one scale per output) and inputs quantised row by row.

    Products are computed by `OneDNNProduct` or `FBGEMMProduct`. Other kernels are fast only if compiled (torchao), or
    quantise only the weights, which leaves the arithmetic slow.
    """

    def __init__(self, *linears: nn.Linear):
        super().__init__(*linears)
        weights, scales = zip(*(_quantised(linear.weight.detach()) for linear in linears), strict=True)
        kernel = kernel_for("int8", torch.int8)
        product = FBGEMMProduct if kernel.startswith("fbgemm") else OneDNNProduct
        self._levels = LEVELS[kernel]
        self._product = product(torch.cat(weights), torch.cat(scales).flatten(), self._levels)

    @property
    def weight_bytes(self) -> int:
        return self.in_features * self.out_features

    def _multiplied(self, rows: torch.Tensor) -> torch.Tensor:
        step = max(MANY_ROWS, CHUNK_ELEMENTS // max(self.in_features, self.out_features))
        if len(rows) <= step:
            return self._chunk(rows)
        output = rows.new_empty(len(rows), self.out_features)
        for start in range(0, len(rows), step):
            output[start : start + step] = self._chunk(rows[start : start + step])
        return output

    def _chunk(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, in_features] -> float32 [rows, out_features]."""
        scales = _scales(rows, self._levels)  # [rows, 1]
        output = self._product(rows / scales).mul_(scales)
        return output if self._bias is None else output.add_(self._bias)


class OneDNNProduct:
    """Inputs times int8 weights by oneDNN, with the operator to which PyTorch's compiler lowers quantised models.

    The kernel takes unsigned inputs, so they are shifted by a zero point.

    Args:
        weight: int8 [N, K].
        scales: float32 [N], one for each row of the weight.
        levels: inputs are quantised to whole numbers from minus this to this.
    """

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, levels: int):
        self._weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scales = scales
        self._zero_point = torch.zeros(len(weight), dtype=torch.long)
        self._zero = levels + 1
        self._middle = torch.tensor([self._zero + 0.5])  # conversion to integers truncates; adding 0.5 makes it round

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 [rows, K] within the levels, which may be overwritten -> float32 [rows, N]."""
        return torch.ops.onednn.qlinear_pointwise(
            *(rows.add_(self._middle).to(torch.uint8), 1.0, self._zero),
            *(self._weight, self._scales, self._zero_point),
            *(None, 1.0, 0, torch.float32),  # no bias, and the output as it is
            *("none", [], ""),  # no operation is fused after it
        )


class FBGEMMProduct:
    """Inputs times int8 weights by FBGEMM, which on some processors is several times faster with one row.

    The arguments are those of `OneDNNProduct`. PyTorch may drop FBGEMM: the quantised tensors that its weights are
    packed from are deprecated.
    """

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, levels: int):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            zero_points = torch.zeros(len(weight), dtype=torch.long)
            quantised = torch._make_per_channel_quantized_tensor(weight, scales.double(), zero_points, 0)
            self._weight = torch.ops.quantized.linear_prepack(quantised, None)
        self._zero = levels + 1

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """As `OneDNNProduct`."""
        return torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(rows, 1.0, self._zero, self._weight)


def _scales(rows: torch.Tensor, levels: int) -> torch.Tensor:
    """The scales of rows [n, K], which divided by them are within -levels ... levels: float32 [n, 1], positive."""
    return rows.abs().amax(dim=-1, keepdim=True).float().clamp_(min=SMALLEST).div_(levels)


def _quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise a weight [N, K]: int8 [N, K], and the scales of its rows, float32 [N, 1]."""
    quantised = torch.empty_like(weight, dtype=torch.int8)
    scales = weight.new_empty(len(weight), 1, dtype=torch.float32)
    step = max(1, QUANTISED_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        wide = weight[part].to(torch.float32, copy=True)
        scales[part] = scale = _scales(wide, 127)
        quantised[part] = wide.div_(scale).round_()
    return quantised, scales
