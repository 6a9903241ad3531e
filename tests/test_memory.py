"""The engine's caches: later turns run only new tokens, images are encoded once, and answers do not change."""

import contextlib
import gc
import queue
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Loaded, make_picture, messages_of, wait_until
from PIL import Image

from deepseek_vl.engine import generation as generation_module
from deepseek_vl.engine.chat import ChatSession
from deepseek_vl.engine.decode_step import LayeredStep, Step
from deepseek_vl.engine.engine import Engine, engine_of
from deepseek_vl.engine.generation import Generation, MemoryBudgetError
from deepseek_vl.engine.kv_cache import STEP, RowCache
from deepseek_vl.engine.limits import EngineLimits, default_memory
from deepseek_vl.engine.prefix_cache import ImageFeatures, weight_bytes
from deepseek_vl.engine.prompt import Prompt, PromptImage
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import load_image
from deepseek_vl.kernels import device as device_module
from deepseek_vl.kernels.device import free_memory
from deepseek_vl.models import MultiModalityCausalLM
from deepseek_vl.models.processing_vlm import BatchedVLChatProcessorOutput
from deepseek_vl.serve.inference import load_model, message_images, stream_answer

TAG = "<image_placeholder>"


class Work:
    """Count what a model computes.

    Attributes:
        prompts: for each prompt, the number of positions that ran through the language model.
        images: the number of images that the vision tower encoded.
    """

    def __init__(self, model: MultiModalityCausalLM):
        self.prompts: list[int] = []
        self.images = 0
        self._cache: Any = None
        self._hook = model.vision_model.register_forward_pre_hook(self._vision)
        self._prompt = prompt = LayeredStep.prompt

        def watched(step: LayeredStep, language_model: Any, embed: Any, cache: RowCache, *others: Any) -> torch.Tensor:
            embeds = embed()
            if language_model is model.language_model:
                self._run(cache, embeds.shape[1])
            return prompt(step, language_model, lambda: embeds, cache, *others)

        LayeredStep.prompt = watched

    def _run(self, cache: RowCache, positions: int) -> None:
        if cache is not self._cache:
            self._cache = cache
            self.prompts.append(0)
        self.prompts[-1] += positions

    def _vision(self, module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        self.images += len(args[0])

    def of(self) -> tuple[list[int], int]:
        """The work since the last call."""
        found = self.prompts, self.images
        self.prompts, self.images = [], 0
        return found

    def stop(self) -> None:
        self._hook.remove()
        LayeredStep.prompt = self._prompt


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    """(tokenizer, model, processor) with random weights, so that answers are long and all differ."""
    return load_model(str(checkpoint), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return load_model("tiny", device="cpu", dtype="float32")


@pytest.fixture
def work(loaded: Loaded) -> Iterator[Work]:
    work = Work(loaded[1])
    yield work
    work.stop()


def engine_for(loaded: Loaded, **limits: Any) -> Engine:
    """A new engine."""
    tokenizer, model, _ = loaded
    return Engine(model, tokenizer, EngineLimits(**limits))


def begin(engine: Engine, loaded: Loaded, messages: list[dict[str, Any]], length: int = 20, **settings: Any) -> Any:
    """Submit a generation."""
    sink: queue.SimpleQueue[Any] = queue.SimpleQueue()
    settings = GenerationSettings(max_new_tokens=length, **settings)
    generation = Generation(engine, inputs_of(loaded, messages), settings, sink.put)
    engine.submit(generation)
    return generation


def ask(engine: Engine, loaded: Loaded, messages: list[dict[str, Any]], length: int = 20, **settings: Any) -> list[int]:
    """The ids of an answer, once the engine is idle and has kept the conversation."""
    generation = begin(engine, loaded, messages, length, **settings)
    assert generation.done.wait(120)
    wait_until(lambda: not engine.running, 10)
    return generation.token_ids


def from_nothing(loaded: Loaded, messages: list[dict[str, Any]], length: int = 20) -> list[int]:
    """The ids of an answer by transformers' own greedy decoding, without any cache from before."""
    _, model, processor = loaded
    inputs = processor(conversations=messages, images=message_images(messages))
    ids = model.generate(**inputs, max_new_tokens=length, do_sample=False)
    return ids[0, inputs.input_ids.shape[1] :].tolist()


def inputs_of(loaded: Loaded, messages: list[dict[str, Any]]) -> BatchedVLChatProcessorOutput:
    return loaded[2](conversations=messages, images=message_images(messages))


def next_turn(
    loaded: Loaded, messages: list[dict[str, Any]], answer: list[int], question: str, *images: Image.Image
) -> list[dict[str, Any]]:
    """The messages with an answer, followed by another question."""
    text = loaded[0].decode(answer, skip_special_tokens=True).replace(TAG, "")
    return [*messages[:-1], {**messages[-1], "content": text}, *messages_of(question, *images)]


def length_of(loaded: Loaded, messages: list[dict[str, Any]]) -> int:
    return inputs_of(loaded, messages).input_ids.shape[1]


def shared_length(first: list[int], second: list[int]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def test_each_turn_of_a_chat_runs_only_what_is_new(tiny: Loaded) -> None:
    tokenizer, model, processor = tiny
    shapes, chart, word = (load_image(ROOT / f"images/{name}.png") for name in ("shapes", "chart", "word"))
    turns = [
        ("What colour is the star?", [shapes]),
        ("How many shapes are there?", []),
        (f"{TAG}Which bar is tallest?\n{TAG}What does it say?", [chart, word]),
        ("And what is the first picture?", []),
        ("Look again.", [shapes]),
    ]
    session, work = ChatSession(engine_for(tiny), processor, GenerationSettings(max_new_tokens=40)), Work(model)
    before: list[int] = []
    encoded = 0
    for question, images in turns:
        answer = "".join(session.ask(question, images))
        (positions,), new_images = work.of()
        encoded += new_images
        messages = [*session.messages[:-1], {"role": "Assistant", "content": ""}]
        prompt = inputs_of(tiny, messages).input_ids[0].tolist()
        expected = from_nothing(tiny, messages, 40)
        work.of()
        assert answer == tokenizer.decode(expected, skip_special_tokens=True)
        assert positions == len(prompt) - shared_length(before, prompt)
        before = [*prompt, *expected[:-1]]
    assert encoded == 3, "the fourth picture was there already"
    assert positions < processor.num_image_tokens + 30
    work.stop()


def test_turns_of_random_answers_are_as_from_nothing(loaded: Loaded, work: Work, tmp_path: Path) -> None:
    """With random weights the text of an answer is often not encoded to the ids that were generated."""
    engine = engine_for(loaded)
    first, second = (load_image(make_picture(tmp_path / f"{seed}.png", seed=seed)) for seed in (1, 2))
    messages = messages_of(f"{TAG}one {TAG}two", first, second)
    for turn, images in enumerate([(), (second,), (), (first, first)]):
        expected = from_nothing(loaded, messages, 60)
        work.of()
        assert ask(engine, loaded, messages, 60) == expected
        (positions,), encoded = work.of()
        assert encoded == (2 if turn == 0 else 0)
        assert turn == 0 or positions < length_of(loaded, messages) - 30
        messages = next_turn(loaded, messages, expected, TAG * len(images) + f"More {turn}?", *images)


def test_a_picture_that_differs_in_one_pixel_is_another(loaded: Loaded, work: Work) -> None:
    side = loaded[2].image_processor.image_size
    image = Image.effect_noise((side, side), 80).convert("RGB")
    other = image.copy()
    other.putpixel((side - 1, side - 1), tuple(255 - value for value in image.getpixel((side - 1, side - 1))))
    engine = engine_for(loaded)
    lengths = []
    for picture in (image, other, image):
        messages = messages_of(f"{TAG}What is it?", picture)
        expected = from_nothing(loaded, messages)
        work.of()
        assert ask(engine, loaded, messages) == expected
        lengths.append(work.of())
    whole = length_of(loaded, messages)
    assert lengths[0] == ([whole], 1)
    assert lengths[1][1] == 1
    assert whole > lengths[1][0][0] > loaded[2].num_image_tokens, "all from the picture on"
    assert lengths[2] == ([1], 0)


def test_undo_retry_edits_and_dropped_turns_fall_back_to_the_common_beginning(tiny: Loaded) -> None:
    _, model, processor = tiny
    shapes, chart = (load_image(ROOT / f"images/{name}.png") for name in ("shapes", "chart"))
    session, work = ChatSession(engine_for(tiny), processor, GenerationSettings(max_new_tokens=30)), Work(model)

    def checked(pieces: Iterator[str]) -> int:
        """Compare an answer with the one from an empty cache; returns how many positions of its prompt ran."""
        work.of()
        answer = "".join(pieces)
        (positions,), _ = work.of()
        kept = session.messages[2 * session.dropped_turns :]
        messages = [*kept[:-1], {"role": "Assistant", "content": ""}]
        assert answer == tiny[0].decode(from_nothing(tiny, messages, 30), skip_special_tokens=True)
        return positions

    whole = checked(session.ask("What colour is the star?", [shapes]))
    turn = checked(session.ask("How many shapes are there?"))
    assert turn < 20 < whole
    assert checked(session.retry()) == 1
    session.undo()
    assert checked(session.ask("How many circles are there?")) < turn
    session.messages[2] = {**session.messages[2], "content": "What is left of the star?"}
    assert checked(session.ask("Why?")) < 40
    session.messages[0] = {**session.messages[0], "images": [chart]}
    assert checked(session.ask("Really?")) > processor.num_image_tokens
    session.max_history_tokens = session.count_tokens(session.messages[2:]) + 20
    assert checked(session.ask("What?")) > 20
    assert session.dropped_turns > 0
    work.stop()


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0, "seed": 3}])
def test_many_continue_one_conversation_at_once(loaded: Loaded, picture: Path, settings: dict[str, Any]) -> None:
    image = load_image(picture)
    engine = engine_for(loaded)
    messages = messages_of(f"{TAG}What is it?", image)
    answer = ask(engine, loaded, messages)
    branches = [next_turn(loaded, messages, answer, f"{'word ' * i}{i}?") for i in range(5)]
    expected = [
        ask(engine_for(loaded, keeps=False), loaded, branch, 20 + i, **settings) for i, branch in enumerate(branches)
    ]
    work = Work(loaded[1])
    running = [begin(engine, loaded, branch, 20 + i, **settings) for i, branch in enumerate(branches)]
    for generation, ids in zip(running, expected, strict=True):
        assert generation.done.wait(120)
        assert generation.token_ids == ids
    assert max(work.of()[0]) < 70
    # Each branch goes on from the cache of its row in the batch, which was padded.
    branches = [next_turn(loaded, *pair, "And then?") for pair in zip(branches, expected, strict=True)]
    for branch in branches:
        again = from_nothing(loaded, branch)
        work.of()
        assert ask(engine, loaded, branch) == again
        assert work.of()[0][0] < 70
    work.stop()


