"""The engine's batch: answers that come and go together, each the same as alone."""

import copy
import queue
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Loaded, messages_of, wait_until
from packaging.version import Version
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel

from deepseek_vl.engine import generation as generation_module
from deepseek_vl.engine import kv_cache
from deepseek_vl.engine.decode_step import Step
from deepseek_vl.engine.engine import Engine, engine_of
from deepseek_vl.engine.generation import END, Generation
from deepseek_vl.engine.kv_cache import SHARED_POSITIONS, STEP, RowCache, SharedBuffers
from deepseek_vl.engine.limits import EngineLimits
from deepseek_vl.engine.sampling import sample
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import load_image
from deepseek_vl.models.modeling_vlm import CACHE
from deepseek_vl.serve.inference import load_model, stream_answer


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    """(tokenizer, model, processor) with random weights, so that every answer is long and another."""
    return load_model(str(checkpoint), device="cpu", dtype="float32")


def engine_for(loaded: Loaded, max_rows: int = 16) -> Engine:
    """A new engine."""
    tokenizer, model, _ = loaded
    return Engine(model, tokenizer, EngineLimits(max_rows))


def generation_of(
    engine: Engine, loaded: Loaded, messages: list[dict[str, Any]], max_new_tokens: int, **settings: Any
) -> Generation:
    _, model, processor = loaded
    inputs = processor(conversations=messages, images=messages[0]["images"]).to(model.device)
    pieces: queue.SimpleQueue[Any] = queue.SimpleQueue()
    generation = Generation(engine, inputs, GenerationSettings(max_new_tokens=max_new_tokens, **settings), pieces.put)
    generation.pieces = pieces
    return generation


def alone(loaded: Loaded, messages: list[dict[str, Any]], max_new_tokens: int) -> list[int]:
    """What transformers' own greedy decoding gives."""
    _, model, processor = loaded
    inputs = processor(conversations=messages, images=messages[0]["images"]).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return ids[0, inputs.input_ids.shape[1] :].tolist()


def questions(picture: Path, count: int) -> list[tuple[list[dict[str, Any]], int]]:
    """Prompts of many lengths, some with images, and lengths of answers from 1 to beyond a cache's growth."""
    image = load_image(picture)
    found = []
    for i in range(count):
        text = f"Question {i}. " + "more words " * (i * 7 % 23)
        images = [image.rotate(7 * i)] * (i % 3)
        messages = messages_of("<image_placeholder>" * len(images) + text, *images)
        found.append((messages, 1 + (i * 37) % (STEP + 40)))
    return found


class LentStep(Step):
    """Runs where CUDA graphs would: in buffers that all caches share, one after the other."""

    def __init__(self) -> None:
        self._buffers: SharedBuffers | None = None

    def __call__(self, language_model: PreTrainedModel, token_ids: Sequence[int], cache: RowCache) -> torch.Tensor:
        if self._buffers is None or not self._buffers.has_room(cache):
            self._buffers = SharedBuffers(cache)
        self._buffers.lend(cache)
        return super().__call__(language_model, token_ids, cache)


@pytest.fixture(scope="module")
def compiled_step(loaded: Loaded) -> Step:
    engine, progress = engine_for(loaded), []
    engine.compile(loaded[2], progress.append)
    assert progress == ["Compiling the language model ..."]
    return engine.step


def check_that_all_answer_as_alone(loaded: Loaded, engine: Engine, picture: Path) -> None:
    asked = questions(picture, 12)
    generations = [generation_of(engine, loaded, messages, length) for messages, length in asked]
    most = 0
    for generation in generations:
        engine.submit(generation)
    for generation, (messages, length) in zip(generations, asked, strict=True):
        most = max(most, engine.running)
        assert generation.done.wait(300)
        assert generation.token_ids == alone(loaded, messages, length)
    assert most <= engine.limits.max_rows
    assert (engine.waiting, engine.running) == (0, 0)


@pytest.mark.parametrize("max_rows", [1, 3, 16])
def test_answers_in_a_batch_are_those_alone(loaded: Loaded, picture: Path, max_rows: int) -> None:
    check_that_all_answer_as_alone(loaded, engine_for(loaded, max_rows), picture)


