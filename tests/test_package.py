"""Effects of importing and installing the package, on itself and on the program that imports it."""

import importlib
import subprocess
import sys

import pytest
from conftest import ROOT

import deepseek_vl


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in another process."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True, cwd=ROOT
    )


@pytest.mark.parametrize(
    "module", ["deepseek_vl", "deepseek_vl.models", "deepseek_vl.serve.inference", "deepseek_vl.plugins.vllm"]
)
def test_import_is_silent_and_changes_nothing_global(module: str) -> None:
    result = run_python(
        f"""
import builtins, collections, sys, warnings
import torch, transformers
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM, StoppingCriteria
def state():
    return (dir(builtins), dir(collections), list(warnings.filters), torch.get_default_dtype(), torch.is_grad_enabled(),
            torch.get_num_threads(), torch.random.get_rng_state().tolist(), sys.excepthook, sys.displayhook)
before = state()
import {module}
assert state() == before
assert not torch.cuda.is_initialized()
assert "vllm" not in sys.modules
"""
    )
    assert (result.stdout, result.stderr) == ("", "")


EFFECTS = r"""
import atexit, builtins, collections, ctypes, gc, json, locale, logging, os, random, resource, signal, sys, threading
import warnings
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import PIL.Image
import six  # attrdict's, which hooks into imports
import torch
import transformers
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoProcessor, LlamaForCausalLM, StoppingCriteria

libc = ctypes.CDLL(None)

def threads():
    counts = [torch.get_num_threads(), torch.get_num_interop_threads()]
    return counts + [libc.omp_get_max_threads()] if hasattr(libc, "omp_get_max_threads") else counts

def in_a_new_thread(run):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]

def malloc():
    "Whether 64 MB, which is above what glibc adapts its threshold to, come from the system and go back to it."
    if not hasattr(libc, "mallinfo2"):
        return None
    libc.mallinfo2.restype, libc.malloc.restype = Mallinfo, ctypes.c_void_p
    before = libc.mallinfo2().hblks
    block = libc.malloc(2**26)
    within = libc.mallinfo2().hblks
    libc.free(ctypes.c_void_p(block))
    return within - before, libc.mallinfo2().hblks - before

def state():
    backends = torch.backends
    found = {
        "threads": threads(),
        "threads of a new thread": in_a_new_thread(threads),
        "malloc": malloc(),
        "collector": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count(), len(gc.callbacks), gc.get_debug()),
        "signals": {number: repr(signal.getsignal(number)) for number in signal.valid_signals()},
        "warnings": (repr(warnings.filters), warnings.showwarning, warnings.formatwarning),
        "root logger": (repr(logging.root.handlers), logging.root.level, logging.root.filters, logging.raiseExceptions),
        "log": (logging.root.manager.disable, logging.getLoggerClass(), logging.getLogRecordFactory()),
        "flags": (
            torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(), torch.is_anomaly_enabled(), torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(), torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32,
            backends.cudnn.enabled, backends.cudnn.benchmark, backends.cudnn.deterministic, backends.mkldnn.enabled,
            backends.cuda.flash_sdp_enabled(), backends.cuda.math_sdp_enabled(), torch.get_flush_denormal()
            if hasattr(torch, "get_flush_denormal") else None, torch.cuda.is_initialized(),
        ),
        "random": (random.getstate(), repr(np.random.get_state()), torch.get_rng_state().tolist()),
        "sys": [
            *(repr(getattr(sys, name)) for name in ("meta_path", "path_hooks", "path", "excepthook", "displayhook")),
            sys.getrecursionlimit(), sys.getswitchinterval(), sys.stdout, sys.stderr, sys.unraisablehook,
            threading.excepthook, sys.gettrace(), sys.getprofile(), PIL.Image.MAX_IMAGE_PIXELS,
        ],
        "modules": (dir(builtins), dir(collections)),
        "process": (
            dict(os.environ), os.getcwd(), locale.setlocale(locale.LC_ALL), os.sched_getaffinity(0), os.nice(0),
            [resource.getrlimit(limit) for limit in range(10)],
        ),
    }
    for name in loggers:
        logger = logging.getLogger(name)
        found[f"logger {name}"] = (logger.level, repr(logger.handlers), logger.propagate, logger.disabled)
    return found

def check(step):
    for name, value in state().items():
        if value != before[name]:
            print(step, "changes", name, "from", before[name], "to", value)
            before[name] = value

seen = set()
ended = threading.Event()

def watch():
    while not ended.wait(0.01):
        seen.add(str(in_a_new_thread(threads)))

loggers = [name for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)]
in_a_new_thread(threads)
before = state()
callbacks = atexit._ncallbacks()
watcher = threading.Thread(target=watch)
watcher.start()

import deepseek_vl
check("import deepseek_vl")
import deepseek_vl.models
check("import deepseek_vl.models")
deepseek_vl.MultiModalityCausalLM, deepseek_vl.DeepseekVLForConditionalGeneration
check("an exported name")
import deepseek_vl.serve.inference
check("import deepseek_vl.serve.inference")
from deepseek_vl.serve.inference import GenerationSettings, stream_answer
from deepseek_vl.utils.io import load_pretrained_model
for options in ({}, {"dtype": "float16"}, {"dtype": "float32"}, {"quantize": "int8"}):
    tokenizer, processor, model = load_pretrained_model("tiny", device="cpu", **options)
    check(f"loading with {options}")
    image = PIL.Image.open("images/shapes.png").convert("RGB")
    messages = [
        {"role": "User", "content": "<image_placeholder>What colour is the star?", "images": [image]},
        {"role": "Assistant", "content": ""},
    ]
    settings = GenerationSettings(max_new_tokens=40)
    assert "".join(stream_answer(model, processor, messages, settings)).strip() == "The star is blue."
    check(f"an answer with {options}")
ended.set()
watcher.join()
if seen != {str(before["threads of a new thread"])}:
    print("meanwhile new threads had", seen)
"""


