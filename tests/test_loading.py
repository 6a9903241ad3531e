"""Loading and saving `MultiModalityCausalLM`: all weights come from real files, or there is a clear error."""

import copy
import dataclasses
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_config, write_checkpoint
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel
from transformers.generation import GenerationMixin
from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel

from deepseek_vl import DeepseekVLForConditionalGeneration
from deepseek_vl.convert import convert
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.utils.io import load_pretrained_model

needs_safe_torch_load = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
    reason="transformers refuses .bin files below torch 2.6, for CVE-2025-32434",
)
FILE_FORMATS = ["safetensors", pytest.param("bin", marks=needs_safe_torch_load)]


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        weights.update(load_file(file))
    return weights


def assert_weights_are(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in state.items():
        assert value.device.type != "meta", name
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value.cpu(), expected[name]), name


def test_every_weight_comes_from_the_file_and_none_is_initialised(checkpoint):
    torch.manual_seed(123)
    model, info = MultiModalityCausalLM.from_pretrained(checkpoint, output_loading_info=True)
    assert_weights_are(model, weights_of(checkpoint))
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]


def test_rotary_frequencies_which_no_file_has_are_llama_s(model):
    expected = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(model.language_model.model.rotary_emb.inv_freq, expected)


def test_a_loaded_model_is_in_eval_mode(model):
    assert not any(module.training for module in model.modules())


def test_auto_model_gives_our_class(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
    assert type(model) is MultiModalityCausalLM
    assert_weights_are(model, weights_of(checkpoint))


@pytest.mark.parametrize("path_type", [str, Path])
def test_a_path_may_be_a_string_or_a_path(siglip_checkpoint, path_type):
    assert_weights_are(
        MultiModalityCausalLM.from_pretrained(path_type(siglip_checkpoint)), weights_of(siglip_checkpoint)
    )


@pytest.fixture
def editable(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to change."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def half_checkpoint(editable: Path) -> Path:
    """A checkpoint in float16 whose dtype is in the language config only, as published."""
    weights = {name: value.half() for name, value in weights_of(editable).items()}
    save_file(weights, editable / "model.safetensors", metadata={"format": "pt"})
    edit_config(editable, language_dtype="float16")
    return editable


def edit_config(directory: Path, language_dtype: str | None = None) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for section in (config, config["language_config"]):
        for key in ("dtype", "torch_dtype"):
            section.pop(key, None)
    if language_dtype:
        config["language_config"]["torch_dtype"] = language_dtype
    file.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("arguments", [{}, {"dtype": "auto"}, {"torch_dtype": "auto"}], ids=str)
def test_the_default_dtype_is_the_checkpoint_s(half_checkpoint, arguments):
    model = MultiModalityCausalLM.from_pretrained(half_checkpoint, **arguments)
    assert model.dtype == torch.float16
    assert_weights_are(model, weights_of(half_checkpoint))


@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16, torch.float16])
def test_the_default_dtype_is_the_weights_own_if_the_config_is_silent(editable, saved):
    weights = {name: value.to(saved) for name, value in weights_of(editable).items()}
    save_file(weights, editable / "model.safetensors", metadata={"format": "pt"})
    edit_config(editable)
    assert_weights_are(MultiModalityCausalLM.from_pretrained(editable), weights)


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, "bfloat16", "float32"], ids=str)
def test_the_dtype_can_be_given_and_converts_the_file_s_float16_exactly(half_checkpoint, argument, dtype):
    model = AutoModelForCausalLM.from_pretrained(half_checkpoint, trust_remote_code=True, **{argument: dtype})
    expected = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert model.dtype == model.language_model.dtype == expected
    assert_weights_are(model, {name: value.to(expected) for name, value in weights_of(half_checkpoint).items()})


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}], ids=str)
@torch.no_grad()
def test_device_map_places_every_weight(checkpoint, model, batch, device_map):
    pytest.importorskip("accelerate")
    placed = MultiModalityCausalLM.from_pretrained(checkpoint, device_map=device_map).eval()
    if isinstance(device_map, dict):
        assert placed.device.type == device_map[""]
    assert_weights_are(placed, weights_of(checkpoint))
    inputs = copy.deepcopy(batch).to(placed.device, torch.float32)
    torch.testing.assert_close(placed(**inputs).logits.cpu(), model(**batch).logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
@torch.no_grad()
def test_a_saved_model_loads_exactly(model, batch, tmp_path, max_shard_size):
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 3) if max_shard_size == "100KB" else (len(files) == 1)
    assert weights_of(tmp_path).keys() == model.state_dict().keys()
    loaded = MultiModalityCausalLM.from_pretrained(tmp_path).eval()
    assert_weights_are(loaded, model.state_dict())
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    for name in ("vision_config", "aligner_config", "language_config"):
        assert loaded.config.to_diff_dict()[name] == model.config.to_diff_dict()[name]


