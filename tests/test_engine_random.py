"""Random tests of the engine: each answer is the same as alone, whatever requests arrive, leave or fail."""

import contextlib
import gc
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Batch, Loaded, WatchedStep, messages_of, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_vl.engine import engine as engine_module
from deepseek_vl.engine import generation as generation_module
from deepseek_vl.engine import kv_cache, prefix_cache
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.generation import END, Generation
from deepseek_vl.engine.kv_cache import RowCache
from deepseek_vl.engine.limits import EngineLimits
from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.imaging.open import load_image
from deepseek_vl.serve.inference import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

TAG = "<image_placeholder>"
LONGEST = 60
QUESTIONS = 10
GONE = "The reader has gone."
POSITION = 2 * 2 * 64 * 4
"""Bytes per position: keys and values x layers x width x bytes of a float32."""


@dataclass(frozen=True)
class Question:
    """A prompt, and the ids of its answer of at most `LONGEST` tokens when it runs alone."""

    inputs: Batch
    alone: list[int]


@dataclass(frozen=True)
class Visit:
    """A request of a random test.

    Attributes:
        question: the index of its question.
        length: the most tokens of its answer.
        comes: the call of the model in which it is submitted; earlier if the engine has nothing else to do.
        fate: `stays` to the end; `leaves` (cancels) `when` calls after it came, 0 for before it is submitted;
            `hears enough` (cancels) or `breaks down` (raises) at item `when` of its answer, counted from 0; `stops` at
            a stop word: the three characters of the answer from character `when` on.
        when: the number that `fate` needs.
    """

    question: int
    length: int
    comes: int
    fate: str
    when: int


@dataclass(frozen=True)
class Fault:
    """A failure of the model in calls of one kind.

    Attributes:
        kind: `encode` images, `prefill`, a `step` of one row, a step of a `batch`, a step of one row `again` after a
            step that failed, or a step `ahead` of its time, which is repeated if it fails.
        call, times: the first call of this kind that fails, counted from 1, and how many fail.
        place: whether a call fails `before` it computes, `within`, or `after`.
        error: the exception's type.
    """

    kind: str
    call: int
    times: int
    place: str
    error: type[Exception]


@dataclass(frozen=True)
class Scenario:
    """Everything that happens to one engine.

    Attributes:
        visits, faults: the requests and the failures, in no order.
        forgets: the call of the model in which the engine is told to forget; 0 for never.
        max_rows, keeps, prefill_seconds: the engine's limits.
        at_once, spare: the memory budget, in answers like the largest and in positions; `at_once` None for the default.
        piece, room: the engine's `PIECE` and `STEP`.
        runs_ahead: whether steps begin before the last ones are read, as on GPUs.
    """

    visits: list[Visit]
    faults: list[Fault]
    forgets: int
    max_rows: int
    keeps: bool
    prefill_seconds: float
    at_once: int | None
    spare: int
    piece: int
    room: int
    runs_ahead: bool


