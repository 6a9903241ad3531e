"""Which parts of a model take the time on a CPU: `python benchmarks/where_time_goes.py --model_path DIR`.

For this package and for transformers' own class it prints the seconds of one prompt with a picture and of the tokens
behind it, by part: matrix products of the vision tower, of the language model and its head, and everything else. Each
contender runs in a process of its own. The clocks around every layer cost a little themselves.
"""

import argparse
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from contenders import CONTENDERS, Contender, chat_processor, picture, question, warm_up
from torch import nn

from deepseek_vl.kernels.policy import fastest_dtype
from deepseek_vl.kernels.quantized import QuantizedLinear

PRODUCTS = (nn.Linear, nn.Conv2d, QuantizedLinear)


@contextmanager
def timed(module: nn.Module, seconds: Counter[tuple[str, str]], part: str) -> Iterator[None]:
    """Within the block, add the times of a layer's products to `seconds`, by what they are for and part."""
    begun: list[float] = []

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        phase = "per token" if inputs[0].numel() == inputs[0].shape[-1] else "first token"  # the prompt's have rows
        seconds[phase, part] += time.perf_counter() - begun.pop()

    before = module.register_forward_pre_hook(lambda *_: begun.append(time.perf_counter()))
    after = module.register_forward_hook(add)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def part_of(name: str) -> str:
    """The part of a model that a linear or convolutional layer belongs to."""
    if "lm_head" in name:
        return "head"
    return "language model" if "language_model" in name else "vision"


def measure(loaded: Contender, messages: list[dict[str, Any]], tokens: int) -> dict[str, dict[str, float]]:
    """The seconds of a prompt and of each token behind it, by part."""
    seconds: Counter[tuple[str, str]] = Counter()
    with ExitStack() as stack:
        for name, module in loaded.model.named_modules():
            if isinstance(module, PRODUCTS):
                stack.enter_context(timed(module, seconds, part_of(name)))
        result = loaded.answer(messages, tokens)
    head = seconds["per token", "head"] / tokens
    first = {part: seconds["first token", part] for part in ("vision", "language model")}
    each = {"vision": 0.0, "language model": seconds["per token", "language model"] / (tokens - 1)}
    return {
        "first token": {**first, "head": head, "all": result["first"]},
        "per token": {**each, "head": head, "all": result["each"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--prompt", type=int, default=640, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="of the answer (default: %(default)s)")
    default = str(fastest_dtype()).removeprefix("torch.")
    parser.add_argument("--dtype", default=default, help="of both contenders (default: %(default)s)")
    parser.add_argument("--contender", choices=CONTENDERS, help="measure this one only, in this process")
    args = parser.parse_args()
    if args.tokens < 2:
        parser.error("--tokens must be at least 2")
    if args.contender is None:
        print("| contender | | vision | language model | head | all else | all |")
        print("| --- | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
        for name in CONTENDERS:
            subprocess.run([sys.executable, Path(__file__), *sys.argv[1:], "--contender", name], check=True)
        return
    loaded = CONTENDERS[args.contender](model_path=args.model_path, device="cpu", dtype=args.dtype)
    processor = chat_processor(args.model_path)
    warm_up(loaded, processor)
    messages = question(processor, args.prompt, [picture(1)])
    for phase, seconds in measure(loaded, messages, args.tokens).items():
        parts = [seconds[part] for part in ("vision", "language model", "head")]
        cells = " | ".join(f"{number:.4f}" for number in (*parts, seconds["all"] - sum(parts), seconds["all"]))
        print(f"| {args.contender}, {args.dtype} | {phase} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
