"""The names and calls by which lmdeploy (0.18, its `vl/model/deepseek.py`) uses a package called `deepseek_vl`.

It takes the processor from the package and the model, without weights, from transformers' Auto class, loads the
checkpoint with accelerate, and runs vision tower and projector itself. The tests repeat its calls without lmdeploy.
"""

from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.utils import get_balanced_memory, infer_auto_device_map
from transformers import AutoModelForCausalLM

from deepseek_vl.imaging.open import load_image
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor

TOGETHER = "vision_model.vision_tower_high.vision_tower."
"""The prefix of the names of modules that lmdeploy keeps on one device."""


def test_the_processor_has_what_is_asked_of_it(checkpoint: Path, picture: Path) -> None:
    processor = VLChatProcessor.from_pretrained(str(checkpoint), trust_remote_code=False)
    assert processor.tokenizer.vocab.get(processor.image_tag) == processor.image_id
    pixels = processor.image_processor([load_image(picture)], return_tensors="pt").pixel_values
    assert pixels.shape == (1, *processor.image_processor.default_shape)


@pytest.mark.skipif(
    accelerate.__version__.startswith("1.7."), reason="accelerate 1.7 makes no models of transformers 5 without weights"
)
@pytest.mark.parametrize("with_language_model", [False, True])
def test_accelerate_fills_an_empty_model_and_its_parts_run(
    checkpoint: Path, picture: Path, with_language_model: bool
) -> None:
    with accelerate.init_empty_weights():
        model = AutoModelForCausalLM.from_pretrained(str(checkpoint), trust_remote_code=False)
        if not with_language_model:
            del model.language_model
    sizes = {"dtype": torch.half, "no_split_module_classes": ["Block"]}
    device_map = infer_auto_device_map(model, max_memory=get_balanced_memory(model, **sizes), **sizes)
    if with_language_model:
        device_map = {"": "cpu"}
    accelerate.load_checkpoint_and_dispatch(model, str(checkpoint), device_map=device_map, dtype=torch.half)
    vision, aligner = model.eval().vision_model.eval(), model.aligner.eval()

    processor = VLChatProcessor.from_pretrained(str(checkpoint))
    pixels = processor.image_processor([load_image(picture)] * 2, return_tensors="pt").pixel_values
    with torch.no_grad():
        features = aligner(vision(pixels.to(next(vision.parameters()).device, torch.float16)))
    parts = torch.split(features, 1, dim=0)
    assert [part.squeeze().shape for part in parts] == [(16, 64)] * 2

    ours = MultiModalityCausalLM.from_pretrained(str(checkpoint), dtype=torch.half).eval()
    with torch.no_grad():
        torch.testing.assert_close(features, ours.get_image_features(pixels), rtol=1e-2, atol=1e-2)


def test_what_it_keeps_on_one_device_has_these_names(hybrid_checkpoint: Path) -> None:
    model = MultiModalityCausalLM.from_pretrained(str(hybrid_checkpoint))
    names = [name for name, _ in (*model.named_modules(), *model.named_parameters())]
    for name in ("pos_embed", "patch_embed", "downsamples", "hd_alpha_downsamples"):
        assert TOGETHER + name in names
    assert {"Block"} <= {type(module).__name__ for module in model.modules()}
