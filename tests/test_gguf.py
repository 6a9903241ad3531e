"""Checkpoints converted to GGUF, read back by llama.cpp's own `gguf` package."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, messages_of, write_checkpoint
from safetensors.torch import load_file, save_file
from transformers.utils.chat_template_utils import render_jinja_template

from deepseek_vl.convert import main
from deepseek_vl.models import VLChatProcessor

gguf = pytest.importorskip("gguf")

TINY = ROOT / "deepseek_vl" / "bundled" / "tiny"


def export(source: Path, destination: Path, *arguments: str) -> dict[str, Any]:
    """Convert a checkpoint to GGUF; returns readers of the files by name."""
    assert main([str(source), str(destination), "--to", "gguf", *arguments]) == 0
    return {file.name: gguf.GGUFReader(file) for file in sorted(destination.iterdir())}


def numbers(reader: Any) -> dict[str, np.ndarray]:
    """The tensors of a file in float32."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in reader.tensors
    }


def said(reader: Any) -> dict[str, Any]:
    """The metadata of a file."""
    return {name: field.contents() for name, field in reader.fields.items()}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return export(TINY, tmp_path_factory.mktemp("gguf") / "tiny")


def test_every_number_is_where_llama_cpp_looks_for_it(files: dict[str, Any]) -> None:
    weights = {name: tensor.float().numpy() for name, tensor in load_file(TINY / "model.safetensors").items()}
    language, vision = numbers(files["model-f16.gguf"]), numbers(files["mmproj-f16.gguf"])
    plain = {
        "token_embd.weight": "language_model.model.embed_tokens.weight",
        "output.weight": "language_model.lm_head.weight",
        "output_norm.weight": "language_model.model.norm.weight",
        "blk.3.attn_v.weight": "language_model.model.layers.3.self_attn.v_proj.weight",
        "blk.0.ffn_down.weight": "language_model.model.layers.0.mlp.down_proj.weight",
        "blk.2.attn_norm.weight": "language_model.model.layers.2.input_layernorm.weight",
    }
    for name, source in plain.items():
        np.testing.assert_array_equal(language[name], weights[source])
    heads, head_dim = 3, 64
    for letter in "qk":
        ours = weights[f"language_model.model.layers.1.self_attn.{letter}_proj.weight"]
        theirs = language[f"blk.1.attn_{letter}.weight"]
        for head in range(heads):  # rotary embedding: transformers pairs i with i + 32, llama.cpp pairs neighbours
            first = head * head_dim
            np.testing.assert_array_equal(theirs[first : first + head_dim : 2], ours[first : first + 32])
            np.testing.assert_array_equal(theirs[first + 1 : first + head_dim : 2], ours[first + 32 : first + 64])
    tower = "vision_model.vision_tower"
    joint = weights[f"{tower}.blocks.6.attn.qkv.weight"]
    for i, letter in enumerate("qkv"):
        np.testing.assert_array_equal(vision[f"v.blk.6.attn_{letter}.weight"], joint[192 * i : 192 * (i + 1)])
    np.testing.assert_array_equal(vision["v.patch_embd.weight"], weights[f"{tower}.patch_embed.proj.weight"])
    np.testing.assert_array_equal(vision["v.position_embd.weight"], weights[f"{tower}.pos_embed"][0])
    np.testing.assert_array_equal(vision["mm.1.bias"], weights["aligner.layers.2.bias"])
    assert len(language) == 3 + 4 * 9
    assert len(vision) == 3 + 7 * 16 + 2 + 4


