"""transformers' interface: its documented example, both layouts, its own classes' outputs, and its conventions."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, STOCK, make_picture, messages_of
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from deepseek_vl import (
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLImageProcessor,
    DeepseekVLImageProcessorFast,
    DeepseekVLModel,
    DeepseekVLProcessor,
    MultiModalityCausalLM,
    VLChatProcessor,
)
from deepseek_vl.convert import convert


@pytest.fixture(scope="session", params=["reference", "transformers"])
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def directory(layout: str, reference: Path, exported: Path) -> Path:
    return {"reference": reference, "transformers": exported}[layout]


@pytest.fixture(scope="session")
def tiny_exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("tiny") / "exported"
    convert("tiny", destination, "transformers")
    return destination


def asking(text: str, *images: Any) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def prepared(processor: DeepseekVLProcessor, conversation: Any, **kwargs: Any) -> Any:
    return processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **kwargs
    )


def test_the_seeds_example(tiny_exported: Path) -> None:
    """transformers' documented example runs with another import line, model path and picture."""
    model_id = str(tiny_exported)
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "url": str(ROOT / "images/shapes.png")},
                {"type": "text", "text": "What colour is the star?"},
            ],
        },
    ]

    processor = DeepseekVLProcessor.from_pretrained(model_id)
    model = DeepseekVLForConditionalGeneration.from_pretrained(model_id, torch_dtype=torch.bfloat16, device_map="auto")

    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        generation_mode="text",
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, dtype=torch.bfloat16)

    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=40, generation_mode="text", do_sample=True)
    text = processor.decode(output[0], skip_special_tokens=True)
    assert text.endswith("Assistant: The star is blue.")
    assert model.dtype == inputs["pixel_values"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["tiny", "tiny_exported"])
def test_the_bundled_model_by_name_and_in_the_other_layout(name: str, request: pytest.FixtureRequest) -> None:
    path = name if name == "tiny" else request.getfixturevalue(name)
    processor = DeepseekVLProcessor.from_pretrained(path)
    model = DeepseekVLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    images = [Image.open(ROOT / "images" / name) for name in ("shapes.png", "chart.png")]
    batch = [asking("What colour is the star?", images[0]), asking("Which bar is the tallest?", images[1])]
    inputs = prepared(processor, batch)
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [answer.strip() for answer in answers] == ["The star is blue.", "The blue bar is the tallest."]


def test_it_computes_what_the_reference_does(directory: Path, reference: Path, picture: Path) -> None:
    """Both interfaces give the same logits and tokens for the same pictures, from either layout."""
    pictures = [Image.open(picture), Image.open(make_picture(picture.with_name("b.png"), (31, 77), 1))]
    ours = DeepseekVLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    processor = DeepseekVLProcessor.from_pretrained(directory)
    inputs = prepared(processor, asking(" And these? ", *pictures))
    model = MultiModalityCausalLM.from_pretrained(str(reference), dtype=torch.float32)
    chat_processor = VLChatProcessor.from_pretrained(str(reference))
    tags = "<image_placeholder>" * 2
    theirs = chat_processor(conversations=messages_of(f"{tags} And these? ", *pictures), images=pictures)

    assert torch.equal(inputs["input_ids"], theirs.input_ids)
    with torch.no_grad():
        torch.testing.assert_close(ours(**inputs).logits, model(**theirs).logits, rtol=0, atol=1e-5)
    options = {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(ours.generate(**inputs, **options), model.generate(**theirs, **options))


def test_transformers_own_classes_agree(kind: str, exported: Path, picture: Path) -> None:
    inputs = prepared(DeepseekVLProcessor.from_pretrained(exported), asking("What?", Image.open(picture)))
    ours = DeepseekVLForConditionalGeneration.from_pretrained(exported, dtype=torch.float32)
    stock = STOCK[kind].from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        one = ours(**inputs, output_hidden_states=True, output_attentions=False)
        other = stock(**inputs, output_hidden_states=True)
    torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-4)
    assert len(one.hidden_states) == len(other.hidden_states)
    for ours_hidden, stock_hidden in zip(one.hidden_states, other.hidden_states, strict=True):
        torch.testing.assert_close(ours_hidden, stock_hidden, rtol=0, atol=1e-4)


