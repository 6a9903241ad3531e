"""Fixtures: real tokenizers, images and checkpoints on disk, small enough to run anywhere."""

import base64
import contextlib
import functools
import io
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pexpect
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase

from deepseek_vl.engine.decode_step import Step
from deepseek_vl.engine.kv_cache import RowCache
from deepseek_vl.imaging.open import load_image
from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor, VLMImageProcessor
from deepseek_vl.models.processing_vlm import BatchedVLChatProcessorOutput

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
BOS, EOS, IMAGE_TAG = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<image_placeholder>"
Batch = BatchedVLChatProcessorOutput


if "PYTEST_XDIST_WORKER" in os.environ:  # several test processes share the cores
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first: each runs in one process, and none should be the only one left at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def golden() -> dict[str, Any]:
    """Outputs of the reference implementation: prompts, ids, hashes, greedy tokens."""
    return json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden_arrays() -> dict[str, np.ndarray]:
    """Outputs of the reference implementation: samples of its arrays."""
    return dict(np.load(GOLDEN / "golden.npz"))


@pytest.fixture(scope="session")
def published_tokenizer_dir() -> Path:
    """The directory of the published DeepSeek-LLM tokenizer, which is not in this repository; skips without it."""
    default = ROOT.parent / "shared" / "reference" / "tokenizer"
    directory = Path(os.environ.get("DEEPSEEK_VL_TOKENIZER", default))
    if not (directory / "tokenizer.json").is_file():
        pytest.skip("needs the published tokenizer; set DEEPSEEK_VL_TOKENIZER to a checkpoint's directory")
    return directory


@pytest.fixture(scope="session")
def small_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small byte-level BPE tokenizer with DeepSeek's special tokens.

    Its config names `LlamaTokenizerFast`, as the published one does.
    """
    directory = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    corpus = (ROOT / "LICENSE-CODE").read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator([*corpus, *VLChatProcessor.system_prompt.split(". ")] * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (BOS, EOS, IMAGE_TAG)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 16384,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def small_config(kind: str, vocab_size: int, **language: Any) -> MultiModalityConfig:
    """The config of a miniature model: `siglip` has the architecture of the 1.3B, `hybrid` that of the 7B.

    Both give 16 features per image. `language` replaces fields of the language config.
    """
    siglip = {
        "model_name": "siglip_large_patch16_384",
        "image_size": 32,
        "patch_size": 8,
        "width": 48,
        "layers": 2,
        "heads": 2,
        "select_feature": "same",
        "select_layer": -1,
    }
    aligner = {"projector_type": "mlp_gelu", "input_dim": 48, "n_embed": 64, "depth": 2}
    vision: dict[str, Any] = {"cls": "CLIPVisionTower", "params": siglip}
    if kind == "hybrid":
        sam = {
            "model_name": "sam_b_downsample",
            "image_size": 64,
            "width": 32,
            "layers": 3,
            "heads": 2,
            "global_attn_indexes": [1, 2],
            "window_size": 3,
            "patch_size": 8,
            "prompt_embed_dim": 12,
            "downsample_channels": [24, 48],
            "output_dim": 48,
            "pixel_mean": [0.48, 0.457, 0.41],
            "pixel_std": [0.27, 0.26, 0.28],
        }
        low = {**siglip, "output_dim": 48, "pixel_mean": [0.5] * 3, "pixel_std": [0.5] * 3}
        params = {"high_res_cfg": sam, "low_res_cfg": low, "freeze_high": True, "freeze_low": True}
        vision = {"cls": "HybridVisionTower", "params": {**params, "concat_type": "tuple"}}
        aligner["projector_type"] = "low_high_hybrid_split_mlp_gelu"
    llama = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 1024,
        "vocab_size": vocab_size,
    }
    return MultiModalityConfig(
        vision_config=vision,
        aligner_config={"cls": "MlpProjector", "params": aligner},
        language_config={**llama, **language},
    )


@pytest.fixture(scope="session", params=["siglip", "hybrid"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in the published layout with a small random model of each kind."""
    return request.getfixturevalue(f"{request.param}_checkpoint")