def test_the_files_say_what_the_config_says(files: dict[str, Any]) -> None:
    language, vision = said(files["model-f16.gguf"]), said(files["mmproj-f16.gguf"])
    assert language["general.architecture"] == "llama"
    sizes = {"context_length": 1024, "embedding_length": 192, "block_count": 4, "feed_forward_length": 512,
             "attention.head_count": 3, "rope.dimension_count": 64, "vocab_size": 640}  # fmt: skip
    assert {name: language[f"llama.{name}"] for name in sizes} == sizes
    assert vision["clip.projector_type"] == "janus_pro"
    sizes = {"image_size": 144, "patch_size": 16, "embedding_length": 192, "block_count": 7,
             "attention.head_count": 3, "projection_dim": 192}  # fmt: skip
    assert {name: vision[f"clip.vision.{name}"] for name in sizes} == sizes
    assert vision["clip.vision.image_mean"] == vision["clip.vision.image_std"] == [0.5] * 3


def test_the_tokenizer_is_ours(files: dict[str, Any]) -> None:
    fields = said(files["model-f16.gguf"])
    tokenizer = VLChatProcessor.from_pretrained("tiny").tokenizer
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(range(640))
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"] is True
    types = fields["tokenizer.ggml.token_type"]
    assert [types[tokenizer.bos_token_id], types[0]] == [gguf.TokenType.CONTROL, gguf.TokenType.NORMAL]
    merges = json.loads((TINY / "tokenizer.json").read_text())["model"]["merges"]
    assert len(fields["tokenizer.ggml.merges"]) == len(merges)


