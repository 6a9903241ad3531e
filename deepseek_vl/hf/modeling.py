"""The models with transformers' interface."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from deepseek_vl.checkpoints.names import TRANSFORMERS, UNUSED, as_reference, rename
from deepseek_vl.checkpoints.special_tokens import config_special_tokens
from deepseek_vl.hf.configuration import DeepseekVLConfig
from deepseek_vl.models.modeling_vlm import (
    CACHE,
    ImageGenerationMixin,
    MultiModalityModel,
    MultiModalityPreTrainedModel,
    build_encoder,
    check_count,
    place_features,
    with_cache_name,
)

PREFIXES = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "model.": ""}
"""Prefixes of weight names: in these classes -> in the reference. `DeepseekVLModel` has no `model.` in its own."""


@dataclass
class DeepseekVLModelOutput(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` with the image features.

    Attributes:
        image_hidden_states: [n, N, D], or None without images.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class DeepseekVLCausalLMOutput(CausalLMOutputWithPast):
    """`CausalLMOutputWithPast` with the image features.

    Attributes:
        image_hidden_states: [n, N, D], or None without images.
    """

    image_hidden_states: torch.Tensor | None = None


class DeepseekVLPreTrainedModel(MultiModalityPreTrainedModel):
    """The base class of the models, which loads either layout and saves transformers'."""

    config_class = DeepseekVLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")  # ty: ignore[invalid-assignment]  transformers' own are tuples too

    def __init__(self, config: DeepseekVLConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.register_load_state_dict_pre_hook(_rename_to_modules)

    def own_names(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Rename a checkpoint's tensors, in either layout, to this class's names."""
        back = {reference: own for own, reference in PREFIXES.items()}
        named = _prefixed(as_reference(tensors, self._reference_names(self.state_dict())), back)
        if not isinstance(self, DeepseekVLModel):
            return named
        return {name.removeprefix("model."): tensor for name, tensor in named.items() if name != "lm_head.weight"}

    def _reference_names(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """Rename tensors from this class's names to the reference's."""
        is_body = isinstance(self, DeepseekVLModel)
        return _prefixed(
            {f"model.{name}": tensor for name, tensor in tensors.items()} if is_body else tensors, PREFIXES
        )

    def save_pretrained(self, save_directory: str, *args: Any, state_dict: dict | None = None, **kwargs: Any) -> None:
        """transformers' `save_pretrained`, with the weights named as in transformers' layout.

        Raises:
            ValueError: for weights that the layout does not have, such as an adapter's.
        """
        weights = self._reference_names(self.state_dict() if state_dict is None else state_dict)
        renamed, left = rename(weights, TRANSFORMERS)
        if more := [name for name in left if name not in UNUSED]:
            raise ValueError(
                f"This layout has no place for {len(more)} weights: {', '.join(more[:3])}; merge adapters first."
            )
        whole = {name: tensor[...].contiguous() for name, tensor in renamed.items()}
        super().save_pretrained(save_directory, *args, state_dict=whole, **kwargs)


def _prefixed(tensors: Mapping[str, Any], prefixes: Mapping[str, str]) -> dict[str, Any]:
    """Tensors renamed: the first of the given prefixes that a name begins with is replaced."""
    named = {}
    for name, tensor in tensors.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        named[name if old is None else prefixes[old] + name.removeprefix(old)] = tensor
    return named


def _rename_to_modules(model: Any, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
    """torch's hook before loading a state dict: weights named as in a file, as `Trainer` gives them, are renamed."""
    if prefix or state_dict.keys() <= model.state_dict().keys():
        return
    weights = model.own_names(state_dict)
    state_dict.clear()
    state_dict.update((name, weight[...]) for name, weight in weights.items())


class DeepseekVLModel(DeepseekVLPreTrainedModel, MultiModalityModel):
    """DeepSeek-VL without the language model's head.

    Attributes:
        vision_model, aligner: the same modules as `MultiModalityCausalLM` has.
        language_model: a `LlamaModel`.
    """

    def __init__(self, config: DeepseekVLConfig):
        super().__init__(config, *build_encoder(config.to_multi_modality()), LlamaModel(config.text_config))
        self.requires_grad_(True)  # the hybrid tower has frozen parts, as the reference's config says
        self.after_loading()
        self.post_init()

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
        if high_res_pixel_values is not None:
            return super().get_image_features(high_res_pixel_values, pixel_values)
        return super().get_image_features(pixel_values)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        high_res_pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any | None = None,
        **kwargs: Any,
    ) -> DeepseekVLModelOutput:
        """Run the model on ids with or without images, or on embeddings.

        Args:
            input_ids: int64 [b, T], with N image tokens per image.
            pixel_values: [n, 3, s, s], the images of all rows in reading order.
            high_res_pixel_values: [n, 3, S, S], for the hybrid model.
            attention_mask: [b, past + T], 0 on padding.
            position_ids: int64 [b, T].
            cache: a transformers cache.
            past_key_values: the same, under transformers' name.
            inputs_embeds: [b, T, D], instead of `input_ids`.
            image_features: [n, N, D], from `get_image_features`, instead of the pixels.
            use_cache: return the cache.
            kwargs: for the language model (`output_attentions`, `output_hidden_states`, ...).

        Returns:
            `last_hidden_state` [b, T, D], the cache, `hidden_states`, `attentions`, `image_hidden_states`.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given; for images together with
                `inputs_embeds`; or if the numbers of features and image tokens differ.
        """
        if inputs_embeds is not None and (pixel_values is not None or image_features is not None):
            raise ValueError("Images need input_ids, which say where they go; inputs_embeds have them already.")
        if input_ids is not None and inputs_embeds is None:
            inputs_embeds, image_features = self.embed(input_ids, pixel_values, high_res_pixel_values, image_features)
            input_ids = None
        output = super().forward(
            input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            return_dict=True,
            past_key_values=past_key_values,
            cache=cache,
            **kwargs,
        )
        return DeepseekVLModelOutput(**output, image_hidden_states=image_features)

    def embed(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        high_res_pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embed ids, with image features in the places of image tokens.

        Args:
            input_ids: as in `forward`.
            pixel_values: as in `forward`.
            high_res_pixel_values: as in `forward`.
            image_features: as in `forward`.

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
        if image_features is None:  # image tokens are then embedded as they are: a model may have generated them
            return embeds, None
        is_image = input_ids == self.config.image_token_id
        if not torch.compiler.is_compiling():  # a graph cannot raise errors that depend on data
            check_count(is_image, image_features)
        return place_features(embeds, is_image, image_features), image_features


class DeepseekVLForConditionalGeneration(ImageGenerationMixin, DeepseekVLPreTrainedModel):
    """DeepSeek-VL: `model` and the language model's head."""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: DeepseekVLConfig):
        super().__init__(config)
        self.model = DeepseekVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        self.set_special_tokens(config_special_tokens(config.text_config))

    def get_image_features(
        self, pixel_values: torch.Tensor, high_res_pixel_values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`DeepseekVLModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, high_res_pixel_values)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        high_res_pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cache: Any | None = None,
        **kwargs: Any,
    ) -> DeepseekVLCausalLMOutput:
        """Run the model; takes the arguments of `DeepseekVLModel.forward`, and returns logits.

        Args:
            labels: int64 [b, T], -100 where nothing is learnt; shifted inside.
            logits_to_keep: the number of last positions whose logits are computed (0 for all), or their indices.

        Returns:
            `loss` (with labels), `logits` [b, T, vocabulary], the cache, `hidden_states`, `attentions`,
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
            inputs_embeds=inputs_embeds,
            image_features=image_features,
            use_cache=use_cache,
            return_dict=True,
            past_key_values=past_key_values,
            cache=cache,
            **kwargs,
        )
        rest = dict(output)
        hidden = rest.pop("last_hidden_state")
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        if labels is None:
            return DeepseekVLCausalLMOutput(logits=logits, **rest)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return DeepseekVLCausalLMOutput(loss=loss, logits=logits, **rest)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
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
            pixel_values: as in `forward`.
            high_res_pixel_values: as in `forward`.
            image_features: as in `forward`.
            args: transformers' other arguments.
            kwargs: transformers' other arguments.

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
        kwargs = with_cache_name(kwargs)
        if any(image is not None for image in images.values()):
            if CACHE in kwargs:
                raise ValueError("Images beside a cache are not taken; generate from the whole conversation.")
            self._refuse_assistance(kwargs)
            kwargs["inputs_embeds"], _ = self.model.embed(input_ids, **images)
        return super().generate(input_ids, *args, **kwargs)
