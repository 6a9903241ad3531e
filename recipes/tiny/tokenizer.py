"""The tokenizer, learnt from the world's sentences."""

import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from deepseek_vl.models import VLChatProcessor
from recipes.tiny.world import SyntheticWorld

BOS, EOS, IMAGE_TAG = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<image_placeholder>"
VOCABULARY = 640

WORDS = Regex(r""" ?(?<![A-Za-z"])[A-Za-z][a-z]*|[A-Za-z]| ?[0-9]|\n+| ?[^\sA-Za-z0-9]+|\s""")
"""How text is split before merges: into words, but after a quotation mark into letters, so that the model spells what
it reads."""


def sentences(world: SyntheticWorld) -> Iterator[str]:
    """The questions and answers of a world, as prompts have them, and the system prompt."""
    for index in range(len(world)):
        for turn in world.turns_of(index):
            yield f"User: {turn.question}\n\nAssistant: {turn.answer}"
            yield turn.question
    for _ in range(len(world) // 10):
        yield VLChatProcessor.system_prompt


def make_tokenizer(corpus: Iterator[str], directory: Path) -> None:
    """Learn a byte-level BPE tokenizer with DeepSeek's special tokens and write its files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False) for token in (BOS, EOS, IMAGE_TAG)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")
