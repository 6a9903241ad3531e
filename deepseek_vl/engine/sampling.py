"""Sampling the next token, and tokens' log probabilities."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deepseek_vl.engine.settings import GenerationSettings


def sample(
    logits: torch.Tensor,
    settings: GenerationSettings,
    generator: torch.Generator | None = None,
    answer: Sequence[int] = (),
) -> torch.Tensor:
    """The next token's id, int64 [] on the logits' device, drawn as transformers' `generate` would draw it.

    Args:
        logits: float32 [vocabulary].
        settings: how to sample; not greedy ones.
        generator: for the draw, on the logits' device; None for torch's own.
        answer: the answer's tokens so far, to which alone the repetition penalty applies.
    """
    input_ids = torch.tensor([answer], dtype=torch.long, device=logits.device)
    processes: list[LogitsProcessor] = [
        RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty)),
        TemperatureLogitsWarper(float(settings.temperature)),
    ]
    if settings.top_k > 0:
        processes.append(TopKLogitsWarper(settings.top_k))
    processes.append(TopPLogitsWarper(float(settings.top_p)))
    if settings.min_p > 0:
        processes.append(MinPLogitsWarper(float(settings.min_p)))
    scores = logits[None]
    for process in processes:
        scores = process(input_ids, scores)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[0, 0]


class TokenLogprobs(NamedTuple):
    """The log probability of an answer's token, before temperature, repetition penalty and structure.

    Attributes:
        token_id: the token.
        logprob: its log probability.
        likeliest: the likeliest tokens at its position and their log probabilities, in order.
    """

    token_id: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


def token_logprobs(logits: torch.Tensor, token_id: int, count: int) -> TokenLogprobs:
    """The log probability of a token, and those of the `count` likeliest tokens.

    Args:
        logits: float32 [vocabulary].
    """
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return TokenLogprobs(token_id, logprobs[token_id].item(), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
