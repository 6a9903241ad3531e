"""The command `python -m deepseek_vl.train`: fine-tune a model on conversations about images."""

import argparse
import dataclasses
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback

from deepseek_vl.checkpoints.find import find_checkpoint
from deepseek_vl.checkpoints.read import checkpoint_dtype
from deepseek_vl.command_line import OneLineParser, not_negative, positive, run_command
from deepseek_vl.data.checks import check_data, load_data
from deepseek_vl.data.files import whole_file
from deepseek_vl.kernels.device import pick_device
from deepseek_vl.kernels.memory import keeping_freed_memory
from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor
from deepseek_vl.train.collator import TrainingCollator
from deepseek_vl.train.stages import PARTS, STAGES, set_trainable
from deepseek_vl.train.trainer import IS_FIRST, VLTrainer, train, training_dtype
from deepseek_vl.utils.io import check_model_type, errors_that_name, load_pretrained_model

logger = logging.getLogger(__name__)

LORA_LEARNING_RATE = 2e-4
LORA_PARTS = ("projector", "language")
"""The parts of a stage that get adapters, unless `--train` names others."""
FIXED = (
    "model_path", "data", "skip_bad", "stage", "train", "learning_rate", "part_rate", "lora", "lora_rank", "batch_size",
    "gradient_accumulation", "warmup_steps", "schedule", "weight_decay", "max_length", "truncate", "pack", "dtype",
    "seed",
)  # fmt: skip
"""Arguments that must stay the same when a run is resumed."""
SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup", "inverse_sqrt")
DTYPES = ("auto", "bfloat16", "float16", "float32")
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
"""How many processes `accelerate launch` started."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = OneLineParser(prog="python -m deepseek_vl.train", description="Fine-tune a DeepSeek-VL model.")
    add = parser.add_argument
    add("--model_path", required=True, help="checkpoint to start from: a directory or a Hub id")
    add("--data", nargs="+", required=True, metavar="FILE", help="conversations: .jsonl, .json, .jsonl.gz or .parquet")
    add("--output", type=Path, help="directory for the result; run the same command again to resume")
    add("--check", action="store_true", help="read all data, name every bad row, and exit")
    add("--skip-bad", action="store_true", help="train without the bad rows")
    add("--eval_data", nargs="+", metavar="FILE", help="conversations whose loss is reported along the way")

    add = parser.add_argument_group("what learns").add_argument
    add(
        "--stage",
        choices=STAGES,
        default="sft",
        help="the paper's stages: adaptor (projector), pretrain (projector and language model), sft (all but SAM) "
        "(default: %(default)s)",
    )
    add("--train", nargs="+", choices=PARTS, metavar="PART", help=f"other parts: {', '.join(PARTS)}")
    add("--learning_rate", type=_above_zero, help="(default: the stage's; 2e-4 with --lora)")
    add("--part_rate", nargs="+", type=_part_rate, default=[], metavar="PART=RATE", help="other rates for some parts")
    add(
        "--lora",
        action="store_true",
        help="adapters learn instead of weights: the stage's projector and language model's, or those of --train",
    )
    add("--lora_rank", type=positive, default=16, help="(default: %(default)s)")

    add = parser.add_argument_group("how").add_argument
    add("--epochs", type=_above_zero, default=1.0, help="(default: %(default)s)")
    add("--max_steps", type=positive, help="optimizer steps, instead of --epochs")
    add("--batch_size", type=positive, default=4, help="conversations per device (default: %(default)s)")
    add("--gradient_accumulation", type=positive, default=1, help="batches per step (default: %(default)s)")
    add("--warmup_steps", type=not_negative, help="(default: the stage's, at most a tenth of all)")
    add("--schedule", choices=SCHEDULES, default="cosine", help="of the learning rate (default: %(default)s)")
    add("--weight_decay", type=_not_negative, default=0.0, help="(default: %(default)s)")
    add("--max_length", type=int, help="most tokens per conversation (default: the model's positions)")
    add("--truncate", action="store_true", help="cut longer conversations instead of refusing them")
    add("--pack", action=argparse.BooleanOptionalAction, help="batches without padding (default: the stage's)")
    add("--dtype", choices=DTYPES, default="auto", help="to compute in (default: what the device is good at)")
    add(
        "--device",
        choices=("auto", "cpu"),
        default="auto",
        help="auto, or cpu to leave a GPU alone (default: %(default)s)",
    )
    add("--gradient_checkpointing", action="store_true", help="less memory, about a third more time")
    add("--save_steps", type=positive, default=200, help="steps between checkpoints (default: %(default)s)")
    add("--eval_steps", type=positive, default=100, help="steps between evaluations (default: %(default)s)")
    add("--logging_steps", type=positive, help="steps between log lines (default: 10, fewer in a short run)")
    add("--workers", type=not_negative, default=1, help="processes that prepare data (default: %(default)s)")
    add("--seed", type=not_negative, default=0, help="(default: %(default)s)")
    return parser


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or above")
    return number


def _above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def _part_rate(text: str) -> tuple[str, float]:
    part, _, rate = text.partition("=")
    if part not in PARTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not PART=RATE with a PART of {', '.join(PARTS)}")
    try:
        number = float(rate)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{rate!r} in {text!r} is not a number") from None
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{rate} in {text!r} is not a learning rate")
    return part, number


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the data, or train; returns the exit code."""
    return run_command(build_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> int | None:
    if args.check:
        return _check(args)
    if args.output is None:
        raise ValueError("Give --output, the directory for the result.")
    if args.schedule == "constant" and args.warmup_steps:
        raise ValueError("--schedule constant has no warm-up; use constant_with_warmup.")
    if missing := [name for name in ("matplotlib", "tensorboard", *(["peft"] * args.lora)) if find_spec(name) is None]:
        raise ValueError(f"Training needs {', '.join(missing)}: pip install '.[train]'.")
    if Path(args.model_path, "config.json").is_file():
        args.model_path = str(Path(args.model_path).absolute())  # so that a run is resumed with the same model
    if IS_FIRST:
        _keep_to_the_run(args)
    set_seed(args.seed)
    dtype = training_dtype(pick_device(args.device), args.dtype)
    # Weights that learn are kept in float32; under adapters they are only read.
    loaded_in = dtype if args.lora else torch.float32
    _, processor, model = load_pretrained_model(args.model_path, device="cpu", dtype=loaded_in)
    max_length = _max_length(args, model.config)
    rows, eval_rows = (
        load_data(files, processor, max_length, args.skip_bad, args.truncate)[0] if files else []
        for files in (args.data, args.eval_data)
    )
    model = _choose_what_learns(model, args)
    trainer = VLTrainer(
        part_rates=dict(args.part_rate),
        model=model,
        args=_training_arguments(args, dtype, len(rows), evaluate=bool(eval_rows)),
        processing_class=processor,
        data_collator=TrainingCollator(processor, max_length, _pick(args.pack, STAGES[args.stage].pack)),
        train_dataset=rows,
        eval_dataset=eval_rows or None,
        callbacks=[_tensorboard(args.output)] if IS_FIRST else [],
    )
    with keeping_freed_memory(trainer.args.device), warnings.catch_warnings():
        # peft looks for an adapter's base from the working directory, to see whether its vocabulary grew; it did not.
        warnings.filterwarnings("ignore", "Could not find a config file", UserWarning)
        train(trainer, stored_in=None if args.lora else checkpoint_dtype(args.model_path))
    if args.lora:
        if IS_FIRST and trainer.state.global_step:  # none if there was nothing to do
            from deepseek_vl.train.lora import write_card

            write_card(args.output, len(rows), trainer.state.global_step)
        logger.info("Merge: python -m deepseek_vl.train.lora --adapter %s --output DIR", args.output)
    else:
        logger.info("Chat with it: python cli_chat.py --model_path %s", args.output)


def _pick(value: Any, default: Any) -> Any:
    return default if value is None else value


def _check(args: argparse.Namespace) -> int:
    directory = Path(find_checkpoint(args.model_path, weights=False))
    with errors_that_name(args.model_path, directory):
        check_model_type(args.model_path, directory)
        processor = VLChatProcessor.from_pretrained(directory)
        max_length = _max_length(args, MultiModalityConfig.from_pretrained(directory))
    report = check_data([*args.data, *(args.eval_data or ())], processor, max_length, args.truncate)
    for bad in report.bad:
        print(bad)
    print(report.summary())
    return int(bool(report.bad))


def _keep_to_the_run(args: argparse.Namespace) -> None:
    """Note the arguments in the output directory, or compare them with those of the run that is to be resumed.

    Raises:
        ValueError: if they differ.
    """
    chosen = {name: getattr(args, name) for name in FIXED}
    chosen["bytes of data"] = [path.stat().st_size for path in map(Path, args.data) if path.is_file()]
    chosen["processes"] = PROCESSES
    chosen = json.loads(json.dumps(chosen))  # as they are read back
    path = args.output / "run.json"
    if path.is_file():
        try:
            noted = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is not JSON ({error}); remove it, or choose another --output.") from error
        if not isinstance(noted, dict):
            raise ValueError(f"{str(path)!r} holds no run's arguments; remove it, or choose another --output.")
        changed = [
            f"{'--' if name in FIXED else ''}{name} was {noted.get(name)!r}"
            for name in chosen
            if noted.get(name) != chosen[name]
        ]
        if not changed:
            return
        if any(args.output.glob("checkpoint-*")) or (args.output / "log.jsonl").exists():
            raise ValueError(
                f"{str(args.output)!r} holds a run with other arguments ({', '.join(changed)}); repeat them to resume "
                "it, or choose another --output."
            )
    elif args.output.exists() and any(args.output.iterdir()):
        raise FileExistsError(f"{str(args.output)!r} is not empty and holds no run; choose another --output.")
    args.output.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        part.write_text(json.dumps(chosen, indent=2), encoding="utf-8")


def _max_length(args: argparse.Namespace, config: Any) -> int:
    positions = config.language_config.max_position_embeddings
    if args.max_length is not None and not 0 < args.max_length <= positions:
        raise ValueError(f"--max_length must be from 1 to the model's {positions} positions, not {args.max_length}.")
    return args.max_length or positions


def _choose_what_learns(model: MultiModalityCausalLM, args: argparse.Namespace) -> torch.nn.Module:
    parts = args.train or STAGES[args.stage].parts
    if args.lora and not args.train:
        parts = [part for part in parts if part in LORA_PARTS]
    if idle := [part for part, _ in args.part_rate if part not in parts]:
        raise ValueError(f"--part_rate names {idle[0]}, which does not learn; what learns is {', '.join(parts)}.")
    if args.lora:
        from deepseek_vl.train.lora import add_lora, note_base  # needs peft, which others can do without

        adapted = add_lora(model, parts, args.lora_rank, 2 * args.lora_rank)
        note_base(adapted, args.model_path, args.output)
        return adapted
    set_trainable(model, parts)
    return model


def _checkpointing(is_on: bool) -> dict[str, Any]:
    """The `TrainingArguments` of recomputed activations, whose names began with `gradient` before transformers 5.24."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: is_on, f"{name}_kwargs": {"use_reentrant": False} if is_on else None}


def _training_arguments(args: argparse.Namespace, dtype: torch.dtype, rows: int, evaluate: bool) -> TrainingArguments:
    stage = STAGES[args.stage]
    per_step = args.batch_size * args.gradient_accumulation * PROCESSES
    steps = args.max_steps or max(1, math.ceil(rows * args.epochs / per_step))
    rate = LORA_LEARNING_RATE if args.lora else stage.learning_rate
    warmup_steps = 0 if args.schedule == "constant" else min(stage.warmup_steps, steps // 10)
    training_arguments = TrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        max_steps=args.max_steps or -1,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.gradient_accumulation,
        learning_rate=_pick(args.learning_rate, rate),
        warmup_steps=_pick(args.warmup_steps, warmup_steps),
        lr_scheduler_type=args.schedule,
        weight_decay=args.weight_decay,
        adam_beta2=0.95,  # the paper's
        max_grad_norm=1.0,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu=pick_device(args.device).type == "cpu",
        **_checkpointing(args.gradient_checkpointing),
        save_steps=args.save_steps,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=args.eval_steps,
        prediction_loss_only=True,
        logging_steps=args.logging_steps or max(1, min(10, steps // 20)),
        dataloader_num_workers=args.workers,
        remove_unused_columns=False,
        use_cache=True,  # the result's config says so; while training, `VLTrainer.compute_loss` does without
        report_to="none",
        seed=args.seed,
    )
    if training_arguments.n_gpu > 1:
        raise ValueError(
            f"There are {training_arguments.n_gpu} GPUs: start with `accelerate launch -m deepseek_vl.train ...`, or "
            "set CUDA_VISIBLE_DEVICES to one of them."
        )
    return training_arguments


def _tensorboard(output: Path) -> TensorBoardCallback:
    from torch.utils.tensorboard import SummaryWriter

    return TensorBoardCallback(SummaryWriter(str(output / "tensorboard")))


if __name__ == "__main__":
    sys.exit(main())
