"""Both layouts of a checkpoint; transformers' own `deepseek_vl` classes must read and agree with theirs."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ROOT, STOCK, make_picture, messages_of, stock_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.utils.chat_template_utils import render_jinja_template

from deepseek_vl import DeepseekVLForConditionalGeneration
from deepseek_vl.convert import convert, main
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.utils.conversation import DEEPSEEK_CHAT_TEMPLATE
from deepseek_vl.utils.io import load_pretrained_model

SETTINGS = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")


def batches(processor: VLChatProcessor, tmp_path: Path) -> dict[str, Any]:
    """A batch of one row, and one of three rows of different lengths with none, one and two images."""
    first, second = (
        Image.open(make_picture(tmp_path / f"{seed}.png", size, seed)) for seed, size in enumerate([(90, 60), (31, 77)])
    )
    rows = [
        messages_of("<image_placeholder>What is this?", first),
        messages_of("Hello."),
        messages_of("<image_placeholder> and <image_placeholder>: which one?", second, first),
    ]
    items = [processor(conversations=row, images=row[0]["images"], force_batchify=False) for row in rows]
    return {"single": processor.batchify(items[:1]), "batched": processor.batchify(items)}


def agree(ours: MultiModalityCausalLM, stock: Any, processor: VLChatProcessor, tmp_path: Path) -> None:
    """Assert that two models give the same logits and the same 32 greedy tokens, for one row and for a batch."""
    for batch in batches(processor, tmp_path).values():
        theirs = stock_inputs(ours, batch)
        with torch.no_grad():
            logits, expected = ours(**batch).logits, stock(**theirs).logits
        seen = batch.attention_mask.bool()
        torch.testing.assert_close(logits[seen], expected[seen], rtol=0, atol=1e-4)
        options = {"max_new_tokens": 32, "min_new_tokens": 32, "do_sample": False}
        prompt = batch.input_ids.shape[1]
        assert torch.equal(
            ours.generate(**batch, **options)[:, prompt:], stock.generate(**theirs, **options)[:, prompt:]
        )


def test_what_we_export_is_the_same_model_in_transformers(
    kind: str, reference: Path, exported: Path, tmp_path: Path
) -> None:
    _, processor, model = load_pretrained_model(reference, device="cpu", dtype="float32")
    stock, info = STOCK[kind].from_pretrained(exported, dtype=torch.float32, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    agree(model, stock.eval(), processor, tmp_path)


def test_what_transformers_saves_is_the_same_model_here(kind: str, exported: Path, tmp_path: Path) -> None:
    """A checkpoint that transformers saves (config, weights, processor) loads here, and computes the same."""
    torch.manual_seed(1)
    config = transformers.AutoConfig.from_pretrained(exported)
    stock = STOCK[kind](config).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    stock.save_pretrained(tmp_path / "saved")
    transformers.AutoProcessor.from_pretrained(exported).save_pretrained(tmp_path / "saved")
    _, processor, model = load_pretrained_model(tmp_path / "saved", device="cpu", dtype="float32")
    agree(model, stock, processor, tmp_path)


def test_an_export_opens_where_this_package_is_not(kind: str, exported: Path, reference: Path, tmp_path: Path) -> None:
    picture = make_picture(tmp_path / "picture.png")
    code = f"""
import sys, torch
sys.modules["deepseek_vl"] = None  # an import of it would fail
from transformers import AutoModelForImageTextToText, AutoProcessor
model, info = AutoModelForImageTextToText.from_pretrained(
    {str(exported)!r}, dtype=torch.float32, output_loading_info=True)
assert type(model).__name__ == {STOCK[kind].__name__!r}
assert not info["missing_keys"] and not info["unexpected_keys"], info
processor = AutoProcessor.from_pretrained({str(exported)!r})
content = [{{"type": "image", "path": {str(picture)!r}}}, {{"type": "text", "text": "What is this? "}}]
inputs = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True,
    tokenize=True, return_dict=True, return_tensors="pt")
print(inputs["input_ids"][0].tolist())
print(model.generation_config.eos_token_id)
model.generate(**inputs, max_new_tokens=3)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    ids, eos = map(json.loads, result.stdout.splitlines()[-2:])
    processor = VLChatProcessor.from_pretrained(str(reference))
    messages = messages_of("<image_placeholder>What is this? ", Image.open(picture))
    ours = processor(conversations=messages, images=messages[0]["images"])
    assert ids == ours.input_ids[0].tolist()
    assert eos == processor.tokenizer.eos_token_id


