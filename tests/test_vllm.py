"""vLLM runs our checkpoints through its entry point: `vllm serve`, the `openai` client, and `LLM.chat`.

Needs vLLM; `.ci/vllm` makes an environment with its build for CPUs and runs this file in it.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from conftest import IMAGE_TAG, ROOT, answers_at, data_url, saved, wait_until, write_checkpoint
from PIL import Image

from deepseek_vl.convert import main as convert
from deepseek_vl.data.checks import load_data
from deepseek_vl.imaging.open import load_image
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.serve.inference import load_model, message_images
from deepseek_vl.utils.io import load_pil_images

pytest.importorskip("vllm", reason="vLLM is not installed; see .ci/vllm")
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ROOT / "deepseek_vl" / "bundled" / "tiny"
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
PICTURES = sorted((ROOT / "images").glob("*.png"))

Messages = Sequence[dict[str, Any]]
Answer = tuple[list[int], list[int]]
"""The ids of a prompt, with an image's tag repeated for each of its features, and the ids of its answer."""


class Server:
    """`vllm serve`, and how to reach it."""

    def __init__(self, model_path: Path, log: Path, port: int, *arguments: str):
        self.log, self.url = log, f"http://127.0.0.1:{port}"
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [Path(sys.executable).with_name("vllm"), "serve", model_path, "--served-model-name", "ours",
                 "--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port), *arguments],
                stdout=file, stderr=file, cwd=log.parent, env={**os.environ, **SETTINGS}, start_new_session=True,
            )  # fmt: skip
        try:
            wait_until(lambda: answers_at(f"{self.url}/health", self.process), 600, "vLLM's start")
        except AssertionError as error:
            self.stop()
            lines = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line]
            raise AssertionError("\n".join(lines)) from error

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))

    def ask(self, messages: Messages, tokens: int = 64, model: str = "ours", **more: Any) -> Answer:
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)
        answer = client.chat.completions.create(
            model=model,
            messages=as_openai(messages),
            temperature=0,
            max_tokens=tokens,
            extra_body={"return_token_ids": True, **more},
        )
        return answer.prompt_token_ids, answer.choices[0].token_ids


def as_openai(messages: Messages) -> list[dict[str, Any]]:
    """Messages in OpenAI's form, with each image in the place of its tag."""
    result = []
    for message in messages:
        images = iter(message.get("images") or ())
        pieces = filter(None, re.split(f"({IMAGE_TAG})", message["content"]))
        parts = [
            {"type": "image_url", "image_url": {"url": data_url(saved(next(images), "PNG"))}}
            if piece == IMAGE_TAG
            else {"type": "text", "text": piece}
            for piece in pieces
        ]
        result.append(
            {"role": message["role"].lower(), "content": parts if message.get("images") else message["content"]}
        )
    return result


def ours(model: MultiModalityCausalLM, processor: VLChatProcessor, messages: Messages, tokens: int = 64) -> Answer:
    conversation = [*messages, {"role": "Assistant", "content": ""}]
    inputs = processor(prompt=processor.render(conversation), images=message_images(conversation))
    prompt = inputs.input_ids[0].tolist()
    with torch.inference_mode():
        ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0].tolist()
    return prompt, ids[len(prompt) :]


def user(text: str, *images: Image.Image) -> dict[str, Any]:
    return {"role": "User", "content": text, "images": list(images)}


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """A function that starts a server and stops the one before, because each needs much memory."""
    servers: list[Server] = []

    def start(model_path: Path, *arguments: str) -> Server:
        for server in servers:
            server.stop()
        servers.append(Server(model_path, tmp_path_factory.mktemp("vllm") / "log", 18100 + len(servers), *arguments))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def tiny() -> tuple[MultiModalityCausalLM, VLChatProcessor]:
    return load_model("tiny", device="cpu", dtype="float32")[1:]


@pytest.fixture(scope="module")
def questions(tiny: tuple[MultiModalityCausalLM, VLChatProcessor]) -> list[Messages]:
    """All questions of `tests/pictures` with opened pictures: about one, two and none, and follow-ups."""
    rows, _ = load_data(ROOT / "tests" / "pictures" / "questions.jsonl", tiny[1])
    asked = []
    for row in rows:
        opened = [{**message, "images": load_pil_images([message])} for message in row.messages]
        asked += [opened[:end] for end in range(1, len(opened), 2)]
    assert len(asked) >= 145
    return asked


