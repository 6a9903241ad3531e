"""The engine's batch: answers join and leave it, and each is the same as alone."""

import copy
import gc
import itertools
import queue
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Loaded, WatchedStep, messages_of, wait_until
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel

from deepseek_vl.engine import engine as engine_module
from deepseek_vl.engine import generation as generation_module
from deepseek_vl.engine.decode_step import LayeredStep, Step
from deepseek_vl.engine.decoder import Decoder, after_attention, before_attention
from deepseek_vl.engine.engine import Engine, engine_of
from deepseek_vl.engine.generation import END, Generation
from deepseek_vl.engine.kv_cache import STEP, RowCache
from deepseek_vl.engine.limits import EngineLimits
from deepseek_vl.engine.sampling import sample
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import load_image
from deepseek_vl.kernels.attention import ATTENTION
from deepseek_vl.models.modeling_vlm import CACHE
from deepseek_vl.serve.inference import load_model, stream_answer


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    """(tokenizer, model, processor) with random weights, so that answers are long and all differ."""
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
    """The ids of an answer by transformers' own greedy decoding."""
    _, model, processor = loaded
    inputs = processor(conversations=messages, images=messages[0]["images"]).to(model.device)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return ids[0, inputs.input_ids.shape[1] :].tolist()


def questions(picture: Path, count: int) -> list[tuple[list[dict[str, Any]], int]]:
    """Prompts of many lengths, some with images, each with an answer's length: from 1 to more than a cache's `STEP`."""
    image = load_image(picture)
    found = []
    for i in range(count):
        text = f"Question {i}. " + "more words " * (i * 7 % 23)
        images = [image.rotate(7 * i)] * (i % 3)
        messages = messages_of("<image_placeholder>" * len(images) + text, *images)
        found.append((messages, 1 + (i * 37) % (STEP + 40)))
    return found


@pytest.fixture(scope="module")
def compiled_step(loaded: Loaded) -> Step:
    engine, progress = engine_for(loaded), []
    engine.compile(progress.append)
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


@pytest.mark.parametrize("max_rows", [1, 3])
def test_answers_that_run_ahead_are_those_alone(loaded: Loaded, picture: Path, max_rows: int) -> None:
    engine = engine_for(loaded, max_rows)
    engine.runs_ahead = True
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


def check_that_it_failed_alone(loaded: Loaded, bad: Generation, good: Generation) -> None:
    """Assert that `bad` has failed, and that `good`, which asks "Hello.", has its answer nevertheless."""
    assert good.done.wait(60)
    assert bad.done.wait(60)
    assert good.token_ids == alone(loaded, messages_of("Hello."), good.max_tokens - good.prompt_tokens)
    assert bad.finish_reason is None


def test_a_prompt_that_fails_fails_alone(loaded: Loaded) -> None:
    engine = engine_for(loaded)
    good, bad = (generation_of(engine, loaded, messages_of("Hello."), 60) for _ in range(2))
    bad.inputs["images_seq_mask"][0, 3] = True
    engine.submit(good)
    engine.submit(bad)
    check_that_it_failed_alone(loaded, bad, good)
    assert "[1] image positions" in next(
        str(item) for item in iter(bad.pieces.get, None) if isinstance(item, ValueError)
    )


class FailingStep(Step):
    """A step that runs out of memory halfway: once with several rows, then `failures_alone` times with one row."""

    def __init__(self, failures_alone: int):
        self.left = [1, failures_alone]

    def __call__(
        self, language_model: PreTrainedModel, token_ids: Sequence[int], caches: Sequence[RowCache]
    ) -> torch.Tensor:
        is_alone = len(caches) == 1
        if self.left[is_alone] and (not is_alone or not self.left[False]):
            self.left[is_alone] -= 1
            layer = caches[0].layers[0]
            layer.update(layer.keys[:, :, :1], layer.values[:, :, :1])
            raise torch.OutOfMemoryError("There is no memory left.")
        return super().__call__(language_model, token_ids, caches)


