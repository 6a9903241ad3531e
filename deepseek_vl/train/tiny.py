"""The recipe of a small model: `python -m deepseek_vl.train.tiny --output DIR` makes it from nothing.

A tokenizer is learnt from the synthetic world's sentences; then a small model of the 1.3B's architecture learns, as in
the paper's last two stages, first from captions and then from conversations. Both are endless: none is seen twice.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.optim.muon import Muon
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import TrainingArguments, set_seed

from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor, VLMImageProcessor
from deepseek_vl.models.processing_vlm import load_tokenizer
from deepseek_vl.train.collator import TrainingCollator
from deepseek_vl.train.stages import parts_of, set_trainable
from deepseek_vl.train.trainer import VLTrainer, train
from deepseek_vl.train.world import Captions, SyntheticWorld
from deepseek_vl.utils.command import OneLineParser, positive, run_command

logger = logging.getLogger(__name__)

BOS, EOS, IMAGE_TAG = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<image_placeholder>"
IMAGE_SIZE, PATCH_SIZE, WIDTH, HEADS, VISION_LAYERS, LANGUAGE_LAYERS = 128, 16, 192, 3, 7, 4
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
VOCABULARY = 640

WORDS = Regex(r""" ?(?<![A-Za-z"])[A-Za-z][a-z]*|[A-Za-z]| ?[0-9]|\n+| ?[^\sA-Za-z0-9]+|\s""")
"""How text is split before merges: in words, but letter by letter behind a quotation mark, so that the model spells
what it reads."""


def sentences(world: SyntheticWorld) -> Iterator[str]:
    """What is said in a world, and what stands around it in a prompt."""
    for index in range(len(world)):
        for turn in world.turns_of(index):
            yield f"User: {turn.question}\n\nAssistant: {turn.answer}"
            yield turn.question
    for _ in range(len(world) // 10):
        yield VLChatProcessor.system_prompt


def make_tokenizer(corpus: Iterator[str], directory: Path) -> None:
    """Learn a byte-level BPE tokenizer with DeepSeek's special tokens and write its files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False) for token in (BOS, EOS, IMAGE_TAG)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")


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


def make_optimizer(model: MultiModalityCausalLM, learning_rate: float) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) for the layers' matrices, AdamW for embeddings, head and vectors.

    From nothing it learns to see in a fraction of the steps that AdamW takes.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_matrix = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            (matrices if is_matrix else others).append(parameter)
    groups = [
        {"params": matrices, "weight_decay": 0.02},
        {"params": others, "weight_decay": 0.0, "use_fallback": True, "lr": learning_rate / 2},
    ]
    return Muon(groups, lr=learning_rate, nesterov=True, betas=(0.9, 0.98))


def learn(
    model: MultiModalityCausalLM,
    processor: VLChatProcessor,
    world: SyntheticWorld,
    output: Path,
    args: argparse.Namespace,
) -> None:
    """Train on every conversation of a world, in order, and write the model to `output`."""
    steps = len(world) // args.batch_size
    settings = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": steps // 4, "decay_type": "1-sqrt"},
        warmup_steps=100,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        logging_steps=20,
        save_steps=500,
        save_total_limit=2,
        dataloader_num_workers=1,
        dataloader_prefetch_factor=4,
        remove_unused_columns=False,
        report_to="none",
        seed=args.seed,
    )
    set_trainable(model, parts_of(model))
    optimizers = (make_optimizer(model, args.learning_rate), None)
    collator = TrainingCollator(processor)
    train(VLTrainer(model, settings, processor, collator, world, shuffle=False, optimizers=optimizers))


def build_parser() -> argparse.ArgumentParser:
    """The recipe's command line."""
    parser = OneLineParser(prog="python -m deepseek_vl.train.tiny", description="Make a small model from nothing.")
    parser.add_argument("--output", type=Path, required=True, help="directory for the models, their logs and plots")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the world (default: %(default)s)")
    parser.add_argument("--captions", type=positive, default=5000, help="steps on captions (default: %(default)s)")
    parser.add_argument(
        "--conversations", type=positive, default=4000, help="steps on conversations (default: %(default)s)"
    )
    parser.add_argument("--batch_size", type=positive, default=32, help="per step (default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="at its highest (default: %(default)s)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the model; the same command again goes on where it was stopped. Returns the exit code."""
    return run_command(build_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    processor = make_processor(args.seed, args.output / "tokenizer")
    seeing = args.output / "captions"
    if not (seeing / "loss.png").is_file():  # written last
        model = make_model(len(processor.tokenizer))
        learn(model, processor, Captions(args.captions * args.batch_size, args.seed), seeing, args)
    model = MultiModalityCausalLM.from_pretrained(str(seeing), dtype=torch.float32)
    talking = args.output / "tiny"
    learn(model, processor, SyntheticWorld(args.conversations * args.batch_size, args.seed), talking, args)
    model.to(torch.float16).save_pretrained(talking)
    logger.info("Chat with it: python cli_chat.py --model_path %s", talking)


if __name__ == "__main__":
    sys.exit(main())
