"""The model card's example: one question about one picture.

    python inference.py --model_path deepseek-ai/deepseek-vl-1.3b-chat

Everything it calls is public; copy it to start a program of your own.
"""

import argparse
from pathlib import Path

from deepseek_vl.utils.io import load_pil_images, load_pretrained_model


def main() -> None:
    """Ask the question and print the prompt and the answer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_path", default="deepseek-ai/deepseek-vl-7b-chat")
    parser.add_argument("--image", default=str(Path(__file__).parent / "images" / "training_pipelines.png"))
    parser.add_argument("--question", default="<image_placeholder>Describe each stage of this image.")
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--quantize", metavar="KIND", help="int8 or int4: faster and smaller")
    args = parser.parse_args()

    conversation = [
        {"role": "User", "content": args.question, "images": [args.image]},
        {"role": "Assistant", "content": ""},
    ]

    pil_images = load_pil_images(conversation)
    tokenizer, vl_chat_processor, vl_gpt = load_pretrained_model(args.model_path, quantize=args.quantize)

    # prepare the inputs
    prepare_inputs = vl_chat_processor(conversations=conversation, images=pil_images, force_batchify=True).to(
        vl_gpt.device
    )

    # run the image encoder to get the image embeddings
    inputs_embeds = vl_gpt.prepare_inputs_embeds(**prepare_inputs)

    # run the language model to get the answer
    outputs = vl_gpt.language_model.generate(
        inputs_embeds=inputs_embeds,
        attention_mask=prepare_inputs.attention_mask,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=args.max_new_tokens,
        do_sample=False,
        use_cache=True,
    )

    answer = tokenizer.decode(outputs[0].cpu().tolist(), skip_special_tokens=True)
    print(f"{prepare_inputs['sft_format'][0]}", answer)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"inference.py: error: {error}") from error
