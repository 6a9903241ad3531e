"""Write a checkpoint of random weights in the published layout, for benchmarks and tests without the real weights.

    python -m deepseek_vl.utils.random_checkpoint --size 1.3b --tokenizer DIR --output DIR

The tokenizer directory is any published checkpoint's, or one with its tokenizer files. The weights are drawn and
written shard by shard, so memory holds one shard at a time. The model answers gibberish at the published model's speed.
"""

import argparse
import json
import logging
import math
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor, VLMImageProcessor
from deepseek_vl.models.image_processing_vlm import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from deepseek_vl.models.processing_vlm import load_tokenizer

logger = logging.getLogger(__name__)

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
"""Not published: the 7B model's vision with a stub of a language model, to measure encoding in little memory."""


def published_image_processor(size: str) -> VLMImageProcessor:
    """The image processor that the published model of this size ships."""
    if size.startswith("7b"):  # its towers normalise for themselves
        return VLMImageProcessor(1024, do_normalize=False)
    return VLMImageProcessor(384, image_mean=IMAGENET_INCEPTION_MEAN, image_std=IMAGENET_INCEPTION_STD)


def random_tensor(name: str, shape: Sequence[int]) -> torch.Tensor:
    """float32 weights on a scale that keeps activations finite; they depend on `name` and `shape` alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(tuple(shape), generator=generator)
    if name.endswith(".weight") and len(shape) == 1:  # a norm's gain
        return 1 + 0.1 * noise
    if name.endswith(".weight"):
        return noise / math.sqrt(math.prod(shape[1:]))
    return 0.05 * noise


def write_random_checkpoint(
    size: str, tokenizer: str, output: str, dtype: torch.dtype = torch.float16, shard_bytes: int = 2 * 10**9
) -> None:
    """Write `output`: config, sharded safetensors, tokenizer and processor files.

    Args:
        size: a key of `PUBLISHED_CONFIGS`.
        tokenizer: directory with DeepSeek-VL's tokenizer files, which are copied.
        output: directory, made if it is not there.
        dtype: of the weights.
        shard_bytes: a shard is closed before it exceeds this.

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

    config = MultiModalityConfig(**PUBLISHED_CONFIGS[size], architectures=["MultiModalityCausalLM"])
    config.save_pretrained(directory)
    VLChatProcessor(published_image_processor(size), load_tokenizer(tokenizer)).save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):  # as published, not as re-saved
        if (Path(tokenizer) / file).is_file():
            shutil.copy(Path(tokenizer) / file, directory)

    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in MultiModalityCausalLM(config).state_dict().items()}
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        tensor_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and used + tensor_bytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor_bytes

    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: random_tensor(name, shapes[name]).to(dtype) for name in names}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
        logger.info("wrote %s", file)
    total = sum(math.prod(shape) for shape in shapes.values()) * dtype.itemsize
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write a random checkpoint in the published layout.")
    parser.add_argument("--size", choices=PUBLISHED_CONFIGS, required=True)
    parser.add_argument("--tokenizer", required=True, help="directory with DeepSeek-VL's tokenizer files")
    parser.add_argument("--output", required=True, help="directory to write")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        write_random_checkpoint(args.size, args.tokenizer, args.output, getattr(torch, args.dtype))
    except OSError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
