"""What quantised weights change: `python benchmarks/agreement.py --model_path DIR`.

Of each kind it prints the relative error of the logits and how often their largest is the same token's, over the
positions of one prompt with a picture, against the model in float32.
"""

import argparse
from pathlib import Path

import torch

from deepseek_vl.kernels.device import QUANTIZATIONS
from deepseek_vl.serve.inference import load_model
from deepseek_vl.utils.io import load_pil_images

PICTURE = Path(__file__).resolve().parents[1] / "images" / "shapes.png"
TEXT = "One two three, what is left of the star, and which colours has the picture? " * 20
"""A long text, unlike the questions that the model was trained on."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--positions", type=int, default=200, help="how many of the prompt's last are compared")
    parser.add_argument("--quantize", nargs="+", choices=QUANTIZATIONS, default=QUANTIZATIONS)
    args = parser.parse_args()

    exact = logits(args.model_path, args.positions, dtype="float32")
    print("| against float32 | relative error of the logits | same likeliest token |")
    print("| --- | ---: | ---: |")
    for name, loading in [("default dtype", {}), *((kind, {"quantize": kind}) for kind in args.quantize)]:
        actual = logits(args.model_path, args.positions, **loading)
        error = (actual - exact).norm() / exact.norm()
        same = (actual.argmax(-1) == exact.argmax(-1)).float().mean()
        print(f"| {name} | {error:.4f} | {same:.3f} |", flush=True)


@torch.inference_mode()
def logits(model_path: str, positions: int, **loading: str) -> torch.Tensor:
    """The logits of the prompt's last positions: float32 [positions, vocabulary]."""
    _, model, processor = load_model(model_path, device="cpu", **loading)
    messages = [
        {"role": "User", "content": f"<image_placeholder>{TEXT}", "images": [str(PICTURE)]},
        {"role": "Assistant", "content": ""},
    ]
    inputs = processor(conversations=messages, images=load_pil_images(messages), force_batchify=True)
    inputs = inputs.to(model.device, dtype=model.dtype)
    return model(**inputs, logits_to_keep=positions).logits[0].float()


if __name__ == "__main__":
    main()