def test_saved_it_is_in_transformers_layout_and_the_same(directory: Path, kind: str, tmp_path: Path) -> None:
    model = DeepseekVLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    DeepseekVLProcessor.from_pretrained(directory).save_pretrained(tmp_path)
    again = DeepseekVLForConditionalGeneration.from_pretrained(tmp_path)
    for name, weight in model.state_dict().items():
        if "layer_norm" in name and name.count(".") == 3 and kind == "hybrid":
            continue  # the hybrid tower's norms are unused, and this layout has no place for them
        assert torch.equal(again.state_dict()[name], weight), name
    _, info = STOCK[kind].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    stock_processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    assert type(stock_processor).__module__.startswith("transformers.")
    settings = DeepseekVLProcessor.from_pretrained(tmp_path)
    assert settings.num_image_tokens == stock_processor.num_image_tokens == 16
    assert (
        settings.image_processor.to_dict() == DeepseekVLProcessor.from_pretrained(directory).image_processor.to_dict()
    )


def test_the_model_without_its_head(directory: Path, picture: Path) -> None:
    inputs = prepared(DeepseekVLProcessor.from_pretrained(directory), asking("What?", Image.open(picture)))
    whole = DeepseekVLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    base = DeepseekVLModel.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        output = base(**inputs)
        torch.testing.assert_close(whole.lm_head(output.last_hidden_state), whole(**inputs).logits)
    assert output.image_hidden_states.shape[:2] == (1, 16)


def test_pre_encoded_images_embeddings_labels_and_attentions(exported: Path, picture: Path) -> None:
    processor = DeepseekVLProcessor.from_pretrained(exported)
    model = DeepseekVLForConditionalGeneration.from_pretrained(
        exported, dtype=torch.float32, attn_implementation="eager"
    )
    inputs = prepared(processor, asking("What?", Image.open(picture)))
    pixels = {name: value for name, value in inputs.items() if "pixel" in name}
    text = {name: value for name, value in inputs.items() if "pixel" not in name}
    with torch.no_grad():
        expected = model(**inputs, labels=inputs["input_ids"], output_attentions=True)
        features = model.get_image_features(**pixels)
        torch.testing.assert_close(model(**text, image_features=features).logits, expected.logits)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        embeds[inputs["input_ids"] == processor.image_token_id] = features.flatten(0, 1)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, expected.logits)
        last = model(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(last, expected.logits[:, -1:])
    shifted = torch.nn.functional.cross_entropy(expected.logits[0, :-1], inputs["input_ids"][0, 1:])
    torch.testing.assert_close(expected.loss, shifted)
    assert len(expected.attentions) == model.config.text_config.num_hidden_layers


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_of_texts_with_none_one_and_two_images(padding_side: str, exported: Path, tmp_path: Path) -> None:
    processor = DeepseekVLProcessor.from_pretrained(exported)
    model = DeepseekVLForConditionalGeneration.from_pretrained(exported, dtype=torch.float32)
    pictures = [Image.open(make_picture(tmp_path / f"{i}.png", size, i)) for i, size in enumerate([(90, 60), (20, 77)])]
    rows = [asking("Hello."), asking("What?", pictures[0]), asking("And of these?", pictures[1], pictures[0])]
    batch = prepared(processor, rows, padding_side=padding_side)
    assert batch["attention_mask"].shape == batch["input_ids"].shape
    with torch.no_grad():
        together = model(**batch).logits
        for row, conversation in enumerate(rows):
            alone = model(**prepared(processor, conversation)).logits[0]
            seen = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row][seen], alone, rtol=0, atol=1e-4)


def test_beams_and_samples_keep_every_rows_own_images(exported: Path, reference: Path, tmp_path: Path) -> None:
    processor = DeepseekVLProcessor.from_pretrained(exported)
    model = DeepseekVLForConditionalGeneration.from_pretrained(exported, dtype=torch.float32)
    pictures = [Image.open(make_picture(tmp_path / f"{i}.png", (60, 40), i)) for i in range(2)]
    rows = [asking("Hello."), asking("What?", pictures[0]), asking("And of these?", *pictures)]
    batch = prepared(processor, rows)
    prompt = batch["input_ids"].shape[1]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}  # few: rounding can part equal beams
    for more in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}):
        together = model.generate(**batch, **options, **more)[:, prompt:]
        each = [prepared(processor, row) for row in rows]
        alone = [model.generate(**row, **options, **more)[:, row["input_ids"].shape[1] :] for row in each]
        assert together.tolist() == [answer for answers in alone for answer in answers.tolist()]