@pytest.fixture(scope="module")
def answers(tiny: tuple[MultiModalityCausalLM, VLChatProcessor], questions: list[Messages]) -> list[Answer]:
    return [ours(*tiny, messages) for messages in questions]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the language model, trained by this package to give other answers."""
    pytest.importorskip("peft")
    from deepseek_vl.train.__main__ import main as train

    directory = tmp_path_factory.mktemp("lora")
    rows = [
        {"messages": [{"role": "User", "content": f"{IMAGE_TAG}{question}", "images": [str(picture)]},
                      {"role": "Assistant", "content": "I see a red word."}]}
        for picture in PICTURES[:4]
        for question in ("What colour is the star?", "What do you see?")
    ]  # fmt: skip
    data = directory / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ["--model_path", "tiny", "--data", str(data), "--output", str(directory / "adapter"), "--lora",
               "--train", "language", "--max_steps", "12", "--learning_rate", "3e-3", "--device", "cpu",
               "--dtype", "float32"]  # fmt: skip
    assert train(command) == 0
    return directory / "adapter"


@pytest.fixture(scope="module")
def server(serve: Callable[..., Server], adapter: Path) -> Server:
    return serve(TINY, "--enable-lora", "--lora-modules", f"adapted={adapter}")


def test_answers_about_pictures_are_ours(server: Server, questions: list[Messages], answers: list[Answer]) -> None:
    for messages, expected in zip(questions, answers, strict=True):
        assert server.ask(messages) == expected, messages


def test_many_at_once_get_the_same_answers(server: Server, questions: list[Messages], answers: list[Answer]) -> None:
    """Prompts come from the prefix cache, which must distinguish pictures although their tokens are the same."""
    before = server.metric("vllm:prefix_cache_hits_total")
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(server.ask, questions)) == answers
    assert server.metric("vllm:prefix_cache_hits_total") > before


def test_lora_adapters_of_our_trainer(
    server: Server, adapter: Path, tiny: tuple[MultiModalityCausalLM, VLChatProcessor]
) -> None:
    from peft import PeftModel

    _, model, processor = load_model("tiny", device="cpu", dtype="float32")
    adapted = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    changed = 0
    for file in PICTURES[:6]:
        messages = [user(f"{IMAGE_TAG}What colour is the star?", load_image(file))]
        expected = ours(adapted, processor, messages)
        assert server.ask(messages, model="adapted") == expected
        changed += expected != ours(*tiny, messages)
        assert server.ask(messages) == ours(*tiny, messages)
    assert changed


@pytest.mark.parametrize("kind", ["transparent", "16 bits", "turned by EXIF", "palette"])
def test_pictures_of_all_kinds_are_opened_as_ours(
    kind: str, server: Server, tiny: tuple[MultiModalityCausalLM, VLChatProcessor]
) -> None:
    """Log probabilities of the first token, which change with any pixel, are ours for pictures of all kinds."""
    image = Image.open(PICTURES[0]).convert("RGB")
    if kind == "transparent":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        content = saved(image, "PNG")
    elif kind == "16 bits":
        grey = np.asarray(image.convert("L")).astype(np.uint16) * 257
        content = saved(Image.fromarray(grey), "PNG")
    elif kind == "palette":
        content = saved(image.quantize(16), "PNG", transparency=3)
    else:
        exif = Image.Exif()
        exif[0x0112] = 6
        content = saved(image.crop((0, 0, image.width, image.height // 2)), "PNG", exif=exif)
    model, processor = tiny
    question = "What do you see?"
    parts = [{"type": "image_url", "image_url": {"url": data_url(content)}}, {"type": "text", "text": question}]
    request = {"model": "ours", "messages": [{"role": "user", "content": parts}], "max_tokens": 1, "temperature": 0}
    reply = httpx.post(
        f"{server.url}/v1/chat/completions", json={**request, "logprobs": True, "top_logprobs": 10}, timeout=300
    ).json()
    theirs = {item["token"]: item["logprob"] for item in reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}
    conversation = [user(IMAGE_TAG + question, load_image(content)), {"role": "Assistant", "content": ""}]
    inputs = processor(prompt=processor.render(conversation), images=message_images(conversation))
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -1].log_softmax(-1)
    best = logits.topk(10)
    expected = {processor.tokenizer.decode([i]): p for i, p in zip(best.indices, best.values.tolist(), strict=True)}
    assert theirs == pytest.approx(expected, abs=2e-3)


def test_images_and_tags_that_do_not_match_are_refused(server: Server) -> None:
    image = load_image(PICTURES[0])
    typed = {"type": "text", "text": f"And {IMAGE_TAG}?"}
    for content in ([typed], [*as_openai([user(IMAGE_TAG, image)])[0]["content"], typed]):
        request = {"model": "ours", "messages": [{"role": "user", "content": content}]}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=request)
        assert reply.status_code == 400
        assert f"A text has {IMAGE_TAG}" in reply.json()["error"]["message"]


def test_transformers_layout(
    serve: Callable[..., Server],
    questions: list[Messages],
    answers: list[Answer],
    tiny: tuple[MultiModalityCausalLM, VLChatProcessor],
    tmp_path: Path,
) -> None:
    """A checkpoint in transformers' layout has a chat template of its own, and gives the same answers."""
    assert convert(["tiny", str(tmp_path / "tiny"), "--to", "transformers"]) == 0
    server = serve(tmp_path / "tiny")
    for messages, expected in [*zip(questions, answers, strict=True)][::12]:
        assert server.ask(messages) == expected
    assert server.ask([user("Hello!")]) == ours(*tiny, [user("Hello!")])


