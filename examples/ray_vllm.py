"""Captions on Ray Data with vLLM inside the actors, into the output that `deepseek-vl-caption` writes. Not run here.

pip install ".[ray]" vllm
python examples/ray_vllm.py photos --model_path M --prompt "Describe the image." --output FILE

It needs GPUs, and a vLLM that runs DeepSeek-VL. An output goes on where it ended, but not one of the other command's.
"""

import argparse
import json
import pickle
from typing import Any

import ray

from deepseek_vl.serve.batch.inputs import find_pictures, open_picture
from deepseek_vl.serve.batch.journal import Journal, row_of

PICTURES_PER_TASK = 256
"""How many pictures a task has; vLLM's own scheduler fills its batches from them."""


class Captioner:
    """An actor with a GPU and vLLM's engine on it."""

    def __init__(self, model_path: str, prompt: str, max_tokens: int):
        from vllm import LLM, SamplingParams

        self._llm = LLM(model=model_path, limit_mm_per_prompt={"image": 1})
        self._settings = SamplingParams(temperature=0, max_tokens=max_tokens)
        self._prompt = prompt

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (pictures,) = map(pickle.loads, batch["pictures"])
        rows, asked, messages = [], [], []
        for picture in pictures:
            try:
                image = open_picture(picture)
            except ValueError as error:
                rows.append(row_of(picture.name, error))
                continue
            asked.append(picture)
            content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": self._prompt}]
            messages.append([{"role": "user", "content": content}])
        for picture, answer in zip(asked, self._llm.chat(messages, self._settings), strict=True):
            output = answer.outputs[0]
            rows.append(
                {
                    "path": picture.name,
                    "caption": output.text.strip(),
                    "error": None,
                    "prompt_tokens": len(answer.prompt_token_ids),
                    "completion_tokens": len(output.token_ids),
                    "finish_reason": output.finish_reason,
                }
            )
        return {"rows": [json.dumps(rows)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--max_tokens", type=int, default=512)
    parser.add_argument("--address", help="of a cluster (default: this machine)")
    args = parser.parse_args()

    ray.init(address=args.address)
    ray.data.DataContext.get_current().max_errored_blocks = -1  # the same command asks about their pictures again
    question = {"engine": "vllm", "model": args.model_path, "prompt": args.prompt, "max_tokens": args.max_tokens}
    with Journal(args.output, question) as journal:
        left = [picture for picture in find_pictures(args.paths) if picture.key not in journal]
        if not left:
            return
        starts = range(0, len(left), PICTURES_PER_TASK)
        items = [{"pictures": pickle.dumps(left[start : start + PICTURES_PER_TASK])} for start in starts]
        answers = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            Captioner,
            fn_constructor_args=(args.model_path, args.prompt, args.max_tokens),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=max(1, int(ray.cluster_resources().get("GPU", 1)))),
            num_gpus=1,
        )
        for batch in answers.iter_batches(batch_size=1, prefetch_batches=0):
            for row in json.loads(batch["rows"][0]):
                journal.add(row)


if __name__ == "__main__":
    main()
