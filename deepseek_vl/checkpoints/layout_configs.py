"""The config files of the two layouts: DeepSeek's own ("reference"), and that of transformers' `deepseek_vl` classes.

They differ in one thing: in the reference the hybrid model's towers normalise their pixels themselves, and in
transformers' layout its image processor does it for both. So a model's config is converted with the image processor's.
"""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import LlamaConfig, SamVisionConfig, SiglipVisionConfig

SIGLIP, HYBRID = "deepseek_vl", "deepseek_vl_hybrid"
TRANSFORMERS_TYPES = (SIGLIP, HYBRID)
"""transformers' names of the two architectures (`model_type`)."""

IMAGE_TAG = "<image_placeholder>"

TowerFields = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""A tower's parameters in the reference's config -> all of its sizes: the published variant's, or those given instead.
It is `deepseek_vl.models.clip_encoder.tower_fields`, passed in because this package does not import the network."""

SIGLIP_FIELDS = {
    "heads": "num_attention_heads",
    "layers": "num_hidden_layers",
    "patch_size": "patch_size",
    "width": "hidden_size",
}
"""Names of the SigLIP tower's sizes: the reference's -> transformers'. The MLPs' width is converted apart: in the
reference it is a ratio."""

SAM_FIELDS = {
    **SIGLIP_FIELDS,
    "global_attn_indexes": "global_attn_indexes",
    "prompt_embed_dim": "output_channels",
    "window_size": "window_size",
}
"""Names of the SAM tower's sizes. In transformers each of the two downsampling convolutions doubles the channels."""

SIGLIP_FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-6}
SAM_FIXED = {**SIGLIP_FIXED, "qkv_bias": True, "use_abs_pos": True, "use_rel_pos": True}
"""Settings of a tower that transformers' config can change and the reference's cannot."""

_SIGLIP_NAME, _SAM_NAME = "siglip_large_patch16_384", "sam_b_downsample"
_SPLIT_PROJECTOR = "low_high_hybrid_split_mlp_gelu"
_SELECT = {"select_feature": "same", "select_layer": -1}
IMAGE_DEFAULTS: dict[str, Any] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "rescale_factor": 1.0 / 255.0,
    "min_size": 14,
}
"""The defaults of both layouts' image processors."""


def is_transformers(config: Mapping[str, Any]) -> bool:
    """Whether a model's config is in transformers' layout."""
    return config.get("model_type") in TRANSFORMERS_TYPES


def to_reference(config: Mapping[str, Any], images: Mapping[str, Any], tower_fields: TowerFields) -> dict[str, Any]:
    """Convert a model's config from transformers' layout to the reference's.

    Args:
        config: of the model.
        images: of its image processor, in transformers' layout; for the hybrid model's normalisation.
        tower_fields: see `TowerFields`.

    Raises:
        ValueError: for a setting that the reference's architecture has no place for.
    """
    text = LlamaConfig(**_without_type(config.get("text_config")))
    vision = _as_built(SiglipVisionConfig, config.get("vision_config"), SIGLIP_FIXED)
    mlp_ratio = vision.intermediate_size / vision.hidden_size
    low = _tower_params(_SIGLIP_NAME, vision, SIGLIP_FIELDS, tower_fields, mlp_ratio=mlp_ratio)
    aligner = {"depth": 2, "input_dim": vision.hidden_size, "n_embed": text.hidden_size, "projector_type": "mlp_gelu"}
    if config["model_type"] == SIGLIP:
        vision_config = {"cls": "CLIPVisionTower", "params": low}
    else:
        aligner["projector_type"] = _SPLIT_PROJECTOR
        vision_config = {"cls": "HybridVisionTower", "params": _hybrid(config, images, low, tower_fields)}
    result = {
        "architectures": ["MultiModalityCausalLM"],
        "aligner_config": {"cls": "MlpProjector", "model_type": "aligner", "params": aligner},
        "language_config": _language(config.get("text_config") or {}),
        "model_type": "multi_modality",
        "vision_config": {"model_type": "vision", **vision_config},
    }
    dtype = config.get("dtype", config.get("torch_dtype"))
    return {**result, "torch_dtype": dtype} if dtype is not None else result


