"""The model: vision towers -> projector -> Llama (paper, section 3.1)."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, LlamaForCausalLM
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from deepseek_vl.checkpoints.find import bundled_or_same
from deepseek_vl.checkpoints.layout_weights import as_reference
from deepseek_vl.checkpoints.read import unread_weights
from deepseek_vl.checkpoints.special_tokens import checkpoint_special_tokens, default_special_tokens
from deepseek_vl.models.clip_encoder import CLIPVisionTower, HybridVisionTower
from deepseek_vl.models.configuration_vlm import AlignerConfig, MultiModalityConfig, VisionConfig
from deepseek_vl.models.processing_vlm import VLChatProcessor
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


def model_name_to_cls(cls_name: str) -> type[nn.Module]:
    """The module class whose name occurs in `cls_name`.

    Raises:
        ValueError: if there is none.
    """
    for name, module_class in MODULES.items():
        if name in cls_name:
            return module_class
    raise ValueError(f"Unknown cls {cls_name!r} in the config; known are {', '.join(MODULES)}.")


class MultiModalityPreTrainedModel(PreTrainedModel):
    """What the model tells transformers about itself."""

    config_class = MultiModalityConfig
    base_model_prefix = "multi_modality"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "SAMBlock", "Block"]  # Block is timm's
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def post_init(self) -> None:
        super().post_init()
        # FSDP wraps these, and takes it ill if one is not there.
        classes = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = [name for name in self._no_split_modules if name in classes]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *model_args: Any, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`, strict: every weight comes from the checkpoint, and no weight is left over.

        Also takes the name of a bundled model. Special tokens are the checkpoint's own.

        Raises:
            ValueError: if the checkpoint lacks a weight, has one too many, or one of another shape (unless
                `ignore_mismatched_sizes` is given).
        """
        path = pretrained_model_name_or_path and str(bundled_or_same(pretrained_model_name_or_path))
        return_info = kwargs.pop("output_loading_info", False)
        ignore_mismatched_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            path,
            *model_args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **kwargs,
        )
        checked = ["missing_keys", "unexpected_keys"] + ([] if ignore_mismatched_sizes else ["mismatched_keys"])
        problems = {kind: sorted(map(str, info.get(kind) or ())) for kind in checked}
        if any(problems.values()):
            details = "; ".join(f"{len(keys)} {kind}: {', '.join(keys[:5])}" for kind, keys in problems.items() if keys)
            raise ValueError(f"The weights at {path!r} do not fit the config: {details}.")
        if path is not None and model.can_generate():
            config = model.config.get_text_config()
            model._set_generation_tokens(checkpoint_special_tokens(config, model.generation_config, path, kwargs))
        return (model, info) if return_info else model

    def _set_generation_tokens(self, token_ids: Mapping[str, int]) -> None:
        """Tell `generate`, here and in a language model that has its own, which tokens begin, end and pad a text."""
        for module in self.modules():
            if isinstance(module, GenerationMixin):
                for name, token_id in token_ids.items():
                    setattr(module.generation_config, name, token_id)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Parameters that stand outside the layers that transformers knows: SAM's and timm's.
        std = self.config.get_text_config().initializer_range
        for name in ("pos_embed", "latent"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                init.normal_(getattr(module, name), std=std)
        for name in ("rel_pos_h", "rel_pos_w", "hd_alpha_downsamples"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                init.zeros_(getattr(module, name))


class MultiModalityCausalLM(MultiModalityPreTrainedModel, GenerationMixin):
    """DeepSeek-VL: a vision tower, a projector and a Llama language model.

    Attributes:
        vision_model: `CLIPVisionTower` or `HybridVisionTower`.
        aligner: `MlpProjector`.
        language_model: `LlamaForCausalLM`, which can be used on its own with `inputs_embeds` from
            `prepare_inputs_embeds`.
    """

    def __init__(self, config: MultiModalityConfig):
        super().__init__(config)
        vision, aligner = config.vision_config, config.aligner_config
        self.vision_model = model_name_to_cls(vision.cls)(**vision.params)
        self.aligner = model_name_to_cls(aligner.cls)(aligner.params)
        self.language_model = LlamaForCausalLM(config.language_config)
        self.post_init()
        self._set_generation_tokens(default_special_tokens(config.language_config))

    # --- the language model's parts under the names that transformers asks for ---

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()

    # --- forward ---

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Encode images for the language model: [n, 3, S, S] -> [n, N, D], in the model's dtype."""
        features = self.vision_model(like_parameters(pixel_values, self.vision_model))
        if isinstance(features, tuple):
            return self.aligner(tuple(like_parameters(feature, self.aligner) for feature in features))
        return self.aligner(like_parameters(features, self.aligner))

    def prepare_inputs_embeds(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | None,
        images_seq_mask: torch.BoolTensor,
        images_emb_mask: torch.BoolTensor,
        position_ids: torch.LongTensor | None = None,
        image_features: torch.Tensor | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        """Embed a batch from the processor, image features in their places.

        Only slots with real features are encoded; without any, no vision runs (but in training).

        Args:
            input_ids: int64 [b, T]; negative ids are embedded as 0.
            pixel_values: [b, n, 3, S, S] of any float dtype, or None without images.
            images_seq_mask: bool [b, T], where features replace token embeddings, in order.
            images_emb_mask: bool [b, n, N], which features are real.
            position_ids: int64 [b, T], if they do not count from 0 to T - 1; only to check that the model has them.
            image_features: [images, N, D], what `get_image_features` gives for the slots with real features, in order,
                for callers that have it already. The pixels are then not looked at.
            ignored: the processor output's other fields.

        Returns:
            [b, T, D] in the model's dtype.

        Raises:
            ValueError: if the prompt is longer than the model's positions, or masks and features do not fit.
        """
        self._check_length(input_ids, position_ids)
        inputs_embeds = self.get_input_embeddings()(input_ids.clamp(min=0))  # [b, T, D]
        check_images(pixel_values, images_seq_mask, images_emb_mask, image_features)
        if not images_emb_mask.any():
            if self.training and torch.is_grad_enabled() and pixel_values is not None:
                # Every weight that learns needs a gradient, and in distributed training every process must run the
                # same modules, so a blank slot is encoded without effect.
                blank = self.get_image_features(pixel_values[:1, 0]).sum()
                return inputs_embeds + 0 * blank.to(inputs_embeds.device, inputs_embeds.dtype)
            return inputs_embeds
        is_real = images_emb_mask.any(dim=-1)  # [b, n]
        if image_features is None:
            image_features = self.get_image_features(pixel_values[is_real.to(pixel_values.device)])  # [images, N, D]
        feature_mask = images_emb_mask[is_real].to(image_features.device)  # [images, N]
        if feature_mask.shape != image_features.shape[:2]:
            raise ValueError(
                f"The vision tower gives {image_features.shape[1]} features per image, the processor reserved "
                f"{feature_mask.shape[1]} (num_image_tokens)."
            )
        source = image_features[feature_mask].to(inputs_embeds.device, inputs_embeds.dtype)  # [features, D]
        return inputs_embeds.masked_scatter(images_seq_mask.to(inputs_embeds.device)[..., None], source)

    def _check_length(self, input_ids: torch.LongTensor, position_ids: torch.LongTensor | None = None) -> None:
        longest = self.config.language_config.max_position_embeddings
        length = input_ids.shape[1]
        if length > longest and position_ids is not None:  # in a packed row they start anew with each conversation
            length = int(position_ids.max()) + 1
        if length > longest:
            raise ValueError(
                f"The prompt has {length} tokens, more than the {longest} positions of this model; "
                "shorten the text or use fewer images."
            )

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        images_seq_mask: torch.BoolTensor | None = None,
        images_emb_mask: torch.BoolTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        sft_format: list[str] | None = None,
        loss_only: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run the model on ids with or without images, or on embeddings.

        Args:
            input_ids: int64 [b, T].
            pixel_values, images_seq_mask, images_emb_mask: as in `prepare_inputs_embeds`; all three or none.
            attention_mask: [b, past + T], 0 on padding.
            position_ids: int64 [b, T].
            past_key_values: a transformers cache.
            inputs_embeds: [b, T, D], instead of `input_ids`.
            labels: int64 [b, T], -100 where nothing is learnt; shifted inside.
            use_cache: return the cache.
            logits_to_keep: compute only the last so many positions' logits (0: all), or those at these indices.
            sft_format: the processor output's prompt strings; not used.
            loss_only: return nothing but the loss, for which only the logits that are learnt are computed. With a
                vocabulary of 102,400 the others are about a tenth of a training step. Without a past and a cache.
            kwargs: for the language model (`output_attentions`, `output_hidden_states`, ...).

        Returns:
            `loss` (with labels), `logits` [b, T, vocabulary], `past_key_values`, `hidden_states`, `attentions`.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given, for pixels without masks, or for
                `loss_only` without labels or with a past; and what `prepare_inputs_embeds` raises.
        """
        if loss_only and (labels is None or past_key_values is not None):
            raise ValueError("loss_only needs labels, and no past_key_values.")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, pixel_values, images_seq_mask, images_emb_mask, position_ids)
        if loss_only:
            items = kwargs.pop("num_items_in_batch", None)
            hidden = self.language_model.model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
                **kwargs,
            )[0]
            return CausalLMOutputWithPast(loss=self._loss_of(hidden, labels, items))
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _loss_of(
        self, hidden: torch.Tensor, labels: torch.LongTensor, num_items_in_batch: torch.Tensor | int | None
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

    def _embed(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | None,
        images_seq_mask: torch.BoolTensor | None,
        images_emb_mask: torch.BoolTensor | None,
        position_ids: torch.LongTensor | None = None,
    ) -> torch.Tensor:
        if images_seq_mask is not None and images_emb_mask is not None:
            # With a cache the ids are the prompt's end, while the masks are still the whole prompt's.
            cached, new = images_seq_mask.shape[1] - input_ids.shape[1], input_ids.shape[1]
            whole = F.pad(input_ids, (max(cached, 0), 0))
            embeds = self.prepare_inputs_embeds(
                whole, pixel_values, images_seq_mask, images_emb_mask, position_ids=position_ids
            )
            return embeds[:, -new:]
        if pixel_values is not None:
            raise ValueError("pixel_values need images_seq_mask and images_emb_mask, as the processor gives them.")
        self._check_length(input_ids, position_ids)
        return self.get_input_embeddings()(input_ids.clamp(min=0))

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        *args: Any,
        pixel_values: torch.Tensor | None = None,
        images_seq_mask: torch.BoolTensor | None = None,
        images_emb_mask: torch.BoolTensor | None = None,
        sft_format: list[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, from the processor's output: `generate(**processor(...), max_new_tokens=64)`.

        Images are encoded once, before decoding starts. As transformers does, the result begins with the prompt's ids
        if ids were given. It stops at the checkpoint's own end token.

        Raises:
            ValueError: what `prepare_inputs_embeds` raises; and for assisted decoding of a prompt with images, which
                transformers would decode without them.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        if input_ids is not None:
            self._check_length(input_ids)
            input_ids = input_ids.clamp(min=0)
        images = {
            "pixel_values": pixel_values,
            "images_seq_mask": images_seq_mask,
            "images_emb_mask": images_emb_mask,
        }
        if kwargs.get("past_key_values") is not None:
            kwargs |= images  # `forward` embeds what the cache does not hold yet
        elif input_ids is not None and kwargs.get("inputs_embeds") is None and _has_images(**images):
            if kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens"):
                raise ValueError("Assisted decoding and prompt lookup are for prompts without images.")
            kwargs["inputs_embeds"] = self._embed(input_ids, **images)
        return super().generate(input_ids, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        past_key_values: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """transformers' hook before each step: images belong to the first one only."""
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration:
            for name in ("pixel_values", "images_seq_mask", "images_emb_mask"):
                model_inputs.pop(name, None)
        return model_inputs

    # --- loading ---

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, *model_args: Any, **kwargs: Any) -> Any:
        """As `MultiModalityPreTrainedModel.from_pretrained`; what is frozen is the checkpoint's.

        Raises:
            ValueError: if the weights do not fit the config.
        """
        return_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
        )
        if isinstance(model.vision_model, HybridVisionTower):
            model.vision_model.freeze_towers()  # transformers' loader makes every parameter trainable
        if pretrained_model_name_or_path is not None:
            model.config.name_or_path = str(pretrained_model_name_or_path)  # what an adapter notes as its base
        return (model, info) if return_info else model

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict | None,
        checkpoint_files: list[str] | None,
        load_config: Any,
        *args: Any,
    ) -> Any:
        """transformers' step that reads the weights, here with a file's pages let go as soon as they are read.

        Else they stay in memory beside the weights that are converted from them, which doubles the peak.
        """
        state_dict = unread_state_dict(model, state_dict, checkpoint_files, load_config)
        if state_dict:
            state_dict = as_reference(state_dict, model.state_dict())
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args)


