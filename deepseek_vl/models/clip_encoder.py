"""The vision towers that DeepSeek-VL's configs name: a single network with normalisation, or a hybrid of two."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from deepseek_vl.checkpoints.read import load_tower_checkpoint
from deepseek_vl.models.sam import SAM_VARIANTS, SAMVisionTransformer, create_sam_vit
from deepseek_vl.models.variants import select_variant

SELECT_FEATURES = ("patch", "cls_patch", "same")
CONCAT_TYPES = ("feature", "sequence", "add", "tuple")


def tower_fields(params: Mapping[str, Any]) -> dict[str, Any]:
    """All sizes of the SigLIP or SAM tower that a config's parameters name: the table's, unless given there.

    Raises:
        ValueError: for a name that is in neither table.
    """
    if params["model_name"].startswith("sam"):
        table = SAM_VARIANTS
    else:
        # timm takes seconds to import, which a program that only needs the processor should not pay.
        from deepseek_vl.models.siglip_vit import SIGLIP_VARIANTS as table
    published = dataclasses.asdict(select_variant(table, params["model_name"]))
    return {**published, **{name: value for name, value in params.items() if name in published}}


class CLIPVisionTower(nn.Module):
    """A vision transformer, with optional normalisation of its pixels and selection of its features.

    Args:
        model_name: `siglip...` or `sam...` for a row of the towers' tables, whose output is returned as it is; any
            other name is the id or path of a `transformers.CLIPVisionModel`.
        image_size: side of the square input in pixels. A CLIP model keeps its own.
        select_feature: for CLIP models, what to return of the hidden states: `patch` drops the class token,
            `cls_patch` keeps it, `same` changes nothing. SigLIP and SAM towers always use `same`.
        select_layer: the layer whose output is used, counted as in `create_siglip_vit`; an index into
            `hidden_states` for CLIP models. SAM ignores it.
        select_layers: kept as an attribute, but not used, as in the reference.
        ckpt_path: optional weights file for this tower alone.
        pixel_mean: per channel; pixels are normalised only if mean and deviation are given.
        pixel_std: per channel.
        output_dim: width of the features; used by the hybrid tower for its layer norms.
        overrides: fields of the table's row to replace, such as `width` or `layers`.

    Raises:
        ValueError: for an unknown model name, `select_feature` or override.
    """

    def __init__(
        self,
        model_name: str = "siglip_large_patch16_384",
        image_size: int = 336,
        select_feature: str = "patch",
        select_layer: int = -2,
        select_layers: list[int] | None = None,
        ckpt_path: str = "",
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        output_dim: int | None = None,
        **overrides: Any,
    ):
        super().__init__()
        self.model_name = model_name
        self.image_size = image_size
        self.select_feature = select_feature
        self.select_layer = select_layer
        self.select_layers = select_layers
        self.output_dim = output_dim
        self.pixel_mean = None if pixel_mean is None else tuple(pixel_mean)
        self.pixel_std = None if pixel_std is None else tuple(pixel_std)

        if model_name.startswith("siglip"):
            # timm takes seconds to import, which a program that only needs the processor should not pay.
            from deepseek_vl.models.siglip_vit import create_siglip_vit

            self.select_feature = "same"
            self.vision_tower = create_siglip_vit(
                model_name, image_size=image_size, select_layer=select_layer, ckpt_path=ckpt_path, **overrides
            )
        elif model_name.startswith("sam"):
            self.select_feature = "same"
            self.vision_tower = create_sam_vit(model_name, image_size=image_size, ckpt_path=ckpt_path, **overrides)
        else:
            if overrides:
                raise ValueError(f"Unknown key {', '.join(map(repr, overrides))} for CLIP vision tower {model_name!r}.")
            if select_feature not in SELECT_FEATURES:
                raise ValueError(f"Unknown select_feature {select_feature!r}; known are {', '.join(SELECT_FEATURES)}.")
            self.vision_tower = _load_clip(model_name)
            load_tower_checkpoint(self.vision_tower, ckpt_path)
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """Freeze weights that are in checkpoints but not in the forward pass: pooling and layers after the selected."""
        tower: Any = self.vision_tower
        unused = [tower.attn_pool] if getattr(tower, "ignore_head", False) else []
        if not self.model_name.startswith(("siglip", "sam")):
            clip = getattr(tower, "vision_model", tower)  # newer versions of transformers lack this level
            layers, chosen = clip.encoder.layers, self.select_layer
            unused = [clip.post_layernorm, layers[chosen if chosen >= 0 else len(layers) + 1 + chosen :]]
        for module in unused:
            module.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, S, S] -> [B, N, width]; a SAM tower gives its map, [B, C, h, h]."""
        if self.pixel_mean is not None and self.pixel_std is not None:
            mean, std = (images.new_tensor(values)[:, None, None] for values in (self.pixel_mean, self.pixel_std))
            images = (images - mean) / std
        if self.model_name.startswith(("siglip", "sam")):
            return self.vision_tower(images)
        features = self.vision_tower(images, output_hidden_states=True).hidden_states[self.select_layer]
        return features[:, 1:] if self.select_feature == "patch" else features