def test_answers_from_shared_buffers_are_those_alone(
    loaded: Loaded, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "SHARED_POSITIONS", 64)  # so that answers outgrow it
    engine = engine_for(loaded, 3)
    engine.use(LentStep())
    check_that_all_answer_as_alone(loaded, engine, picture)


@pytest.mark.slow
@pytest.mark.parametrize("max_rows", [1, 3])
def test_compiled_answers_are_those_alone(loaded: Loaded, compiled_step: Step, picture: Path, max_rows: int) -> None:
    engine = engine_for(loaded, max_rows)
    engine.use(compiled_step)
    check_that_all_answer_as_alone(loaded, engine, picture)


def test_who_joins_late_or_leaves_early_changes_nothing_for_the_others(loaded: Loaded, picture: Path) -> None:
    engine = engine_for(loaded)
    asked = questions(picture, 5)
    first, second, third, late, later = (generation_of(engine, loaded, messages, 150) for messages, _ in asked)
    for generation in (first, second, third):
        engine.submit(generation)
    third.pieces.get()
    engine.submit(late)
    late.pieces.get()
    first.cancelled.set()
    assert first.done.wait(10)
    engine.submit(later)
    for generation, (messages, _) in zip((second, third, late, later), asked[1:], strict=True):
        assert generation.done.wait(120)
        assert generation.token_ids == alone(loaded, messages, 150)
    assert first.token_ids == alone(loaded, asked[0][0], 150)[: len(first.token_ids)]


def test_a_prompt_that_fails_fails_alone(loaded: Loaded) -> None:
    engine = engine_for(loaded)
    good, bad = (generation_of(engine, loaded, messages_of("Hello."), 60) for _ in range(2))
    bad.inputs["images_seq_mask"][0, 3] = True
    engine.submit(good)
    engine.submit(bad)
    assert good.done.wait(60)
    assert bad.done.wait(60)
    assert good.token_ids == alone(loaded, messages_of("Hello."), 60)
    assert bad.finish_reason is None
    assert "[1] image positions" in next(
        str(item) for item in iter(bad.pieces.get, None) if isinstance(item, ValueError)
    )


