"""The model's configuration, as published in `config.json`."""

from collections.abc import Mapping
from typing import Any, ClassVar

from transformers import LlamaConfig, PretrainedConfig
from transformers.image_processing_utils import BaseImageProcessor

from deepseek_vl.checkpoints import layout_configs
from deepseek_vl.checkpoints.attrdict_import import AttrDict
from deepseek_vl.checkpoints.find import FromCheckpoint
from deepseek_vl.models.clip_encoder import tower_fields


def _set_module(config: PretrainedConfig, cls: str | type, params: Mapping[str, Any] | None) -> None:
    config.cls = cls if isinstance(cls, str) else cls.__name__
    config.params = AttrDict(params or {})


class VisionConfig(PretrainedConfig):
    """The vision tower's configuration.

    Args:
        cls: the tower's class, or the class's name.
        params: the arguments of the class, kept as an `AttrDict`: `params.x` and `params["x"]` both work.
    """

    model_type = "vision"

    def __init__(self, cls: str | type = "", params: Mapping[str, Any] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        _set_module(self, cls, params)


class AlignerConfig(PretrainedConfig):
    """The projector's configuration; `cls` and `params` as in `VisionConfig`."""

    model_type = "aligner"

    def __init__(self, cls: str | type = "", params: Mapping[str, Any] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        _set_module(self, cls, params)


class MultiModalityConfig(FromCheckpoint, PretrainedConfig):
    """The whole model's configuration, as published in `config.json`.

    Args:
        vision_config: a dict or a config object.
        aligner_config: a dict or a config object.
        language_config: a dict (missing keys take `LlamaConfig`'s defaults) or a `LlamaConfig`.
    """

    model_type = "multi_modality"
    sub_configs = {"vision_config": VisionConfig, "aligner_config": AlignerConfig, "language_config": LlamaConfig}
    auto_map: ClassVar = {}  # no remote code; TRL reads this before it opens a path

    def __init__(
        self,
        vision_config: VisionConfig | Mapping[str, Any] | None = None,
        aligner_config: AlignerConfig | Mapping[str, Any] | None = None,
        language_config: LlamaConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        given = {"vision_config": vision_config, "aligner_config": aligner_config, "language_config": language_config}
        for name, config in given.items():
            config_class = self.sub_configs[name]
            setattr(self, name, config if isinstance(config, PretrainedConfig) else config_class(**(config or {})))
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers' hook that reads `config.json`, which may be in transformers' layout of this model.

        Raises:
            ValueError: for a setting that this model has no place for.
        """
        config, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if layout_configs.is_transformers(config):
            images, _ = BaseImageProcessor.get_image_processor_dict(pretrained_model_name_or_path)
            config = layout_configs.to_reference(config, images, tower_fields)
        return config, unused

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """The language model's config, in which transformers looks for the vocabulary and the cache's sizes."""
        return self.language_config

    def to_diff_dict(self) -> dict[str, Any]:
        """The settings that `save_pretrained` writes, in the published form, which the reference can read as well."""
        output = super().to_diff_dict()
        output["architectures"] = self.architectures or ["MultiModalityCausalLM"]
        return layout_configs.as_published(output, self)
