"""DeepSeek-VL with the interface of transformers' `deepseek_vl` classes, over the network in `deepseek_vl.models`."""

from deepseek_vl.hf.configuration import DeepseekVLConfig
from deepseek_vl.hf.image_processing import DeepseekVLImageProcessor, DeepseekVLImageProcessorFast
from deepseek_vl.hf.modeling import DeepseekVLForConditionalGeneration, DeepseekVLModel
from deepseek_vl.hf.processing import DeepseekVLProcessor

__all__ = [
    "DeepseekVLConfig",
    "DeepseekVLForConditionalGeneration",
    "DeepseekVLImageProcessor",
    "DeepseekVLImageProcessorFast",
    "DeepseekVLModel",
    "DeepseekVLProcessor",
]
