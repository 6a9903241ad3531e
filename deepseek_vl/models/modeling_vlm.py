"""The model: vision towers -> projector -> Llama (paper, section 3.1)."""

import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM, PretrainedConfig
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from deepseek_vl.checkpoints.loading import CheckpointModel
from deepseek_vl.checkpoints.special_tokens import config_special_tokens
from deepseek_vl.models.clip_encoder import CLIPVisionTower, HybridVisionTower
from deepseek_vl.models.configuration_vlm import AlignerConfig, MultiModalityConfig, VisionConfig
from deepseek_vl.models.projector import MlpProjector

__all__ = [
    "AlignerConfig",
    "MultiModalityCausalLM",
    "MultiModalityConfig",
    "MultiModalityPreTrainedModel",
    "VisionConfig",
    "model_name_to_cls",
]

MODULES: dict[str, type[nn.Module]] = {
    "MlpProjector": MlpProjector,
    "CLIPVisionTower": CLIPVisionTower,
    "HybridVisionTower": HybridVisionTower,
}


CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""The installed transformers' name for the argument with the key-value cache: `past_key_values` up to 5.23."""


def with_cache_name(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with the cache under the name that the installed transformers uses; without a cache that is None.

    Raises:
        ValueError: if there is a cache under both names.
    """
    names = ("cache", "past_key_values")
    caches = [arguments[name] for name in names if arguments.get(name) is not None]
    if len(caches) > 1:
        raise ValueError("cache and past_key_values are two names of one argument; give one of them.")
    others = {name: value for name, value in arguments.items() if name not in names}
    return {**others, CACHE: caches[0]} if caches else others


def model_name_to_cls(cls_name: str) -> type[nn.Module]:
    """The module class whose name occurs in `cls_name`.

    Raises:
        ValueError: if there is none.
    """
    for name, module_class in MODULES.items():
        if name in cls_name:
            return module_class
    raise ValueError(f"Unknown cls {cls_name!r} in the config; known are {', '.join(MODULES)}.")


def build_encoder(config: MultiModalityConfig) -> tuple[nn.Module, nn.Module]:
    """The vision tower and the projector that a config names."""
    vision, aligner = config.vision_config, config.aligner_config
    return model_name_to_cls(vision.cls)(**vision.params), model_name_to_cls(aligner.cls)(aligner.params)


class MultiModalityPreTrainedModel(CheckpointModel):
    """The base class of the models: what transformers has to know about them."""

    config_class = MultiModalityConfig
    base_model_prefix = "multi_modality"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "SAMBlock", "Block"]  # Block is timm's
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    all_tied_weights_keys: dict[str, str] = {}  # of the class: programs read it before they patch remote code

    def post_init(self) -> None:
        super().post_init()
        # FSDP wraps these, and raises an error if the model lacks one.
        classes = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = [name for name in self._no_split_modules or () if name in classes]

    def after_loading(self) -> None:
        """Freeze weights that no forward pass uses, as DistributedDataParallel would wait for their gradients."""
        for module in self.modules():
            if isinstance(module, CLIPVisionTower | HybridVisionTower):
                module.freeze_unused()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Parameters outside of the layers that transformers initialises: SAM's and timm's.
        std = self.config.get_text_config().initializer_range
        for name in ("pos_embed", "latent"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                init.normal_(getattr(module, name), std=std)
        for name in ("rel_pos_h", "rel_pos_w", "hd_alpha_downsamples"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                init.zeros_(getattr(module, name))


class MultiModalityModel(MultiModalityPreTrainedModel):
    """The model without the language model's head.

    Args:
        config: the whole model's.
        vision_model: `CLIPVisionTower` or `HybridVisionTower`.
        aligner: `MlpProjector`.
        language_model: `LlamaModel`.
    """

    language_model: Any  # it has methods that `nn.Module` lacks

    def __init__(
        self, config: PretrainedConfig, vision_model: nn.Module, aligner: nn.Module, language_model: nn.Module
    ):
        super().__init__(config)
        self.vision_model = vision_model
        self.aligner = aligner
        self.language_model = language_model

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    def get_image_features(
        self, pixel_values: torch.Tensor, low_res_pixel_values: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode images for the language model.

        Args:
            pixel_values: [n, 3, S, S] of any float dtype.
            low_res_pixel_values: [n, 3, s, s], for a hybrid tower; None for the tower to make them itself.

        Returns:
            [n, N, D] in the model's dtype.
        """
        pixels = [images for images in (pixel_values, low_res_pixel_values) if images is not None]
        features = self.vision_model(*(like_parameters(images, self.vision_model) for images in pixels))
        if isinstance(features, tuple):
            return self.aligner(tuple(like_parameters(feature, self.aligner) for feature in features))
        return self.aligner(like_parameters(features, self.aligner))

    def prepare_inputs_embeds(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        images_seq_mask: torch.Tensor | None = None,
        images_emb_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        """Embed a batch from the processor, image features in their places.

        Only image slots with real features are encoded. If there are none, the vision tower runs in training only.

        Args:
            input_ids: int64 [b, T]; negative ids are embedded as 0.
            pixel_values: [b, n, 3, S, S] of any float dtype, or None without images. Without masks also [n, 3, S, S],
                the images of all rows; features then go where `input_ids` are the config's `image_token_id`.
            images_seq_mask: bool [b, T], where features replace token embeddings, in order. It may be longer than
                `input_ids`, if these are only the end of a prompt whose beginning is in a cache; or shorter, if they
                are a prompt with a completion.
            images_emb_mask: bool [b, n, N], which features are real.
            position_ids: int64 [b, T], if they do not count from 0 to T - 1; only for checking the length.
            image_features: [images, N, D], the output of `get_image_features` for the slots with real features, in
                order, if the caller has it already. The pixels are then ignored.
            mm_token_type_ids: int64 [b, T], 1 where features go: transformers' form of `images_seq_mask`, which does
                not need `images_emb_mask`.
            ignored: the processor output's other fields.

        Returns:
            [b, T, D] in the model's dtype.

        Raises:
            ValueError: if the prompt is longer than the model's positions, or pixels, masks and features do not fit.
        """
        new = input_ids.shape[1]
        if mm_token_type_ids is not None and images_seq_mask is None:
            images_seq_mask = mm_token_type_ids == 1
        if images_seq_mask is not None:
            masked = images_seq_mask.shape[1]
            input_ids = F.pad(input_ids, (max(masked - new, 0), 0))
            images_seq_mask = F.pad(images_seq_mask, (0, max(new - masked, 0)))
        self._check_length(input_ids, position_ids)
        inputs_embeds = self.get_input_embeddings()(input_ids.clamp(min=0))  # [b, T, D]
        if images_seq_mask is None and pixel_values is not None and pixel_values.ndim == 4:
            image_features = self.get_image_features(pixel_values)
            is_image = input_ids == getattr(self.config, "image_token_id", -1)
            if not torch.compiler.is_compiling():
                check_count(is_image, image_features)
            return place_features(inputs_embeds, is_image, image_features)
        if images_seq_mask is None or (images_emb_mask is None and mm_token_type_ids is None):
            if pixel_values is not None:
                raise ValueError("pixel_values need images_seq_mask and images_emb_mask, as the processor gives them.")
            return inputs_embeds[:, -new:]
        if image_features is None and (images_emb_mask is None or torch.compiler.is_compiling()):
            if pixel_values is not None:
                inputs_embeds = self._embed_all_slots(inputs_embeds, pixel_values, images_seq_mask, images_emb_mask)
            elif not torch.compiler.is_compiling() and images_seq_mask.any():
                raise ValueError(f"The prompt has {int(images_seq_mask.sum())} image positions, but no pixel_values.")
            return inputs_embeds[:, -new:]
        if images_emb_mask is None and image_features is not None:  # all features are real
            check_count(images_seq_mask, image_features)
            return place_features(inputs_embeds, images_seq_mask, image_features)[:, -new:]
        images_emb_mask, pixels = cast(torch.Tensor, images_emb_mask), cast(torch.Tensor, pixel_values)
        check_images(pixel_values, images_seq_mask, images_emb_mask, image_features)
        is_real = images_emb_mask.any(dim=-1)  # [b, n]
        if is_real.any():
            if image_features is None:
                image_features = self.get_image_features(pixels[is_real.to(pixels.device)])
            feature_mask = images_emb_mask[is_real].to(image_features.device)  # [images, N]
            if feature_mask.shape != image_features.shape[:2]:
                raise ValueError(
                    f"The vision tower gives {image_features.shape[1]} features per image, the processor reserved "
                    f"{feature_mask.shape[1]} (num_image_tokens)."
                )
            inputs_embeds = place_features(inputs_embeds, images_seq_mask, image_features[feature_mask])
        elif self.training and torch.is_grad_enabled() and pixel_values is not None:
            # In training every trained weight needs a gradient, and distributed processes must all run the same
            # modules, so a blank slot is encoded and its features multiplied by 0.
            blank = self.get_image_features(pixel_values[:1, 0]).sum()
            inputs_embeds = inputs_embeds + 0 * blank.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds[:, -new:]

    def _embed_all_slots(
        self,
        inputs_embeds: torch.Tensor,
        pixel_values: torch.Tensor,
        images_seq_mask: torch.Tensor,
        images_emb_mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Embed images by encoding all slots, also those without an image, whose features are not used.

        This is for compiled graphs, whose shapes cannot depend on the masks, and for batches without `images_emb_mask`,
        where the number of image positions in a row tells how many images it has.
        """
        features = self.get_image_features(pixel_values.flatten(0, 1))  # [b * n, N, D]
        if images_emb_mask is None:
            counts = images_seq_mask.sum(dim=1, keepdim=True) // features.shape[1]  # [b, 1]
            is_real = torch.arange(pixel_values.shape[1], device=counts.device) < counts
            images_emb_mask = is_real[..., None].expand(*is_real.shape, features.shape[1])
        if not torch.compiler.is_compiling():
            check_images(pixel_values, images_seq_mask, images_emb_mask)
        real_first = images_emb_mask.flatten().logical_not().int().argsort(stable=True)
        features = features.flatten(0, 1)[real_first.to(features.device)]
        return place_features(inputs_embeds, images_seq_mask, features)

    def _check_length(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> None:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids must be [b, T], not {list(input_ids.shape)}; make a batch with batchify.")
        longest = self.config.language_config.max_position_embeddings
        length = input_ids.shape[1]
        if length > longest and position_ids is not None:  # in a packed row, each conversation starts at 0
            length = int(position_ids.max()) + 1
        if length > longest:
            raise ValueError(
                f"The prompt has {length} tokens, more than the {longest} positions of this model; "
                "shorten the text or use fewer images."
            )

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        images_seq_mask: torch.Tensor | None = None,
        images_emb_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        sft_format: list[str] | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`MultiModalityCausalLM.forward` without the head: it returns `last_hidden_state` [b, T, D], not logits."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if input_ids is not None:
            inputs_embeds = self.prepare_inputs_embeds(
                input_ids,
                pixel_values,
                images_seq_mask,
                images_emb_mask,
                position_ids,
                mm_token_type_ids=mm_token_type_ids,
            )
        return self.language_model(inputs_embeds=inputs_embeds, position_ids=position_ids, **with_cache_name(kwargs))


class ImageGenerationMixin(GenerationMixin):
    """transformers' `generate` for prompts whose images are encoded before decoding starts."""

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' hook before each step; only the first step gets the images."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **with_cache_name(kwargs)
        )
        if not is_first_iteration:
            for name in ("pixel_values", "images_seq_mask", "images_emb_mask", "mm_token_type_ids"):
                model_inputs.pop(name, None)
        return model_inputs

    @staticmethod
    def _refuse_assistance(arguments: Mapping[str, Any]) -> None:
        """Refuse arguments of `generate` with which transformers would ignore a prompt's images."""
        if arguments.get("assistant_model") is not None or arguments.get("prompt_lookup_num_tokens"):
            raise ValueError("Assisted decoding and prompt lookup are for prompts without images.")


class MultiModalityCausalLM(ImageGenerationMixin, MultiModalityModel):
    """DeepSeek-VL: a vision tower, a projector and a Llama language model.

    Attributes:
        vision_model: `CLIPVisionTower` or `HybridVisionTower`.
        aligner: `MlpProjector`.
        language_model: `LlamaForCausalLM`, which can be used on its own with `inputs_embeds` from
            `prepare_inputs_embeds`.
    """

    def __init__(self, config: MultiModalityConfig):
        super().__init__(config, *build_encoder(config), LlamaForCausalLM(config.language_config))
        self.post_init()
        self.set_special_tokens(config_special_tokens(config.language_config))

    @property
    def base_model(self) -> MultiModalityModel:
        """The model without the language model's head, made of this one's modules.

        A new object each time, which adds no weights to this model's own.
        """
        body = MultiModalityModel(self.config, self.vision_model, self.aligner, self.get_decoder())
        body.training = self.training
        return body

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        images_seq_mask: torch.Tensor | None = None,
        images_emb_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        sft_format: list[str] | None = None,
        loss_only: bool = False,
        cache: Any | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model on ids with or without images, or on embeddings.

        Args:
            input_ids: int64 [b, T].
            pixel_values: as in `prepare_inputs_embeds`.
            images_seq_mask: as in `prepare_inputs_embeds`.
            images_emb_mask: as in `prepare_inputs_embeds`.
            mm_token_type_ids: instead of the masks, as in `prepare_inputs_embeds`.
            attention_mask: [b, past + T], 0 on padding.
            position_ids: int64 [b, T].
            cache: a transformers cache.
            past_key_values: the same, under transformers' name.
            inputs_embeds: [b, T, D], instead of `input_ids`.
            labels: int64 [b, T], -100 where nothing is learnt; shifted inside.
            use_cache: return the cache.
            logits_to_keep: the number of last positions whose logits are computed (0 for all), or their indices.
            sft_format: the processor output's prompt strings; not used.
            loss_only: return only the loss, and compute only the logits that it needs. With a vocabulary of 102,400 the
                other logits take about a tenth of a training step. Needs labels, and takes no cache.
            kwargs: for the language model (`output_attentions`, `output_hidden_states`, ...).

        Returns:
            `loss` (with labels), `logits` [b, T, vocabulary], the cache, `hidden_states`, `attentions`.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given, for pixels without masks, for a
                cache under both names, or for `loss_only` without labels or with a past; and what
                `prepare_inputs_embeds` raises.
        """
        run: Any = super().forward
        options: dict[str, Any] = {"use_cache": use_cache, "labels": labels, "logits_to_keep": logits_to_keep}
        items = None
        if loss_only:
            if labels is None or cache is not None or past_key_values is not None:
                raise ValueError("loss_only needs labels, and no past_key_values.")
            items = kwargs.pop("num_items_in_batch", None)
            run, options = self.base_model, {"use_cache": False}
        output = run(
            input_ids=input_ids,
            pixel_values=pixel_values,
            images_seq_mask=images_seq_mask,
            images_emb_mask=images_emb_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            cache=cache,
            **options,
            **kwargs,
        )
        if loss_only and labels is not None:
            return CausalLMOutputWithPast(loss=self._loss_of(output[0], labels, items))
        return output

    def _loss_of(
        self, hidden: torch.Tensor, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        targets = F.pad(labels, (0, 1), value=-100)[:, 1:].to(hidden.device)
        learnt = targets != -100
        logits = self.language_model.lm_head(hidden[learnt])  # [learnt positions, vocabulary]
        return self.language_model.loss_function(
            logits=logits,
            labels=None,
            vocab_size=logits.shape[-1],
            num_items_in_batch=num_items_in_batch,
            shift_labels=targets[learnt],
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        pixel_values: torch.Tensor | None = None,
        images_seq_mask: torch.Tensor | None = None,
        images_emb_mask: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        sft_format: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, from the processor's output: `generate(**processor(...), max_new_tokens=64)`.

        Images are encoded once, before decoding starts. As in transformers, the result begins with the prompt's ids if
        ids were given. Generation stops at the checkpoint's own end token.

        Raises:
            ValueError: what `prepare_inputs_embeds` raises; if the processor's output is not unpacked; and for assisted
                decoding of a prompt with images, which transformers would decode without them.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        if input_ids is not None:
            if not isinstance(input_ids, torch.Tensor):
                raise ValueError("The inputs must be token ids; unpack the processor's output: generate(**inputs).")
            self._check_length(input_ids)
            input_ids = input_ids.clamp(min=0)
        images = {
            "pixel_values": pixel_values,
            "images_seq_mask": images_seq_mask,
            "images_emb_mask": images_emb_mask,
            "mm_token_type_ids": mm_token_type_ids,
        }
        kwargs = with_cache_name(kwargs)
        if CACHE in kwargs:
            kwargs |= images  # `forward` embeds what the cache does not hold yet
        elif input_ids is not None and kwargs.get("inputs_embeds") is None:
            masks = [mask for name, mask in images.items() if name != "pixel_values" and mask is not None]
            # Any sign of images counts, so that inputs that do not fit together raise an error.
            is_told = len(masks) > 1 or mm_token_type_ids is not None
            if any(mask.any() for mask in masks) if is_told else pixel_values is not None:
                self._refuse_assistance(kwargs)
                kwargs["inputs_embeds"] = self.prepare_inputs_embeds(input_ids, **images)
        return super().generate(input_ids, *args, **kwargs)

    def after_loading(self) -> None:
        """Freeze the weights that the config says, as transformers' loader makes every parameter trainable."""
        if isinstance(self.vision_model, HybridVisionTower):
            self.vision_model.freeze_towers()
        super().after_loading()


def like_parameters(tensor: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """`tensor` on the device and in the dtype of a module's first parameter.

    Its device stays if the parameter is offloaded, and its dtype if the parameter is quantised.
    """
    parameter = next(module.parameters(), None)
    if parameter is None:
        return tensor
    device = tensor.device if parameter.is_meta else parameter.device
    return tensor.to(device, parameter.dtype if parameter.is_floating_point() else tensor.dtype)


def place_features(inputs_embeds: torch.Tensor, positions: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Embeddings [b, T, D], replaced by image features [..., D], in order, where `positions`, bool [b, T], is true."""
    features = features.to(inputs_embeds.device, inputs_embeds.dtype)
    return inputs_embeds.masked_scatter(positions.to(inputs_embeds.device)[..., None], features)


def check_count(is_image: torch.Tensor, image_features: torch.Tensor) -> None:
    """Check that there are as many image positions, bool [b, T], as features [n, N, D].

    Raises:
        ValueError: if there are not.
    """
    found, given = int(is_image.sum()), image_features.shape[0] * image_features.shape[1]
    if found != given:
        raise ValueError(f"There are {found} image tokens and {given} image features.")


def check_images(
    pixel_values: torch.Tensor | None,
    images_seq_mask: torch.Tensor,
    images_emb_mask: torch.Tensor,
    image_features: torch.Tensor | None = None,
) -> None:
    """Check that the arguments of `prepare_inputs_embeds` fit together.

    Raises:
        ValueError: if they do not.
    """
    positions, features = images_seq_mask.sum(dim=1), images_emb_mask.sum(dim=(1, 2)).to(images_seq_mask.device)
    if not torch.equal(positions, features):
        raise ValueError(
            f"images_seq_mask has {positions.tolist()} image positions in its rows, images_emb_mask "
            f"{features.tolist()} features."
        )
    if image_features is not None or not features.any():
        return
    if pixel_values is None:
        raise ValueError(f"The prompt has {int(positions.sum())} image positions, but pixel_values is None.")
    if pixel_values.shape[:2] != images_emb_mask.shape[:2]:
        raise ValueError(
            f"pixel_values has {tuple(pixel_values.shape[:2])} rows and images, images_emb_mask "
            f"{tuple(images_emb_mask.shape[:2])}."
        )