def test_the_newer_names_of_transformers_are_read_too(exported: Path, reference: Path, tmp_path: Path) -> None:
    """Newer versions of transformers write SigLIP's names with one level less; all versions read the names we write."""
    copy(exported, tmp_path / "newer")
    weights = load_file(exported / "model.safetensors")
    assert any("vision_model.vision_model." in name for name in weights)
    newer = {name.replace("vision_model.vision_model.", "vision_model."): weight for name, weight in weights.items()}
    save_file(newer, tmp_path / "newer" / "model.safetensors", metadata={"format": "pt"})
    convert(tmp_path / "newer", tmp_path / "back", "reference")
    before, after = (load_file(path / "model.safetensors") for path in (reference, tmp_path / "back"))
    assert all(torch.equal(before[name], after[name]) for name in before if "_layer_norm" not in name)
    MultiModalityCausalLM.from_pretrained(str(tmp_path / "newer"))


@pytest.mark.parametrize("layout", ["reference", "transformers"])
def test_torch_files_of_either_layout_open_in_either_face(
    layout: str, reference: Path, exported: Path, tmp_path: Path
) -> None:
    source, directory = {"reference": reference, "transformers": exported}[layout], tmp_path / "torch"
    copy(source, directory)
    torch.save(load_file(source / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    for face in (MultiModalityCausalLM, DeepseekVLForConditionalGeneration):
        expected, opened = face.from_pretrained(source).state_dict(), face.from_pretrained(directory).state_dict()
        assert all(torch.equal(opened[name], weight) for name, weight in expected.items())


def test_either_layout_is_the_same_model_and_processor_here(reference: Path, exported: Path, picture: Path) -> None:
    answers = []
    for directory in (reference, exported):
        _, processor, model = load_pretrained_model(directory, device="cpu", dtype="float32")
        messages = messages_of("<image_placeholder>What is this?", Image.open(picture))
        inputs = processor(conversations=messages, images=messages[0]["images"])
        answers.append((inputs, model.generate(**inputs, max_new_tokens=8)))
    (inputs, tokens), (again, tokens_again) = answers
    assert torch.equal(inputs.input_ids, again.input_ids) and torch.equal(inputs.pixel_values, again.pixel_values)
    assert torch.equal(tokens, tokens_again)


def test_there_and_back_every_file_is_as_it_was(reference: Path, exported: Path, tmp_path: Path) -> None:
    convert(exported, tmp_path / "back", "reference")
    for path in reference.iterdir():
        again = tmp_path / "back" / path.name
        if path.suffix == ".safetensors":
            before, after = load_file(path), load_file(again)
            assert before.keys() == after.keys()
            for name in before:
                assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]), name
        else:
            assert again.read_bytes() == path.read_bytes(), path.name
    convert(tmp_path / "back", tmp_path / "again", "transformers")
    for name in SETTINGS:
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()