def test_neither_importing_nor_loading_nor_answering_changes_anything_of_the_program() -> None:
    """Threads, signals, memory, warnings, logs, random numbers and PyTorch's flags of the program stay the same."""
    assert run_python(EFFECTS).stdout == ""


PRIVATE = {
    # name: its replacement
    "torch.cpu._is_vnni_supported": "torch.cpu.get_capabilities(), once PyTorch 2.6 to 2.9 are not supported any more",
    "torch.cpu._is_avx2_supported": "as above",
    "torch.cpu._is_avx512_supported": "as above",
    "torch.cpu._is_avx512_bf16_supported": "as above",
    "torch.cpu._is_amx_tile_supported": "as above",
    "torch.cpu._is_amx_fp16_supported": "as above",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported": "a public name that says in what oneDNN computes; there is none",
    "torch.ops.mkldnn._is_mkldnn_fp16_supported": "as above",
    "torch.ops.mkldnn._linear_pointwise": "torch.nn.functional.linear, once it knows when oneDNN is faster",
    "torch.ops.onednn.qlinear_prepack": "a public product of int8 matrices on CPUs; there is none",
    "torch.ops.onednn.qlinear_pointwise": "as above",
    "torch.ops.quantized.linear_prepack": "as above, as fast without VNNI; oneDNN's is used if it is gone",
    "torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32": "as above",
    "torch._make_per_channel_quantized_tensor": "as above",
    "torch.nn.Module._compiled_call_impl": "a public way back from torch.nn.Module.compile; there is none",
    "transformers.PretrainedConfig._attn_implementation": "a public name of the implementation; there is none",
    "transformers.PreTrainedModel._init_weights": "a public hook for parameters outside of layers; there is none",
    "transformers.PreTrainedModel._no_split_modules": "a public list of the modules that stay whole; there is none",
    "transformers.PreTrainedModel._skip_keys_device_placement": "a public list of what is not moved; there is none",
    "transformers.PreTrainedModel._supports_sdpa": "a public way to say which attention a model takes; there is none",
    "transformers.PreTrainedModel._supports_flash_attn": "as above",
    "transformers.PreTrainedModel._supports_flex_attn": "as above",
    "transformers.PreTrainedModel._supports_attention_backend": "as above",
    "transformers.PreTrainedModel._tied_weights_keys": "a public table of tied weights; there is none",
    "transformers.ProcessorMixin._get_arguments_from_pretrained": "from_pretrained, once it opens the tokenizer right",
    "transformers.ProcessorMixin._merge_kwargs": "a public way to divide a call's arguments; there is none",
    "transformers.Trainer._load_from_checkpoint": "a public way to load a checkpoint's weights without training",
    "transformers.models.auto.tokenization_auto.TOKENIZER_MAPPING_NAMES": "nothing, once vLLM needs transformers 5.24",
}
"""Private names of PyTorch and transformers that the package uses, with their replacements."""


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_name_is_still_there(name: str) -> None:
    """If this fails, change the one place that uses the name to the replacement given in `PRIVATE`."""
    path = name.split(".")
    found = importlib.import_module(path[0])
    for part in path[1:]:
        assert hasattr(found, part), f"{name} is gone; it was to be replaced by: {PRIVATE[name]}"
        found = getattr(found, part)


def test_importing_the_package_leaves_the_network_for_later() -> None:
    """Importing the package loads neither torch nor transformers; its models are imported when they are used."""
    result = run_python(
        """
import sys
import deepseek_vl
print(sorted({"torch", "transformers", "timm", "PIL", "deepseek_vl.models"} & set(sys.modules)))
deepseek_vl.VLChatProcessor
print(sorted({"deepseek_vl.models", "timm"} & set(sys.modules)))
"""
    )
    assert result.stdout.splitlines() == ["[]", "['deepseek_vl.models']"]


def test_every_exported_name_is_there() -> None:
    for name in deepseek_vl.__all__:
        assert getattr(deepseek_vl, name).__name__ == name
    assert set(deepseek_vl.__all__) <= set(dir(deepseek_vl))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = deepseek_vl.nothing
