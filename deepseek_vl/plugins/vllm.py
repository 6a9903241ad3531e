"""vLLM's entry point: `vllm serve` runs DeepSeek-VL where this package is installed beside vLLM.

vLLM calls `register` in each of its processes. It imports the model, `deepseek_vl.plugins.vllm_model`, only when one is
loaded.
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
"""The model's names in configs: the published ones, and those in transformers' layout."""

_BEGINNING = """\
{%- for message in messages -%}
    {%- for part in message.content -%}
        {%- if part.type == 'text' and @IMAGE@ in part.text -%}
            {{- raise_exception("A text has " ~ @IMAGE@ ~ ", which stands for an image; send the image instead.") -}}
        {%- endif -%}
    {%- endfor -%}
{%- endfor -%}
"""
"""The beginning of our chat template. Its loop over the parts tells vLLM that the template places the images itself."""


class Config(MultiModalityConfig):
    """The config, without an end token if the file does not name one.

    The default, Llama's end token id, is an ordinary token in DeepSeek's vocabulary, and vLLM would end answers there.
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
    # public way to register this; transformers does it itself from 5.24 on.
    TOKENIZER_MAPPING_NAMES.setdefault(Config.model_type, "TokenizersBackend")
    # vLLM prefers a class in this module to transformers' class of that name. Its public way to register a template
    # (`register_chat_template_fallback_path`) is only for checkpoints that have none; those in transformers' layout
    # have one, which may lack the begin token (this package's converter writes it).
    for name in ("VLChatProcessor", "DeepseekVLProcessor", "DeepseekVLHybridProcessor"):
        setattr(processors, name, Processor)
