"""Choosing the step for a model, and compiling it."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from deepseek_vl.engine.decode_step import LayeredStep, Step, runs_in_layers
from deepseek_vl.engine.decoder import Decoder, after_attention, before_attention
from deepseek_vl.engine.graphed_step import GraphedStep, can_be_graphed
from deepseek_vl.engine.kv_cache import RowCache
from deepseek_vl.kernels.attention import ROW_ATTENTION, gpu_attention
from deepseek_vl.kernels.compiling import CompilationError, compiling
from deepseek_vl.kernels.quantized import QuantizedLinear
from deepseek_vl.models import MultiModalityCausalLM

logger = logging.getLogger(__name__)


def step_for(model: MultiModalityCausalLM) -> Step:
    """The step for a model that is not compiled: the fastest that can run its language model."""
    if can_be_graphed(model.language_model):
        return GraphedStep(model.language_model)
    return LayeredStep(model.language_model) if runs_in_layers(model.language_model) else Step()


def check_compile(device: torch.device, is_quantised: bool) -> None:
    """Check that models on this device can be compiled, with quantised weights or without.

    Raises:
        ValueError: if they cannot.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"Models are compiled for the CPU and for CUDA, not for {device.type}.")
    if device.type == "cpu" and is_quantised:
        raise ValueError("With quantised weights on the CPU compiling gains nothing; leave --compile out.")


def compile_step(model: MultiModalityCausalLM, progress: Callable[[str], None]) -> Step:
    """Compile a model's step, and run it once.

    Takes and raises what `Engine.compile` does.
    """
    is_quantised = any(isinstance(module, QuantizedLinear) for module in model.modules())
    check_compile(model.device, is_quantised)
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ValueError("A model that is spread over several devices cannot be compiled.")
    attention = model.language_model.config._attn_implementation
    if attention not in ROW_ATTENTION:
        raise ValueError(f"Compiled models attend with sdpa, not with {attention}; leave attn_implementation out.")
    is_gpu = model.device.type == "cuda"
    if is_gpu and not can_be_graphed(model.language_model):
        raise ValueError("On GPUs PyTorch compiles with Triton, which is not installed here.")
    step = _compiled_step(model.language_model)
    if not step.is_for(model.language_model):
        raise ValueError("The language model has forward hooks, which compiled code would not call; remove them first.")
    progress("Compiling the language model ...")
    try:
        # In a thread, as in the engine: the number of threads that the caller may use is part of the compiled code.
        with compiling(vision_blocks(model) if is_gpu else ()), ThreadPoolExecutor(1) as thread:
            thread.submit(_answer_nothing, model, step).result()
    except CompilationError as error:
        raise ValueError(f"The model cannot be compiled on this machine: {error}") from error
    return step


def vision_blocks(model: MultiModalityCausalLM) -> list[nn.Module]:
    """The blocks of a model's SigLIP and SAM towers, of which PyTorch compiles one for all that are alike.

    They are compiled on GPUs only: on a CPU with AMX the 24 of SigLIP-L take 0.57 s compiled, and 0.38 otherwise.
    """
    kinds = model._no_split_modules or ()
    return [module for module in model.vision_model.modules() if type(module).__name__ in kinds]


def _compiled_step(language_model: PreTrainedModel) -> LayeredStep:
    """A step with compiled layers: for one token; and on GPUs, in another version, for several."""
    if language_model.device.type == "cuda":
        # Tuned, products of one row are as fast as the weights are read.
        tuned: dict[str, str | int | bool | Callable[..., Any]] = {"coordinate_descent_tuning": True}
        return GraphedStep(language_model, _compiled(dynamic=False, options=tuned), _compiled(dynamic=True))
    return LayeredStep(language_model, _compiled(dynamic=False))


def _compiled(**options: Any) -> Decoder:
    return Decoder(torch.compile(before_attention, **options), torch.compile(after_attention, **options))


@torch.inference_mode()
def _answer_nothing(model: MultiModalityCausalLM, step: LayeredStep) -> None:
    cache, embeddings = RowCache(), model.get_input_embeddings()
    prompt = torch.zeros(1, 3, dtype=torch.long, device=model.device)
    vision: Any = model.vision_model
    side = getattr(vision, "vision_tower_high", vision).image_size
    with gpu_attention(model.device):
        step.prompt(model.language_model, lambda: embeddings(prompt), cache)
        if isinstance(step, GraphedStep):
            for number in (1, 2):
                step.capture(model.language_model, number)
                if vision_blocks(model):  # compiled for one image, and for any other number
                    model.get_image_features(torch.zeros(number, 3, side, side, device=model.device))
        step(model.language_model, [0], [cache])
