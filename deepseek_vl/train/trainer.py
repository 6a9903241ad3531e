"""Training on transformers' `Trainer`: rates per part, checkpoints in the published layout, resuming, a loss plot."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from deepseek_vl.data.files import whole_file
from deepseek_vl.kernels.device import pick_dtype
from deepseek_vl.kernels.policy import multiplies_fast
from deepseek_vl.train.banner import StartBanner
from deepseek_vl.train.stages import parameter_groups

logger = logging.getLogger(__name__)

IS_FIRST = os.environ.get("RANK", "0") == "0"
"""Whether this is the first of the processes that `accelerate launch` started, or the only one."""


class Float32Attention(TorchFunctionMode):
    """Attention in float32 under a CPU's autocast to bfloat16; the result is in bfloat16, as it would be without."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs or {})
        narrow = torch.get_autocast_dtype("cpu")
        with torch.autocast("cpu", enabled=False):
            wide = {name: _to_float32(value) for name, value in (kwargs or {}).items()}
            return func(*map(_to_float32, args), **wide).to(narrow)


def _to_float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


class CheckpointRotation(TrainerCallback):
    """Deletes all but the last two checkpoints of a run.

    `Trainer`'s own `save_total_limit` also deletes what others have given a name that begins with `checkpoint-`.
    """

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            for checkpoint in checkpoints(Path(args.output_dir))[2:]:
                shutil.rmtree(checkpoint)