def test_an_answer_that_was_stopped_can_be_continued_and_one_that_failed_leaves_nothing(
    loaded: Loaded, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(loaded)
    messages = messages_of("Hello.")
    expected = from_nothing(loaded, messages, 80)
    stopped = begin(engine, loaded, messages, 900)
    stopped._sink.__self__.get()
    stopped.cancelled.set()
    assert stopped.done.wait(30)
    work.of()
    assert ask(engine, loaded, messages, 80) == expected
    assert work.of()[0] == [1]

    def failing_sample(*_: Any) -> torch.Tensor:
        raise ArithmeticError("no token")

    monkeypatch.setattr(generation_module, "sample", failing_sample)
    engine = engine_for(loaded)
    failing = begin(engine, loaded, messages_of("Bye."), 9, temperature=1.0)
    assert failing.done.wait(30)
    assert failing.finish_reason is None
    wait_until(lambda: not engine.running, 10)
    assert engine.memory_used == 0


def one_training_step(model: MultiModalityCausalLM, processor: Any) -> None:
    inputs = processor(conversations=messages_of("Hello."), images=[])
    model(**inputs, labels=inputs.input_ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()


def load_others(model: MultiModalityCausalLM, processor: Any) -> None:
    model.load_state_dict({name: weight * 1.1 for name, weight in model.state_dict().items()})


def change_the_tower(model: MultiModalityCausalLM, processor: Any) -> None:
    with torch.no_grad():
        next(model.vision_model.parameters()).mul_(1.5)


def cast(model: MultiModalityCausalLM, processor: Any) -> None:
    model.to(torch.float64)


def cast_there_and_back(model: MultiModalityCausalLM, processor: Any) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def replace_a_weight(model: MultiModalityCausalLM, processor: Any) -> None:
    model.aligner.layers = torch.nn.Sequential(*(torch.nn.Linear(48, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)))


def write_behind_torch_s_back(model: MultiModalityCausalLM, processor: Any) -> None:
    model.vision_model.vision_tower.patch_embed.proj.weight.data.mul_(2)
    engine_of(model, processor.tokenizer).forget()


@pytest.mark.parametrize(
    "change",
    [
        one_training_step,
        load_others,
        change_the_tower,
        cast,
        cast_there_and_back,
        replace_a_weight,
        write_behind_torch_s_back,
    ],
)
def test_nothing_is_used_when_the_weights_have_changed(
    siglip_checkpoint: Path, picture: Path, change: Callable[[MultiModalityCausalLM, Any], None]
) -> None:
    loaded = load_model(str(siglip_checkpoint), device="cpu", dtype="float32")
    _, model, processor = loaded
    messages = messages_of(f"{TAG}What is it?", load_image(picture))
    engine, work = engine_of(model, processor.tokenizer), Work(model)
    before = ask(engine, loaded, messages)
    assert ask(engine, loaded, messages) == before
    (whole, again), images = work.of()
    assert (again, images) == (1, 1)
    change(model, processor)
    expected = from_nothing(loaded, messages)
    work.of()
    assert ask(engine, loaded, messages) == expected
    assert work.of() == ([whole], 1)
    assert ask(engine, loaded, messages) == expected
    assert work.of() == ([1], 0)


def test_weights_that_change_during_an_answer_leave_nothing_of_it(siglip_checkpoint: Path) -> None:
    loaded = load_model(str(siglip_checkpoint), device="cpu", dtype="float32")
    engine, messages = engine_for(loaded), messages_of("Hello.")
    running = begin(engine, loaded, messages, 900)
    running._sink.__self__.get()
    load_others(loaded[1], loaded[2])
    running.cancelled.set()
    assert running.done.wait(30)
    expected = from_nothing(loaded, messages)
    assert ask(engine, loaded, messages) == expected


def test_a_model_made_in_inference_mode_keeps_nothing(siglip_checkpoint: Path, picture: Path) -> None:
    """PyTorch counts no changes of inference tensors, so changed weights could not be noticed."""
    with torch.inference_mode():
        loaded = load_model(str(siglip_checkpoint), device="cpu", dtype="float32")
    engine, messages = engine_for(loaded), messages_of(f"{TAG}What is it?", load_image(picture))
    work = Work(loaded[1])
    answers = [ask(engine, loaded, messages) for _ in range(2)]
    assert answers[0] == answers[1]
    assert work.of()[1] == 2
    with torch.inference_mode():
        load_others(loaded[1], loaded[2])
        expected = from_nothing(loaded, messages)
    assert ask(engine, loaded, messages) == expected


POSITION = 2 * 2 * 64 * 4
"""Bytes per position: keys and values x layers x width x bytes of a float32."""


def needed(loaded: Loaded, messages: list[dict[str, Any]], length: int) -> int:
    """Bytes that the engine reserves for an answer."""
    inputs = inputs_of(loaded, messages)
    return (inputs.input_ids.shape[1] + length + STEP) * POSITION + inputs.pixel_values.nbytes


def test_memory_is_bounded_and_the_oldest_goes_first(loaded: Loaded, work: Work) -> None:
    questions = [messages_of(f"{i} " * 100) for i in range(6)]
    longest = max(questions, key=lambda messages: length_of(loaded, messages))
    one = (length_of(loaded, longest) + 20) * POSITION
    engine = engine_for(loaded, memory_bytes=2 * one + needed(loaded, longest, 30))
    for messages in questions:
        ask(engine, loaded, messages)
        assert engine.memory_used <= engine.memory_bytes
    work.of()
    for messages in reversed(questions):
        ask(engine, loaded, messages)
    positions = work.of()[0]
    assert positions[:2] == [1, 1]
    assert min(positions[4:]) > 100


def test_a_container_has_what_its_limit_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory in a container is its limit less what is in use, without the cache of files."""
    for name, text in (("max", "5000000"), ("current", "4500000"), ("stat", "anon 1500000\ninactive_file 3000000")):
        (tmp_path / f"memory.{name}").write_text(f"{text}\n")
    of_the_machine = free_memory(torch.device("cpu"))
    monkeypatch.setattr(device_module, "CGROUP", tmp_path)
    assert free_memory(torch.device("cpu")) == 3_500_000 < of_the_machine
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu")) > 3_500_000


def test_what_is_kept_gives_way_to_what_runs(loaded: Loaded) -> None:
    messages, long = messages_of("Hello."), messages_of("word " * 150)
    engine = engine_for(loaded, memory_bytes=needed(loaded, long, 20) + 10 * POSITION)
    ask(engine, loaded, messages)
    assert engine.memory_used > 10 * POSITION
    running = begin(engine, loaded, long)
    wait_until(lambda: engine.running or running.done.is_set(), 10)
    assert engine.memory_used <= engine.memory_bytes
    assert running.done.wait(60)
    assert running.token_ids == from_nothing(loaded, long)
    assert ask(engine, loaded, messages) == from_nothing(loaded, messages)


def test_what_is_kept_gives_way_to_encoded_images(loaded: Loaded, picture: Path) -> None:
    messages, shown = messages_of("Hello."), messages_of(f"{TAG}What is it?", load_image(picture))
    kept = (length_of(loaded, messages) + len(from_nothing(loaded, messages)) - 1) * POSITION
    engine = engine_for(loaded, memory_bytes=kept + needed(loaded, shown, 20))
    ask(engine, loaded, messages)
    assert engine.memory_used == kept
    used: list[int] = []
    hook = loaded[1].language_model.lm_head.register_forward_hook(lambda *_: used.append(engine.memory_used))
    assert ask(engine, loaded, shown) == from_nothing(loaded, shown)
    hook.remove()
    assert max(used) <= engine.memory_bytes


def test_who_does_not_fit_beside_the_others_waits_in_order(loaded: Loaded) -> None:
    messages = messages_of("Hello.")
    engine = engine_for(loaded, memory_bytes=int(2.5 * needed(loaded, messages, 300)))
    used, running = [], []

    def look(*_: Any) -> None:  # runs in the engine's thread, where both numbers are consistent
        used.append(engine.memory_used)
        running.append(engine.running)

    hook = loaded[1].language_model.lm_head.register_forward_hook(look)
    generations = [begin(engine, loaded, messages, 300) for _ in range(5)]
    ended: list[int] = []
    while len(ended) < len(generations):
        ended += [i for i, generation in enumerate(generations) if generation.done.is_set() and i not in ended]
        time.sleep(0.01)  # a loop without a pause would keep the GIL from the engine's thread
    hook.remove()
    assert max(used) <= engine.memory_bytes
    assert max(running) == 2
    assert ended == sorted(ended)
    assert {tuple(generation.token_ids) for generation in generations} == {tuple(from_nothing(loaded, messages, 300))}


def bytes_of_all_tensors() -> int:
    """The bytes of all tensors on the CPU that the garbage collector knows."""
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            with contextlib.suppress(RuntimeError):  # the storage has been released
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_a_long_conversation_costs_short_ones_beside_it_nothing(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve short answers beside one of 4,000 tokens take at most twice what all their keys and values need."""

    class Measuring(Step):
        steps, worst = 0, 0.0

        def __call__(self, language_model: Any, token_ids: Sequence[int], caches: Sequence[RowCache]) -> torch.Tensor:
            logits = super().__call__(language_model, token_ids, caches)
            if len(caches) == 13 and self.steps % 8 == 0:
                held = sum(cache.get_seq_length() for cache in caches) * POSITION
                self.worst = max(self.worst, (bytes_of_all_tensors() - before) / held)
            self.steps += len(caches) == 13
            return logits

    monkeypatch.setattr(loaded[1].config.language_config, "max_position_embeddings", 5000)
    engine = engine_for(loaded, keeps=False)
    engine.use(step := Measuring())
    long, short = messages_of("more words " * 600), messages_of("Hello.")
    assert 4000 < length_of(loaded, long) < 4800
    assert length_of(loaded, short) < 100
    gc.collect()
    before = bytes_of_all_tensors()
    generations = [begin(engine, loaded, messages, 25) for messages in (long, *[short] * 12)]
    assert all(generation.done.wait(60) for generation in generations)
    assert generations[0].token_ids == from_nothing(loaded, long, 25)
    assert 0.9 < step.worst < 2


def test_who_leaves_the_line_is_gone_at_once(loaded: Loaded) -> None:
    engine = engine_for(loaded, max_rows=1)
    running, waiting = (begin(engine, loaded, messages_of("Hello."), 900) for _ in range(2))
    waiting.cancelled.set()
    assert waiting.done.wait(10)
    assert not running.done.is_set()
    running.cancelled.set()
    assert running.done.wait(10)


def test_what_can_never_fit_is_refused_with_both_numbers(loaded: Loaded) -> None:
    engine = engine_for(loaded, memory_bytes=1 << 20)
    with pytest.raises(MemoryBudgetError, match=r"answer of up to 933 may take 1\.\d MiB .* 1\.0 for all"):
        begin(engine, loaded, messages_of("Hello."), 2000)
    assert ask(engine, loaded, messages_of("Hello."), 5) == from_nothing(loaded, messages_of("Hello."), 5)


def test_the_budget_follows_the_weights_and_what_is_free(siglip_checkpoint: Path) -> None:
    assert default_memory(4 << 30, 100 << 30) == 4 << 30
    assert default_memory(4 << 30, 6 << 30) == 3 << 30
    assert default_memory(1 << 20, 100 << 30) == 1 << 30
    plain, quantised = (
        weight_bytes(load_model(str(siglip_checkpoint), device="cpu", dtype="float32", quantize=kind)[1])
        for kind in (None, "int8")
    )
    assert plain // 5 < quantised < plain // 2


def test_a_short_conversation_takes_no_room_for_more(loaded: Loaded) -> None:
    messages = messages_of("Hello.")
    engine = engine_for(loaded)
    positions = length_of(loaded, messages) + len(ask(engine, loaded, messages, 5)) - 1
    assert engine.memory_used == positions * POSITION


def test_no_memory_is_no_memory(loaded: Loaded, work: Work) -> None:
    engine = engine_for(loaded, keeps=False)
    assert ask(engine, loaded, messages_of("Hello.")) == ask(engine, loaded, messages_of("Hello."))
    first, second = work.of()[0]
    assert first == second
    assert engine.memory_used == 0


def test_a_longer_answer_takes_its_beginnings_place(loaded: Loaded) -> None:
    engine = engine_for(loaded)
    messages = messages_of("Hello.")
    used = []
    for length in (5, 60, 5, 60):
        ask(engine, loaded, messages, length)
        used.append(engine.memory_used)
    assert used[1] == used[2] == used[3]


def test_encoded_images_are_bounded(loaded: Loaded, work: Work, tmp_path: Path) -> None:
    _, model, processor = loaded
    pictures = [load_image(make_picture(tmp_path / f"{seed}.png", seed=seed)) for seed in range(4)]
    pixels = processor.image_processor(pictures)["pixel_values"]
    images = [PromptImage.of(image) for image in pixels]
    with torch.inference_mode():
        expected = model.get_image_features(pixels)
        kept = ImageFeatures(int(2.5 * expected[0].nbytes))
        work.of()
        for wanted, runs in (((0, 1), 2), ((1, 0, 1), 0), ((2,), 1), ((1, 2), 0), ((0, 2), 1), ((1,), 1), ((3, 3), 1)):
            got = kept.encode(model, [images[i] for i in wanted])
            assert all(torch.allclose(got[images[i].key], expected[i], atol=1e-4) for i in wanted)
            assert work.of()[1] == runs
            assert kept.nbytes <= kept.max_bytes


def test_everything_goes_with_the_model_and_when_the_engine_closes(siglip_checkpoint: Path, picture: Path) -> None:
    loaded = load_model(str(siglip_checkpoint), device="cpu", dtype="float32")
    messages = messages_of(f"{TAG}What is it?", load_image(picture))
    engine = engine_of(loaded[1], loaded[0])
    ask(engine, loaded, messages)
    assert engine.memory_used > 0
    engine.close()
    assert engine.memory_used == 0
    ask(engine, loaded, messages)
    kept = weakref.ref(engine._caches)
    model = weakref.ref(loaded[1])
    del loaded, engine
    wait_until(lambda: gc.collect() is not None and model() is None, 10)  # the engine's thread may still be ending
    assert kept() is None


def test_a_prompts_end_is_the_prompts_end(loaded: Loaded, tmp_path: Path) -> None:
    """The rest of a prompt has the same embeddings as in the whole, wherever it is cut, also within an image."""
    _, model, processor = loaded
    first, second = (load_image(make_picture(tmp_path / f"{seed}.png", seed=seed)) for seed in (1, 2))
    short = processor(conversations=messages_of("x"), images=[], force_batchify=False)
    item = processor(
        conversations=messages_of(f"{TAG}one {TAG}two", first, second), images=[first, second], force_batchify=False
    )
    padded = processor.batchify([processor.process_one(prompt="word " * 300), item, short])
    row = BatchedVLChatProcessorOutput(**{name: value[1:2] for name, value in padded.items()})
    prompt = Prompt.of(row)
    assert len(prompt) == len(item)
    images = ImageFeatures(1 << 20)
    with torch.inference_mode():
        whole = model.prepare_inputs_embeds(**row)[:, row.attention_mask[0].bool()]
        for start in (0, 1, *prompt.images_seq_mask.nonzero().flatten().tolist(), len(prompt) - 1):
            rest = prompt.part(start, len(prompt))
            encoded = images.encode(model, rest.images)
            features = torch.stack([encoded[image.key] for image in rest.images]) if rest.images else None
            embeds = model.prepare_inputs_embeds(**rest.arguments(model.device), image_features=features)
            assert torch.allclose(embeds, whole[:, start:], atol=1e-4)
            assert (rest.content == prompt.content[start:]).all()


def test_the_reference_s_way_of_asking_uses_it_too(loaded: Loaded, work: Work, picture: Path) -> None:
    _, model, processor = loaded
    messages = messages_of(f"{TAG}What is it?", load_image(picture))
    answers = [
        "".join(stream_answer(model, processor, messages, GenerationSettings(max_new_tokens=10))) for _ in range(2)
    ]
    assert answers[0] == answers[1]
    (_, again), images = work.of()
    assert (again, images) == (1, 1)
    engine_of(model, processor.tokenizer).forget()
