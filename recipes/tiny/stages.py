"""How the small model's stages are trained: the vision tower on segmentation maps, the model on conversations."""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from deepseek_vl.kernels.compiling import CompilationError, compiling
from deepseek_vl.kernels.device import pick_device
from deepseek_vl.kernels.memory import keeping_freed_memory
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.models.siglip_vit import SigLIPVisionTransformer
from deepseek_vl.train.collator import TrainingCollator
from deepseek_vl.train.stages import parts_of, set_trainable
from deepseek_vl.train.trainer import BaseTrainer, VLTrainer, train, training_dtype
from recipes.tiny.optimizer import make_optimizer
from recipes.tiny.segmentation import SegmentationCollator, SegmentationModel
from recipes.tiny.world import SegmentationMaps

logger = logging.getLogger(__name__)

SCHEDULE = {"decay_type": "1-sqrt", "decay": 0.25}
"""The learning rate falls over the last quarter of a stage's steps (Hägele et al. 2024)."""

LONG_SCHEDULE = {"decay_type": "linear", "decay": 0.8}
"""The learning rate falls over most of the steps: conversations are learnt well at low rates only."""


def training_arguments(
    output: Path, data: Dataset, args: argparse.Namespace, decay_type: str, decay: float
) -> TrainingArguments:
    """The training arguments of a stage, which goes through `data` once and in order.

    Args:
        decay_type, decay: how, and over which part of the steps, the learning rate falls to 0 at the end.
    """
    steps = len(data) // args.batch_size
    return TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": int(steps * decay), "decay_type": decay_type},
        warmup_steps=100,
        use_cpu=not torch.cuda.is_available(),
        bf16=training_dtype(pick_device()) is torch.bfloat16,
        logging_steps=20,
        save_steps=args.save_steps,
        train_sampling_strategy="sequential",
        dataloader_num_workers=1,
        dataloader_prefetch_factor=4,
        remove_unused_columns=False,
        report_to="none",
        seed=args.seed,
    )


def train_vision_tower(
    tower: SigLIPVisionTransformer, processor: VLChatProcessor, output: Path, args: argparse.Namespace
) -> None:
    """Train a vision tower on segmentation maps, and write it to `output`."""
    maps = SegmentationMaps(args.maps * args.batch_size, args.seed)
    model = SegmentationModel(tower)
    trainer = BaseTrainer(
        model=model,
        args=training_arguments(output, maps, args, **SCHEDULE),
        data_collator=SegmentationCollator(processor.image_processor, model.side),
        train_dataset=maps,
        optimizers=(make_optimizer(model, args.learning_rate), None),
    )
    with keeping_freed_memory(trainer.args.device):
        train(trainer)


def train_model(
    model: MultiModalityCausalLM,
    processor: VLChatProcessor,
    conversations: Dataset,
    output: Path,
    args: argparse.Namespace,
    schedule: Mapping[str, Any],
    stored_in: torch.dtype | None = None,
) -> None:
    """Train on every conversation, in order, and write the model to `output`, in its own dtype or `stored_in`."""
    set_trainable(model, parts_of(model))
    settings = training_arguments(output, conversations, args, **schedule)
    collator = TrainingCollator(processor)
    if settings.use_cpu and not settings.bf16:
        compile_layers(model, collator([conversations[index] for index in range(args.batch_size)]))
    trainer = VLTrainer(
        model=model,
        args=settings,
        processing_class=processor,
        data_collator=collator,
        train_dataset=conversations,
        optimizers=(make_optimizer(model, args.learning_rate), None),
    )
    with keeping_freed_memory(trainer.args.device):
        train(trainer, stored_in)


def compile_layers(model: MultiModalityCausalLM, batch: dict[str, torch.Tensor]) -> None:
    """Compile the language model's layers for training; if that fails, log a warning and leave them.

    In a small model the operations between matrix products take as long as the products.

    Args:
        batch: the same whenever a run is begun or resumed. The code works for every length, but is made for this one's;
            made for another, it would have a resumed run round differently from an unbroken one.
    """
    torch.compiler.reset()
    try:
        with compiling(model.language_model.model.layers, dynamic=True):
            model.train()(**batch, loss_only=True).loss.backward()
    except CompilationError as error:
        logger.warning("Training takes a quarter longer, because layers cannot be compiled here: %s", error)
    model.zero_grad()