def test_the_loss_of_a_part_of_a_batch_is_its_share_of_the_whole(exported: Path, picture: Path) -> None:
    """`num_items_in_batch` scales the loss, as `Trainer` needs for gradient accumulation."""
    inputs = prepared(DeepseekVLProcessor.from_pretrained(exported), asking("What?", Image.open(picture)))
    model = DeepseekVLForConditionalGeneration.from_pretrained(exported, dtype=torch.float32)
    with torch.no_grad():
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        share = model(**inputs, labels=inputs["input_ids"], num_items_in_batch=1000).loss
    torch.testing.assert_close(share, loss * (inputs["input_ids"].shape[1] - 1) / 1000)


def test_weights_that_the_layout_has_no_place_for_are_not_lost(exported: Path, tmp_path: Path) -> None:
    """Saving refuses adapter weights (injected by peft: transformers 5.24's `add_adapter` needs an unreleased peft)."""
    peft = pytest.importorskip("peft")

    model = DeepseekVLForConditionalGeneration.from_pretrained(exported)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj"]), model)
    with pytest.raises(ValueError, match=r"no place for .*; merge adapters first"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_has_two_names(exported: Path, name: str, recwarn: pytest.WarningsRecorder) -> None:
    model = DeepseekVLForConditionalGeneration.from_pretrained(exported, dtype=torch.float32)
    ids = torch.arange(5, 15)[None]
    options = {"do_sample": False, "return_dict_in_generate": True}
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, 6:]
        for part in (model, model.model):
            past = part(input_ids=ids[:, :6], use_cache=True)["past_key_values"]
            output = part(input_ids=ids[:, 6:], **{name: past})[0]
            logits = output if part is model else model.lm_head(output)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    first = model.generate(input_ids=ids, max_new_tokens=3, **options)
    longer = torch.cat([first.sequences, torch.tensor([[7, 8]])], dim=1)
    plain = model.generate(input_ids=longer, max_new_tokens=5, **options).sequences
    again = model.generate(input_ids=longer, max_new_tokens=5, **options, **{name: first["past_key_values"]})
    assert again.sequences.tolist() == plain.tolist()
    with pytest.raises(ValueError, match="two names of one argument"):
        model(input_ids=ids, cache=past, past_key_values=past)
    assert not [warning for warning in recwarn if issubclass(warning.category, FutureWarning)]


def test_pixels_are_on_the_device_that_is_asked_for(exported: Path, picture: Path) -> None:
    """`meta` stands for a GPU."""
    processor = DeepseekVLImageProcessorFast.from_pretrained(exported)
    tensor = torch.tensor(np.asarray(Image.open(picture).convert("RGB")))
    assert all(pixels.device.type == "cpu" for pixels in processor(tensor).values())
    assert all(pixels.device.type == "meta" for pixels in processor(tensor, device="meta").values())


def test_everything_learns_until_it_is_frozen(exported: Path) -> None:
    loaded = DeepseekVLForConditionalGeneration.from_pretrained(exported)
    for model in (loaded, DeepseekVLForConditionalGeneration(loaded.config)):
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        unused = ("attn_pool.", "high_layer_norm.", "low_layer_norm.")  # no forward pass uses these
        assert frozen and all(any(part in name for part in unused) for name in frozen)
        assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}


def test_a_checkpoint_that_lacks_a_weight_is_an_error(exported: Path, tmp_path: Path) -> None:
    for file in exported.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(exported / "model.safetensors")
    del weights["model.language_model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing_keys: model\.language_model\.norm\.weight"):
        DeepseekVLForConditionalGeneration.from_pretrained(tmp_path)


