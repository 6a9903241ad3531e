"""The small model before it has learnt anything: the 1.3B's architecture in miniature, and its processor."""

from pathlib import Path

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed

from deepseek_vl.checkpoints.tokenizer import load_tokenizer
from deepseek_vl.models import MultiModalityCausalLM, MultiModalityConfig, VLChatProcessor, VLMImageProcessor
from recipes.tiny.tokenizer import make_tokenizer, sentences
from recipes.tiny.world import SyntheticWorld

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
    # The usual standard deviation, 0.02, is for wide layers; with it the patches' positions hardly count at first.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(WIDTH**-0.5 / 0.02)
        pos_embed = model.vision_model.vision_tower.pos_embed
        grid = [IMAGE_SIZE // PATCH_SIZE] * 2
        pos_embed.copy_(build_sincos2d_pos_embed(grid, WIDTH, temperature=100.0, interleave_sin_cos=True)[None] / 2)
    return model
