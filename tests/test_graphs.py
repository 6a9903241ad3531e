"""Decoding steps on GPUs: attention over rows in Triton, also in its interpreter, and CUDA graphs (GPU only)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Loaded, make_picture, messages_of
from torch._dynamo.utils import counters

from deepseek_vl.engine.compiling import vision_blocks
from deepseek_vl.engine.decode_step import Step
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.generation import Generation
from deepseek_vl.engine.graphed_step import GraphedStep
from deepseek_vl.engine.limits import EngineLimits
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import load_image
from deepseek_vl.kernels.compiling import compiling
from deepseek_vl.kernels.row_attention import attend_rows, is_available
from deepseek_vl.serve.inference import load_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def check_attention(device: str, heads: int, kv_heads: int, head_dim: int, lengths: list[int]) -> None:
    """Compare `attend_rows` with PyTorch's attention in float64; the last rows share their keys and values."""
    torch.manual_seed(0)
    rows, shared = len(lengths), 3
    keys, values = (
        [torch.randn(kv_heads, length + 9, head_dim, device=device) for length in lengths] for _ in range(2)
    )
    query = torch.randn(rows + shared, heads, head_dim, device=device)
    key, value = torch.randn(2, rows + shared, kv_heads, head_dim, device=device)
    places = torch.tensor([*lengths, *(lengths[-1] + 1 + i for i in range(shared))])
    held = [*range(rows), *[rows - 1] * shared]
    addresses = torch.tensor([[states[row].data_ptr() for row in held] for states in (keys, values)])
    strides = torch.tensor([keys[row].stride(0) for row in held])
    where = (tensor.to(device) for tensor in (addresses, strides, places))
    attended = attend_rows(query, key, value, *where, scale=0.3)
    for row, (own, place) in enumerate(zip(held, places.tolist(), strict=True)):
        for states, new in ((keys, key), (values, value)):
            assert torch.equal(states[own][:, place], new[row])
        seen = (states[own][:, : place + 1].double() for states in (keys, values))
        expected = F.scaled_dot_product_attention(query[row, :, None].double(), *seen, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(attended[row], expected[:, 0].float(), rtol=1e-5, atol=1e-5)


CASES = [(3, 3, 64, [0, 5, 100]), (4, 2, 24, [31, 32, 33, 0])]


@pytest.mark.slow
@pytest.mark.skipif(not is_available(), reason="needs Triton")
@pytest.mark.parametrize("case", range(len(CASES)))
def test_rows_attend_to_what_they_hold(case: int) -> None:
    code = f"from test_graphs import *; check_attention('cpu', *CASES[{case}])"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@needs_gpu
@pytest.mark.parametrize("case", [*CASES, (16, 16, 128, [(37 * i * i) % 1500 for i in range(60)])])
def test_rows_attend_to_what_they_hold_on_a_gpu(case: tuple[Any, ...]) -> None:
    check_attention("cuda", *case)


@pytest.fixture(scope="module")
def on_gpu(checkpoint: Path) -> Loaded:
    """(tokenizer, model, processor) of each kind on the GPU, with random weights in float32."""
    return load_model(str(checkpoint), device="cuda", dtype="float32")


def answers(loaded: Loaded, step: Step | None, runs_ahead: bool, tmp_path: Path) -> list[list[int]]:
    """The ids of an engine's answers: one alone, nine together, some with pictures, and a second turn of each."""
    tokenizer, model, processor = loaded
    engine = Engine(model, tokenizer, EngineLimits(max_rows=5))
    engine.runs_ahead = runs_ahead
    if step is not None:
        engine.use(step)

    def ask(messages: list[dict[str, Any]], length: int) -> Generation:
        images = [image for message in messages for image in message.get("images", ())]
        inputs = processor(conversations=messages, images=images)
        generation = Generation(engine, inputs, GenerationSettings(max_new_tokens=length), lambda _: None)
        engine.submit(generation)
        return generation

    asked = []
    for number in range(9):
        images = [
            load_image(make_picture(tmp_path / f"{number}-{i}.png", seed=3 * number + i)) for i in range(number % 3)
        ]
        asked.append(messages_of("<image_placeholder>" * len(images) + "More words. " * number, *images))
    found = []
    for count in (1, 9):
        generations = [ask(messages, 7 + 30 * number) for number, messages in enumerate(asked[:count])]
        assert all(generation.done.wait(300) for generation in generations)
        found += [generation.token_ids for generation in generations]
    for number, messages in enumerate(asked):
        answer = {"role": "Assistant", "content": tokenizer.decode(found[1 + number], skip_special_tokens=True)}
        generation = ask([messages[0], answer, *messages_of("And then?")], 5)
        assert generation.done.wait(300)
        found.append(generation.token_ids)
    engine.close()
    return found


@needs_gpu
def test_answers_from_graphs_are_those_without(on_gpu: Loaded, tmp_path: Path) -> None:
    expected = answers(on_gpu, Step(), False, tmp_path)
    assert answers(on_gpu, None, True, tmp_path) == expected
    assert answers(on_gpu, Step(), True, tmp_path) == expected


@needs_gpu
def test_answers_of_compiled_graphs_are_those_without(on_gpu: Loaded, tmp_path: Path) -> None:
    expected = answers(on_gpu, Step(), False, tmp_path)
    engine = Engine(on_gpu[1], on_gpu[0])
    engine.compile()
    found = answers(on_gpu, engine.step, True, tmp_path)
    for block in vision_blocks(on_gpu[1]):
        block._compiled_call_impl = None  # for the other tests
    assert found == expected


def check_blocks(loaded: Loaded, tmp_path: Path) -> None:
    """Compare what a tower with compiled blocks sees in one picture and in three; there are few graphs for them all."""
    _, model, processor = loaded
    torch._dynamo.reset()  # what was compiled for other models
    pictures = [load_image(make_picture(tmp_path / f"{seed}.png", seed=seed)) for seed in range(3)]
    pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"].to(model.device)
    kinds = {type(block) for block in vision_blocks(model)}
    counters.clear()
    with torch.inference_mode():
        expected = model.get_image_features(pixels)
        with compiling(vision_blocks(model)):
            found = [model.get_image_features(pixels[:1]), model.get_image_features(pixels)]
    for block in vision_blocks(model):
        block._compiled_call_impl = None
    torch.testing.assert_close(found[0], expected[:1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1], expected, rtol=1e-3, atol=1e-4)
    assert 0 < counters["stats"]["unique_graphs"] <= 4 * len(kinds)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.long
def test_compiled_towers_see_the_same(checkpoint: Path, tmp_path: Path) -> None:
    check_blocks(load_model(str(checkpoint), device="cpu", dtype="float32"), tmp_path)


@needs_gpu
def test_compiled_towers_see_the_same_on_a_gpu(checkpoint: Path, tmp_path: Path) -> None:
    check_blocks(load_model(str(checkpoint), device="cuda", dtype="float32"), tmp_path)


@needs_gpu
def test_changed_weights_are_not_answered_from_old_graphs(checkpoint: Path, tmp_path: Path) -> None:
    loaded = load_model(str(checkpoint), device="cuda", dtype="float32")
    step = GraphedStep(loaded[1].language_model)
    before = answers(loaded, step, True, tmp_path)
    with torch.no_grad():
        loaded[1].language_model.lm_head.weight = torch.nn.Parameter(loaded[1].language_model.lm_head.weight.flip(0))
    after = answers(loaded, step, True, tmp_path)
    assert after != before
    assert after == answers(loaded, Step(), False, tmp_path)


@needs_gpu
def test_what_no_graph_can_hold_runs_without(on_gpu: Loaded, tmp_path: Path) -> None:
    """A model that a graph cannot capture (a layer synchronises with the GPU) runs without graphs."""
    expected = answers(on_gpu, Step(), False, tmp_path)
    step = GraphedStep(on_gpu[1].language_model)
    layer = on_gpu[1].language_model.model.layers[0].mlp
    run = layer.forward

    def synchronising(hidden: torch.Tensor) -> torch.Tensor:
        torch.cuda.synchronize()
        return run(hidden)

    layer.forward = synchronising
    try:
        assert answers(on_gpu, step, True, tmp_path) == expected
    finally:
        del layer.forward
    assert not step._captured or not step._captured.graphs