def test_only_another_tokenizer_than_the_published_one_is_warned_of(
    published_tokenizer_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (directory := tmp_path / "checkpoint").mkdir()
    checkpoint = write_checkpoint("siglip", published_tokenizer_dir, directory)
    (reader,) = export(checkpoint, tmp_path / "published", "--language_only").values()
    assert said(reader)["tokenizer.ggml.pre"] == "deepseek-coder"
    assert "other rules" not in caplog.text
    export(TINY, tmp_path / "tiny", "--language_only")
    assert "other rules" in caplog.text


def test_the_chat_template_gives_our_prompt(files: dict[str, Any]) -> None:
    """The template takes pictures as llama.cpp's server gives them: `media_marker` parts, whose text is a marker."""
    template = said(files["model-f16.gguf"])["tokenizer.chat_template"]
    processor = VLChatProcessor.from_pretrained("tiny")
    parts = [{"type": "media_marker", "text": "<__media__>"}, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": parts}]
    (prompt,), _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True)
    ours = processor.apply_sft_template_for_multi_turn_prompts(
        messages_of("<image_placeholder>What is this?"), processor.sft_format, processor.system_prompt
    )
    assert prompt.replace("<__media__>", "<image_placeholder>") == ours


@pytest.mark.parametrize(("kind", "error"), [("bf16", 2**-8), ("q8_0", 0.01), ("q4_0", 0.15)])
def test_matrices_are_stored_as_asked(kind: str, error: float, tmp_path: Path, files: dict[str, Any]) -> None:
    found = export(TINY, tmp_path / "out", "--type", kind, "--language_only")
    assert list(found) == [f"model-{kind}.gguf"]
    (reader,) = found.values()
    stored = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    ends = "q8_0" if kind == "q4_0" else kind
    assert (stored["blk.0.ffn_up.weight"], stored["token_embd.weight"], stored["output_norm.weight"]) == (
        kind,
        ends,
        "f32",
    )
    exact, rounded = numbers(files["model-f16.gguf"]), numbers(reader)
    for name, weight in exact.items():
        assert np.abs(rounded[name] - weight).max() <= error * np.abs(weight).max()


def test_both_layouts_are_the_same_files(siglip_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "same" / "model"
    assert main([str(siglip_checkpoint), str(other), "--to", "transformers"]) == 0
    original = tmp_path / "model"
    shutil.copytree(siglip_checkpoint, original)
    first, second = export(original, tmp_path / "first"), export(other, tmp_path / "second")
    assert list(first) == list(second) == ["mmproj-f16.gguf", "model-f16.gguf"]
    for name in first:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_the_hybrid_has_its_language_model_only(
    hybrid_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    destination = tmp_path / "out"
    assert main([str(hybrid_checkpoint), str(destination), "--to", "gguf"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "not the hybrid" in line
    assert "--language_only" in line
    assert not destination.exists()
    assert list(export(hybrid_checkpoint, destination, "--language_only")) == ["model-f16.gguf"]


def changed(source: Path, directory: Path, change: Any) -> Path:
    """A copy of a checkpoint, after `change(config, weights)`."""
    shutil.copytree(source, directory)
    config, weights = directory / "config.json", directory / "model.safetensors"
    settings, tensors = json.loads(config.read_text()), load_file(weights)
    change(settings, tensors)
    config.write_text(json.dumps(settings))
    save_file(tensors, weights, metadata={"format": "pt"})
    return directory


def too_large(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].float()
    tensors[name][0, 0] = 1e6


def scaled(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["language_config"]["rope_scaling"] = {"rope_type": "yarn", "factor": 4.0}


def incomplete(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    del tensors["aligner.layers.0.bias"]


def normalising(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["vision_config"]["params"].update(pixel_mean=[0.5] * 3, pixel_std=[0.5] * 3)


def one_layer(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["aligner_config"]["params"].update(projector_type="linear", depth=1)
    for kind in ("weight", "bias"):
        tensors[f"aligner.layers.{kind}"] = tensors.pop(f"aligner.layers.2.{kind}")
        del tensors[f"aligner.layers.0.{kind}"]


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (too_large, (), "float16 does not hold; choose --type bf16"),
        (scaled, (), "scaled by 'yarn'"),
        (incomplete, (), "1 missing: aligner.layers.0.bias"),
        (one_layer, (), "a projector of two layers"),
        (normalising, (), "normalises pixels before the tower"),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    change: Any, arguments: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = changed(TINY, tmp_path / "source", change)
    assert main([str(source), str(tmp_path / "out"), "--to", "gguf", *arguments]) == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_linear_scaling_is_said(tmp_path: Path) -> None:
    def stretch(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        config["language_config"]["rope_scaling"] = {"type": "linear", "factor": 2.0}

    (reader,) = export(changed(TINY, tmp_path / "source", stretch), tmp_path / "out", "--language_only").values()
    fields = said(reader)
    assert (fields["llama.rope.scaling.type"], fields["llama.rope.scaling.factor"]) == ("linear", 2.0)


def test_what_a_config_leaves_out_is_llamas_default(tmp_path: Path) -> None:
    """Missing keys, as the numbers of heads in the published 7B's config, have Llama's defaults."""

    def shorten(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        language = config["language_config"]
        del language["num_attention_heads"], language["num_key_value_heads"]
        language["head_dim"] = 192 // 32

    (reader,) = export(changed(TINY, tmp_path / "source", shorten), tmp_path / "out", "--language_only").values()
    fields = said(reader)
    assert (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]) == (32, 32)


def test_a_mean_that_is_left_out_is_the_image_processors_own(tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "source")
    file = tmp_path / "source" / "preprocessor_config.json"
    images = json.loads(file.read_text())
    del images["image_mean"]
    file.write_text(json.dumps(images))
    fields = said(export(tmp_path / "source", tmp_path / "out")["mmproj-f16.gguf"])
    processor = VLChatProcessor.from_pretrained(str(tmp_path / "source"))
    assert fields["clip.vision.image_mean"] == pytest.approx(processor.image_processor.image_mean)


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    assert main([str(TINY), str(tmp_path / "out"), "--to", "gguf"]) == 1
    assert "There is something at" in capsys.readouterr().err
    assert main([str(TINY), str(tmp_path / "new"), "--to", "transformers", "--type", "f16"]) == 1
    assert "belong to --to gguf" in capsys.readouterr().err


def test_without_the_library_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "deepseek_vl.checkpoints.gguf", raising=False)
    monkeypatch.delattr("deepseek_vl.checkpoints.gguf", raising=False)
    assert main([str(TINY), str(tmp_path / "out"), "--to", "gguf"]) == 1
    assert "pip install '.[gguf]'" in capsys.readouterr().err