def as_published(output: dict[str, Any], config: Any) -> dict[str, Any]:
    """Change `output`, the dictionary of a `MultiModalityConfig`, into the form of the published files."""
    for name in ("vision_config", "aligner_config"):
        part = getattr(config, name)
        output[name] = {"cls": part.cls, "model_type": part.model_type, "params": dict(part.params)}
    output["language_config"] = _llama_diff(config.language_config)
    output.pop("image_token_id", None)  # the tokenizer's file says it
    dtype, llama_dtype = output.pop("dtype", None), output["language_config"].pop("dtype", None)
    if dtype is not None:
        output["torch_dtype"] = dtype
    if dtype is not None or llama_dtype is not None:
        output["language_config"]["torch_dtype"] = dtype or llama_dtype
    return output


def _llama_diff(config: LlamaConfig) -> dict[str, Any]:
    """The keys that differ from `LlamaConfig`'s defaults."""
    full = {name: value for name, value in config.to_dict().items() if name not in ("_name_or_path", "architectures")}
    defaults = LlamaConfig().to_dict()
    diff = {name: value for name, value in full.items() if name not in defaults or defaults[name] != value}
    rebuilt = LlamaConfig(**diff).to_dict()  # some defaults follow from other keys
    return {
        **diff,
        **{name: value for name, value in full.items() if rebuilt.get(name) != value},
        "model_type": "llama",
    }


def _hybrid(
    config: Mapping[str, Any], images: Mapping[str, Any], low: dict[str, Any], tower_fields: TowerFields
) -> dict[str, Any]:
    """The hybrid tower's parameters."""
    width = tower_fields(low)["width"]
    sam = _as_built(SamVisionConfig, config.get("high_res_vision_config"), SAM_FIXED)
    channels = (2 * sam.output_channels, 4 * sam.output_channels)
    if channels[1] != width:
        raise ValueError(
            f"The high-resolution tower gives {channels[1]} channels and the other {width}; this layout's projector "
            "takes one width for both."
        )
    mlp_ratio = sam.mlp_dim / sam.hidden_size
    high = _tower_params(_SAM_NAME, sam, SAM_FIELDS, tower_fields, mlp_ratio=mlp_ratio, downsample_channels=channels)
    images = {**IMAGE_DEFAULTS, **{name: value for name, value in images.items() if value is not None}}
    return {
        "concat_type": "tuple",
        "freeze_high": True,
        "freeze_low": True,
        "high_res_cfg": {
            "ckpt_path": "",
            "output_dim": width,
            "pixel_mean": list(images.get("high_res_image_mean", IMAGE_DEFAULTS["image_mean"])),
            "pixel_std": list(images.get("high_res_image_std", IMAGE_DEFAULTS["image_std"])),
            **high,
        },
        "low_res_cfg": {
            "ckpt_path": "",
            "output_dim": width,
            "pixel_mean": list(images["image_mean"]),
            "pixel_std": list(images["image_std"]),
            **low,
        },
    }


def _tower_params(
    model_name: str, config: Any, fields: Mapping[str, str], tower_fields: TowerFields, **more: Any
) -> dict[str, Any]:
    """A tower's parameters in the reference's config, with those sizes that differ from the published tower's."""
    published = tower_fields({"model_name": model_name})
    sizes = {**{ours: getattr(config, theirs) for ours, theirs in fields.items()}, **more}
    overrides = {name: _json(value) for name, value in sizes.items() if _json(value) != _json(published[name])}
    return {"image_size": config.image_size, "model_name": model_name, **_SELECT, **overrides}


