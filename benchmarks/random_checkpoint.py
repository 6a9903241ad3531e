"""Write a checkpoint of random weights in the published layout, for benchmarks and tests without the real weights.

    python benchmarks/random_checkpoint.py --size 1.3b --tokenizer DIR --output DIR

The tokenizer directory is any published checkpoint's, or one with its tokenizer files. The weights are drawn and
written shard by shard, so memory holds one shard at a time. The model answers gibberish at the published model's speed.
"""

import argparse
import math
import shutil
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepseek_vl.checkpoints.tensors import DTYPE_NAMES
from deepseek_vl.checkpoints.tokenizer import load_tokenizer
from deepseek_vl.checkpoints.write import write_shards
from deepseek_vl.command_line import OneLineParser, positive, run_command
from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor, VLMImageProcessor
from deepseek_vl.models.image_processing_vlm import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD

_SIGLIP_L = {
    "image_size": 384,
    "model_name": "siglip_large_patch16_384",
    "select_feature": "same",
    "select_layer": -1,
}
_SAM_B = {
    "ckpt_path": "",
    "image_size": 1024,
    "model_name": "sam_b_downsample",
    "output_dim": 1024,
    "pixel_mean": [0.48145466, 0.4578275, 0.40821073],
    "pixel_std": [0.26862954, 0.26130258, 0.27577711],
    "select_feature": "same",
    "select_layer": -1,
}
_LLAMA = {"max_position_embeddings": 16384, "model_type": "llama", "torch_dtype": "float16", "vocab_size": 102400}

PUBLISHED_CONFIGS: dict[str, dict[str, Any]] = {
    "1.3b": {
        "vision_config": {"cls": "CLIPVisionTower", "params": _SIGLIP_L},
        "aligner_config": {
            "cls": "MlpProjector",
            "params": {"depth": 2, "input_dim": 1024, "n_embed": 2048, "projector_type": "mlp_gelu"},
        },
        "language_config": {
            **_LLAMA,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
        },
    },
    "7b": {
        "vision_config": {
            "cls": "HybridVisionTower",
            "params": {
                "concat_type": "tuple",
                "freeze_high": True,
                "freeze_low": True,
                "high_res_cfg": _SAM_B,
                "low_res_cfg": {
                    **_SIGLIP_L,
                    "ckpt_path": "",
                    "output_dim": 1024,
                    "pixel_mean": list(IMAGENET_INCEPTION_MEAN),
                    "pixel_std": list(IMAGENET_INCEPTION_STD),
                },
            },
        },
        "aligner_config": {
            "cls": "MlpProjector",
            "params": {
                "depth": 2,
                "input_dim": 1024,
                "n_embed": 4096,
                "projector_type": "low_high_hybrid_split_mlp_gelu",
            },
        },
        "language_config": {**_LLAMA, "num_hidden_layers": 30},
    },
}
PUBLISHED_CONFIGS["7b-towers"] = {
    **PUBLISHED_CONFIGS["7b"],
    "language_config": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 64,
        "num_attention_heads": 1,
        "num_hidden_layers": 1,
        "vocab_size": 64,
    },
}
"""The 7B model's vision with a stub of a language model, to measure encoding in little memory; not published."""


def published_image_processor(size: str) -> VLMImageProcessor:
    """The image processor that the published model of this size ships."""
    if size.startswith("7b"):  # its towers normalise their own inputs
        return VLMImageProcessor(1024, do_normalize=False)
    return VLMImageProcessor(384, image_mean=IMAGENET_INCEPTION_MEAN, image_std=IMAGENET_INCEPTION_STD)


@dataclass(frozen=True)
class RandomTensor:
    """A random weight that is drawn when it is indexed, from its name and shape alone.

    Its scale keeps activations finite.
    """

    name: str
    shape: list[int]
    dtype: torch.dtype

    def get_shape(self) -> list[int]:
        """The shape, as of a safetensors slice."""
        return self.shape

    def get_dtype(self) -> str:
        """The dtype's name in safetensors, such as `F16`."""
        return DTYPE_NAMES[self.dtype]

    def __getitem__(self, index: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        tensor = torch.randn(self.shape, generator=generator)
        if not self.name.endswith(".weight"):
            tensor *= 0.05
        elif len(self.shape) == 1:  # a norm's gain
            tensor = 1 + 0.1 * tensor
        else:
            tensor /= math.sqrt(math.prod(self.shape[1:]))
        return tensor.to(self.dtype)[index]


def write_random_checkpoint(
    size: str,
    tokenizer: str,
    output: str,
    dtype: torch.dtype = torch.float16,
    shard_bytes: int = 2 * 10**9,
    language_layers: int | None = None,
) -> None:
    """Write a checkpoint of random weights: config, sharded safetensors, tokenizer and processor files.

    Args:
        size: a key of `PUBLISHED_CONFIGS`.
        tokenizer: the directory with DeepSeek-VL's tokenizer files, which are copied.
        output: the directory to write, created if it does not exist.
        dtype: the dtype of the weights.
        shard_bytes: the largest size of a shard.
        language_layers: the number of layers of the language model; None for that of the published model.

    Raises:
        FileExistsError: if `output` already has a config.
        FileNotFoundError: if `tokenizer` has no tokenizer.
    """
    directory = Path(output)
    if (directory / "config.json").exists():
        raise FileExistsError(f"{output!r} already holds a checkpoint.")
    if not (Path(tokenizer) / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{tokenizer!r} has no tokenizer.json.")
    directory.mkdir(parents=True, exist_ok=True)

    published = PUBLISHED_CONFIGS[size]
    language = published["language_config"] | ({"num_hidden_layers": language_layers} if language_layers else {})
    config = MultiModalityConfig(**{**published, "language_config": language}, architectures=["MultiModalityCausalLM"])
    config.save_pretrained(directory)
    VLChatProcessor(published_image_processor(size), load_tokenizer(tokenizer)).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):  # unchanged, not as re-saved
        if (Path(tokenizer) / file).is_file():
            shutil.copy(Path(tokenizer) / file, directory)

    with torch.device("meta"):
        weights = MultiModalityCausalLM(config).state_dict()
    tensors = {name: RandomTensor(name, list(weight.shape), dtype) for name, weight in weights.items()}
    write_shards(tensors, directory, shard_bytes)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = OneLineParser(
        prog="python benchmarks/random_checkpoint.py",
        description="Write a random checkpoint in the published layout.",
    )
    parser.add_argument("--size", choices=PUBLISHED_CONFIGS, required=True)
    parser.add_argument("--tokenizer", required=True, help="directory with DeepSeek-VL's tokenizer files")
    parser.add_argument("--output", required=True, help="directory to write")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--language_layers", type=positive, help="fewer layers of the language model, to try things")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a checkpoint; returns the exit code."""
    return run_command(build_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> None:
    dtype = getattr(torch, args.dtype)
    write_random_checkpoint(args.size, args.tokenizer, args.output, dtype, language_layers=args.language_layers)


if __name__ == "__main__":
    sys.exit(main())