@pytest.mark.parametrize("broken", ["append", "keep"])
def test_when_memory_runs_out_between_tokens_later_answers_are_right(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """`append` is needed when an answer joins, `keep` when it leaves."""
    whole, failed = getattr(RowCache, broken), []

    def fail_once(cache: RowCache, *arguments: Any) -> None:
        if not failed:
            failed.append(broken)
            raise torch.OutOfMemoryError("There is no memory left.")
        whole(cache, *arguments)

    monkeypatch.setattr(RowCache, broken, fail_once)
    engine = engine_for(loaded)
    first, second, *later = (
        generation_of(engine, loaded, messages_of("Hello."), length) for length in (900, 3, 20, 30)
    )
    engine.submit(first)
    first.pieces.get()
    engine.submit(second)
    assert first.done.wait(60)
    assert second.done.wait(60)
    errors = [item for item in iter(first.pieces.get, END) if isinstance(item, torch.OutOfMemoryError)]
    assert len(errors) == 1
    assert second.finish_reason == ("length" if broken == "keep" else None)
    for generation in later:
        engine.submit(generation)
    for generation, length in zip(later, (20, 30), strict=True):
        assert generation.done.wait(60)
        assert generation.token_ids == alone(loaded, messages_of("Hello."), length)


def test_without_another_thread_an_answer_is_refused_and_forgotten(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    engine = engine_for(loaded)
    refused_one, answered = (generation_of(engine, loaded, messages_of("Hello."), 2) for _ in range(2))
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="new thread"):
        patch.setattr(threading.Thread, "start", refused)
        engine.submit(refused_one)
    assert engine.waiting == 0
    engine.submit(answered)
    assert answered.done.wait(30)
    assert not refused_one.done.is_set()


def test_sampled_answers_follow_their_own_seeds_in_a_batch(loaded: Loaded) -> None:
    def sample(seeds: tuple[int, ...]) -> list[list[int]]:
        engine = engine_for(loaded)
        generations = [
            generation_of(engine, loaded, messages_of("Hello."), 40, temperature=1.0, seed=seed) for seed in seeds
        ]
        for generation in generations:
            engine.submit(generation)
        assert all(generation.done.wait(60) for generation in generations)
        return [generation.token_ids for generation in generations]

    together = sample((1, 2, 1))
    assert together[0] == together[2] != together[1]
    assert together[1] == sample((2,))[0]


def test_sampling_is_transformers_own(loaded: Loaded) -> None:
    """The same draws as `generate` with the same settings and seed."""
    _, model, processor = loaded
    messages = messages_of("Hello.")
    inputs = processor(conversations=messages, images=None)
    torch.manual_seed(5)
    embeds = model.prepare_inputs_embeds(**inputs)
    expected = model.language_model.generate(
        inputs_embeds=embeds, attention_mask=inputs.attention_mask, max_new_tokens=40, do_sample=True,
        temperature=0.9, top_p=0.8, top_k=50, repetition_penalty=1.2,
    )  # fmt: skip
    engine = engine_for(loaded)
    generation = generation_of(engine, loaded, messages, 40, temperature=0.9, top_p=0.8, repetition_penalty=1.2, seed=5)
    engine.submit(generation)
    assert generation.done.wait(60)
    assert generation.token_ids == expected[0].tolist()


def test_closing_ends_everything(loaded: Loaded) -> None:
    engine = engine_for(loaded, max_rows=2)
    generations = [generation_of(engine, loaded, messages_of(f"Hello {i}."), 900) for i in range(5)]
    for generation in generations:
        engine.submit(generation)
    generations[0].pieces.get()
    engine.close()
    assert all(generation.done.is_set() for generation in generations)
    assert {generation.finish_reason for generation in generations} == {"cancelled"}
    assert (engine.waiting, engine.running) == (0, 0)


def test_ctrl_c_while_the_thread_starts_harms_nothing(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    def submit_and_interrupt(generation: Generation) -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(threading.Thread, "start", interrupted)
            engine.submit(generation)

    engine = engine_for(loaded)
    given_up, answered, closed = (generation_of(engine, loaded, messages_of("Hello."), 2) for _ in range(3))
    submit_and_interrupt(given_up)
    given_up.cancelled.set()  # as `AnswerStream` does
    engine.submit(answered)
    assert answered.done.wait(30)
    assert (given_up.finish_reason, answered.finish_reason) == ("cancelled", "length")
    wait_until(lambda: all(thread.name != "deepseek_vl-generate" for thread in threading.enumerate()), 5)
    submit_and_interrupt(closed)
    engine.close()
    assert closed.done.is_set()
    assert (engine.waiting, engine.running) == (0, 0)


def test_an_engine_works_again_after_it_was_idle_and_keeps_no_thread(loaded: Loaded) -> None:
    engine = engine_for(loaded)
    for _ in range(20):
        generation = generation_of(engine, loaded, messages_of("Hello."), 2)
        engine.submit(generation)
        assert generation.done.wait(30)
    wait_until(lambda: all(thread.name != "deepseek_vl-generate" for thread in threading.enumerate()), 5)


def test_a_model_has_one_engine(loaded: Loaded) -> None:
    tokenizer, model, processor = loaded
    engine = engine_of(model, tokenizer)
    assert engine_of(model, tokenizer) is engine
    with stream_answer(model, processor, messages_of("Hello."), GenerationSettings(max_new_tokens=50)) as stream:
        next(stream)
        assert engine.running == 1


def test_another_tokenizer_has_another_engine(loaded: Loaded) -> None:
    tokenizer, model, _ = loaded
    engine, other = engine_of(model, tokenizer), copy.copy(tokenizer)
    assert engine_of(model, other) is not engine
    assert engine_of(model, other).tokenizer is other


def test_who_streams_an_answer_may_let_go_of_the_model(siglip_checkpoint: Path) -> None:
    _, model, processor = load_model(str(siglip_checkpoint), device="cpu", dtype="float32")
    stream = stream_answer(model, processor, messages_of("Hello."), GenerationSettings(max_new_tokens=20))
    gone = weakref.ref(model)
    del model
    list(stream)
    assert stream.completion_tokens > 0
    del stream
    wait_until(lambda: gone() is None, 5)


def test_a_row_cache_holds_what_transformers_cache_holds() -> None:
    torch.manual_seed(0)
    cache, plain = RowCache([5]), DynamicCache()
    for length in (5, *[1] * (STEP + 3), 7):
        for layer in range(2):
            states = torch.randn(2, 1, 3, length, 4)
            for got, expected in zip(cache.update(*states, layer), plain.update(*states, layer), strict=True):
                assert torch.equal(got, expected)
    assert cache.get_seq_length() == plain.get_seq_length()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_compiled_step_is_compiled_once_for_every_length(siglip_checkpoint: Path, dtype: str) -> None:
    _, model, processor = load_model(str(siglip_checkpoint), device="cpu", dtype=dtype)
    language_model = model.language_model
    before = counters["stats"]["unique_graphs"]
    engine = engine_of(model, processor.tokenizer)
    engine.compile(processor)
    graphs = counters["stats"]["unique_graphs"]
    # None where a model of the same shapes was compiled before. Before 2.8 transformers' wrappers break it.
    assert graphs <= before + 1 or Version(torch.__version__) < Version("2.8")
    exact_model = load_model(str(siglip_checkpoint), device="cpu", dtype="float32")[1].language_model
    ids = torch.randint(0, 99, (1, 100), generator=torch.Generator().manual_seed(0))
    ways = [(exact_model, Step()), (language_model, Step()), (language_model, engine.step)]
    caches = [RowCache([100]) for _ in ways]
    errors = []
    with torch.inference_mode():
        for (run, _), cache in zip(ways, caches, strict=True):
            run(input_ids=ids, use_cache=True, **{CACHE: cache})
        for token_id in range(2 * STEP):
            exact, plain, compiled = (
                step(run, [token_id], cache).float() for (run, step), cache in zip(ways, caches, strict=True)
            )
            errors.append([float((found - exact).norm() / exact.norm()) for found in (plain, compiled)])
    of_plain, of_compiled = torch.tensor(errors).mean(0)
    assert of_compiled < (1e-5 if dtype == "float32" else 1.2 * of_plain)
    assert caches[2].lengths == [100 + 2 * STEP]
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize(
    ("loading", "message"),
    [({"quantize": "int8"}, "int8 weights on the CPU"), ({"attn_implementation": "eager"}, "sdpa, not with eager")],
)
def test_what_cannot_be_compiled_is_said(siglip_checkpoint: Path, loading: dict[str, str], message: str) -> None:
    _, model, processor = load_model(str(siglip_checkpoint), device="cpu", dtype="float32", **loading)
    with pytest.raises(ValueError, match=message):
        engine_of(model, processor.tokenizer).compile(processor)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("max_rows", [1, 3])
def test_answers_from_graphs_are_those_alone(checkpoint: Path, picture: Path, max_rows: int) -> None:
    on_gpu = load_model(str(checkpoint), device="cuda", dtype="float32")
    engine = engine_for(on_gpu, max_rows)
    engine.compile(on_gpu[2])
    check_that_all_answer_as_alone(on_gpu, engine, picture)


def test_what_is_remembered_is_no_longer_in_shared_buffers(loaded: Loaded, picture: Path) -> None:
    engine = engine_for(loaded)
    engine.use(LentStep())
    image = load_image(picture)
    for question in ("First.", "Another one, which is written to the same memory.", "First."):
        generation = generation_of(engine, loaded, messages_of(f"<image_placeholder>{question}", image), 30)
        engine.submit(generation)
        assert generation.done.wait(60)
        assert generation.token_ids == alone(loaded, messages_of(f"<image_placeholder>{question}", image), 30)
    assert generation.cached_tokens == generation.prompt_tokens - 1


def cache_of(rows: int, length: int) -> RowCache:
    cache = RowCache([length] * rows)
    cache.update(*torch.randn(2, rows, 3, length, 4), 0)
    return cache


def test_a_cache_lies_where_others_of_its_size_lay() -> None:
    torch.manual_seed(0)
    first, second = cache_of(rows=2, length=5), cache_of(rows=2, length=SHARED_POSITIONS - 1)
    longer, more = cache_of(rows=2, length=SHARED_POSITIONS), cache_of(rows=3, length=5)
    expected = [cache.layers[0].keys.clone() for cache in (first, second)]
    buffers = SharedBuffers(first)
    (lent,) = buffers.lend(first)
    assert lent[0].shape == (2, 3, SHARED_POSITIONS, 4)
    assert buffers.lend(first)[0][0].is_set_to(lent[0])
    assert first.is_borrowed
    assert torch.equal(first.layers[0].keys, expected[0])
    first.keep([1])
    assert not first.is_borrowed
    assert buffers.lend(second)[0][0].is_set_to(lent[0])
    assert torch.equal(first.layers[0].keys, expected[0][1:])
    assert torch.equal(second.layers[0].keys, expected[1])
    assert not buffers.has_room(longer)
    assert not buffers.has_room(more)


def test_a_cache_is_the_same_in_larger_buffers() -> None:
    torch.manual_seed(0)
    cache = cache_of(rows=2, length=5)
    expected = cache.layers[0].keys.clone()
    for _ in range(2):
        (lent,) = SharedBuffers(cache_of(rows=4, length=5)).lend(cache)
        assert lent[0].shape == (2, 3, SHARED_POSITIONS, 4)
        assert torch.equal(cache.layers[0].keys, expected)


def test_shared_buffers_forget_what_was_there() -> None:
    """What is masked is multiplied with 0, which leaves 0 of finite numbers only."""
    spoilt, cache = cache_of(rows=1, length=9), cache_of(rows=1, length=5)
    spoilt.layers[0].values.fill_(torch.nan)
    buffers = SharedBuffers(spoilt)
    buffers.lend(spoilt)
    ((keys, values),) = buffers.lend(cache)
    assert keys.isfinite().all()
    assert values.isfinite().all()


def test_rows_are_kept_and_joined_with_their_padding_in_front() -> None:
    def filled(length: int, value: float) -> RowCache:
        cache = RowCache([length])
        cache.update(*torch.full((2, 1, 1, length, 2), value), 0)
        return cache

    cache = filled(3, 1.0)
    cache.append(filled(5, 2.0))
    cache.append(filled(2, 3.0))
    assert cache.lengths == [3, 5, 2]
    assert cache.layers[0].keys[..., 0].squeeze(1).tolist() == [[0, 0, 1, 1, 1], [2] * 5, [0, 0, 0, 3, 3]]
    arguments = cache.step_arguments("cpu")
    assert arguments["position_ids"].tolist() == [[3], [5], [2]]
    assert arguments["attention_mask"].tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 1, 1, 1]]
    cache.update(*torch.full((2, 3, 1, 1, 2), 9.0), 0)
    cache.keep([2, 0])
    assert cache.lengths == [3, 4]
    assert cache.layers[0].values[..., 0].squeeze(1).tolist() == [[0, 3, 3, 9], [1, 1, 1, 9]]
    cache.keep([1])
    assert cache.step_arguments("cpu") == {"attention_mask": None, "position_ids": None}


