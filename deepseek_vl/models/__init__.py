"""The network and its inputs. Importing this package registers them with transformers' Auto classes."""

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

from deepseek_vl.checkpoints.find import open_bundled_names
from deepseek_vl.models.configuration_vlm import AlignerConfig, MultiModalityConfig, VisionConfig
from deepseek_vl.models.image_processing_vlm import VLMImageProcessor, VLMImageProcessorConfig
from deepseek_vl.models.modeling_vlm import MultiModalityCausalLM
from deepseek_vl.models.processing_vlm import VLChatProcessor

__all__ = ["MultiModalityCausalLM", "MultiModalityConfig", "VLChatProcessor", "VLMImageProcessor"]

_AUTO_MODELS = [
    getattr(transformers, name)
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
    if hasattr(transformers, name)  # not all versions have the last
]

for _config in (VisionConfig, AlignerConfig, MultiModalityConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
for _auto in _AUTO_MODELS:
    _auto.register(MultiModalityConfig, MultiModalityCausalLM, exist_ok=True)
AutoImageProcessor.register(VLMImageProcessorConfig, slow_image_processor_class=VLMImageProcessor, exist_ok=True)
AutoProcessor.register(MultiModalityConfig, VLChatProcessor, exist_ok=True)


for _auto in (AutoConfig, AutoImageProcessor, AutoProcessor, transformers.AutoTokenizer, *_AUTO_MODELS):
    open_bundled_names(_auto)