def _json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _as_built(config_class: type, given: Mapping[str, Any] | None, fixed: Mapping[str, Any]) -> Any:
    """A tower's config; raises ValueError if the reference's tower cannot be built with it."""
    config = config_class(**_without_type(given))
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise ValueError(f"DeepSeek-VL's towers have {name}={value!r}, this config {getattr(config, name)!r}.")
    return config


def _without_type(config: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in (config or {}).items() if name not in ("model_type", "transformers_version")}


def _language(text: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's config in the reference's spelling."""
    renamed = {name: value for name, value in text.items() if name not in ("transformers_version", "_name_or_path")}
    dtype = renamed.pop("dtype", None)
    if dtype is not None:
        renamed.setdefault("torch_dtype", dtype)
    return {**renamed, "model_type": "llama"}


def to_transformers(
    config: Mapping[str, Any], images: Mapping[str, Any], image_token_id: int, tower_fields: TowerFields
) -> dict[str, Any]:
    """Convert a model's config from the reference's layout to transformers'.

    Args:
        config: of the model.
        images: of its image processor, in the reference's layout.
        image_token_id: the image tag's token id.
        tower_fields: see `TowerFields`.

    Raises:
        ValueError: for a setting that transformers' architecture has no place for.
    """
    vision, aligner = config["vision_config"], config["aligner_config"]["params"]
    is_hybrid = "HybridVisionTower" in vision["cls"]
    low = vision["params"]["low_res_cfg"] if is_hybrid else vision["params"]
    siglip = _siglip_config(low, tower_fields(low))
    _require("projector_type", aligner.get("projector_type"), _SPLIT_PROJECTOR if is_hybrid else "mlp_gelu")
    _require("depth", aligner.get("depth", 1), 2)
    text = LlamaConfig(**_without_type(config["language_config"]))
    language = {**_without_type(config["language_config"]), "model_type": "llama"}
    dtype = config.get("torch_dtype", language.pop("torch_dtype", None))
    language.pop("torch_dtype", None)
    result: dict[str, Any] = {
        "architectures": [f"DeepseekVL{'Hybrid' if is_hybrid else ''}ForConditionalGeneration"],
        "image_token_id": image_token_id,
        "model_type": HYBRID if is_hybrid else SIGLIP,
        "text_config": language,
        "tie_word_embeddings": text.tie_word_embeddings,
        "vision_config": siglip,
    }
    if is_hybrid:
        _require("concat_type", vision["params"].get("concat_type", "tuple"), "tuple")
        high = vision["params"]["high_res_cfg"]
        result["high_res_vision_config"] = _sam_config(high, tower_fields(high), siglip)
    elif not images.get("do_normalize", True) or low.get("pixel_mean") is not None:
        raise ValueError("transformers' layout has no place for a tower that normalises its own pixels.")
    return {**result, "dtype": dtype} if dtype is not None else result


def _require(name: str, value: Any, needed: Any) -> None:
    if value != needed:
        raise ValueError(f"transformers' layout has only {name}={needed!r}, and this config says {value!r}.")


def _siglip_config(params: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The SigLIP tower's config."""
    _require("select_layer", params.get("select_layer", -1), -1)
    return {
        **{theirs: fields[ours] for ours, theirs in SIGLIP_FIELDS.items()},
        **SIGLIP_FIXED,
        "attention_dropout": 0.0,
        "image_size": fields["image_size"],
        "intermediate_size": int(fields["width"] * fields["mlp_ratio"]),
        "model_type": "siglip_vision_model",
        "num_channels": 3,
        "vision_use_head": True,
    }


def _sam_config(params: Mapping[str, Any], fields: Mapping[str, Any], siglip: Mapping[str, Any]) -> dict[str, Any]:
    """The SAM tower's config."""
    channels, neck_size = fields["prompt_embed_dim"], 4 * (siglip["image_size"] // siglip["patch_size"])
    _require("downsample_channels", tuple(fields["downsample_channels"]), (2 * channels, 4 * channels))
    _require("neck_size", params.get("neck_size", neck_size), neck_size)
    return {
        **{theirs: _json(fields[ours]) for ours, theirs in SAM_FIELDS.items()},
        **SAM_FIXED,
        "image_size": fields["image_size"],
        "mlp_dim": int(fields["width"] * fields["mlp_ratio"]),
        "mlp_ratio": fields["mlp_ratio"],
        "model_type": "sam_vision_model",
    }


# --- processors ---


def require_transformers_processor(settings: Mapping[str, Any]) -> None:
    """Refuse a processor's settings, in the reference's layout, that transformers' layout has no place for.

    Raises:
        ValueError: naming the setting.
    """
    for name, needed in (("image_tag", IMAGE_TAG), ("add_special_token", False), ("sft_format", "deepseek")):
        _require(name, settings.get(name, needed), needed)


def images_to_reference(images: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an image processor's config from transformers' layout to the reference's."""
    images = {**IMAGE_DEFAULTS, **images}
    is_hybrid = "high_res_size" in images or "Hybrid" in images.get("image_processor_type", "")
    size = images.get("high_res_size", {"height": 1024}) if is_hybrid else images.get("size", {"height": 384})
    prefix = "high_res_" if is_hybrid else ""
    mean = images.get(f"{prefix}image_mean") or IMAGE_DEFAULTS["image_mean"]
    return {
        "background_color": [int(255 * value) for value in mean],
        "do_normalize": images.get("do_normalize", True) and not is_hybrid,
        "image_mean": list(mean),
        "image_processor_type": "VLMImageProcessor",
        "image_size": size["height"],
        "image_std": list(images.get(f"{prefix}image_std") or IMAGE_DEFAULTS["image_std"]),
        "min_size": images["min_size"],
        "processor_class": "VLChatProcessor",
        "rescale_factor": images["rescale_factor"],
    }


def images_to_transformers(images: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an image processor's config from the reference's layout to transformers'.

    Args:
        images: of the image processor.
        config: of its model, in the reference's layout.

    Raises:
        ValueError: for a setting that transformers' layout has no place for.
    """
    params = config["vision_config"]["params"]
    is_hybrid = "low_res_cfg" in params
    # The hybrid's towers normalise; the other has its image processor do it.
    _require("do_normalize", images.get("do_normalize", True), not is_hybrid)
    if is_hybrid:
        low, high = params["low_res_cfg"], params["high_res_cfg"]
        side, mean, std = low["image_size"], low.get("pixel_mean", ()), low.get("pixel_std", ())
        more = {
            "high_res_image_mean": list(high.get("pixel_mean") or ()),
            "high_res_image_std": list(high.get("pixel_std") or ()),
            "high_res_resample": 3,
            "high_res_size": {"height": images["image_size"], "width": images["image_size"]},
            "image_processor_type": "DeepseekVLHybridImageProcessor",
            "processor_class": "DeepseekVLHybridProcessor",
        }
    else:
        side, mean, std = images["image_size"], images.get("image_mean", ()), images.get("image_std", ())
        more = {"image_processor_type": "DeepseekVLImageProcessor", "processor_class": "DeepseekVLProcessor"}
    if not all((mean, std, more.get("high_res_image_mean", True), more.get("high_res_image_std", True))):
        raise ValueError("transformers' layout has no place for pixels without a mean and a standard deviation.")
    background = images.get("background_color")
    if background is not None and list(background) != [
        int(255 * value) for value in more.get("high_res_image_mean", mean)
    ]:
        raise ValueError("transformers' layout has no background colour but the mean colour.")
    return {
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "min_size": images.get("min_size", 14),
        "resample": 3,
        "rescale_factor": images.get("rescale_factor", 1.0 / 255.0),
        "size": {"height": side, "width": side},
        **more,
    }
