"""What answers of a given form cost per token: `python benchmarks/structured.py --model_path random-1.3b`.

Answers that keep to a form, and answers of any, as many tokens each, are generated in turn, several times. The time of
a token is from one step of the batch to the next; the median of the fastest run counts.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from deepseek_vl import load_pretrained_model
from deepseek_vl.command_line import add_loading
from deepseek_vl.engine.decode_step import Step
from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.generation import END, Generation
from deepseek_vl.engine.kv_cache import RowCache
from deepseek_vl.engine.limits import EngineLimits
from deepseek_vl.engine.settings import GenerationSettings, StructuredOutput
from deepseek_vl.models import VLChatProcessor

SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 20},
            "colour": {"enum": ["red", "green", "blue"]},
            "count": {"type": "integer", "minimum": 0, "maximum": 999},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
        },
        "required": ["name", "colour", "count", "tags"],
        "additionalProperties": False,
    },
    "minItems": 1000,  # more than any answer has, so that none ends by itself
}
FORMS = {
    "any": None,
    "schema": StructuredOutput(json_schema=SCHEMA),
    "text of an expression": StructuredOutput(regex=r"([A-Za-z]{1,12} ){1000}"),
}


class TimedStep(Step):
    """A step that records when it begins."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def __call__(
        self, language_model: PreTrainedModel, token_ids: Sequence[int], caches: Sequence[RowCache]
    ) -> torch.Tensor:
        self.begun.append(time.perf_counter())
        return super().__call__(language_model, token_ids, caches)


def ignore(item: object) -> None:
    if item is not END and not isinstance(item, str):
        raise SystemExit(f"The engine failed: {item!r}")


def seconds_per_step(
    engine: Engine, processor: VLChatProcessor, form: StructuredOutput | None, rows: int, constrained: int, tokens: int
) -> float:
    """The median time of a step with `rows` answers, `constrained` of which keep to the form."""
    step = TimedStep()
    engine.use(step)
    messages = [{"role": "user", "content": "Make a list."}, {"role": "assistant", "content": ""}]
    inputs = processor(prompt=processor.render(messages)).to("cpu", dtype=engine.model.dtype)
    generations = []
    for row in range(rows):
        settings = GenerationSettings(
            max_new_tokens=tokens, temperature=1.0, seed=row, structured=form if row < constrained else None
        )
        generations.append(Generation(engine, inputs, settings, ignore))
    for generation in generations:
        engine.submit(generation)
    for generation in generations:
        generation.done.wait()
    if constrained and any(len(generation.token_ids) < tokens for generation in generations[:constrained]):
        raise SystemExit("An answer ended too early.")
    steps = [later - earlier for earlier, later in zip(step.begun, step.begun[1:], strict=False)]
    return statistics.median(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True)
    add_loading(parser)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4], help="answers in a batch (default: 1 4)")
    parser.add_argument("--tokens", type=int, default=40, help="of an answer (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement (default: %(default)s)")
    args = parser.parse_args()
    _, processor, model = load_pretrained_model(args.model_path, args.device, args.dtype, args.quantize)
    engine = Engine(model, processor.tokenizer, EngineLimits(max_rows=max(args.rows), keeps=False))
    for rows in args.rows:
        measured: dict[str, list[float]] = {}
        for repeat in range(args.repeats + 1):
            for name, form in FORMS.items():
                shares = {"": rows} if rows == 1 else {", all": rows, ", one of them": 1}
                for share, constrained in ({"": 0} if form is None else shares).items():
                    seconds = seconds_per_step(engine, processor, form, rows, constrained, args.tokens)
                    if repeat:  # the first one is a warm-up
                        measured.setdefault(name + share, []).append(seconds)
        fastest = {name: min(seconds) for name, seconds in measured.items()}
        for name, seconds in fastest.items():
            print(f"{rows:3} rows  {name:34} {1000 * seconds:8.2f} ms  {seconds / fastest['any']:6.3f}", flush=True)


if __name__ == "__main__":
    main()
