"""Ask a running server with OpenAI's client: `python -m deepseek_vl.serve.api --model_path tiny`, then this."""

import argparse
import base64
from pathlib import Path

from openai import OpenAI

SHAPES = Path(__file__).parents[1] / "images" / "shapes.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--image", type=Path, default=SHAPES)
    parser.add_argument("--question", default="What colour is the star?")
    args = parser.parse_args()

    client = OpenAI(base_url=args.base_url, api_key="none")
    model = client.models.list().data[0].id
    url = "data:image/png;base64," + base64.b64encode(args.image.read_bytes()).decode("ascii")
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": args.question},
            ],
        }
    ]
    for chunk in client.chat.completions.create(model=model, messages=messages, stream=True):
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
