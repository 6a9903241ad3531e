"""The configuration in transformers' form."""

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, SamVisionConfig, SiglipVisionConfig
from transformers.image_processing_utils import BaseImageProcessor

from deepseek_vl.checkpoints import layout_configs as layouts
from deepseek_vl.checkpoints.find import FromCheckpoint
from deepseek_vl.checkpoints.special_tokens import token_id_of
from deepseek_vl.models import MultiModalityConfig
from deepseek_vl.models.clip_encoder import tower_fields


class DeepseekVLConfig(FromCheckpoint, PretrainedConfig):
    """The configuration of the plain and the hybrid model, in transformers' form.

    Args:
        text_config: the language model's, a dict or a `LlamaConfig`.
        vision_config: SigLIP's, a dict or a `SiglipVisionConfig`.
        high_res_vision_config: SAM's, a dict or a `SamVisionConfig`; None for a model without a high-resolution tower.
        image_token_id: id of the image tag, in whose places image features go.
    """

    model_type = layouts.SIGLIP
    sub_configs = {
        "text_config": LlamaConfig,
        "vision_config": SiglipVisionConfig,
        "high_res_vision_config": SamVisionConfig,
    }

    def __init__(
        self,
        text_config: LlamaConfig | Mapping[str, Any] | None = None,
        vision_config: SiglipVisionConfig | Mapping[str, Any] | None = None,
        high_res_vision_config: SamVisionConfig | Mapping[str, Any] | None = None,
        image_token_id: int = 100015,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ):
        given = {"text_config": text_config, "vision_config": vision_config or {"hidden_act": "gelu"}}
        for name, config in given.items():
            setattr(self, name, _built(self.sub_configs[name], config))
        self.high_res_vision_config = high_res_vision_config and _built(SamVisionConfig, high_res_vision_config)
        self.image_token_id = image_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)  # ty: ignore[unknown-argument]

    @property
    def is_hybrid(self) -> bool:
        """Whether there is a high-resolution tower."""
        return self.high_res_vision_config is not None

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """The language model's config."""
        return self.text_config

    def to_dict(self) -> dict[str, Any]:
        """All settings; the `model_type` is that of transformers' class for this architecture."""
        output = super().to_dict()
        output["model_type"] = layouts.HYBRID if self.is_hybrid else layouts.SIGLIP
        if not self.is_hybrid:
            output.pop("high_res_vision_config", None)
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """The settings that `save_pretrained` writes."""
        return {**super().to_diff_dict(), "model_type": self.to_dict()["model_type"]}

    def to_multi_modality(self) -> MultiModalityConfig:
        """The same network's configuration in the reference's form.

        Its towers do not normalise pixels, as in transformers' form the image processor does.

        Raises:
            ValueError: for a setting that DeepSeek-VL has no place for.
        """
        config = layouts.to_reference(self.to_dict(), {}, tower_fields)
        for tower in ("low_res_cfg", "high_res_cfg"):
            if tower in config["vision_config"]["params"]:
                config["vision_config"]["params"][tower] |= {"pixel_mean": None, "pixel_std": None}
        return MultiModalityConfig(**config)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers' hook that reads `config.json`, which may be in the reference's layout.

        Raises:
            ValueError: for a setting that transformers' form has no place for.
        """
        path = pretrained_model_name_or_path
        config, unused = super().get_config_dict(path, **kwargs)
        if config.get("model_type") == MultiModalityConfig.model_type:
            images, _ = BaseImageProcessor.get_image_processor_dict(path)
            config = layouts.to_transformers(config, images, token_id_of(layouts.IMAGE_TAG, path), tower_fields)
        if config.get("model_type") in layouts.TRANSFORMERS_TYPES:
            config["model_type"] = cls.model_type  # one class for both
        return config, unused


def _built(config_class: type[PretrainedConfig], config: Any) -> PretrainedConfig:
    if isinstance(config, PretrainedConfig):
        return config
    return config_class(**{name: value for name, value in (config or {}).items() if name != "model_type"})
