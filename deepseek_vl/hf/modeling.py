"""The models with transformers' interface."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from deepseek_vl.checkpoints.layout_weights import TRANSFORMERS, UNUSED, as_reference, canonical, rename
from deepseek_vl.checkpoints.special_tokens import default_special_tokens
from deepseek_vl.hf.configuration import DeepseekVLConfig
from deepseek_vl.models.modeling_vlm import (
    MultiModalityPreTrainedModel,
    like_parameters,
    model_name_to_cls,
    unread_state_dict,
)

LANGUAGE = "language_model."


@dataclass
class DeepseekVLModelOutput(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast`, with the features that stood in the images' places.

    Attributes:
        image_hidden_states: [n, N, D], or None without images.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class DeepseekVLCausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast`, with the features that stood in the images' places.

    Attributes:
        image_hidden_states: [n, N, D], or None without images.
    """

    image_hidden_states: torch.Tensor | None = None


class DeepseekVLPreTrainedModel(MultiModalityPreTrainedModel):
    """Loads either layout, and saves transformers'."""

    config_class = DeepseekVLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")

    def __init__(self, config: DeepseekVLConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.register_load_state_dict_pre_hook(_rename_to_modules)

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        *args: Any,
    ) -> Any:
        """transformers' step that reads the weights, here under the names that this class has for them."""
        state_dict = unread_state_dict(model, state_dict, checkpoint_files, load_config)
        if state_dict:
            state_dict = _to_modules(as_reference(state_dict, _to_reference(model.state_dict(), model)), model)
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args)

    def save_pretrained(self, save_directory: str, *args: Any, state_dict: dict | None = None, **kwargs: Any) -> None:
        """transformers' `save_pretrained`; the weights get the names of transformers' layout.

        Raises:
            ValueError: for weights that the layout has no place for, such as an adapter's.
        """
        weights = _to_reference(self.state_dict() if state_dict is None else state_dict, self)
        renamed, left = rename(weights, TRANSFORMERS)
        if more := [name for name in left if name not in UNUSED]:
            raise ValueError(
                f"This layout has no place for {len(more)} weights: {', '.join(more[:3])}; merge adapters first."
            )
        whole = {name: tensor[...].contiguous() for name, tensor in renamed.items()}
        super().save_pretrained(save_directory, *args, state_dict=whole, **kwargs)


