"""Linear layers with int4 weights, for inference on CPUs: half of int8's memory, and as fast for one row.

For few rows, PyTorch's kernel reads the packed weights directly. For many rows it is slow; there the weights are
widened, as much at a time as fits in the CPU's cache, and multiplied as floating point numbers.
"""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from deepseek_vl.kernels.layers import CHUNK_ELEMENTS, scratch
from deepseek_vl.kernels.policy import INT4_WIDENED_ROWS, multiplies_fast
from deepseek_vl.kernels.quantized import QuantizedLinear

GROUP = 32
"""The size of a group: this many consecutive inputs of an output share a scale and a zero point."""

WIDENED_ELEMENTS = 2**21
"""The most elements of a weight widened at a time."""

BLOCKS = (64, 32)
"""The numbers of outputs in a block of packed weights: with AVX-512, and with AVX2."""


class Int4Linear(QuantizedLinear):
    """A linear layer with int4 weights, and a bfloat16 scale and zero point for each group.

    Products of few rows are in bfloat16; those of many rows are in bfloat16 where that is fast, otherwise in float32.
    """

    def __init__(self, *linears: nn.Linear):
        super().__init__(*linears)
        weight = torch.cat([linear.weight.detach() for linear in linears])
        blocks = -(-self.out_features // BLOCKS[0]) * (BLOCKS[0] // block_size())  # whole ones, padded with 0
        self._packed = torch.empty(blocks, self.in_features, block_size() // 2, dtype=torch.uint8)
        outputs = blocks * block_size()
        self._scales = torch.zeros(self.in_features // GROUP, outputs, 2, dtype=torch.bfloat16)  # and zero points
        rows = max(1, CHUNK_ELEMENTS // (self.in_features * BLOCKS[0])) * BLOCKS[0]
        for start in range(0, outputs, rows):
            part = weight[start : start + rows].float()
            part = F.pad(part, (0, 0, 0, min(rows, outputs - start) - len(part)))
            levels, self._scales[:, start : start + rows] = _quantised(part)
            self._packed[start // block_size() : (start + rows) // block_size()] = _pack(levels, block_size())

    @classmethod
    def takes(cls, linear: nn.Linear) -> bool:
        """Whether a layer's inputs divide into groups."""
        return linear.in_features % GROUP == 0

    @property
    def weight_bytes(self) -> int:
        return self._packed.nbytes + self._scales.nbytes

    def _multiplied(self, rows: torch.Tensor) -> torch.Tensor:
        output = self._few(rows) if len(rows) < INT4_WIDENED_ROWS else self._many(rows)
        output = output[:, : self.out_features]
        return output if self._bias is None else output + self._bias

    def _few(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply with PyTorch's kernel: [rows, in_features] -> bfloat16 [rows, outputs of whole blocks]."""
        packed = self._packed.view(-1, self.in_features // 2)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(rows.bfloat16(), packed, GROUP, self._scales)

    def _many(self, rows: torch.Tensor) -> torch.Tensor:
        """Multiply with widened weights: [rows, in_features] -> [rows, outputs of whole blocks]."""
        rows = rows.to(torch.bfloat16 if multiplies_fast(torch.bfloat16) else torch.float32)
        output = rows.new_empty(len(rows), len(self._packed), 2, block_size() // 2)
        step = max(1, WIDENED_ELEMENTS // (self.in_features * block_size()))
        for start in range(0, len(self._packed), step):
            weight = self._widened(slice(start, start + step), rows.dtype)
            product = torch.mm(rows, weight, out=scratch("product", (len(rows), weight.shape[1]), rows.dtype))
            output[:, start : start + step] = product.view(len(rows), 2, -1, block_size() // 2).transpose(1, 2)
        return output.flatten(1)

    def _widened(self, blocks: slice, dtype: torch.dtype) -> torch.Tensor:
        """The widened weights of some blocks: [in_features, outputs], first each block's first half of outputs."""
        # By inputs instead of by blocks, so that all that follows runs through memory in order.
        packed = self._packed[blocks].transpose(0, 1)
        packed = scratch("packed", packed.shape, torch.uint8).copy_(packed).flatten(1)
        groups, outputs = len(self._scales), packed.shape[1]
        numbers = self._scales.view(groups, -1, 2, block_size() // 2, 2)[:, blocks].to(dtype)
        widened = scratch("widened", (groups, GROUP, 2, outputs), dtype)
        for half in (0, 1):
            levels = scratch("levels", packed.shape, dtype).copy_(_half(packed, half)).view(groups, GROUP, outputs)
            scales, zeros = numbers[:, :, half].flatten(1, 2)[:, None].unbind(-1)
            torch.addcmul(zeros.contiguous(), levels, scales.contiguous(), out=widened[:, :, half])
        return widened.view(self.in_features, 2 * outputs)


def check_int4() -> None:
    """Check that there is an int4 kernel for this processor.

    Raises:
        ValueError: if there is none, or this PyTorch packs weights in an unknown way.
    """
    block_size()


@functools.cache
def block_size() -> int:
    """The number of outputs in a block of packed weights on this processor.

    Raises:
        ValueError: as `check_int4`.
    """
    levels = torch.randint(16, (BLOCKS[0], GROUP), generator=torch.Generator().manual_seed(0))
    for size in BLOCKS:
        packed = _pack(levels, size)
        unpacked = torch.cat([_half(packed, half).clone() for half in (0, 1)], -1)
        if torch.equal(unpacked.transpose(1, 2).reshape(levels.shape) + 8, levels):
            return size
    raise ValueError("There is no int4 kernel for this processor, or none that is known; use int8.")


def _pack(levels: torch.Tensor, size: int) -> torch.Tensor:
    """Pack levels of 0 to 15 [N, K] for the kernel, in blocks of `size` outputs: uint8 [blocks, K, size / 2]."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels.int(), 1)
    return packed.view(-1, levels.shape[1], size // 2)


def _half(packed: torch.Tensor, half: int) -> torch.Tensor:
    """Half 0 (the lower four bits of each byte) or half 1 (the upper) of each block's outputs: int8, levels less 8."""
    numbers = scratch("numbers", packed.shape, torch.uint8)
    if half == 0:
        torch.bitwise_and(packed, 15, out=numbers)
    else:
        torch.bitwise_right_shift(packed, 4, out=numbers)
    return numbers.view(torch.int8).sub_(8)


def _quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [N, K] -> levels of 0 to 15 [N, K]; scales and the values of level 8, bfloat16 [K / GROUP, N, 2]."""
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    scales = ((high - low) / 15).clamp_(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    zeros = (low + 8 * scales).bfloat16()
    levels = groups.sub(zeros).div_(scales).round_().add_(8).clamp_(0, 15)
    return levels.view_as(weight), torch.cat([scales, zeros], -1).transpose(0, 1)