class ScheduleOverAllSteps(TrainerCallback):
    """Takes the learning rate for the first step of a resumed run from the schedule.

    `Trainer` takes it from the checkpoint. In a run that is given more steps than it had, that is the end of the old
    schedule: a cosine's 0.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step and isinstance(lr_scheduler, LambdaLR):
            shares = zip(lr_scheduler.base_lrs, lr_scheduler.lr_lambdas, strict=True)
            rates = [rate * share(lr_scheduler.last_epoch) for rate, share in shares]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            lr_scheduler.load_state_dict({**lr_scheduler.state_dict(), "_last_lr": rates})  # what the log shows


class BaseTrainer(Trainer):
    """`Trainer` that keeps the last two checkpoints, and attends in float32 on a CPU; its arguments are keywords."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_callback(CheckpointRotation())
        self.add_callback(ScheduleOverAllSteps())

    def training_step(self, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`Trainer`'s step; for bfloat16 on a CPU, attention is in float32, which is faster in both passes there."""
        on_cpu = self.args.device.type == "cpu" and self.args.bf16
        with Float32Attention() if on_cpu else nullcontext():  # both passes: checkpointed layers run again
            return super().training_step(model, *args, **kwargs)


class VLTrainer(BaseTrainer):
    """The trainer for `MultiModalityCausalLM`, or one wrapped by peft.

    Args:
        part_rates: learning rates that differ from `args.learning_rate`, by part.
        kwargs: `Trainer`'s. The processor as `processing_class` is saved beside every checkpoint, so that each can be
            opened by the chat.
    """

    def __init__(self, *, part_rates: Mapping[str, float] | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.part_rates = part_rates or {}
        self.add_callback(StartBanner(self))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW, or what `args.optim` says, with one group per part."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            rate = options.pop("lr")
            groups = parameter_groups(trained, rate, self.part_rates, self.args.weight_decay)
            self.optimizer = optimizer_class(groups, lr=rate, **options)
        return self.optimizer

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        # With a cache transformers would not look for the borders of packed rows in their positions.
        inputs = {**inputs, "use_cache": False}
        needs_only_loss = model.training or self.args.prediction_loss_only
        if needs_only_loss and self.label_smoother is None and self.compute_loss_func is None:
            inputs["loss_only"] = True
        return super().compute_loss(model, inputs, *args, **kwargs)


def training_dtype(device: torch.device, dtype: str = "auto") -> torch.dtype:
    """The dtype to train in: the one asked for, or the fastest on this device.

    Raises:
        ValueError: if the device cannot train in it.
    """
    picked = pick_dtype(device, dtype)
    if dtype == "auto" and device.type != "cuda" and not (device.type == "cpu" and multiplies_fast(picked)):
        return torch.float32
    if picked is torch.float16 and device.type != "cuda":
        raise ValueError("Training in float16 needs a CUDA device; use --dtype bfloat16 or float32.")
    return picked


def checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, the newest first."""
    found = [path for path in output.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)


def last_checkpoint(output: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None; newer ones, cut off by a kill, are deleted.

    A checkpoint is complete if it has a whole `trainer_state.json`, which `Trainer` writes last.

    Raises:
        OSError: if a checkpoint cannot be read.
    """
    for checkpoint in checkpoints(output):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # it is missing or cut off
            if IS_FIRST:
                logger.warning("%s was not written to its end; it is deleted.", checkpoint)
                shutil.rmtree(checkpoint)
        else:
            return checkpoint
    return None


def plot_loss(history: list[dict[str, float]], path: Path) -> None:
    """Draw the training and evaluation loss and the learning rate over the steps.

    Args:
        history: `trainer.state.log_history`.
        path: a PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    rate_axes = axes.twinx()
    curves: Any = (
        ("loss", "training", axes, {}),
        ("eval_loss", "evaluation", axes, {"marker": "."}),
        ("learning_rate", "learning rate", rate_axes, {"color": "lightgrey", "zorder": 0}),
    )
    for key, label, where, style in curves:
        if points := [(entry["step"], entry[key]) for entry in history if key in entry]:
            where.plot(*zip(*points, strict=True), label=label, **style)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    rate_axes.set_ylabel("learning rate")
    axes.set_zorder(rate_axes.get_zorder() + 1)
    axes.patch.set_visible(False)
    figure.savefig(path, dpi=120)


def train(trainer: Any, stored_in: torch.dtype | None = None) -> None:
    """Train, going on from the run's last checkpoint if there is one; then write model, log and plot to its directory.

    Args:
        trainer: a `Trainer`.
        stored_in: dtype of the weights that are written at the end; None leaves it (as FSDP does).

    Raises:
        FileExistsError: if the directory has the result of a run, but no checkpoint to go on from.
        ValueError: if the run was begun with fewer processes, with which it would have more steps.
        DataError: if a row cannot be used.
    """
    output = Path(trainer.args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    checkpoint, exported = last_checkpoint(output), (output / "log.jsonl").exists()
    if checkpoint is None and exported:
        raise FileExistsError(f"{str(output)!r} holds a finished run without checkpoints; choose another directory.")
    if checkpoint is None:
        trainer.train()
    elif not _is_finished(state := TrainerState.load_from_json(str(checkpoint / "trainer_state.json")), trainer.args):
        steps = _planned_steps(trainer)
        if steps <= state.global_step:
            raise ValueError(
                f"The run has done {state.global_step} steps of its own {state.max_steps}, and with this number of "
                f"processes it would have {steps}; start as many as it began with."
            )
        logger.warning("Going on from %s.", checkpoint)
        if steps != state.max_steps:
            logger.warning(
                "The run was planned for %d steps; from here on its learning rate is that of a run of %d.",
                state.max_steps,
                steps,
            )
        trainer.train(resume_from_checkpoint=str(checkpoint))
    elif exported:
        logger.warning("The run in %s is finished; there is nothing to do.", output)
        return
    else:  # killed between its last checkpoint and the end
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.state = state
    if stored_in is not None and not trainer.is_fsdp_enabled:
        trainer.model.to(stored_in)
    trainer.save_model()
    if trainer.is_world_process_zero():
        history = trainer.state.log_history
        plot_loss(history, output / "loss.png")
        (output / "training_args.bin").unlink(missing_ok=True)  # the trainer's own, no part of a checkpoint
        # Last, because its presence says that all files are written.
        with whole_file(output / "log.jsonl") as part:
            part.write_text("".join(json.dumps(entry) + "\n" for entry in history), encoding="utf-8")


def _is_finished(state: TrainerState, args: TrainingArguments) -> bool:
    """Whether a run has all that is asked for, which may be more than when it was begun."""
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return (state.epoch or 0.0) >= args.num_train_epochs


def _planned_steps(trainer: Trainer) -> int:
    """How many steps the arguments ask for."""
    plan: Any = trainer.set_initial_training_values
    # transformers 5.0 wants to be told the size of a batch of all processes.
    has_size = "total_train_batch_size" in signature(plan).parameters
    size = [trainer.get_total_train_batch_size(trainer.args)] if has_size else []
    return plan(trainer.args, trainer.get_train_dataloader(), *size)[-1]