@pytest.mark.parametrize("failures_alone", [0, 1])
def test_when_memory_runs_out_in_a_step_one_answer_ends_at_most(loaded: Loaded, failures_alone: int) -> None:
    engine = engine_for(loaded)
    engine.use(FailingStep(failures_alone))
    asked = [(f"Hello {i}.", length) for i, length in enumerate((90, 40, 20, 30))]
    generations = [generation_of(engine, loaded, messages_of(text), length) for text, length in asked]
    for generation in generations:
        engine.submit(generation)
    failed = 0
    for generation, (text, length) in zip(generations, asked, strict=True):
        assert generation.done.wait(60)
        errors = [item for item in iter(generation.pieces.get, END) if not isinstance(item, str)]
        assert {type(error) for error in errors} <= {torch.OutOfMemoryError}, errors
        failed += len(errors)
        if not errors:
            assert generation.token_ids == alone(loaded, messages_of(text), length)
    assert failed == failures_alone


def test_a_reader_that_fails_ends_its_own_answer(loaded: Loaded) -> None:
    engine = engine_for(loaded)
    good, bad = (generation_of(engine, loaded, messages_of("Hello."), 60) for _ in range(2))

    def fail(item: Any) -> None:
        raise OSError("The reader has gone.")

    bad._sink = fail
    for generation in (bad, good):
        engine.submit(generation)
    check_that_it_failed_alone(loaded, bad, good)
    wait_until(lambda: engine.running == 0, 5)


def test_a_long_prompt_runs_in_pieces_between_which_others_get_their_tokens(
    loaded: Loaded, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "PIECE", 16)
    _, model, _ = loaded
    engine = Engine(model, loaded[0], EngineLimits(prefill_seconds=0))
    runs: list[int] = []  # the length of each piece of a prompt; 0 for a step
    engine.use(WatchedStep(engine.step, lambda tokens, caches: runs.append(tokens)))
    image = load_image(picture)
    long = messages_of("<image_placeholder>Many words. " * 3 + "more words " * 60, *[image.rotate(i) for i in range(3)])
    first, second = generation_of(engine, loaded, messages_of("Hello."), 300), generation_of(engine, loaded, long, 5)
    engine.submit(first)
    engine.submit(second)
    assert first.done.wait(60)
    assert second.done.wait(60)
    assert max(runs) == 16
    pieces = runs[runs.index(0) :]  # the second prompt's, since the first answer has begun
    assert sum(pieces) > 100
    steps = [i for i, length in enumerate(pieces) if not length]
    shared = pieces[: steps[len(first.token_ids) - 2] + 1]  # until the first answer has ended
    assert len(shared) > 4
    assert all(0 in pair for pair in itertools.pairwise(shared))
    assert first.token_ids == alone(loaded, messages_of("Hello."), 300)
    assert second.token_ids == alone(loaded, long, 5)


