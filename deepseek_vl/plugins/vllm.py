"""vLLM's entry point: `vllm serve` runs DeepSeek-VL where this package is installed beside vLLM.

vLLM calls `register` in each of its processes. The model itself, `deepseek_vl.plugins.vllm_model`, is imported when one
is loaded.
"""

import json
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from deepseek_vl.models import MultiModalityConfig, VLChatProcessor
from deepseek_vl.utils.conversation import jinja_template

ARCHITECTURES = (
    "MultiModalityCausalLM",
    "DeepseekVLForConditionalGeneration",
    "DeepseekVLHybridForConditionalGeneration",
)
"""What configs call the model: the published ones, and those in transformers' layout."""

_BEGINNING = """\
{%- for message in messages -%}
    {%- for part in message.content -%}
        {%- if part.type == 'text' and @IMAGE@ in part.text -%}
            {{- raise_exception("A text has " ~ @IMAGE@ ~ ", which stands for an image; send the image instead.") -}}
        {%- endif -%}
    {%- endfor -%}
{%- endfor -%}
"""
"""In front of our chat template. By the loop over a content's parts vLLM sees that the template places the images."""


class Config(MultiModalityConfig):
    """The config, without an end token if the file does not name one.

    Llama's, which is the default, would be an ordinary token of DeepSeek's at which vLLM ends answers.
    """

    def __init__(self, *, language_config: Any = None, **kwargs: Any):
        if not isinstance(language_config, PretrainedConfig):
            language_config = {"eos_token_id": None, **(language_config or {})}
        super().__init__(language_config=language_config, **kwargs)


class Processor(VLChatProcessor):
    """The processor with our renderer's chat template, whatever template is among the checkpoint's files."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> "Processor":
        """See `VLChatProcessor.from_pretrained`."""
        processor = super().from_pretrained(*args, **kwargs)
        beginning = _BEGINNING.replace("@IMAGE@", json.dumps(processor.image_tag))
        processor.chat_template = beginning + jinja_template(processor.new_chat_template(), processor.image_tag)
        return processor


def register() -> None:
    """Tell vLLM of the model, its config, tokenizer and chat template. May be called more than once."""
    from vllm import ModelRegistry
    from vllm.transformers_utils import processors

    for architecture in ARCHITECTURES:
        ModelRegistry.register_model(architecture, "deepseek_vl.plugins.vllm_model:DeepseekVL")
    AutoConfig.register(Config.model_type, Config, exist_ok=True)
    # Without this, the class that published files name replaces the pre-tokenizer (see `load_tokenizer`). There is no
    # public way to say so; transformers sees it by itself from 5.24 on.
    TOKENIZER_MAPPING_NAMES.setdefault(Config.model_type, "TokenizersBackend")
    # vLLM prefers a class that it has here to transformers' of that name. It registers templates publicly only for
    # checkpoints that have none (`register_chat_template_fallback_path`), and those in transformers' layout have one,
    # without the begin token.
    for name in ("VLChatProcessor", "DeepseekVLProcessor", "DeepseekVLHybridProcessor"):
        setattr(processors, name, Processor)
