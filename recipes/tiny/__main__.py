"""The recipe of a small model: `python -m recipes.tiny --output DIR` makes it from nothing.

A tokenizer is learnt from the synthetic world's sentences. A small vision tower learns to see from maps of pictures, in
place of the published models' pretrained ones. Then a small model of the 1.3B's architecture learns, as in the paper's
last two stages, first from captions and then from conversations, of which the later ones ask more of what is hard.
"""

import argparse
import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.optim import muon
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset
from transformers import TrainingArguments, set_seed

from deepseek_vl.checkpoints.tokenizer import load_tokenizer
from deepseek_vl.command_line import OneLineParser, positive, run_command
from deepseek_vl.kernels.compiling import CompilationError, compiling
from deepseek_vl.kernels.device import pick_device
from deepseek_vl.kernels.policy import multiplies_fast
from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor, VLMImageProcessor
from deepseek_vl.models.siglip_vit import SigLIPVisionTransformer
from deepseek_vl.train.collator import TrainingCollator
from deepseek_vl.train.stages import parts_of, set_trainable
from deepseek_vl.train.trainer import OrderedTrainer, VLTrainer, train, training_dtype
from recipes.tiny.sight import MapCollator, PatchReader
from recipes.tiny.tokenizer import make_tokenizer, sentences
from recipes.tiny.world import ByLength, Captions, HardQuestions, Maps, SyntheticWorld

logger = logging.getLogger(__name__)
IMAGE_SIZE, PATCH_SIZE, WIDTH, HEADS, VISION_LAYERS, LANGUAGE_LAYERS = 144, 16, 192, 3, 7, 4
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2


def make_processor(seed: int, directory: Path) -> VLChatProcessor:
    """The processor, with a tokenizer learnt from 4,000 conversations."""
    make_tokenizer(sentences(SyntheticWorld(4000, seed=seed)), directory)
    image_processor = VLMImageProcessor(IMAGE_SIZE, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)
    return VLChatProcessor(image_processor, load_tokenizer(str(directory)), num_image_tokens=IMAGE_TOKENS)