def write_bin(directory: Path, weights: dict[str, torch.Tensor], shards: int) -> None:
    for file in directory.glob("model*.safetensors*"):
        file.unlink()
    if shards == 1:
        torch.save(weights, directory / "pytorch_model.bin")
        return
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        part = dict(list(weights.items())[i::shards])
        torch.save(part, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")


@needs_safe_torch_load
@pytest.mark.parametrize("shards", [1, 3])
def test_bin_files_load(editable, shards):
    weights = weights_of(editable)
    write_bin(editable, weights, shards)
    assert_weights_are(MultiModalityCausalLM.from_pretrained(editable), weights)


@needs_safe_torch_load
@pytest.mark.parametrize("shards", [1, 3])
def test_float16_bin_files_load_as_bfloat16(editable, shards):
    weights = {name: value.half() for name, value in weights_of(editable).items()}
    write_bin(editable, weights, shards)
    model = MultiModalityCausalLM.from_pretrained(editable, dtype=torch.bfloat16)
    assert_weights_are(model, {name: value.bfloat16() for name, value in weights.items()})


@pytest.mark.parametrize("kind", ["siglip", "hybrid"])
def test_an_offloaded_vision_tower_encodes(kind, request, picture, tmp_path):
    """A tower on disk runs: accelerate keeps its parameters on the meta device and loads their values when needed."""
    directory = request.getfixturevalue(f"{kind}_checkpoint")
    processor = VLChatProcessor.from_pretrained(directory)
    pixels = processor.image_processor(Image.open(picture))["pixel_values"]
    expected = MultiModalityCausalLM.from_pretrained(directory).get_image_features(pixels)
    device_map = {"vision_model": "disk", "aligner": "cpu", "language_model": "cpu"}
    offloaded = MultiModalityCausalLM.from_pretrained(directory, device_map=device_map, offload_folder=tmp_path)
    assert torch.equal(offloaded.get_image_features(pixels), expected)


# --- strictness ---

SIGLIP_KEYS = [
    "language_model.lm_head.weight",
    "language_model.model.embed_tokens.weight",
    "language_model.model.layers.1.self_attn.o_proj.weight",
    "aligner.layers.2.bias",
    "vision_model.vision_tower.blocks.1.norm1.weight",
    "vision_model.vision_tower.attn_pool.latent",
]
HYBRID_KEYS = [
    "vision_model.high_layer_norm.weight",
    "vision_model.vision_tower_low.vision_tower.pos_embed",
    "vision_model.vision_tower_high.vision_tower.hd_alpha_downsamples",
    "vision_model.vision_tower_high.vision_tower.blocks.0.attn.rel_pos_h",
    "vision_model.vision_tower_high.vision_tower.neck_hd.0.weight",
    "aligner.high_up_proj.weight",
]


@pytest.fixture
def edit_weights(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A function that copies a checkpoint with edited weights, as one safetensors or one `.bin` file."""

    def edit(kind: str, file_format: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        directory = Path(
            shutil.copytree(request.getfixturevalue(f"{kind}_checkpoint"), tmp_path / f"{kind}-{file_format}")
        )
        weights = weights_of(directory)
        change(weights)
        if file_format == "bin":
            write_bin(directory, weights, shards=1)
        else:
            save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    yield edit


KEYS = [*(("siglip", key) for key in SIGLIP_KEYS), *(("hybrid", key) for key in HYBRID_KEYS)]


@pytest.mark.parametrize(("kind", "key"), KEYS)
@pytest.mark.parametrize("file_format", FILE_FORMATS)
def test_a_missing_key_is_an_error_that_names_it(edit_weights, kind, key, file_format):
    path = edit_weights(kind, file_format, lambda weights: weights.pop(key))
    with pytest.raises(ValueError, match=re.escape(key)):
        MultiModalityCausalLM.from_pretrained(path)


@pytest.mark.parametrize("file_format", FILE_FORMATS)
@pytest.mark.parametrize(
    "key",
    [
        "language_model.model.layers.2.mlp.up_proj.weight",
        "vision_model.vision_tower.head.weight",
        "aligner.layers.4.weight",
        "optimizer_step",
    ],
)
def test_an_extra_key_is_an_error_that_names_it(edit_weights, key, file_format):
    path = edit_weights("siglip", file_format, lambda weights: weights.update({key: torch.zeros(2)}))
    with pytest.raises(ValueError, match=re.escape(key)):
        MultiModalityCausalLM.from_pretrained(path)


@pytest.mark.parametrize(("kind", "key"), KEYS)
def test_a_wrong_shape_is_an_error_that_names_the_key(edit_weights, kind, key):
    path = edit_weights(kind, "safetensors", lambda weights: weights.update({key: torch.zeros(3, 5)}))
    with pytest.raises((ValueError, RuntimeError), match=re.escape(key)):
        MultiModalityCausalLM.from_pretrained(path)


def test_the_auto_class_is_as_strict(edit_weights):
    key = "vision_model.vision_tower.pos_embed"
    path = edit_weights("siglip", "safetensors", lambda weights: weights.pop(key))
    with pytest.raises(ValueError, match=re.escape(key)):
        AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)


# --- special tokens ---


@pytest.mark.parametrize("layout", ["reference", "transformers"])
def test_special_tokens_of_the_published_tokenizer_are_read(published_tokenizer_dir, tmp_path, layout):
    directory = write_checkpoint("siglip", published_tokenizer_dir, tmp_path / "reference")
    (directory / "generation_config.json").unlink()  # the published checkpoints have none
    if layout == "transformers":
        convert(directory, directory := tmp_path / "exported", "transformers")
    for model in (
        load_pretrained_model(directory, device="cpu")[2],
        MultiModalityCausalLM.from_pretrained(directory),
        AutoModelForCausalLM.from_pretrained(tmp_path / "reference"),
        DeepseekVLForConditionalGeneration.from_pretrained(directory),
    ):
        for module in model.modules():
            if isinstance(module, GenerationMixin):
                found = module.generation_config
                assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (100000, 100001, 100001)


def test_special_tokens_are_not_guessed_from_the_size_of_the_vocabulary(editable):
    config = json.loads((editable / "config.json").read_text(encoding="utf-8"))
    config["language_config"]["vocab_size"] = 102400
    (editable / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for file in ("tokenizer_config.json", "generation_config.json"):
        (editable / file).unlink()
    weights = weights_of(editable)
    for name in ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"):
        weights[name] = torch.zeros(102400, 64)
    save_file(weights, editable / "model.safetensors", metadata={"format": "pt"})
    found = MultiModalityCausalLM.from_pretrained(editable).generation_config
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id) == (1, 2, 2)


def test_a_generation_config_goes_before_the_tokenizer_unless_it_repeats_the_config(editable):
    tokenizer = VLChatProcessor.from_pretrained(editable).tokenizer
    for given, expected in (([5, 6], [5, 6]), (2, tokenizer.eos_token_id)):
        generation = {"bos_token_id": 1, "eos_token_id": given}
        (editable / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
        found = MultiModalityCausalLM.from_pretrained(editable).generation_config
        assert (found.bos_token_id, found.eos_token_id) == (tokenizer.bos_token_id, expected)


# --- the program that loads ---


def threads_of_a_new_thread() -> int:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


def test_loads_at_the_same_time_change_no_thread_counts_and_no_default_dtype(siglip_checkpoint):
    """Two loads that each save and restore the thread count would leave later threads with one OpenMP thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen = set()
        with ThreadPoolExecutor(4) as pool:
            options = {"device": "cpu", "dtype": "bfloat16"}
            loads = [pool.submit(load_pretrained_model, siglip_checkpoint, **options) for _ in range(8)]
            while not all(load.done() for load in loads):
                seen |= {threads_of_a_new_thread(), torch.get_num_threads()}
        for load in loads:
            load.result()
        assert seen | {threads_of_a_new_thread()} == {3}
        assert torch.get_default_dtype() is torch.float32
    finally:
        torch.set_num_threads(before)
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_loading_leaves_no_threads_behind(siglip_checkpoint, tmp_path):
    """OpenMP threads that remain would slow down computation in other threads."""
    config = small_config("siglip", 40_000)  # large enough that PyTorch copies with several threads
    model = MultiModalityCausalLM(config).half()
    shutil.copytree(siglip_checkpoint, tmp_path, dirs_exist_ok=True)
    model.save_pretrained(tmp_path)
    code = f"""
import os, time, torch
from deepseek_vl.utils.io import load_pretrained_model
torch.set_num_threads(3)
def load():
    load_pretrained_model({str(siglip_checkpoint)!r}, device="cpu")
def threads():
    return len(os.listdir("/proc/self/task"))
load()  # some libraries keep a thread
time.sleep(1)  # and others end
before = threads()
load_pretrained_model({str(tmp_path)!r}, device="cpu", dtype="bfloat16")
deadline = time.monotonic() + 10
while threads() > before and time.monotonic() < deadline:
    time.sleep(0.01)
print(threads() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_transformers_still_has_the_private_step_through_which_weights_are_read():
    step = inspect.signature(PreTrainedModel._load_pretrained_model)
    assert list(step.parameters)[:4] == ["model", "state_dict", "checkpoint_files", "load_config"]
    assert {"device_map", "hf_quantizer"} <= {field.name for field in dataclasses.fields(LoadStateDictConfig)}
    assert hasattr(LoadStateDictConfig, "is_quantized")


# --- a CLIP tower from transformers as the vision model ---


@torch.no_grad()
def test_a_model_on_a_clip_tower_saves_and_loads(tmp_path):
    clip_config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=32,
    )
    clip = CLIPVisionModel(clip_config)
    clip.save_pretrained(tmp_path / "clip")
    config = small_config("siglip", 100)
    config.vision_config.params = type(config.vision_config.params)(
        {"model_name": str(tmp_path / "clip"), "image_size": 16, "select_feature": "patch", "select_layer": -2}
    )
    config.aligner_config.params["input_dim"] = 32
    model = MultiModalityCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    loaded = MultiModalityCausalLM.from_pretrained(tmp_path / "model").eval()
    assert_weights_are(loaded, model.state_dict())
    pixels = torch.rand(2, 3, 16, 16)
    features = loaded.get_image_features(pixels)
    assert features.shape == (2, 4, 64)
    assert torch.equal(features, model.get_image_features(pixels))


@torch.no_grad()
def test_a_fresh_model_on_a_clip_tower_keeps_the_clip_weights(tmp_path):
    clip_config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    clip = CLIPVisionModel(clip_config)
    clip.save_pretrained(tmp_path / "clip")
    config = small_config("siglip", 100)
    config.vision_config.params = type(config.vision_config.params)({"model_name": str(tmp_path / "clip")})
    config.aligner_config.params["input_dim"] = 32
    model = MultiModalityCausalLM(config)
    assert_weights_are(model.vision_model.vision_tower, clip.state_dict())


@torch.no_grad()
def test_a_half_precision_clip_checkpoint_makes_a_float32_model(tmp_path):
    clip_config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    CLIPVisionModel(clip_config).half().save_pretrained(tmp_path)
    config = small_config("siglip", 100)
    config.vision_config.params = {"model_name": str(tmp_path), "image_size": 16}
    config.aligner_config.params["input_dim"] = 32
    model = MultiModalityCausalLM(config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.get_image_features(torch.rand(1, 3, 16, 16)).shape == (1, 4, 64)
    model.vision_model.bfloat16()  # parts may have different dtypes
    assert model.get_image_features(torch.rand(1, 3, 16, 16)).dtype == torch.float32