def test_stop_is_obeyed_within_a_piece_of_a_prompt(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part of the prompt that has run is kept for the next prompt with the same beginning."""
    monkeypatch.setattr(engine_module, "PIECE", 16)
    _, model, _ = loaded
    engine = Engine(model, loaded[0], EngineLimits(prefill_seconds=0))
    messages = messages_of("many words " * 100)
    stopped, again = (generation_of(engine, loaded, messages, 5) for _ in range(2))
    runs: list[int] = []

    def stop_in_second(tokens: int, caches: Any) -> None:
        runs.append(tokens)
        if len(runs) == 2:
            stopped.cancelled.set()

    engine.use(WatchedStep(engine.step, stop_in_second))
    engine.submit(stopped)
    assert stopped.done.wait(30)
    assert (len(runs), stopped.finish_reason, stopped.token_ids) == (2, "cancelled", [])
    assert 0 < max(runs) <= 16
    engine.submit(again)
    assert again.done.wait(30)
    assert again.cached_tokens == runs[0] + runs[1]
    assert again.token_ids == alone(loaded, messages, 5)


@pytest.mark.parametrize("piece", [384, 100, 64, 30, 7])
def test_pieces_of_a_prompt_are_even(loaded: Loaded, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(engine_module, "PIECE", piece)
    engine = Engine(loaded[1], loaded[0], EngineLimits(prefill_seconds=0))
    runs: list[int] = []
    engine.use(WatchedStep(engine.step, lambda tokens, caches: runs.append(tokens)))
    generation = generation_of(engine, loaded, messages_of("many words " * 100), 1)
    engine.submit(generation)
    assert generation.done.wait(30)
    assert sum(runs) == generation.prompt_tokens
    assert len(runs) == -(-generation.prompt_tokens // piece)
    assert max(runs) - min(runs) <= 1
    assert max(runs) <= piece


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
    """The engine draws the same tokens as `generate` with the same settings and seed."""
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
    engine.close()
    submit_and_interrupt(closed)
    engine.close()
    assert closed.done.is_set()
    assert (engine.waiting, engine.running) == (0, 0)


def threads_of_engines() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "deepseek_vl-generate"}


def test_an_engine_works_again_after_it_was_idle_and_keeps_no_thread(loaded: Loaded) -> None:
    engine = engine_for(loaded)
    for _ in range(20):
        generation = generation_of(engine, loaded, messages_of("Hello."), 2)
        engine.submit(generation)
        assert generation.done.wait(30)
    wait_until(lambda: not threads_of_engines(), 5)


def test_a_thread_that_is_kept_as_on_gpus_ends_with_its_engine(loaded: Loaded) -> None:
    """On GPUs the engine keeps its thread, because CUDA's libraries cache plans, as for attention, per thread."""
    engine, threads = engine_for(loaded), set()
    engine._keeps_thread = True
    for _ in range(20):
        generation = generation_of(engine, loaded, messages_of("Hello."), 2)
        engine.submit(generation)
        assert generation.done.wait(30)
        threads |= threads_of_engines()
    (thread,) = threads
    engine.close()
    assert not thread.is_alive()

    generation = generation_of(engine, loaded, messages_of("Hello."), 2)
    engine.submit(generation)
    assert generation.done.wait(30)
    (another,) = threads_of_engines()
    del engine, generation
    wait_until(lambda: gc.collect() is not None and not another.is_alive(), 5)


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


@pytest.mark.parametrize("room", [0, 50])
def test_a_row_cache_holds_what_transformers_cache_holds(room: int) -> None:
    torch.manual_seed(0)
    cache, plain = RowCache(room), DynamicCache()
    for length in (5, *[1] * (STEP + 3), 7):
        for layer in range(2):
            states = torch.randn(2, 1, 3, length, 4)
            for got, expected in zip(cache.update(*states, layer), plain.update(*states, layer), strict=True):
                assert torch.equal(got, expected)
    assert cache.get_seq_length() == plain.get_seq_length()


def logits_of(step: Step, language_model: PreTrainedModel) -> list[torch.Tensor]:
    """Prompts in two pieces, of one and of many tokens; then steps of one row, and of three rows of other lengths."""
    ids, found = torch.randint(0, 99, (1, 90), generator=torch.Generator().manual_seed(0)), []
    embeddings, caches = language_model.get_input_embeddings(), []
    with torch.inference_mode():
        for length, first in ((90, 50), (40, 1), (3, 2)):
            caches.append(RowCache())
            for part in (ids[:, :first], ids[:, first:length]):
                found.append(step.prompt(language_model, lambda part=part: embeddings(part), caches[-1]).clone())
        for rows in (1, 3, 3):
            found.append(step(language_model, list(range(rows)), caches[:rows]).clone())
    assert [cache.get_seq_length() for cache in caches] == [93, 42, 5]
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("attention", [*ATTENTION.values(), "sdpa"])
def test_layers_run_one_by_one_give_what_transformers_gives(
    siglip_checkpoint: Path, dtype: str, attention: str
) -> None:
    language_model = load_model(str(siglip_checkpoint), device="cpu", dtype=dtype)[1].language_model
    language_model.set_attn_implementation(attention)
    exact = load_model(str(siglip_checkpoint), device="cpu", dtype="float32")[1].language_model
    ways = (Step(), exact), (Step(), language_model), (LayeredStep(language_model), language_model)
    for expected, plain, layered in zip(*(logits_of(*way) for way in ways), strict=True):
        error_of_plain = (plain.float() - expected).norm()
        assert (layered.float() - expected).norm() <= 1e-5 * expected.norm() + 1.2 * error_of_plain


def answer_of(engine: Engine, loaded: Loaded) -> list[int]:
    generation = generation_of(engine, loaded, messages_of("Hello."), 10)
    engine.submit(generation)
    assert generation.done.wait(60)
    assert generation.finish_reason is not None
    return generation.token_ids


@pytest.mark.parametrize("name", ["", "model", "model.layers.1", "model.layers.1.self_attn", "model.layers.0.mlp"])
@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_forward_hook"])
@pytest.mark.parametrize("compiled", [False, True])
def test_hooks_on_layers_run_in_the_engine(loaded: Loaded, name: str, kind: str, compiled: bool) -> None:
    """Also hooks on modules that the engine does not call otherwise."""
    engine, calls = engine_for(loaded), []
    language_model = loaded[1].language_model
    expected = answer_of(engine, loaded)
    if compiled:  # the backend that only records what is computed
        layers = (torch.compile(part, backend="eager") for part in (before_attention, after_attention))
        engine.use(LayeredStep(language_model, Decoder(*layers)))
        assert answer_of(engine, loaded) == expected
    engine.forget()
    hook = getattr(language_model.get_submodule(name), kind)(lambda *_: calls.append(1))
    try:
        assert answer_of(engine, loaded) == expected
    finally:
        hook.remove()
    assert len(calls) == len(expected)
    assert engine.step.is_for(language_model)


def test_who_asked_for_hidden_states_once_has_fast_steps_all_the_same(siglip_checkpoint: Path) -> None:
    """transformers adds hooks to every layer then, and leaves them there."""
    loaded = load_model(str(siglip_checkpoint), device="cpu", dtype="float32")
    engine, language_model = engine_for(loaded), loaded[1].language_model
    language_model(torch.tensor([[1, 2, 3]]), output_hidden_states=True, output_attentions=True)
    assert engine.step.is_for(language_model)
    assert answer_of(engine, loaded) == alone(loaded, messages_of("Hello."), 10)


def test_another_attention_may_be_set_at_any_time(siglip_checkpoint: Path) -> None:
    loaded = load_model(str(siglip_checkpoint), device="cpu", dtype="float32")
    engine = engine_for(loaded)
    expected = answer_of(engine, loaded)
    for attention in ("eager", "sdpa"):
        engine.forget()
        loaded[1].set_attn_implementation(attention)
        assert answer_of(engine, loaded) == expected
        assert engine.step.is_for(loaded[1].language_model) == (attention == "sdpa")


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_compiled_step_is_compiled_once_for_every_length(siglip_checkpoint: Path, dtype: str) -> None:
    _, model, processor = load_model(str(siglip_checkpoint), device="cpu", dtype=dtype)
    language_model = model.language_model
    torch._dynamo.reset()
    counters.clear()
    engine = engine_of(model, processor.tokenizer)
    engine.compile()
    graphs = counters["stats"]["unique_graphs"]
    assert graphs == 2  # one function before the attention and one behind it, for all layers
    exact_model = load_model(str(siglip_checkpoint), device="cpu", dtype="float32")[1].language_model
    ids = torch.randint(0, 99, (1, 100), generator=torch.Generator().manual_seed(0))
    ways = [(exact_model, Step()), (language_model, Step()), (language_model, engine.step)]
    caches = [RowCache() for _ in ways]
    errors = []
    with torch.inference_mode():
        for (run, _), cache in zip(ways, caches, strict=True):
            run(input_ids=ids, use_cache=True, **{CACHE: cache})
        for token_id in range(2 * STEP):
            exact, plain, compiled = (
                step(run, [token_id], [cache]).float() for (run, step), cache in zip(ways, caches, strict=True)
            )
            errors.append([float((found - exact).norm() / exact.norm()) for found in (plain, compiled)])
    of_plain, of_compiled = torch.tensor(errors).mean(0)
    assert of_compiled < (1e-5 if dtype == "float32" else 1.2 * of_plain)
    assert caches[2].get_seq_length() == 100 + 2 * STEP
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize(
    ("loading", "message"),
    [
        ({"quantize": "int8"}, "quantised weights on the CPU"),
        ({"attn_implementation": "eager"}, "sdpa, not with eager"),
    ],
)
def test_what_cannot_be_compiled_is_said(siglip_checkpoint: Path, loading: dict[str, str], message: str) -> None:
    _, model, processor = load_model(str(siglip_checkpoint), device="cpu", dtype="float32", **loading)
    with pytest.raises(ValueError, match=message):
        engine_of(model, processor.tokenizer).compile()


def test_a_model_with_hooks_is_not_compiled(siglip_checkpoint: Path) -> None:
    _, model, processor = load_model(str(siglip_checkpoint), device="cpu", dtype="float32")
    model.language_model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has forward hooks"):
        engine_of(model, processor.tokenizer).compile()


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
    check_that_it_failed_alone(loaded, bad, good)


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
