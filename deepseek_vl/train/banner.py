"""A summary of a training run, logged before its first step."""

import logging
from collections import defaultdict
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from deepseek_vl.train.stages import part_of

logger = logging.getLogger(__name__)


class StartBanner(TrainerCallback):
    """Logs where and in which dtype a trainer trains, what of the model learns and how fast, on how much data.

    All of it is read from the trainer before its first step, so that it is what happens, not what was asked for.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            for line in describe_run(self.trainer, state):
                logger.info("%s", line)


def describe_run(trainer: Any, state: TrainerState) -> list[str]:
    """The lines of the banner.

    Args:
        trainer: a `Trainer` with its optimizer made.
        state: the trainer's, with the steps that are done and those that are planned.
    """
    args, processes = trainer.args, trainer.accelerator.num_processes
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    alone = "weights and optimizer sharded (FSDP)" if trainer.is_fsdp_enabled else "each with all weights"
    threads = f" ({torch.get_num_threads()} threads)" if args.device.type == "cpu" else ""
    shares = "1 process" if processes == 1 else f"{processes} processes, {alone}"
    learnt: dict[str | None, int] = defaultdict(int)
    rates: dict[str | None, set[float]] = defaultdict(set)
    rate_of = {id(weight): group.get("initial_lr", group["lr"]) for group in trainer.optimizer.param_groups
               for weight in group["params"]}  # fmt: skip
    total = 0
    for name, weight in trainer.model.named_parameters():
        total += weight.numel()
        if weight.requires_grad:
            learnt[part_of(name)] += weight.numel()
            rates[part_of(name)].add(rate_of.get(id(weight), args.learning_rate))
    parts = [
        f"{part} ({number:,} parameters, learning rate {', '.join(f'{rate:g}' for rate in sorted(rates[part]))})"
        for part, number in learnt.items()
    ]
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    examples = f"{len(trainer.train_dataset):,} examples"
    if trainer.eval_dataset is not None:
        examples += f" and {len(trainer.eval_dataset):,} for evaluation"
    steps = f"{state.max_steps:,} steps of {per_step}"
    if state.global_step:
        steps += f", of which {state.global_step:,} are done"
    return [
        f"Training on {args.device.type}{threads} in {dtype}, {shares}.",
        f"Of {total:,} parameters learn: {', '.join(parts)}.",
        f"{examples}; {steps}; {args.lr_scheduler_type.value} schedule with {args.warmup_steps:g} steps of warm-up.",
    ]
