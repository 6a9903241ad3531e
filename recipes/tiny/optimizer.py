"""The small model's optimizer: Muon for the matrices of its layers, AdamW for all else."""

from collections.abc import Callable
from typing import Any

import torch
from timm.optim import muon
from torch import nn

from deepseek_vl.kernels.policy import multiplies_fast

NEWTON_SCHULZ = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
"""Coefficients of Newton and Schulz's iteration: timm's default, `quintic` (from modded-nanogpt)."""


class Float32Muon(muon.Muon):
    """timm's Muon with matrices made orthogonal in float32, for processors that multiply bfloat16 slowly.

    timm's has no argument for the dtype. The matrices are those of groups without `use_fallback`; timm's own step
    updates the other groups.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step, which sets the matrices' gradients to None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for matrix in group["params"] if not group.get("use_fallback") else ():
                if matrix.grad is not None:
                    self._step(matrix, group)
                    matrix.grad = None  # or timm would use it as well
        super().step()
        return loss

    def _step(self, matrix: nn.Parameter, group: dict[str, Any]) -> None:
        state = self.state[matrix]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(matrix)
        momentum = state["momentum_buffer"]
        momentum.lerp_(matrix.grad, 1 - group["momentum"])
        update = muon.zeropower_via_newtonschulz(
            matrix.grad.lerp(momentum, group["momentum"]),  # Nesterov's
            steps=len(NEWTON_SCHULZ),
            coefficients=NEWTON_SCHULZ,
            eps=group["eps"],
            dtype=torch.float32,
        )
        matrix.mul_(1 - group["lr"] * group["weight_decay"])
        matrix.add_(update, alpha=-group["lr"] * muon.get_lr_scale(matrix.shape))


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for embeddings, heads and vectors.

    A vision tower with random weights learns in a fraction of the steps that AdamW takes. The tower of a whole model,
    which is trained already, learns at a third of the rate.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim == 2 and "embed" not in name and "head" not in name
        can_see = name.startswith("vision_model.")
        rate = learning_rate / (3 if can_see else 1)
        options = {"lr": rate, "weight_decay": 0.02} if is_matrix else {"lr": rate / 2, "use_fallback": True}
        groups.setdefault((is_matrix, can_see), {"params": [], "weight_decay": 0.0, **options})["params"].append(
            parameter
        )
    optimizer = muon.Muon if torch.cuda.is_available() or multiplies_fast(torch.bfloat16) else Float32Muon
    return optimizer(list(groups.values()), lr=learning_rate, nesterov=True, betas=(0.9, 0.98))
