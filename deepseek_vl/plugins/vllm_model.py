"""The model as vLLM runs it: our towers, projector and processor, and vLLM's Llama."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import BatchFeature
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)
from vllm.sequence import IntermediateTensors

from deepseek_vl.checkpoints.names import as_reference
from deepseek_vl.imaging.open import load_image
from deepseek_vl.models import MultiModalityConfig
from deepseek_vl.models.modeling_vlm import build_encoder
from deepseek_vl.plugins.vllm import Processor
from deepseek_vl.utils.conversation import IMAGE_TAG


class ImageParser(MultiModalDataParser):
    """Opens images as the rest of the package does: vLLM treats transparency and 16-bit images differently."""

    def _parse_image_data(self, data: Any) -> Any:
        if data is None or self.is_embeddings(data):
            return super()._parse_image_data(data)
        return ImageProcessorItems([_opened(image) for image in (data if isinstance(data, list | tuple) else [data])])


def _opened(image: Any) -> Any:
    if isinstance(image, MediaWithBytes):
        return MediaWithBytes(load_image(image.original_bytes), image.original_bytes)
    return load_image(image) if isinstance(image, Image.Image) else image


class ProcessingInfo(BaseProcessingInfo):
    """Answers vLLM's questions about the processor."""

    def get_hf_processor(self, **kwargs: object) -> Processor:
        return self.ctx.get_hf_processor(Processor, **kwargs)

    def get_data_parser(self) -> MultiModalDataParser:
        return ImageParser(expected_hidden_size=self._get_expected_hidden_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": self.get_hf_processor().num_image_tokens}


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
    """Images by which vLLM measures how much memory is needed."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return self.info.get_hf_processor().image_tag * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        side = self.info.get_hf_processor().image_processor.image_size
        return {"image": self._get_dummy_images(width=side, height=side, num_images=mm_counts.get("image", 0))}


class MultiModalProcessor(BaseMultiModalProcessor[ProcessingInfo]):
    """Prompt and images -> tokens and pixels."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """Run vLLM's whole processing of one prompt.

        Raises:
            ValueError: unless there are as many images as tags.
        """
        processor = self.info.get_hf_processor()
        tags, images = inputs.prompt.count(processor.image_id), inputs.mm_data_items.get_count("image", strict=False)
        if tags != images:
            raise ValueError(
                f"The prompt has {tags} {processor.image_tag} and {images} images were given; "
                "there must be one tag per image."
            )
        return super().apply(inputs, timing_ctx)

    def _call_hf_processor(self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        processor = self.info.get_hf_processor(**hf_kwargs)
        return self.info.ctx.call_hf_processor(processor.image_processor, hf_data, hf_kwargs)

    def _get_mm_fields_config(self, *_: Any, **__: Any) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixel_values": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(self, *_: Any, **__: Any) -> Sequence[PromptReplacement]:
        processor = self.info.get_hf_processor()
        tag, features = [processor.image_id], processor.num_image_tokens
        positions = PromptUpdateDetails(
            full=tag * processor.positions_per_image,
            is_embed=lambda ids: torch.arange(len(ids)) >= len(ids) - features,
        )
        return [PromptReplacement(modality="image", target=tag, replacement=positions)]


@MULTIMODAL_REGISTRY.register_processor(MultiModalProcessor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class DeepseekVL(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA):
    """DeepSeek-VL in vLLM, from a checkpoint in either layout."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        model_config = vllm_config.model_config
        self.config = model_config.hf_config  # vLLM's LoRA reads it
        config = MultiModalityConfig.from_pretrained(model_config.model, revision=model_config.revision)
        with self._mark_tower_model(vllm_config, "image"):
            self.vision_model, self.aligner = build_encoder(config)
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=model_config.hf_text_config,
                prefix=maybe_prefix(prefix, "language_model"),
                architectures=["LlamaForCausalLM"],
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str:
        """The tag for an image in a prompt whose template does not place images itself."""
        return IMAGE_TAG

    def embed_multimodal(self, pixel_values: torch.Tensor, **kwargs: object) -> torch.Tensor:
        """Encode images: [n, 3, S, S] -> [n, N, D]."""
        return self.aligner(self.vision_model(pixel_values))

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        """Run the language model."""
        return self.language_model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Hidden states -> logits."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint's tensors, in either layout; returns the names of the weights that were loaded."""
        return AutoWeightsLoader(self).load_weights(self._as_reference(weights))

    def _as_reference(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Rename tensors: the language model's one by one, the towers' at the end, since some of these are joined."""
        towers = {}
        for name, tensor in weights:
            if "language_model." in name or name.startswith("lm_head."):
                yield from ((new, part[...]) for new, part in as_reference({name: tensor}, {}).items())
            else:
                towers[name] = tensor
        yield from ((new, part[...]) for new, part in as_reference(towers, dict(self.named_parameters())).items())

    def get_mm_mapping(self) -> MultiModelKeys:
        """The names of language model, connector and tower, for LoRA."""
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="aligner", tower_model="vision_model"
        )