def _rename_to_modules(model: PreTrainedModel, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """torch's hook before weights are loaded: those of a file, as `Trainer` loads them, get a model's own names."""
    own = model.state_dict()
    if prefix or state_dict.keys() <= own.keys():
        return
    weights = as_reference(canonical(state_dict), _to_reference(own, model))
    state_dict.clear()
    state_dict.update((name, weight[...]) for name, weight in _to_modules(weights, model).items())


def _to_modules(weights: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """The reference's names -> a model's own."""
    prefix = "" if isinstance(model, DeepseekVLModel) else "model."
    named = {}
    for name, weight in weights.items():
        if name.startswith("language_model.lm_head."):
            if prefix:
                named[name.removeprefix(LANGUAGE)] = weight
        elif name.startswith("language_model.model."):
            named[prefix + LANGUAGE + name.removeprefix("language_model.model.")] = weight
        else:
            named[prefix + name] = weight
    return named


def _to_reference(weights: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """A model's own names -> the reference's."""
    named = {}
    for name, weight in weights.items():
        inner = name.removeprefix("model.") if not isinstance(model, DeepseekVLModel) else name
        if inner.startswith("lm_head."):
            inner = LANGUAGE + inner
        elif inner.startswith(LANGUAGE):
            inner = f"language_model.model.{inner.removeprefix(LANGUAGE)}"
        named[inner] = weight
    return named


class DeepseekVLModel(DeepseekVLPreTrainedModel):
    """DeepSeek-VL without the language model's head.

    Attributes:
        vision_model, aligner: the same modules as `MultiModalityCausalLM` has.
        language_model: a `LlamaModel`.
    """

    def __init__(self, config: DeepseekVLConfig):
        super().__init__(config)
        network = config.to_multi_modality()
        vision, aligner = network.vision_config, network.aligner_config
        self.vision_model = model_name_to_cls(vision.cls)(**vision.params)
        self.aligner = model_name_to_cls(aligner.cls)(aligner.params)
        self.language_model = LlamaModel(config.text_config)
        self.requires_grad_(True)  # the hybrid tower has opinions of its own about what learns
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.embed_tokens = value

    def get_image_features(
        self, pixel_values: torch.Tensor, high_res_pixel_values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode images for the language model.

        Args:
            pixel_values: [n, 3, s, s].
            high_res_pixel_values: [n, 3, S, S], for the hybrid model.

        Returns:
            [n, N, D].

        Raises:
            ValueError: if the high-resolution pixels are missing, or given to a model without such a tower.
        """
        if self.config.is_hybrid != (high_res_pixel_values is not None):
            raise ValueError(
                "The hybrid model needs high_res_pixel_values." if self.config.is_hybrid
                else "This model has no high-resolution tower for high_res_pixel_values."
            )  # fmt: skip
        low = like_parameters(pixel_values, self.vision_model)
        if high_res_pixel_values is None:
            return self.aligner(like_parameters(self.vision_model(low), self.aligner))
        features = self.vision_model.encode(like_parameters(high_res_pixel_values, self.vision_model), low)
        return self.aligner(tuple(like_parameters(feature, self.aligner) for feature in features))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        high_res_pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> DeepseekVLModelOutput:
        """Run the model on ids with or without images, or on embeddings.

        Args:
            input_ids: int64 [b, T], with N image tokens per image.
            pixel_values: [n, 3, s, s], the images of all rows in reading order.
            high_res_pixel_values: [n, 3, S, S], for the hybrid model.
            attention_mask: [b, past + T], 0 on padding.
            position_ids: int64 [b, T].
            past_key_values: a transformers cache.
            inputs_embeds: [b, T, D], instead of `input_ids`.
            image_features: [n, N, D], from `get_image_features`, instead of the pixels.
            use_cache: return the cache.
            kwargs: for the language model (`output_attentions`, `output_hidden_states`, ...).

        Returns:
            `last_hidden_state` [b, T, D], `past_key_values`, `hidden_states`, `attentions`, `image_hidden_states`.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given; for images beside
                `inputs_embeds`; or if features and image tokens are not equally many.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is not None and (pixel_values is not None or image_features is not None):
            raise ValueError("Images need input_ids, which say where they go; inputs_embeds have them already.")
        if inputs_embeds is None:
            inputs_embeds, image_features = self.embed(input_ids, pixel_values, high_res_pixel_values, image_features)
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        return DeepseekVLModelOutput(**output, image_hidden_states=image_features)

    def embed(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | None = None,
        high_res_pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embed ids, image features in the places of image tokens.

        Args:
            input_ids, pixel_values, high_res_pixel_values, image_features: as in `forward`.

        Returns:
            Embeddings [b, T, D], and the features [n, N, D] if there are images.

        Raises:
            ValueError: if images are given in two forms, or if there are not as many features as image tokens.
        """
        embeds = self.get_input_embeddings()(input_ids)  # [b, T, D]
        if pixel_values is not None and image_features is not None:
            raise ValueError("Give pixel_values or image_features, not both.")
        if pixel_values is not None:
            image_features = self.get_image_features(pixel_values, high_res_pixel_values)
        if image_features is None:  # a model may write the image's token itself
            return embeds, None
        is_image = input_ids == self.config.image_token_id
        found, given = int(is_image.sum()), image_features.shape[:2].numel()
        if found != given:
            raise ValueError(f"There are {found} image tokens and {given} image features.")
        source = image_features.flatten(0, 1).to(embeds.device, embeds.dtype)
        return embeds.masked_scatter(is_image[..., None], source), image_features


class DeepseekVLForConditionalGeneration(DeepseekVLPreTrainedModel, GenerationMixin):
    """DeepSeek-VL: `model` and the language model's head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: DeepseekVLConfig):
        super().__init__(config)
        self.model = DeepseekVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        self._set_generation_tokens(default_special_tokens(config.text_config))

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_image_features(
        self, pixel_values: torch.Tensor, high_res_pixel_values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`DeepseekVLModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, high_res_pixel_values)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        high_res_pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> DeepseekVLCausalLMOutput:
        """`DeepseekVLModel.forward`, and the next tokens' logits.

        Args:
            labels: int64 [b, T], -100 where nothing is learnt; shifted inside.
            logits_to_keep: compute only the last so many positions' logits (0: all), or those at these indices.
            input_ids, ...: as in `DeepseekVLModel.forward`.

        Returns:
            `loss` (with labels), `logits` [b, T, vocabulary], `past_key_values`, `hidden_states`, `attentions`,
            `image_hidden_states`.

        Raises:
            ValueError: what `DeepseekVLModel.forward` raises.
        """
        output = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            high_res_pixel_values=high_res_pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_features=image_features,
            use_cache=use_cache,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return DeepseekVLCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            image_hidden_states=output.image_hidden_states,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        *args: Any,
        generation_mode: str = "text",
        pixel_values: torch.Tensor | None = None,
        high_res_pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, from the processor's output. Images are encoded once, before decoding starts.

        Args:
            inputs: int64 [b, T], as `input_ids`.
            generation_mode: `text`, which is all that this model generates.
            pixel_values, high_res_pixel_values, image_features: as in `forward`.
            args, kwargs: transformers' other arguments.

        Raises:
            ValueError: for another mode; for assisted decoding of a prompt with images; and what `forward` raises.
        """
        if generation_mode != "text":
            raise ValueError(f"generation_mode must be 'text', not {generation_mode!r}: this model writes text only.")
        input_ids = kwargs.pop("input_ids", inputs)
        images = {
            "pixel_values": pixel_values,
            "high_res_pixel_values": high_res_pixel_values,
            "image_features": image_features,
        }
        if any(image is not None for image in images.values()):
            if kwargs.get("past_key_values") is not None:
                raise ValueError("Images beside a cache are not taken; generate from the whole conversation.")
            if kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens"):
                raise ValueError("Assisted decoding and prompt lookup are for prompts without images.")
            kwargs["inputs_embeds"], _ = self.model.embed(input_ids, **images)
        return super().generate(input_ids, *args, **kwargs)