def make_model(vocabulary: int) -> MultiModalityCausalLM:
    """The 1.3B's architecture in miniature, with random weights and sinusoidal positions."""
    siglip = {
        "model_name": "siglip_large_patch16_384",
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "width": WIDTH,
        "layers": VISION_LAYERS,
        "heads": HEADS,
        "select_feature": "same",
        "select_layer": -1,
    }
    projector = {"projector_type": "mlp_gelu", "depth": 2, "input_dim": WIDTH, "n_embed": WIDTH}
    llama = {
        "hidden_size": WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": LANGUAGE_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 1024,
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 3,
        "eos_token_id": vocabulary - 2,
    }
    model = MultiModalityCausalLM(
        MultiModalityConfig(
            vision_config={"cls": "CLIPVisionTower", "params": siglip},
            aligner_config={"cls": "MlpProjector", "params": projector},
            language_config=llama,
        )
    )
    # The usual deviation of 0.02 is for wide layers, and leaves the patches' places all but invisible at the start.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(WIDTH**-0.5 / 0.02)
        pos_embed = model.vision_model.vision_tower.pos_embed
        grid = [IMAGE_SIZE // PATCH_SIZE] * 2
        pos_embed.copy_(build_sincos2d_pos_embed(grid, WIDTH, temperature=100.0, interleave_sin_cos=True)[None] / 2)
    return model


class Float32Muon(muon.Muon):
    """Muon in float32, for processors that multiply bfloat16 slowly; timm's has no option for it."""

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        narrow = muon.zeropower_via_newtonschulz
        muon.zeropower_via_newtonschulz = functools.partial(narrow, dtype=torch.float32)
        try:
            return super().step(closure)
        finally:
            muon.zeropower_via_newtonschulz = narrow


def make_optimizer(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for embeddings, heads and vectors.

    From nothing it learns to see in a fraction of the steps that AdamW takes. The tower of a whole model, which can see
    already, learns at a third of the rate.
    """
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_matrix = parameter.ndim == 2 and "embed" not in name and "head" not in name
        can_see = name.startswith("vision_model.")
        rate = learning_rate / (3 if can_see else 1)
        options = {"lr": rate, "weight_decay": 0.02} if is_matrix else {"lr": rate / 2, "use_fallback": True}
        groups.setdefault((is_matrix, can_see), {"params": [], "weight_decay": 0.0, **options})["params"].append(
            parameter
        )
    optimizer = muon.Muon if torch.cuda.is_available() or multiplies_fast(torch.bfloat16) else Float32Muon
    return optimizer(list(groups.values()), lr=learning_rate, nesterov=True, betas=(0.9, 0.98))


def compile_layers(model: MultiModalityCausalLM, batch: dict[str, torch.Tensor]) -> None:
    """Compile the language model's layers for training; where that is not possible, say so and leave them.

    In a small model the operations between the products take as long as they do.

    Args:
        batch: the same whenever a run is begun or resumed. The code holds for every length, but is best for this one's;
            if the next batch decided, or the stage before, a resumed run would round otherwise than an unbroken one.
    """
    torch.compiler.reset()
    try:
        with compiling(model.language_model.model.layers, dynamic=True):
            model.train()(**batch, loss_only=True).loss.backward()
    except CompilationError as error:
        logger.warning("Training takes a quarter longer, because layers cannot be compiled here: %s", error)
    model.zero_grad()


SCHEDULE = {"decay_type": "1-sqrt", "decay": 0.25}
"""The learning rate falls over the last quarter of a stage's steps (Hägele et al. 2024)."""

LONG_SCHEDULE = {"decay_type": "linear", "decay": 0.8}
"""Most of the steps at a falling rate: what conversations ask is learnt well at low rates only."""


def settings_of(
    output: Path, data: Dataset, args: argparse.Namespace, decay_type: str, decay: float
) -> TrainingArguments:
    """How a stage is trained: on everything in `data`, once and in order.

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
        dataloader_num_workers=1,
        dataloader_prefetch_factor=4,
        remove_unused_columns=False,
        report_to="none",
        seed=args.seed,
    )


def learn_to_see(
    tower: SigLIPVisionTransformer, processor: VLChatProcessor, output: Path, args: argparse.Namespace
) -> None:
    """Train a vision tower on maps, and write it to `output`."""
    maps = Maps(args.maps * args.batch_size, args.seed)
    reader = PatchReader(tower)
    trainer = OrderedTrainer(
        model=reader,
        args=settings_of(output, maps, args, **SCHEDULE),
        data_collator=MapCollator(processor.image_processor, reader.side),
        train_dataset=maps,
        optimizers=(make_optimizer(reader, args.learning_rate), None),
        shuffle=False,
    )
    train(trainer)


def learn(
    model: MultiModalityCausalLM,
    processor: VLChatProcessor,
    world: Dataset,
    output: Path,
    args: argparse.Namespace,
    schedule: Mapping[str, Any],
    stored_in: torch.dtype | None = None,
) -> None:
    """Train on every conversation of a world, and write the model to `output`, in its or another dtype."""
    set_trainable(model, parts_of(model))
    settings = settings_of(output, world, args, **schedule)
    collator = TrainingCollator(processor)
    if settings.use_cpu and not settings.bf16:
        compile_layers(model, collator([world[index] for index in range(args.batch_size)]))
    trainer = VLTrainer(
        model,
        settings,
        processor,
        collator,
        world,
        optimizers=(make_optimizer(model, args.learning_rate), None),
        shuffle=False,
    )
    train(trainer, stored_in)


def build_parser() -> argparse.ArgumentParser:
    """The recipe's command line."""
    parser = OneLineParser(prog="python -m recipes.tiny", description="Make a small model from nothing.")
    parser.add_argument("--output", type=Path, required=True, help="directory for the models, their logs and plots")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the world (default: %(default)s)")
    parser.add_argument("--maps", type=positive, default=5000, help="steps on maps (default: %(default)s)")
    parser.add_argument("--captions", type=positive, default=1500, help="steps on captions (default: %(default)s)")
    parser.add_argument(
        "--conversations", type=positive, default=1500, help="steps on conversations (default: %(default)s)"
    )
    parser.add_argument(
        "--hard_conversations",
        type=positive,
        default=3900,
        help="then, steps on conversations with more of what is hard (default: %(default)s)",
    )
    parser.add_argument("--batch_size", type=positive, default=32, help="per step (default: %(default)s)")
    parser.add_argument(
        "--save_steps", type=positive, default=500, help="between checkpoints, to go on from (default: %(default)s)"
    )
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="at its highest (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the model; the same command again goes on where it was stopped. Returns the exit code."""
    return run_command(build_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or torch.cuda.device_count() > 1:
        raise ValueError(
            "The recipe is one process's on one device, or it would see everything twice: start it without accelerate "
            "launch, with CUDA_VISIBLE_DEVICES set to one GPU."
        )
    set_seed(args.seed)
    processor = make_processor(args.seed, args.output / "tokenizer")
    maps, captions, tiny = (args.output / name for name in ("maps", "captions", "tiny"))
    if not _is_done(captions):
        model = make_model(len(processor.tokenizer))
        if not _is_done(maps):
            learn_to_see(model.vision_model.vision_tower, processor, maps, args)
        reader = PatchReader(model.vision_model.vision_tower)
        reader.load_state_dict(load_file(maps / "model.safetensors"))
        world = ByLength(Captions(args.captions * args.batch_size, args.seed), args.batch_size)
        learn(model, processor, world, captions, args, SCHEDULE)
    if not _is_done(tiny):
        model = MultiModalityCausalLM.from_pretrained(str(captions), dtype=torch.float32)
        easy, hard = args.conversations * args.batch_size, args.hard_conversations * args.batch_size
        first = ByLength(SyntheticWorld(easy, args.seed), args.batch_size)
        later = Subset(ByLength(HardQuestions(easy + hard, args.seed), args.batch_size), range(easy, easy + hard))
        learn(model, processor, ConcatDataset([first, later]), tiny, args, LONG_SCHEDULE, torch.float16)
    logger.info("Chat with it: python cli_chat.py --model_path %s", tiny)


def _is_done(stage: Path) -> bool:
    return (stage / "log.jsonl").is_file()  # written last


if __name__ == "__main__":
    sys.exit(main())