def unread_state_dict(
    model: PreTrainedModel, state_dict: dict[str, Any] | None, checkpoint_files: list[str] | None, load_config: Any
) -> dict[str, Any] | None:
    """What transformers' loader is to read: tensors that are read one by one, where it would map whole files.

    None leaves the files to transformers: for weights that stay on the disk, or are divided among DeepSpeed's
    processes.
    """
    devices = set((load_config.device_map or {"": "cpu"}).values())
    if state_dict is not None or not checkpoint_files or "disk" in devices or is_deepspeed_zero3_enabled():
        return state_dict
    # Converted as they are read, weights are copied once only. Elsewhere they are converted where they come to.
    dtypes = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    is_for_cpu = all(str(device) == "cpu" for device in devices) and not load_config.is_quantized
    return unread_weights(checkpoint_files, dtypes.pop() if is_for_cpu and len(dtypes) == 1 else None)


def like_parameters(tensor: torch.Tensor, module: nn.Module) -> torch.Tensor:
    """`tensor` on the device and in the dtype of a module's parameters, as far as these say: offloaded parameters have
    no device, and quantised ones no floating point dtype."""
    parameter = next(module.parameters(), None)
    if parameter is None:
        return tensor
    device = tensor.device if parameter.is_meta else parameter.device
    return tensor.to(device, parameter.dtype if parameter.is_floating_point() else tensor.dtype)


def check_images(
    pixel_values: torch.Tensor | None,
    images_seq_mask: torch.BoolTensor,
    images_emb_mask: torch.BoolTensor,
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


def _has_images(
    pixel_values: torch.Tensor | None,
    images_seq_mask: torch.BoolTensor | None,
    images_emb_mask: torch.BoolTensor | None,
) -> bool:
    """Whether anything says so, so that what does not fit together is noticed later."""
    if images_seq_mask is None or images_emb_mask is None:
        return pixel_values is not None
    return bool(images_seq_mask.any() or images_emb_mask.any())


AutoModelForCausalLM.register(MultiModalityConfig, MultiModalityCausalLM, exist_ok=True)
AutoModelForImageTextToText.register(MultiModalityConfig, MultiModalityCausalLM, exist_ok=True)
AutoProcessor.register(MultiModalityConfig, VLChatProcessor, exist_ok=True)