def test_an_answer_whose_scores_overflow_fails_alone(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflowing(logits: torch.Tensor, settings: GenerationSettings, *others: Any) -> int:
        is_due = not settings.greedy and len(others[-1]) > 3
        return sample(logits * float("inf") if is_due else logits, settings, *others)

    monkeypatch.setattr(generation_module, "sample", overflowing)
    engine = engine_for(loaded)
    good = generation_of(engine, loaded, messages_of("Hello."), 40)
    bad = generation_of(engine, loaded, messages_of("Hello."), 40, temperature=0.001, repetition_penalty=0.01)
    for generation in (good, bad):
        engine.submit(generation)
    assert good.done.wait(60)
    assert bad.done.wait(60)
    assert good.token_ids == alone(loaded, messages_of("Hello."), 40)
    assert bad.finish_reason is None


def test_scores_stay_finite_at_the_bounds_of_the_settings(loaded: Loaded) -> None:
    for penalty in (0.01, 100):
        engine = engine_for(loaded)
        generation = generation_of(
            engine, loaded, messages_of("Hello."), 40, temperature=0.0001, repetition_penalty=penalty, seed=1
        )
        engine.submit(generation)
        assert generation.done.wait(60)
        assert generation.finish_reason is not None
    for penalty in (0, 1e-38, 1e9, float("nan")):
        with pytest.raises(ValueError, match="repetition_penalty"):
            GenerationSettings(temperature=1.0, repetition_penalty=penalty)
