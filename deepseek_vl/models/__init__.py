"""The network and its inputs. Importing it registers them with transformers' Auto classes."""

from deepseek_vl.models.configuration_vlm import MultiModalityConfig
from deepseek_vl.models.image_processing_vlm import VLMImageProcessor
from deepseek_vl.models.modeling_vlm import MultiModalityCausalLM
from deepseek_vl.models.processing_vlm import VLChatProcessor

__all__ = ["MultiModalityCausalLM", "MultiModalityConfig", "VLChatProcessor", "VLMImageProcessor"]
