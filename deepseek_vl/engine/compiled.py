"""Compiling a loaded model, with a warm-up, so that no answer waits for it."""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from deepseek_vl.engine.decode_step import CompiledStep
from deepseek_vl.engine.engine import engine_of
from deepseek_vl.engine.kv_cache import RowCache
from deepseek_vl.kernels.attention import FLOAT32_ATTENTION
from deepseek_vl.kernels.compiling import CompilationError, compiling
from deepseek_vl.kernels.int8 import Int8Linear
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor

logger = logging.getLogger(__name__)

TYPICAL_POSITIONS = 1024
"""Compiled code holds for every number of positions, and is best for so many."""


def compile_model(
    model: MultiModalityCausalLM, processor: VLChatProcessor, progress: Callable[[str], None] = logger.info
) -> None:
    """Compile what a model runs for each token of an answer, and on GPUs its vision tower, by `torch.compile`.

    All answers that the engine gives from then on (`stream_answer` and the front-ends) are faster, and the same up to
    rounding. It takes a minute or two; PyTorch keeps the code on the disk, for the next time. Move, cast, quantise or
    otherwise change the model before, not after.

    Args:
        model: in evaluation mode, all of it on one device.
        processor: the model's.
        progress: gets a line of text whenever something begins.

    Raises:
        ValueError: if the model is on several devices or one for which PyTorch does not compile, attends with another
            implementation than `sdpa`, or has int8 weights on the CPU; or if there is no compiler.
    """
    is_int8 = any(isinstance(module, Int8Linear) for module in model.modules())
    check_compile(model.device, "int8" if is_int8 else None)
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise ValueError("A model that is spread over several devices cannot be compiled.")
    attention = model.language_model.config._attn_implementation
    if attention not in ("sdpa", FLOAT32_ATTENTION):
        raise ValueError(f"Compiled models attend with sdpa, not with {attention}; leave attn_implementation out.")
    # On CPUs a tower's products take all the time.
    encoders = (model.vision_model, model.aligner) if model.device.type == "cuda" else ()
    try:
        # In a thread, as the engine runs it: how many threads a thread may use is part of what is compiled.
        with compiling(encoders), ThreadPoolExecutor(1) as thread:
            if encoders:
                progress("Compiling the vision tower ...")
                thread.submit(_encode_blanks, model, processor).result()
            progress("Compiling the language model ...")
            step = CompiledStep(model.language_model)
            thread.submit(_answer_nothing, model, step).result()
    except CompilationError as error:
        raise ValueError(f"The model cannot be compiled on this machine: {error}") from error
    engine_of(model).use(step, model)


def check_compile(device: torch.device, quantize: str | None) -> None:
    """Whether a model on this device, with weights quantised so, can be compiled, as far as is known beforehand.

    Raises:
        ValueError: if it cannot.
    """
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"Models are compiled for the CPU and for CUDA, not for {device.type}.")
    if device.type == "cpu" and quantize is not None:
        raise ValueError(f"With {quantize} weights on the CPU compiling gains nothing; leave --compile out.")


@torch.inference_mode()
def _encode_blanks(model: MultiModalityCausalLM, processor: VLChatProcessor) -> None:
    side = processor.image_processor.image_size
    for count in (1, 2):  # the second is compiled for every number above 1
        model.get_image_features(torch.zeros(count, 3, side, side, device=model.device, dtype=model.dtype))


@torch.inference_mode()
def _answer_nothing(model: MultiModalityCausalLM, step: CompiledStep) -> None:
    cache = RowCache([1])
    first = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    model.language_model(input_ids=first, past_key_values=cache, use_cache=True)
    for layer in cache.layers:
        layer.reserve(TYPICAL_POSITIONS)
    step(model.language_model, [0], cache)