LLM = """
import json, sys
from PIL import Image
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model, *files = sys.argv[1:]
    llm = LLM(model=model, dtype="float32", enforce_eager=True)
    settings = SamplingParams(temperature=0, max_tokens=64)
    images = [{"type": "image_pil", "image_pil": Image.open(file)} for file in files]
    content = [*images, {"type": "text", "text": "Which image has the blue star?"}]
    [answer] = llm.chat([{"role": "user", "content": content}], settings)
    try:
        llm.generate({"prompt": "<image_placeholder>" * 3, "multi_modal_data": {"image": [Image.open(files[0])]}})
    except ValueError as error:
        refused = str(error)
    print("RESULT", json.dumps([[answer.prompt_token_ids, list(answer.outputs[0].token_ids)], refused]))
"""


def test_llm_chat_with_pil_pictures(tiny: tuple[MultiModalityCausalLM, VLChatProcessor], tmp_path: Path) -> None:
    files = [ROOT / "images" / f"{name}.png" for name in ("more_shapes", "shapes")]
    (tmp_path / "program.py").write_text(LLM, encoding="utf-8")
    result = subprocess.run(
        [sys.executable, "program.py", TINY, *files],
        cwd=tmp_path, env={**os.environ, **SETTINGS}, capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    answer, refused = json.loads(re.search("RESULT (.*)", result.stdout)[1])
    question = user(IMAGE_TAG * 2 + "Which image has the blue star?", *map(load_image, files))
    assert tuple(answer) == ours(*tiny, [question])
    assert refused == (f"The prompt has 3 {IMAGE_TAG} and 1 images were given; there must be one tag per image.")


def check_random_model(checkpoint: Path, serve: Callable[..., Server], *arguments: str) -> None:
    """Assert that vLLM and we give the same first 32 tokens for five prompts."""
    wide, tall = (load_image(ROOT / "images" / "shapes.png").resize(shape) for shape in ((700, 333), (200, 1001)))
    prompts = [
        [user("Tell me a story about\n\n  a boat, and count: 1234567.")],
        [user(f"{IMAGE_TAG}What is this?", wide)],
        [user(f"Compare {IMAGE_TAG} with {IMAGE_TAG}.\nBe brief.", wide, tall)],
        [user(f"{IMAGE_TAG}读", tall), {"role": "Assistant", "content": "A boat."}, user("Why?")],
        [user("Hello"), {"role": "Assistant", "content": "Hi!"}, user(f"{IMAGE_TAG}{IMAGE_TAG}", tall, wide)],
    ]
    _, model, processor = load_model(str(checkpoint), device="cpu", dtype="float32")
    expected = [ours(model, processor, messages, tokens=32) for messages in prompts]
    del model
    server = serve(checkpoint, "--max-num-seqs", "2", *arguments)
    assert [server.ask(messages, tokens=32) for messages in prompts] == expected
    # The end token is the tokenizer's. The config's default, Llama's 2, is an ordinary token here.
    assert server.ask(prompts[0], tokens=4, logit_bias={"2": 100})[1] == [2] * 4


@pytest.mark.parametrize("layout", ["reference", "transformers"])
def test_a_random_hybrid(layout: str, serve: Callable[..., Server], small_tokenizer_dir: Path, tmp_path: Path) -> None:
    """A miniature 7B, whose tokenizer's files name `LlamaTokenizerFast`, which would break it, as the published do."""
    checkpoint = write_checkpoint("hybrid", small_tokenizer_dir, tmp_path / "reference", num_attention_heads=2)
    (checkpoint / "generation_config.json").unlink()
    if layout == "reference":  # the other layout cannot store this setting
        settings = checkpoint / "processor_config.json"
        text = settings.read_text(encoding="utf-8")
        settings.write_text(text.replace('"add_special_token": false', '"add_special_token": true'), encoding="utf-8")
        assert VLChatProcessor.from_pretrained(checkpoint).positions_per_image == 17
    else:
        assert convert([str(checkpoint), str(tmp_path / layout), "--to", layout]) == 0
    # Two processes share the language model of one layout; each has whole towers.
    check_random_model(tmp_path / layout, serve, *(["--tensor-parallel-size", "2"] if layout == "transformers" else []))


@pytest.mark.long
@pytest.mark.parametrize("size", ["1.3b", "7b"])
def test_random_models_of_the_published_widths(
    size: str, serve: Callable[..., Server], published_tokenizer_dir: Path, tmp_path: Path
) -> None:
    """Both published architectures with two layers of the language model, and the published tokenizer's files."""
    command = [
        sys.executable, ROOT / "benchmarks" / "random_checkpoint.py", "--size", size, "--language_layers", "2",
        "--tokenizer", published_tokenizer_dir, "--output", tmp_path / size,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    check_random_model(tmp_path / size, serve, "--max-model-len", "4096")