@pytest.fixture(scope="session")
def siglip_checkpoint(small_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature of the 1.3B model."""
    return write_checkpoint("siglip", small_tokenizer_dir, tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="session")
def hybrid_checkpoint(small_tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The miniature of the 7B model."""
    return write_checkpoint("hybrid", small_tokenizer_dir, tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def processor(checkpoint: Path) -> VLChatProcessor:
    return VLChatProcessor.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> MultiModalityCausalLM:
    """The checkpoint's model, shared by all tests of a module, which must not change it."""
    return MultiModalityCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture
def own_model(checkpoint: Path) -> MultiModalityCausalLM:
    """The checkpoint's model, loaded for one test, which may change it."""
    return MultiModalityCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def picture_files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    directory = tmp_path_factory.mktemp("pictures")
    return [make_picture(directory / f"{seed}.png", seed=seed) for seed in range(3)]


@pytest.fixture(scope="module")
def make_batch(processor: VLChatProcessor, picture_files: list[Path]) -> Callable[..., Batch]:
    """A function of the number of images in each row; returns the batch. There are three rows and images at most."""
    remaining_words = ["What is this?", "Tell me a story about a boat.", "Why?"]

    def make(*image_counts: int) -> Batch:
        files = iter(picture_files)
        rows = []
        for count, words in zip(image_counts, remaining_words, strict=False):
            conversation = [
                {"role": "User", "content": "<image_placeholder>" * count + words},
                {"role": "Assistant", "content": ""},
            ]
            images = [Image.open(next(files)).convert("RGB") for _ in range(count)]
            rows.append(processor(conversations=conversation, images=images, force_batchify=False))
        return processor.batchify(rows)

    return make


@pytest.fixture(scope="module")
def batch(make_batch: Callable[..., Batch]) -> Batch:
    """Rows with two images, none, and one: padding and blank slots."""
    return make_batch(2, 0, 1)


def embedded(model: MultiModalityCausalLM, batch: Batch) -> dict[str, torch.Tensor]:
    """The arguments that downstream tools pass to `language_model.generate`."""
    return {"inputs_embeds": model.prepare_inputs_embeds(**batch), "attention_mask": batch.attention_mask}


STOCK = {
    "siglip": transformers.DeepseekVLForConditionalGeneration,
    "hybrid": transformers.DeepseekVLHybridForConditionalGeneration,
}
"""transformers' own class for each kind of model."""


def stock_inputs(model: MultiModalityCausalLM, batch: Any) -> dict[str, torch.Tensor]:
    """A batch as inputs of transformers' own classes, with the same pixels."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    images = batch.pixel_values[batch.images_emb_mask.any(dim=-1)]
    if not hasattr(model.vision_model, "vision_tower_high"):
        return {**inputs, "pixel_values": images}
    low, high = model.vision_model.vision_tower_low, model.vision_model.vision_tower_high
    small = F.interpolate(images, size=(low.image_size,) * 2, mode="bilinear", antialias=True)
    normalised = [
        (pixels - torch.tensor(tower.pixel_mean)[:, None, None]) / torch.tensor(tower.pixel_std)[:, None, None]
        for pixels, tower in ((small, low), (images, high))
    ]
    return {**inputs, "pixel_values": normalised[0], "high_res_pixel_values": normalised[1]}


@pytest.fixture(scope="session", params=STOCK)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def reference(kind: str, request: pytest.FixtureRequest) -> Path:
    """A checkpoint in the reference's layout."""
    return request.getfixturevalue(f"{kind}_checkpoint")


@pytest.fixture(scope="session")
def exported(kind: str, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `reference`, converted to transformers' layout."""
    from deepseek_vl.convert import main

    destination = tmp_path_factory.mktemp(kind) / "exported"
    assert main([str(reference), str(destination), "--to", "transformers"]) == 0
    return destination


def write_checkpoint(kind: str, tokenizer_dir: Path, directory: Path, **language: Any) -> Path:
    """Write a random model, its processor and copies of the tokenizer's files; `language` is as in `small_config`."""
    from deepseek_vl.checkpoints.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(tokenizer_dir))
    if kind == "siglip":
        image_processor = VLMImageProcessor(32, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    else:
        image_processor = VLMImageProcessor(64, do_normalize=False)
    VLChatProcessor(image_processor, tokenizer, num_image_tokens=16).save_pretrained(directory)
    for file in tokenizer_dir.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    torch.manual_seed(0)
    model = MultiModalityCausalLM(small_config(kind, len(tokenizer), **language)).eval()
    with torch.no_grad():  # larger weights than a fresh model's, so that answers vary with the input
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return directory


def in_terminal(arguments: list[str], timeout: float = 120, **options: Any) -> pexpect.spawn:
    """Start Python in a terminal, with Ctrl-C enabled even if the process that runs the tests ignores it."""
    return pexpect.spawn(
        sys.executable,
        arguments,
        encoding="utf-8",
        timeout=timeout,
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        **{"dimensions": (40, 200), **options},
    )


def interrupt(process: pexpect.spawn, expected: str) -> None:
    """Press Ctrl-C until the expected output appears: Python can miss one just before it waits for input."""
    for _ in range(12):
        process.sendintr()
        if process.expect([expected, pexpect.TIMEOUT], timeout=10) == 0:
            return
    pytest.fail(f"Ctrl-C did not lead to {expected!r}: {process.before!r}")


def wait_until(condition: Callable[[], bool], seconds: float, what: str = "it") -> None:
    """Wait until a condition holds; fail after some seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} has not happened in {seconds} s"
        time.sleep(0.02)


def answers_at(url: str, process: subprocess.Popen) -> bool:
    """Whether a server answers; fails if its process has ended."""
    assert process.poll() is None, "the server has ended"
    with contextlib.suppress(httpx.TransportError):
        httpx.get(url)
        return True
    return False


def data_url(content: bytes, kind: str = "image/png") -> str:
    """A file's content as a data URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png_that_declares(width: int, height: int) -> bytes:
    """A PNG file of a few bytes whose header declares a picture of this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """The content of a picture's file in the format `kind`."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def slow_jpeg() -> bytes:
    """A small progressive JPEG whose last scan is repeated until decoding takes minutes."""
    data = saved(Image.new("RGB", (4000, 4000), "teal"), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * 20_000 + data[-2:]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: faster for miniature models, and the same results in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A PNG file of 90 x 60 pixels."""
    return make_picture(tmp_path / "picture.png")


class WatchedStep(Step):
    """An engine's step, with functions that are called before and after each run.

    Args:
        step: runs prompts and rows.
        before: takes the number of a prompt's tokens, or 0 for a step of rows; and the caches.
        after: takes nothing.
    """

    def __init__(
        self, step: Step, before: Callable[[int, Sequence[RowCache]], None], after: Callable[[], None] = lambda: None
    ):
        self._step, self._before, self._after = step, before, after

    def __call__(self, language_model: Any, token_ids: Any, caches: Sequence[RowCache]) -> torch.Tensor:
        self._before(0, caches)
        logits = self._step(language_model, token_ids, caches)
        self._after()
        return logits

    def prompt(self, language_model: Any, embed: Any, cache: RowCache, token_ids: Any = None) -> torch.Tensor:
        embeds = embed()
        self._before(embeds.shape[1], [cache])
        logits = self._step.prompt(language_model, lambda: embeds, cache, token_ids)
        self._after()
        return logits

    def forget(self) -> None:
        self._step.forget()


def make_picture(path: Path, size: tuple[int, int] = (90, 60), seed: int = 0) -> Path:
    """Write an image file whose content depends on the seed."""
    noise = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


Loaded = tuple[PreTrainedTokenizerBase, MultiModalityCausalLM, VLChatProcessor]
"""What `load_model` returns."""


def messages_of(question: str, *images: Image.Image) -> list[dict[str, Any]]:
    """A conversation that asks one question."""
    return [{"role": "User", "content": question, "images": list(images)}, {"role": "Assistant", "content": ""}]


PARROT_ANSWERS = {
    "Greet me.": "Grüße, 世界! 🙂🎉 All good.",
    "What do you say?": "One thing.\n\nUser: and this is not for you",
    "Sing.": "la " * 40,  # learnt without an end token: the answer goes on until it is stopped
    "<image_placeholder>Colour?": {"red": "It is red.", "blue": "It is blue."},
}


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A red and a blue picture, in a directory whose name has a space."""
    directory = tmp_path_factory.mktemp("colours") / "my pictures"
    directory.mkdir()
    paths = {}
    for name in ("red", "blue"):
        paths[name] = directory / f"{name} square.png"
        Image.new("RGB", (50, 40), name).save(paths[name])
    return paths


@pytest.fixture(scope="session")
def parrot_checkpoint(
    small_tokenizer_dir: Path, colours: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The parrot: a small model that has learnt the answers of `PARROT_ANSWERS` by heart, so that tests know them."""
    directory = write_checkpoint("siglip", small_tokenizer_dir, tmp_path_factory.mktemp("parrot"))
    processor = VLChatProcessor.from_pretrained(str(directory))
    eos = processor.tokenizer.eos_token_id

    lessons = []
    for question, answers in PARROT_ANSWERS.items():
        for colour, answer in answers.items() if isinstance(answers, dict) else [(None, answers)]:
            messages = [{"role": "User", "content": question}, {"role": "Assistant", "content": ""}]
            images = [Image.open(colours[colour])] if colour else []
            item = processor(conversations=messages, images=images, force_batchify=False)
            ids = processor.tokenizer.encode(" " + answer, add_special_tokens=False)
            ids += [] if question == "Sing." else [eos]
            item.input_ids = torch.cat([item.input_ids, torch.tensor(ids)])
            lessons.append((item, len(ids)))
    batch = processor.batchify([item for item, _ in lessons])
    labels = torch.full_like(batch.input_ids, -100)
    for row, (_, length) in enumerate(lessons):
        labels[row, -length:] = batch.input_ids[row, -length:]

    torch.manual_seed(0)
    config = small_config("siglip", len(processor.tokenizer), max_position_embeddings=16384)
    model = MultiModalityCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loss = torch.tensor(1.0)
    for _ in range(400):
        loss = model(**batch, labels=labels).loss
        if loss < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.1, f"the parrot has not learnt its answers: loss {loss:.3f}"
    model.eval().save_pretrained(directory)
    return directory


def tiny_in(dtype: torch.dtype) -> MultiModalityCausalLM:
    """The bundled model with PyTorch's layers, without this package's kernels."""
    return MultiModalityCausalLM.from_pretrained("tiny", dtype=dtype).eval()


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error of a tensor, in the Euclidean norm."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(scope="session")
def tiny_prompt() -> dict[str, torch.Tensor]:
    """A prompt with a picture, for the bundled model."""
    processor = VLChatProcessor.from_pretrained("tiny")
    image = load_image(ROOT / "images" / "shapes.png")
    messages = messages_of("<image_placeholder>Describe the image.", image)
    return dict(processor(conversations=messages, images=[image], force_batchify=True).to("cpu"))


@pytest.fixture(scope="session")
def tiny_logits(tiny_prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    """The bundled model's float32 logits for `tiny_prompt`: [1, T, vocabulary]."""
    return logits_of(tiny_in(torch.float32), tiny_prompt)


@torch.inference_mode()
def logits_of(model: MultiModalityCausalLM, prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    """A model's logits for a whole prompt: float32 [1, T, vocabulary]."""
    return model(**prompt).logits.float()


@pytest.fixture(scope="module")
def serve(parrot_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """A function that starts servers of the API; all are stopped after the module's tests."""
    servers: list[Any] = []

    def start(*arguments: str, model_path: str | Path = parrot_checkpoint, **environment: str) -> Any:
        from api_server import Server

        log = tmp_path_factory.mktemp("server") / "log"
        servers.append(Server(model_path, log, *arguments, **environment))
        return servers[-1]

    yield start
    for server in servers:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait(10)


@pytest.fixture(scope="module")
def server(serve: Callable[..., Any]) -> Any:
    """A server of the API with the parrot."""
    return serve()
