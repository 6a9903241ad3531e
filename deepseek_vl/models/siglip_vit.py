"""The SigLIP vision transformer (arXiv 2303.15343), built from timm's `VisionTransformer`.

Pre-norm ViT with learned positions, no class token, exact GELU and a final norm. The attention-pooling head of the
pretrained network is kept, so that checkpoints load strictly, but DeepSeek-VL never runs it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from deepseek_vl.checkpoints.read import load_tower_checkpoint
from deepseek_vl.models.variants import select_variant


@dataclass(frozen=True)
class SigLIPVariant:
    """One row of the table of published SigLIP networks; sizes in pixels, channels and counts."""

    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float
    image_size: int = 384


SIGLIP_VARIANTS = {
    "siglip_so400m_patch14_384": SigLIPVariant(patch_size=14, width=1152, layers=27, heads=16, mlp_ratio=3.7362),
    "siglip_so400m_patch14_224": SigLIPVariant(patch_size=14, width=1152, layers=27, heads=16, mlp_ratio=3.7362),
    "siglip_large_patch16_384": SigLIPVariant(patch_size=16, width=1024, layers=24, heads=16, mlp_ratio=4.0),
}


class SigLIPVisionTransformer(VisionTransformer):
    """timm's `VisionTransformer` that returns patch features rather than the pooled vector.

    Args:
        variant: sizes of the network.
        layers: number of blocks to build, at most `variant.layers`.
        ignore_head: return the patch features; otherwise the attention-pooled vector.
    """

    def __init__(self, variant: SigLIPVariant, layers: int, ignore_head: bool = True):
        super().__init__(
            img_size=variant.image_size,
            patch_size=variant.patch_size,
            embed_dim=variant.width,
            depth=layers,
            num_heads=variant.heads,
            mlp_ratio=variant.mlp_ratio,
            class_token=False,
            global_pool="map",
            num_classes=0,
            # On the meta device timm's initialisation takes a third of a second and has no effect.
            weight_init="skip" if torch.get_default_device().type == "meta" else "",
        )
        self.ignore_head = ignore_head

    # timm's switch under the name by which transformers sets it
    gradient_checkpointing = property(lambda self: self.grad_checkpointing, VisionTransformer.set_grad_checkpointing)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """`images` [B, 3, S, S] -> [B, N, width], or [B, width] with the pooling head. N = (S // patch_size) ** 2."""
        return self.forward_features(images) if self.ignore_head else super().forward(images)


def create_siglip_vit(
    model_name: str = "siglip_so400m_patch14_384",
    image_size: int = 384,
    select_layer: int = -1,
    ckpt_path: str = "",
    ignore_head: bool = True,
    **overrides: Any,
) -> SigLIPVisionTransformer:
    """Build a SigLIP tower (reference: `create_siglip_vit`).

    Args:
        model_name: a row of `SIGLIP_VARIANTS`.
        image_size: side of the square input in pixels; the grid of patches follows it, not the name.
        select_layer: which block's output to use. L <= 0 counts from the end (-1 is the last); L > 0 keeps the first L
            blocks. Later blocks are not built; the final norm follows the last block that is.
        ckpt_path: optional weights file for this tower alone.
        ignore_head: return patch features [B, N, width] rather than the pooled [B, width].
        overrides: fields of `SigLIPVariant` that replace the row's.

    Raises:
        ValueError: for an unknown name or override, or a `select_layer` before the first block.
    """
    variant = select_variant(SIGLIP_VARIANTS, model_name, image_size=image_size, **overrides)
    layers = min(variant.layers, select_layer if select_layer > 0 else variant.layers + select_layer + 1)
    if layers < 0:
        raise ValueError(f"select_layer={select_layer} is before the first of the {variant.layers} blocks.")
    tower = SigLIPVisionTransformer(variant, layers, ignore_head)
    load_tower_checkpoint(tower, ckpt_path)
    return tower
