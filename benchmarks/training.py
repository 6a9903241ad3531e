"""Time and memory of training steps, and where the time goes: `python benchmarks/training.py --model_path DIR`."""

import argparse
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from measuring import now

from deepseek_vl.kernels.device import pick_device, pick_dtype
from deepseek_vl.train.collator import TrainingCollator
from deepseek_vl.train.lora import add_lora
from deepseek_vl.train.stages import STAGES, parameter_groups, parts_of, set_trainable
from deepseek_vl.utils.io import load_pretrained_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the recipe is in the checkout, not in the package
from recipes.tiny.world import SyntheticWorld


class Phases:
    """Seconds spent in named phases; a phase inside another is taken off the outer one."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[float] = []

    def begin(self) -> None:
        self._open.append(now(self.device))

    def end(self, name: str) -> None:
        spent = now(self.device) - self._open.pop()
        self.seconds[name] += spent
        self._open = [start + spent for start in self._open]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.begin()
        yield
        self.end(name)

    def watch(self, module: torch.nn.Module, name: str) -> None:
        """Time a module's forward pass as a phase."""
        module.register_forward_pre_hook(lambda *_: self.begin())
        module.register_forward_hook(lambda *_: self.end(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--stage", choices=STAGES, default="sft")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", type=int, default=6, help="questions per conversation")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    args = parser.parse_args()

    device = pick_device()
    dtype = pick_dtype(device, args.dtype)
    _, processor, model = load_pretrained_model(args.model_path, device, dtype if args.lora else torch.float32)
    phases = Phases(device)
    phases.watch(model.vision_model, "vision forward")
    phases.watch(model.aligner, "projector forward")
    phases.watch(model.language_model.model, "language forward")
    if args.lora:
        model = add_lora(model, [part for part in STAGES["pretrain"].parts if part in parts_of(model)])
    else:
        set_trainable(model, STAGES[args.stage].parts)
    model.train()
    if args.gradient_checkpointing:
        name = "activation_checkpointing_enable"  # from transformers 5.24 on
        enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
        enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-5, {}, 0.0))
    collator = TrainingCollator(processor, pack=args.pack)
    world = SyntheticWorld((args.steps + 1) * args.batch_size, seed=1, turns=args.turns)

    tokens = 0
    for step in range(args.steps + 1):
        if step == 1:  # the first step is a warm-up
            phases.seconds.clear()
            tokens = 0
        first = step * args.batch_size
        with phases.phase("data"):
            batch = collator([world[first + i] for i in range(args.batch_size)])
            batch = {name: value.to(device) for name, value in batch.items()}
        with phases.phase("rest of forward"), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**batch, use_cache=False, loss_only=True).loss
        with phases.phase("backward"):
            loss.backward()
        with phases.phase("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        tokens += batch["input_ids"].numel()

    total = sum(phases.seconds.values())
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(0).ru_maxrss * 1024
    print(f"{args.model_path} on {device}, {dtype}, {'LoRA' if args.lora else args.stage}, batch {args.batch_size}")
    print(f"{total / args.steps:.2f} s per step, {args.steps * args.batch_size / total:.2f} conversations/s, ", end="")
    print(f"{tokens / total:.0f} tokens/s, peak memory {memory / 1e9:.2f} GB")
    for name, seconds in sorted(phases.seconds.items(), key=lambda item: -item[1]):
        print(f"  {name:18s} {seconds / args.steps:8.3f} s  {100 * seconds / total:5.1f} %")


if __name__ == "__main__":
    main()
