"""Find the pictures in a folder that look most like another: `python examples/find_picture.py images/dog_a.png images`.

The vectors of 100,000 pictures take 0.4 GB, and are compared by one product; with more, give them to an index such as
FAISS or a database with vectors.
"""

import argparse
from pathlib import Path

from torch.nn.functional import normalize

from deepseek_vl import load_pretrained_model
from deepseek_vl.engine.features import embed_images
from deepseek_vl.serve.batch.inputs import PICTURES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model_path", default="tiny")
    parser.add_argument("--pooling", default="mean", help="mean, or attention for SigLIP's own head")
    parser.add_argument("--count", type=int, default=5)
    args = parser.parse_args()

    _, processor, model = load_pretrained_model(args.model_path)
    paths = [path for path in sorted(args.folder.rglob("*")) if path.suffix.lower() in PICTURES]
    vectors = normalize(embed_images(model, processor, paths, args.pooling), dim=-1)  # [n, D]
    query = normalize(embed_images(model, processor, [args.picture], args.pooling), dim=-1)  # [1, D]
    similarities, best = (vectors @ query[0]).topk(min(args.count, len(paths)))
    for similarity, index in zip(similarities.tolist(), best.tolist(), strict=True):
        print(f"{similarity:.3f}  {paths[index]}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"find_picture.py: error: {error}") from error