# --- images ---


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (64, 64), (301, 7), (7, 301), (1, 1)])
def test_pixels_are_the_references(directory: Path, reference: Path, size: tuple[int, int], tmp_path: Path) -> None:
    image = Image.open(make_picture(tmp_path / "picture.png", size))
    ours = DeepseekVLImageProcessor.from_pretrained(directory)(image)
    model = MultiModalityCausalLM.from_pretrained(str(reference))
    pixels = VLChatProcessor.from_pretrained(str(reference)).image_processor(image)["pixel_values"]
    if ours.get("high_res_pixel_values") is None:
        assert torch.equal(ours["pixel_values"], pixels)
        return
    high = model.vision_model.vision_tower_high
    mean, std = (torch.tensor(values)[:, None, None] for values in (high.pixel_mean, high.pixel_std))
    assert torch.equal(ours["high_res_pixel_values"], (pixels - mean) / std)
    assert list(ours["pixel_values"].shape) == [1, 3, model.vision_model.low_res_size, model.vision_model.low_res_size]


def test_the_fast_processor_gives_the_same_bits(exported: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    exact, fast = (cls.from_pretrained(exported) for cls in (DeepseekVLImageProcessor, DeepseekVLImageProcessorFast))
    sizes = [(1, 200), (200, 1), (3, 90), (90, 3), *(tuple(map(int, rng.integers(1, 300, 2))) for _ in range(40))]
    smooth = [Image.open(make_picture(tmp_path / f"{i}.png", size, i)) for i, size in enumerate(sizes)]
    noise = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    for images in (smooth, noise):
        made = fast(images)
        for name, pixels in exact(images).items():
            assert torch.equal(made[name], pixels), name


@pytest.mark.parametrize("processor_class", [DeepseekVLImageProcessor, DeepseekVLImageProcessorFast])
def test_settings_of_one_call(processor_class: type, exported: Path, picture: Path) -> None:
    image = Image.open(picture)
    processor = processor_class.from_pretrained(exported)
    before = processor(image)
    plain = processor(image, do_normalize=False)
    assert all((plain[name].min() >= 0) & (plain[name].max() <= 1) for name in plain)
    small = processor(image, size={"height": 16, "width": 16}, do_rescale=True)["pixel_values"]
    assert small.shape == (1, 3, 16, 16)
    for name, pixels in processor(image).items():
        assert torch.equal(pixels, before[name]), "the settings of one call are not those of the next"


@pytest.mark.parametrize("processor_class", [DeepseekVLImageProcessor, DeepseekVLImageProcessorFast])
def test_arrays_and_tensors_are_images_too(processor_class: type, exported: Path, picture: Path) -> None:
    processor = processor_class.from_pretrained(exported)
    image = Image.open(picture).convert("RGB")
    array = np.asarray(image)
    forms = [array, array.transpose(2, 0, 1), torch.tensor(array).permute(2, 0, 1)]
    expected = processor(image)["pixel_values"]
    for form in forms:
        assert torch.equal(processor(form)["pixel_values"], expected)
        assert torch.equal(processor([[form], [form]])["pixel_values"], expected.repeat(2, 1, 1, 1))
    assert torch.equal(processor(torch.stack([forms[2]] * 2))["pixel_values"], expected.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="There are no images"):
        processor([])
    assert isinstance(processor(image, return_tensors="np")["pixel_values"], np.ndarray)


# --- Auto classes and pipelines ---


@pytest.mark.parametrize("first", ["import deepseek_vl.models", "from deepseek_vl import load_pil_images"])
def test_auto_classes_and_the_pipeline_open_the_published_layout(first: str) -> None:
    """Importing `deepseek_vl.models`, or any name that the package exports, registers the Auto classes."""
    code = f"""
import transformers
{first}
path = {str(ROOT / "deepseek_vl/bundled/tiny")!r}
model = transformers.AutoModelForImageTextToText.from_pretrained(path)
processor = transformers.AutoProcessor.from_pretrained(path)
print(type(model).__name__, type(processor).__name__)
pipe = transformers.pipeline("image-text-to-text", model=path)
parts = [{{"type": "image", "image": "images/shapes.png"}}, {{"type": "text", "text": "What colour is the star?"}}]
options = {{"max_new_tokens": 20, "do_sample": False}}
result = pipe(text=[{{"role": "user", "content": parts}}], return_full_text=False, generate_kwargs=options)
print(result[0]["generated_text"].strip())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert result.stdout.splitlines() == ["MultiModalityCausalLM VLChatProcessor", "The star is blue."], result.stderr


# --- errors and habits ---


def test_errors(exported: Path, kind: str, picture: Path) -> None:
    processor = DeepseekVLProcessor.from_pretrained(exported)
    model = DeepseekVLForConditionalGeneration.from_pretrained(exported, dtype=torch.float32)
    inputs = prepared(processor, asking("What?", Image.open(picture)))
    with pytest.raises(ValueError, match="1 <image_placeholder> and 0 images"):
        processor(text="<image_placeholder>What?")
    with pytest.raises(ValueError, match="There is no text"):
        processor(images=Image.open(picture))
    with pytest.raises(ValueError, match="must be 'text'"):
        model.generate(**inputs, generation_mode="image")
    with pytest.raises(ValueError, match="must be 'text'"):
        prepared(processor, asking("What?"), generation_mode="image")
    pixels = {name: value for name, value in inputs.items() if "pixel" in name}
    with pytest.raises(ValueError, match="0 image tokens and 16 image features"):
        model(input_ids=torch.ones_like(inputs["input_ids"]), **pixels)
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="uint8 arrays"):
        processor.image_processor(np.zeros((8, 8, 3)))
    pixels = {"pixel_values": inputs["pixel_values"]}
    if kind == "siglip":
        pixels["high_res_pixel_values"] = inputs["pixel_values"]
    with pytest.raises(ValueError, match="high_res_pixel_values"):
        model(input_ids=inputs["input_ids"], **pixels)


def test_a_config_from_nothing_is_a_model_that_learns() -> None:
    """A config can be made from sizes alone, as in transformers' own tests."""
    config = DeepseekVLConfig(
        text_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                     "vocab_size": 99},
        vision_config={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 16, "patch_size": 8, "hidden_act": "gelu"},
        image_token_id=98,
    )  # fmt: skip
    model = DeepseekVLForConditionalGeneration(config)
    input_ids = torch.tensor([[1, 98, 98, 98, 98, 2, 3]])
    loss = model(input_ids=input_ids, pixel_values=torch.rand(1, 3, 16, 16), labels=input_ids).loss
    loss.backward()
    idle = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert all("attn_pool" in name for name in idle), idle


