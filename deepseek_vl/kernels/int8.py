"""Linear layers with int8 weights and inputs, for inference on CPUs."""

import warnings
import weakref
from typing import NoReturn

import torch
from torch import nn

from deepseek_vl.kernels.linear import CHUNK_ELEMENTS
from deepseek_vl.kernels.policy import MANY_ROWS, kernel_for

QUANTISED_ELEMENTS = 2**20
"""So much of a weight is quantised at a time: 4 MB as float32, which stay in the cache."""

SMALLEST = 2.0**-100
"""Of what inputs and weights are scaled by: what it is divided by is far from overflowing."""

LEVELS = {"onednn": 127, "onednn-7-bit": 63, "fbgemm-7-bit": 63}
"""Inputs are quantised to whole numbers from minus this to this, by the name of the kernel."""

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of Llama's layers that get the same input one after the other."""


class Int8Linear(nn.Module):
    """A linear layer with int8 weights (symmetric, one scale per output) and inputs quantised row by row.

    The product is `OneDNNProduct`'s or `FBGEMMProduct`'s. Other kernels want compilation to be fast (torchao), or
    quantise the weights only, which leaves the arithmetic slow.

    Args:
        linears: the layer to replace, on the CPU; or several of the same input, whose outputs are then one.
    """

    def __init__(self, *linears: nn.Linear):
        super().__init__()
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        weights, scales = zip(*(_quantised(linear.weight.detach()) for linear in linears), strict=True)
        kernel = kernel_for("int8", torch.int8)
        product = FBGEMMProduct if kernel.startswith("fbgemm") else OneDNNProduct
        self._levels = LEVELS[kernel]
        # Neither parameters nor buffers: they are on the CPU, and of their dtypes, whatever the model is moved to.
        self._product = product(torch.cat(weights), torch.cat(scales).flatten(), self._levels)
        self._bias = None
        if any(linear.bias is not None for linear in linears):
            biases = (torch.zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears)
            self._bias = torch.cat([bias.detach().float() for bias in biases])
        self._kept: tuple[weakref.ref[torch.Tensor], torch.Tensor] | None = None
        self.eval()

    @property
    def weight_bytes(self) -> int:
        """How much memory the weight takes."""
        return self.in_features * self.out_features

    @torch.no_grad()
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in the input's dtype, without a gradient."""
        rows = input.reshape(-1, self.in_features)
        step = max(MANY_ROWS, CHUNK_ELEMENTS // max(self.in_features, self.out_features))
        if len(rows) <= step:
            output = self._multiplied(rows)
        else:
            output = rows.new_empty(len(rows), self.out_features)
            for start in range(0, len(rows), step):
                output[start : start + step] = self._multiplied(rows[start : start + step])
        return output.to(input.dtype).reshape(*input.shape[:-1], self.out_features)

    def _multiplied(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, in_features] -> float32 [rows, out_features]."""
        scales = _scales(rows, self._levels)  # [rows, 1]
        output = self._product(rows / scales).mul_(scales)
        return output if self._bias is None else output.add_(self._bias)

    def once(self, input: torch.Tensor, is_last: bool) -> torch.Tensor:
        """As `forward`, for siblings that get the same tensor one after the other: kept until the last has had it."""
        kept = self._kept  # read once: another thread may change it
        output = kept[1] if kept is not None and kept[0]() is input else self(input)
        self._kept = None if is_last else (weakref.ref(input), output)
        return output

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def train(self, mode: bool = True) -> "Int8Linear":
        if mode:
            raise ValueError("A model with int8 weights cannot learn; load it without quantize.")
        return super().train(mode)

    def state_dict(self, *args: object, **kwargs: object) -> NoReturn:
        raise ValueError("A model with int8 weights cannot be saved; save the one that it was made from.")


class OneDNNProduct:
    """Inputs times int8 weights by oneDNN, with the operator to which PyTorch's compiler lowers quantised models.

    The kernel takes unsigned inputs, so that something stands for 0.

    Args:
        weight: int8 [N, K].
        scales: what each of its rows is to be multiplied with, float32 [N].
        levels: inputs are quantised to whole numbers from minus this to this.
    """

    def __init__(self, weight: torch.Tensor, scales: torch.Tensor, levels: int):
        self._weight = torch.ops.onednn.qlinear_prepack(weight, None)
        self._scales = scales
        self._zero_point = torch.zeros(len(weight), dtype=torch.long)
        self._zero = levels + 1
        self._middle = torch.tensor([self._zero + 0.5])  # conversion cuts off what 0.5 rounds up

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """float32 [rows, K] within the levels, which may be overwritten -> float32 [rows, N]."""
        return torch.ops.onednn.qlinear_pointwise(
            *(rows.add_(self._middle).to(torch.uint8), 1.0, self._zero),
            *(self._weight, self._scales, self._zero_point),
            *(None, 1.0, 0, torch.float32),  # no bias, and the output as it is
            *("none", [], ""),  # nor any operation after it
        )


class FBGEMMProduct:
    """As `OneDNNProduct`, by FBGEMM, which on x86 without VNNI is several times faster with one row.

    PyTorch may drop it: the tensors that its weights are packed from are deprecated.
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


class Int8Sibling(nn.Module):
    """One of several layers of the same input: a part of the `Int8Linear` of them all, which runs once.

    Args:
        whole: the layer that the siblings share.
        start, end: which of its outputs are this layer's.
    """

    def __init__(self, whole: Int8Linear, start: int, end: int):
        super().__init__()
        self.whole = whole
        self.in_features, self.out_features = whole.in_features, end - start
        self._start, self._end = start, end

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in the input's dtype."""
        output = self.whole.once(input, is_last=self._end == self.whole.out_features)
        return output[..., self._start : self._end]


def _scales(rows: torch.Tensor, levels: int) -> torch.Tensor:
    """What maps each of the rows [n, K] to -levels ... levels: float32 [n, 1], positive."""
    return rows.abs().amax(dim=-1, keepdim=True).float().clamp_(min=SMALLEST).div_(levels)


def _quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [N, K] -> int8 [N, K], and what each of its rows is to be multiplied with, float32 [N, 1]."""
    quantised = torch.empty_like(weight, dtype=torch.int8)
    scales = weight.new_empty(len(weight), 1, dtype=torch.float32)
    step = max(1, QUANTISED_ELEMENTS // weight.shape[1])
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        wide = weight[part].to(torch.float32, copy=True)
        scales[part] = scale = _scales(wide, 127)
        quantised[part] = wide.div_(scale).round_()
    return quantised, scales


def quantize_int8(model: nn.Module) -> None:
    """Replace a model's linear layers by `Int8Linear`, in place and one by one: float weights go as int8 ones come.

    Raises:
        ValueError: if the model is not on the CPU.
    """
    for module in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        linears = {name: child for name, child in module.named_children() if isinstance(child, nn.Linear)}
        for names in (*SIBLINGS, *((name,) for name in linears)):
            if linears.keys() >= set(names):
                _replace(module, {name: linears.pop(name) for name in names})


def _replace(module: nn.Module, linears: dict[str, nn.Linear]) -> None:
    """Replace a layer of a module, or several of the same input in the order in which they get it."""
    for device in {linear.weight.device.type for linear in linears.values()} - {"cpu"}:
        raise ValueError(f"There is no int8 kernel for {device}; quantise on the CPU.")
    whole, start = Int8Linear(*linears.values()), 0
    for name, linear in linears.items():
        end = start + linear.out_features
        setattr(module, name, whole if len(linears) == 1 else Int8Sibling(whole, start, end))
        start = end
