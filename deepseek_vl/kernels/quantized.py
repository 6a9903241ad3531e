"""The base class of linear layers with quantised weights on CPUs, and replacing a model's layers by them."""

import weakref
from typing import NoReturn

import torch
from torch import nn

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of Llama's layers that have the same input, in the order in which they run."""


class QuantizedLinear(nn.Module):
    """A linear layer with quantised weights, for inference on CPUs.

    Subclasses quantise the weights in their constructor, and implement `weight_bytes` and `_multiplied`.

    Args:
        linears: the layer to replace, on the CPU; or several of the same input, whose outputs are concatenated.
    """

    def __init__(self, *linears: nn.Linear):
        super().__init__()
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        # Neither parameters nor buffers, so that they keep device and dtype when the model is moved or cast.
        self._bias = None
        if any(linear.bias is not None for linear in linears):
            biases = (torch.zeros(linear.out_features) if linear.bias is None else linear.bias for linear in linears)
            self._bias = torch.cat([bias.detach().float() for bias in biases])
        self._kept: tuple[weakref.ref[torch.Tensor], torch.Tensor] | None = None
        self.eval()

    @classmethod
    def takes(cls, linear: nn.Linear) -> bool:
        """Whether a layer can be quantised in this way."""
        return True

    @property
    def weight_bytes(self) -> int:
        """The size of the weight in bytes."""
        raise NotImplementedError

    @torch.no_grad()
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in the input's dtype, without a gradient."""
        output = self._multiplied(input.reshape(-1, self.in_features))
        return output.to(input.dtype).reshape(*input.shape[:-1], self.out_features)

    def _multiplied(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, in_features] -> [rows, out_features], with the bias."""
        raise NotImplementedError

    def once(self, input: torch.Tensor, is_last: bool) -> torch.Tensor:
        """As `forward`, for siblings with the same input: computed once, and kept until the last has had the output."""
        kept = self._kept  # read once: another thread may change it
        output = kept[1] if kept is not None and kept[0]() is input else self(input)
        self._kept = None if is_last else (weakref.ref(input), output)
        return output

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def train(self, mode: bool = True) -> "QuantizedLinear":
        if mode:
            raise ValueError("A model with quantised weights cannot learn; load it without quantize.")
        return super().train(mode)

    def state_dict(self, *args: object, **kwargs: object) -> NoReturn:
        raise ValueError("A model with quantised weights cannot be saved; save the one that it was made from.")


class QuantizedSibling(nn.Module):
    """One of several layers with the same input. Their weights are one `QuantizedLinear`, which runs once for all.

    Args:
        whole: the layer that the siblings share.
        start, end: this layer's slice of the outputs.
    """

    def __init__(self, whole: QuantizedLinear, start: int, end: int):
        super().__init__()
        self.whole = whole
        self.in_features, self.out_features = whole.in_features, end - start
        self._start, self._end = start, end

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features], in the input's dtype."""
        output = self.whole.once(input, is_last=self._end == self.whole.out_features)
        return output[..., self._start : self._end]


def quantize_layers(model: nn.Module, kind: type[QuantizedLinear]) -> None:
    """Replace a model's linear layers by quantised ones, in place, if `kind.takes` them.

    They are replaced one by one, so that all float weights and all quantised ones are never in memory together.

    Raises:
        ValueError: if the model is not on the CPU.
    """
    for module in [module for module in model.modules() if not isinstance(module, nn.Linear)]:
        children = module.named_children()
        linears = {name: child for name, child in children if isinstance(child, nn.Linear) and kind.takes(child)}
        for names in (*SIBLINGS, *((name,) for name in linears)):
            if linears.keys() >= set(names):
                _replace(module, {name: linears.pop(name) for name in names}, kind)


def _replace(module: nn.Module, linears: dict[str, nn.Linear], kind: type[QuantizedLinear]) -> None:
    """Replace a layer of a module, or several with the same input, in the order in which they run."""
    for device in {linear.weight.device.type for linear in linears.values()} - {"cpu"}:
        raise ValueError(f"There is no kernel for quantised weights on {device}; quantise on the CPU.")
    whole, start = kind(*linears.values()), 0
    for name, linear in linears.items():
        end = start + linear.out_features
        setattr(module, name, whole if len(linears) == 1 else QuantizedSibling(whole, start, end))
        start = end