def test_trainer_goes_on_from_its_checkpoints_and_ends_with_the_best(exported: Path, tmp_path: Path) -> None:
    """`Trainer` loads the files of `save_pretrained` itself, by the names of weights in the file."""
    texts = [{"input_ids": torch.tensor([5, 6, 7, row]), "labels": torch.tensor([5, 6, 7, row])} for row in range(4)]

    def trainer(steps: int) -> Trainer:
        model = DeepseekVLForConditionalGeneration.from_pretrained(exported, dtype=torch.float32)
        arguments = TrainingArguments(
            tmp_path,
            max_steps=steps,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            greater_is_better=True,  # the first checkpoint, with the highest loss, is the best
            report_to="none",
            use_cpu=True,
        )
        return Trainer(model, arguments, train_dataset=texts, eval_dataset=texts)

    first = trainer(2)
    first.train()
    assert first.state.best_model_checkpoint.endswith("checkpoint-1")
    best = DeepseekVLForConditionalGeneration.from_pretrained(tmp_path / "checkpoint-1")
    for name, weight in best.state_dict().items():
        assert torch.equal(first.model.state_dict()[name], weight), name

    resumed = trainer(3)
    resumed.args.load_best_model_at_end = False
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    unbroken = trainer(3)
    unbroken.args.load_best_model_at_end = False
    unbroken.args.output_dir = str(tmp_path / "unbroken")
    unbroken.train()
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], weight), name


def test_outputs_as_tuples(exported: Path, picture: Path) -> None:
    model = DeepseekVLForConditionalGeneration.from_pretrained(exported, dtype=torch.float32)
    inputs = prepared(DeepseekVLProcessor.from_pretrained(exported), asking("What?", Image.open(picture)))
    with torch.no_grad():
        assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)
        assert torch.equal(model.model(**inputs, return_dict=False)[0], model.model(**inputs).last_hidden_state)


@pytest.mark.skipif(Version(torch.__version__) < Version("2.8"), reason="transformers' own wrappers break it there")
def test_the_language_model_compiles_without_graph_breaks(exported: Path, picture: Path) -> None:
    processor = DeepseekVLProcessor.from_pretrained(exported)
    model = DeepseekVLForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
    inputs = prepared(processor, asking("What?", Image.open(picture)))
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, use_cache=False).logits
        torch.testing.assert_close(compiled(inputs_embeds=embeds, use_cache=False).logits, expected)