def test_a_config_that_was_changed_is_not_replaced_by_the_one_that_was_kept(exported: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    copy(exported, changed)
    config = json.loads((changed / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_theta": 5000.0, "rope_type": "default"}
    (changed / "config.json").write_text(json.dumps(config))
    convert(changed, tmp_path / "back", "reference")
    language = MultiModalityCausalLM.from_pretrained(str(tmp_path / "back")).config.language_config
    assert language.rope_parameters["rope_theta"] == 5000.0


def test_shards_stay_shards(reference: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    copy(reference, source)
    (source / "model.safetensors").unlink()
    MultiModalityCausalLM.from_pretrained(str(reference)).save_pretrained(source, max_shard_size="100kB")
    most = max(file.stat().st_size for file in source.glob("model-*.safetensors"))
    count = convert(source, tmp_path / "exported", "transformers")
    written = list((tmp_path / "exported").glob("model-*-of-*.safetensors"))
    assert len(written) > 1 and all(file.stat().st_size < most + 20_000 for file in written)
    assert count == len(load_file(reference / "model.safetensors"))
    convert(tmp_path / "exported", tmp_path / "back", "reference")
    MultiModalityCausalLM.from_pretrained(str(tmp_path / "back"))


def test_files_are_as_the_library_writes_them(exported: Path, tmp_path: Path) -> None:
    file = exported / "model.safetensors"
    save_file(load_file(file), tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert file.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_files_of_several_dtypes_are_read_as_they_were(reference: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    copy(reference, source)
    dtypes = {"vision_model": torch.float32, "aligner": torch.bfloat16, "language_model": torch.float16}
    named = load_file(source / "model.safetensors").items()
    weights = {name: weight.to(dtypes[name.split(".")[0]]) for name, weight in named}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    convert(source, tmp_path / "exported", "transformers")
    convert(tmp_path / "exported", tmp_path / "back", "reference")
    back: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        back |= load_file(file)
    assert all(back[name].dtype == weight.dtype and torch.equal(back[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("shards", [1, 3])
def test_torch_files_are_converted_as_they_are_loaded(reference: Path, tmp_path: Path, shards: int) -> None:
    """One `.bin` file, or several with an index, convert to the same files as safetensors do."""
    source = tmp_path / "source"
    copy(reference, source)
    (source / "model.safetensors").unlink()
    weights = load_file(reference / "model.safetensors")
    names = sorted(weights)
    files = {f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin": names[i::shards] for i in range(shards)}
    if shards == 1:
        files = {"pytorch_model.bin": names}
    for file, held in files.items():
        torch.save({name: weights[name] for name in held}, source / file)
    if shards > 1:
        index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert convert(source, tmp_path / "exported", "transformers") == len(weights)
    assert not list((tmp_path / "exported").rglob("*.bin*"))
    convert(tmp_path / "exported", tmp_path / "back", "reference")
    back: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        back |= load_file(file)
    assert all(torch.equal(back[name], weight) for name, weight in weights.items()) and back.keys() == weights.keys()


def test_of_several_kinds_of_weights_those_are_converted_that_are_loaded(reference: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    copy(reference, source)
    torch.save({"other": torch.zeros(1)}, source / "pytorch_model.bin")
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"other": "gone.safetensors"}}))
    convert(source, tmp_path / "exported", "transformers")
    MultiModalityCausalLM.from_pretrained(str(tmp_path / "exported"))


def copy(source: Path, destination: Path) -> None:
    destination.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (destination / path.name).write_bytes(path.read_bytes())


# --- what cannot be converted ---


def test_nothing_is_overwritten(reference: Path, exported: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "there").mkdir()
    assert main([str(reference), str(tmp_path / "there"), "--to", "transformers"]) == 1
    assert "There is something at" in capsys.readouterr().err
    assert main([str(exported), str(tmp_path / "new"), "--to", "transformers"]) == 1
    assert "is in the transformers layout already" in capsys.readouterr().err
    assert main([str(tmp_path / "there"), str(tmp_path / "new"), "--to", "transformers"]) == 1
    assert "is no checkpoint: it has no config.json" in capsys.readouterr().err
    inside = reference / "inside"
    assert main([str(reference), str(inside), "--to", "transformers"]) == 1
    assert "is inside the checkpoint itself" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and not inside.exists()


@pytest.mark.parametrize("layout", ["reference", "transformers"])
@pytest.mark.parametrize("change", ["missing", "not known", "of another shape"])
def test_weights_that_do_not_fit_are_named(
    layout: str, change: str, reference: Path, exported: Path, tmp_path: Path
) -> None:
    source, norm = (exported, "model.language_model.norm.weight")
    if layout == "transformers":
        source, norm = (reference, "language_model.model.norm.weight")
    copy(source, tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    if change == "missing":
        del weights[norm]
    elif change == "not known":
        norm = "extra.weight"
        weights[norm] = torch.zeros(3)
    else:
        weights[norm] = torch.zeros(3)
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 {change}: (language_model.model.norm|extra).weight"):
        convert(tmp_path / "source", tmp_path / "new", layout)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("file", "path", "value", "message"),
    [
        ("config.json", ["aligner_config", "params", "depth"], 3, "only depth=2"),
        ("config.json", ["aligner_config", "params", "projector_type"], "linear", "only projector_type="),
        ("processor_config.json", ["add_special_token"], True, "only add_special_token=False"),
        ("processor_config.json", ["image_tag"], "<img>", "only image_tag="),
        ("processor_config.json", ["sft_format"], "plain", "only sft_format="),
        ("preprocessor_config.json", ["do_normalize"], False, "only do_normalize=True"),
    ],
)
def test_settings_without_a_place_in_transformers_are_refused(
    file: str, path: list[str], value: Any, message: str, siglip_checkpoint: Path, tmp_path: Path
) -> None:
    copy(siglip_checkpoint, tmp_path / "source")
    settings = json.loads((tmp_path / "source" / file).read_text())
    inner = settings
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (tmp_path / "source" / file).write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", tmp_path / "new", "transformers")
    assert not (tmp_path / "new").exists()


def test_a_truncated_file_is_one_line(reference: Path, tmp_path: Path) -> None:
    copy(reference, tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    command = [sys.executable, "-m", "deepseek_vl.convert", str(tmp_path / "source"), str(tmp_path / "new"), "--to"]
    result = subprocess.run([*command, "transformers"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "is broken or truncated" in result.stderr


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", {"model_type": "llama"}, "is not a DeepSeek-VL checkpoint: its model_type is 'llama'"),
        ("config.json", {"vision_config": None}, "cannot be loaded"),
        ("config.json", {"language_config": {"hidden_size": "wide"}}, "cannot be loaded"),
        ("config.json", None, "config.json' is not JSON"),
        ("preprocessor_config.json", {"image_size": None}, "cannot be loaded"),
    ],
)
@pytest.mark.parametrize("to", ["transformers", "reference"])
def test_a_source_that_is_no_whole_checkpoint_is_one_line(
    reference: Path, tmp_path: Path, capsys: Any, name: str, change: dict[str, Any] | None, message: str, to: str
) -> None:
    copy(reference, tmp_path / "source")
    file = tmp_path / "source" / name
    if change is None:
        file.write_bytes(file.read_bytes()[:200])
    else:
        settings = {**json.loads(file.read_text(encoding="utf-8")), **change}
        settings = {name: value for name, value in settings.items() if value is not None}
        file.write_text(json.dumps(settings), encoding="utf-8")
    assert main([str(tmp_path / "source"), str(tmp_path / "new"), "--to", to]) == 1
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert message in error or (to == "reference" and "is in the reference layout already" in error)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"not a file of torch's"])
def test_a_broken_torch_file_is_one_line_too(reference: Path, tmp_path: Path, capsys: Any, content: bytes) -> None:
    copy(reference, tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").unlink()
    (tmp_path / "source" / "pytorch_model.bin").write_bytes(content)
    assert main([str(tmp_path / "source"), str(tmp_path / "new"), "--to", "transformers"]) == 1
    assert "pytorch_model.bin' is broken or truncated (" in capsys.readouterr().err
    (tmp_path / "source" / "pytorch_model.bin").unlink()
    assert main([str(tmp_path / "source"), str(tmp_path / "new"), "--to", "transformers"]) == 1
    assert "source' has no weights: neither model.safetensors nor " in capsys.readouterr().err


# --- the chat template ---

TEXTS = st.text(st.sampled_from("ab \n\t:<>{}é世🙂|%'\"\\"), max_size=12)
PARTS = st.one_of(st.just({"type": "image"}), st.builds(lambda text: {"type": "text", "text": text}, TEXTS))
CONTENTS = st.one_of(TEXTS, st.lists(PARTS, max_size=4))


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(
    system=st.none() | TEXTS | st.just("Answer briefly."),
    contents=st.lists(CONTENTS, min_size=1, max_size=5),
    asked=st.booleans(),
)
def test_the_template_is_the_conversation_format(
    tiny_processor: VLChatProcessor, system: str | None, contents: list[Any], asked: bool
) -> None:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    generates = asked and len(messages) % 2 == 1
    with_system = messages if system is None else [{"role": "system", "content": system}, *messages]
    (rendered,), _ = render_jinja_template(
        conversations=[with_system], chat_template=DEEPSEEK_CHAT_TEMPLATE, add_generation_prompt=generates
    )

    def text_of(content: Any) -> str:
        if isinstance(content, str):
            return content
        return "".join("<image_placeholder>" if part["type"] == "image" else part["text"] for part in content)

    expected = [{"role": message["role"].capitalize(), "content": text_of(message["content"])} for message in messages]
    if generates:
        expected.append({"role": "Assistant", "content": ""})
    assert rendered == tiny_processor.apply_sft_template_for_multi_turn_prompts(
        expected, system_prompt=tiny_processor.system_prompt if system is None else system
    )


@pytest.fixture(scope="module")
def tiny_processor() -> VLChatProcessor:
    return VLChatProcessor.from_pretrained("tiny")
