"""The vision-language adaptor: from the vision towers' width to the language model's (paper, section 3.1)."""

from typing import Any

import torch
from torch import nn

SPLIT_PROJECTOR = "low_high_hybrid_split_mlp_gelu"


class MlpProjector(nn.Module):
    """Projects image features to the language model's width, each feature on its own.

    Args:
        cfg: object with attributes and `.get` (an `AttrDict`):
            projector_type: `identity`, `linear`, `mlp_gelu` or `low_high_hybrid_split_mlp_gelu`;
            input_dim: width of the vision features;
            n_embed: width of the language model;
            depth: number of linear layers, 1 if absent.

    Raises:
        ValueError: for an unknown `projector_type`.
    """

    def __init__(self, cfg: Any):
        super().__init__()
        self.cfg = cfg
        projector_type, depth = cfg.get("projector_type"), cfg.get("depth", 1)

        if projector_type == "identity":
            self.layers = nn.Identity()
        elif projector_type == "linear":
            self.layers = nn.Linear(cfg.input_dim, cfg.n_embed)
        elif projector_type == "mlp_gelu":
            self.layers = nn.Sequential(nn.Linear(cfg.input_dim, cfg.n_embed), *_hidden_layers(cfg.n_embed, depth))
        elif projector_type == SPLIT_PROJECTOR:
            self.high_up_proj = nn.Linear(cfg.input_dim, cfg.n_embed // 2)
            self.low_up_proj = nn.Linear(cfg.input_dim, cfg.n_embed // 2)
            self.layers = nn.Sequential(*_hidden_layers(cfg.n_embed, depth))
        else:
            raise ValueError(
                f"Unknown projector_type {projector_type!r}; known are identity, linear, mlp_gelu, {SPLIT_PROJECTOR}."
            )

    def forward(self, features: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[B, N, input_dim], or a (high, low) pair of them, -> [B, N, n_embed].

        Raises:
            ValueError: for a pair with a projector type that takes one tensor.
        """
        if isinstance(features, tuple):
            if self.cfg.projector_type != SPLIT_PROJECTOR:
                raise ValueError(
                    f"The vision tower gives a (high, low) pair, which projector_type {self.cfg.projector_type!r} does "
                    f"not take; use {SPLIT_PROJECTOR!r} or another concat_type in the vision config."
                )
            high, low = features
            features = torch.cat([self.high_up_proj(high), self.low_up_proj(low)], dim=-1)  # [B, N, n_embed]
        return self.layers(features)


def _hidden_layers(width: int, depth: int) -> list[nn.Module]:
    """`depth - 1` pairs of GELU and Linear."""
    return [layer for _ in range(1, depth) for layer in (nn.GELU(), nn.Linear(width, width))]
