"""Choosing the next token."""

from collections.abc import Sequence

import torch
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deepseek_vl.engine.settings import GenerationSettings

TOP_K = 50
"""Sampling is among so many tokens: transformers' default, and so the reference's."""


def sample(
    logits: torch.Tensor,
    settings: GenerationSettings,
    generator: torch.Generator | None = None,
    answer: Sequence[int] = (),
) -> torch.Tensor:
    """The next token's id, int64 [] on the logits' device, drawn as transformers' `generate` would draw it.

    Args:
        logits: float32 [vocabulary].
        settings: say how; not greedily.
        generator: for the draw, on the logits' device; None for torch's own.
        answer: the tokens so far, which the repetition penalty is for; the prompt's are not.
    """
    input_ids = torch.tensor([answer], dtype=torch.long, device=logits.device)
    scores = logits[None]
    for process in (
        RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty)),
        TemperatureLogitsWarper(float(settings.temperature)),
        TopKLogitsWarper(TOP_K),
        TopPLogitsWarper(float(settings.top_p)),
    ):
        scores = process(input_ids, scores)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[0, 0]