VISITS = st.builds(
    Visit,
    question=st.integers(0, QUESTIONS - 1) | st.sampled_from([4, 5]),
    length=st.integers(LONGEST // 2, LONGEST) | st.integers(1, LONGEST),
    comes=st.just(0) | st.integers(0, 80),
    fate=st.sampled_from(["stays", "stays", "stays", "leaves", "hears enough", "breaks down", "stops"]),
    when=st.integers(0, 30),
)
FAULTS = st.builds(
    Fault,
    kind=st.sampled_from(["batch", "batch", "again", "step", "ahead", "prefill", "encode"]),
    call=st.integers(1, 3) | st.integers(1, 30),
    times=st.sampled_from([1, 1, 2, 5]),
    place=st.sampled_from(["before", "within", "after"]),
    error=st.sampled_from([RuntimeError, torch.OutOfMemoryError]),
)
SCENARIOS = st.builds(
    Scenario,
    visits=st.lists(VISITS, min_size=4, max_size=8) | st.lists(VISITS, min_size=1, max_size=8),
    faults=st.lists(FAULTS, min_size=1, max_size=4) | st.just([]),
    forgets=st.sampled_from([0, 0, 5, 40]),
    max_rows=st.sampled_from([5, 3, 2, 1]),
    keeps=st.sampled_from([True, True, False]),
    prefill_seconds=st.sampled_from([0, EngineLimits.prefill_seconds]),
    at_once=st.sampled_from([None, 3, 2, 1]),
    spare=st.integers(0, 100),
    piece=st.sampled_from([engine_module.PIECE, 32]),
    room=st.sampled_from([kv_cache.STEP, 8]),
    runs_ahead=st.booleans(),
)


class Visitor:
    """Submit a request and record what it is told, as (kind, text): a stored exception would keep tensors alive."""

    def __init__(self, engine: Engine, question: Question, visit: Visit):
        self.visit, self.question, self.came = visit, question, 0
        self.told: list[tuple[str, str]] = []
        whole = engine.tokenizer.decode(question.alone, skip_special_tokens=True)
        self.word = whole[visit.when :][:3] if visit.fate == "stops" else ""
        asked = GenerationSettings(max_new_tokens=visit.length, stop=(self.word,))
        self.generation = Generation(engine, question.inputs, asked, self._listen)

    def _listen(self, item: Any) -> None:
        kind = "end" if item is END else "text" if isinstance(item, str) else "error"
        self.told.append((kind, "" if item is END else str(item)))
        if len(self.told) == self.visit.when + 1 and self.visit.fate == "breaks down":
            raise OSError(GONE)
        if len(self.told) == self.visit.when + 1 and self.visit.fate == "hears enough":
            self.generation.cancelled.set()

    def tick(self, calls: int) -> None:
        """Cancel the request if its time has come; runs in each call of the model, with the number of calls."""
        if self.visit.fate == "leaves" and calls >= self.came + self.visit.when:
            self.generation.cancelled.set()

    def check(self, engine: Engine) -> list[str]:
        """Compare the answer with the one alone; returns the model's failure that ended it, if there was one."""
        tokens, reason = self.generation.token_ids, self.generation.finish_reason
        assert tokens == self.question.alone[: self.visit.length][: len(tokens)]
        texts, errors = ([text for kind, text in self.told if kind == wanted] for wanted in ("text", "error"))
        kinds = [kind for kind, _ in self.told]
        assert kinds == ["text"] * len(texts) + ["error"] * len(errors) + ["end"]
        assert len(errors) == (reason is None)
        whole = engine.tokenizer.decode(tokens, skip_special_tokens=True)
        is_stopped = bool(self.word) and self.word in whole
        shown = whole[: whole.index(self.word)] if is_stopped else whole
        assert shown.startswith("".join(texts))
        assert "".join(texts) == shown or errors
        assert reason != "cancelled" or self.generation.cancelled.is_set()
        assert reason != "stop" or is_stopped or tokens[-1] == engine.tokenizer.eos_token_id
        assert reason != "length" or len(tokens) == self.visit.length
        is_broken = self.visit.fate == "breaks down" and kinds[self.visit.when : self.visit.when + 1] == ["text"]
        assert (errors == [GONE]) == is_broken
        return [] if is_broken else errors


class Day:
    """Run a scenario: submit requests while the model works, and let the model fail.

    Attributes:
        fatal: the messages of failures that must each end one answer.
        used, running: the most memory that the engine used, and the most answers that it ran, in any call.
    """

    def __init__(self, engine: Engine, visitors: list[Visitor], scenario: Scenario):
        self.fatal: list[str] = []
        self.used = self.running = 0
        self._engine, self._scenario = engine, scenario
        self._to_come = sorted(visitors, key=lambda visitor: visitor.visit.comes)
        self._here: list[Visitor] = []
        self._has_begun = threading.Event()
        self._calls: Counter[str] = Counter()
        self._due: Fault | None = None
        self._again = 0  # rows that still have to run alone, after a failed step
        self._is_ahead = False

    def run(self) -> None:
        """Submit all requests, and wait until they have ended."""
        with self._hooks():
            self._bring(0)
            self._has_begun.set()
            while True:
                for visitor in self._here:  # the list grows meanwhile
                    if not visitor.generation.done.wait(120):
                        stacks = ["".join(traceback.format_stack(frame)) for frame in sys._current_frames().values()]
                        pytest.fail("\n".join(["An answer does not end.", *stacks]))
                if not self._to_come:
                    return
                self._bring(self._to_come[0].visit.comes)

    def _bring(self, comes: int) -> None:
        while self._to_come and self._to_come[0].visit.comes <= comes:
            visitor = self._to_come.pop(0)
            visitor.came = self._calls.total()
            visitor.tick(visitor.came)
            self._here.append(visitor)
            self._engine.submit(visitor.generation)

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        model, step = self._engine.model, self._engine.step
        self._engine.use(WatchedStep(step, self._begin_step, lambda: self._reach("after")))
        hooks = [
            model.vision_model.register_forward_pre_hook(lambda *_: self._begin("encode")),
            model.aligner.register_forward_hook(lambda *_: self._reach("after")),
        ]
        for inner in (model.language_model.model.layers[-1].mlp, model.aligner):
            hooks.append(inner.register_forward_pre_hook(lambda *_: self._reach("within")))
        assert step.is_for(model.language_model)  # not transformers' layers
        run_ahead = self._engine._run_ahead

        def ahead(*arguments: Any) -> None:
            self._is_ahead = True
            run_ahead(*arguments)
            self._is_ahead = False

        self._engine._run_ahead = ahead
        try:
            yield
        finally:
            self._engine._run_ahead = run_ahead
            self._engine.step = step
            for hook in hooks:
                hook.remove()

    def _begin_step(self, prompt: int, caches: Sequence[RowCache]) -> None:
        rows = len(caches)
        if prompt:
            kind = "prefill"
        elif self._is_ahead:
            kind = "ahead"
        else:
            kind = "again" if self._again else "batch" if rows > 1 else "step"
        self._begin(kind, rows)

    def _begin(self, kind: str, rows: int = 1) -> None:
        assert self._has_begun.wait(60)
        self._calls[kind] += 1
        calls = self._calls.total()
        self._again -= kind == "again"
        self.used = max(self.used, self._engine.memory_used)
        self.running = max(self.running, self._engine.running)
        if calls == self._scenario.forgets:
            self._engine.forget()
        self._bring(calls)
        for visitor in self._here:
            visitor.tick(calls)
        faults = [fault for fault in self._scenario.faults if fault.kind == kind]
        self._due = next((f for f in faults if f.call <= self._calls[kind] < f.call + f.times), None)
        if self._due is not None:
            if kind == "batch" or (kind == "step" and self._due.error is torch.OutOfMemoryError):
                self._again = rows
            elif kind != "ahead":
                self.fatal.append(f"Call {calls} fails.")
        self._reach("before")

    def _reach(self, place: str) -> None:
        due = self._due
        if due is not None and due.place == place:
            self._due = None
            raise due.error(f"Call {self._calls.total()} fails.")


@pytest.fixture(scope="module")
def loaded(siglip_checkpoint: Path) -> Loaded:
    """(tokenizer, model, processor) with random weights, so that answers are long and all differ."""
    return load_model(str(siglip_checkpoint), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def questions(loaded: Loaded, picture_files: list[Path]) -> list[Question]:
    """Long and short questions, some with pictures, some with the same beginning as others."""
    tokenizer, model, processor = loaded
    first, second, third = map(load_image, picture_files)

    def question_of(turns: list[dict[str, Any]]) -> Question:
        inputs = processor(conversations=turns, images=[image for turn in turns for image in turn.get("images", [])])
        ids = model.generate(**inputs, max_new_tokens=LONGEST, do_sample=False)
        return Question(inputs, ids[0, inputs.input_ids.shape[1] :].tolist())

    story = "Tell me a story of a boat. " * 4
    picture = messages_of(f"{TAG}What is this?", first)
    asked = [
        question_of(messages_of("Hello.")),
        question_of(messages_of("Hello. Who are you?")),
        question_of(messages_of("more words " * 50)),
        question_of(messages_of(f"{story}Why so?")),
        question_of(messages_of(f"{story}{TAG}What is this?", first)),
        question_of(picture),
        question_of(messages_of(f"{TAG}What is this?{TAG}And this?", first, second)),
        question_of(messages_of(f"{TAG}{TAG}", third, third)),
        question_of(messages_of(f"{TAG}{story}", third)),
    ]
    answer = tokenizer.decode(asked[5].alone[:20], skip_special_tokens=True)
    asked.append(question_of([picture[0], {**picture[1], "content": answer}, *messages_of("And what else?")]))
    assert len(asked) == QUESTIONS
    return asked


@contextlib.contextmanager
def nothing_stays() -> Iterator[None]:
    """Fail if generations or caches that were made within the `with` block are alive at its end."""
    gc.freeze()  # older objects are not searched
    try:
        yield
        for thread in threading.enumerate():  # an engine's thread holds its last row until it ends
            if thread.name == "deepseek_vl-generate":
                thread.join(60)
        gc.collect()
        assert not [thing for thing in gc.get_objects() if type(thing) in (Generation, RowCache)]
    finally:
        gc.unfreeze()


def spend_day(engine: Engine, questions: list[Question], scenario: Scenario) -> None:
    """Run a scenario on an engine, and check all answers, the failures and the memory."""
    visitors = [Visitor(engine, questions[visit.question], visit) for visit in scenario.visits]
    day = Day(engine, visitors, scenario)
    day.run()
    wait_until(lambda: not engine.running and not engine.waiting, 30)
    failures = [failure for visitor in visitors for failure in visitor.check(engine)]
    assert sorted(failures) == sorted(day.fatal)
    assert day.running <= scenario.max_rows
    assert max(day.used, engine.memory_used) <= engine.memory_bytes
    assert scenario.keeps or engine.memory_used == 0


@pytest.mark.parametrize("examples", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_whatever_happens_each_answer_is_the_one_alone(
    loaded: Loaded, questions: list[Question], examples: int
) -> None:
    def needed(visit: Visit, room: int) -> int:
        inputs = questions[visit.question].inputs
        return (inputs.input_ids.shape[1] + visit.length + room) * POSITION + inputs.pixel_values.nbytes

    def live(scenario: Scenario) -> None:
        largest = max(needed(visit, scenario.room) for visit in scenario.visits)
        memory = scenario.at_once and scenario.at_once * largest + scenario.spare * POSITION
        limits = EngineLimits(scenario.max_rows, scenario.prefill_seconds, memory, keeps=scenario.keeps)
        engine = Engine(loaded[1], loaded[0], limits)
        engine.runs_ahead = scenario.runs_ahead
        spend_day(engine, questions, scenario)
        again = [replace(visit, comes=0, fate="stays") for visit in scenario.visits[:1]]
        spend_day(engine, questions, replace(scenario, visits=again, faults=[], forgets=0))
        engine.forget()
        assert engine.memory_used == 0

    @settings(max_examples=examples, deadline=None, derandomize=True, print_blob=True)
    @given(SCENARIOS)
    def check(scenario: Scenario) -> None:
        with pytest.MonkeyPatch.context() as patch:
            for module in (engine_module, kv_cache, prefix_cache):
                patch.setattr(module, "STEP", scenario.room)
            patch.setattr(engine_module, "PIECE", scenario.piece)
            for module in (engine_module, generation_module):  # pytest keeps log records, and these keep tensors
                patch.setattr(module.logger, "disabled", True)
            with nothing_stays():
                live(scenario)

    check()