def _load_clip(name_or_path: str) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    if torch.empty(0).is_meta:  # inside `from_pretrained`: the weights are in the model's own checkpoint
        return CLIPVisionModel(CLIPVisionConfig.from_pretrained(name_or_path))
    return CLIPVisionModel.from_pretrained(name_or_path, dtype=torch.get_default_dtype())


class HybridVisionTower(nn.Module):
    """SAM at high resolution beside SigLIP at low resolution (paper, section 3.1).

    Args:
        high_res_cfg: arguments of the `CLIPVisionTower` at high resolution. Its neck is resized to four times the
            low-resolution grid, unless there is a `neck_size` among them.
        low_res_cfg: arguments of the `CLIPVisionTower` at low resolution.
        freeze_high: freeze the high-resolution tower. If not frozen, only its necks and downsampling convolutions are
            trained.
        freeze_low: freeze the low-resolution tower.
        concat_type: `tuple` gives (high, low); `feature` concatenates them along the last dimension and `sequence`
            along the tokens, high first; `add` sums them.

    Raises:
        ValueError: for an unknown `concat_type` or key, and what `CLIPVisionTower` raises.
    """

    def __init__(
        self,
        high_res_cfg: Mapping[str, Any],
        low_res_cfg: Mapping[str, Any],
        freeze_high: bool = False,
        freeze_low: bool = False,
        concat_type: str = "tuple",
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ValueError(f"Unknown key {', '.join(map(repr, unknown))} for HybridVisionTower.")
        if concat_type not in CONCAT_TYPES:
            raise ValueError(f"Unknown concat_type {concat_type!r}; known are {', '.join(CONCAT_TYPES)}.")
        self.concat_type = concat_type
        self.freeze_high = freeze_high
        self.freeze_low = freeze_low

        self.vision_tower_low = CLIPVisionTower(**low_res_cfg)
        self.low_res_size = self.vision_tower_low.image_size
        high: dict[str, Any] = {**self._neck_size(high_res_cfg), **high_res_cfg}
        self.vision_tower_high = CLIPVisionTower(**high)
        # The forward pass uses neither norm; the published checkpoints have both.
        self.high_layer_norm = nn.LayerNorm(self.vision_tower_high.output_dim or 1024)
        self.low_layer_norm = nn.LayerNorm(self.vision_tower_low.output_dim or 1024)

        self.freeze_towers()

    def freeze_towers(self) -> None:
        """Freeze the weights that `freeze_high` and `freeze_low` say."""
        if self.freeze_high:
            self.vision_tower_high.requires_grad_(False).eval()
        else:
            for name, parameter in self.vision_tower_high.named_parameters():
                parameter.requires_grad_("neck" in name or "downsamples" in name)
        if self.freeze_low:
            self.vision_tower_low.requires_grad_(False).eval()
        self.freeze_unused()

    def freeze_unused(self) -> None:
        """Freeze weights that are in checkpoints but not in the forward pass."""
        for module in (self.high_layer_norm, self.low_layer_norm):
            module.requires_grad_(False)
        for tower in (self.vision_tower_high, self.vision_tower_low):
            tower.freeze_unused()

    def _neck_size(self, high_res_cfg: Mapping[str, Any]) -> dict[str, int]:
        if not high_res_cfg.get("model_name", "").startswith("sam"):
            return {}
        patch_embed = getattr(self.vision_tower_low.vision_tower, "patch_embed", None)
        return {"neck_size": 4 * patch_embed.grid_size[0]} if hasattr(patch_embed, "grid_size") else {}

    def forward(
        self, images: torch.Tensor, low_images: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Encode images in both resolutions.

        Args:
            images: [B, 3, S, S] with S the high-resolution size.
            low_images: [B, 3, s, s] in the low resolution; None to make them from `images`.

        Returns:
            Features [B, N, width], or a (high, low) pair of them.
        """
        if low_images is None:
            size = (self.low_res_size, self.low_res_size)
            low_images = F.interpolate(images.float(), size=size, mode="bilinear", antialias=True).to(images.dtype)
        high, low = self.vision_tower_high(images), self.vision_tower_low(low_images)
        if isinstance(self.vision_tower_high.vision_tower, SAMVisionTransformer):
            high = rearrange(high, "b c h w -> b (h w) c")

        if self.concat_type == "tuple":
            return high, low
        if self.concat_type == "add":
            return high + low
        return torch.cat([high, low], dim=-1 if self.concat_type == "feature" else 1)
