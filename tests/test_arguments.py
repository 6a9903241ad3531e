"""Command-line arguments that all doors share: the model and the settings of sampling."""

import argparse
import dataclasses
import json

import pytest

from deepseek_vl.engine.settings import GenerationSettings
from deepseek_vl.serve import cli
from deepseek_vl.serve.arguments import SAMPLING, add_arguments, open_engine, settings_of

DEFAULTS = GenerationSettings(max_new_tokens=7, temperature=0.3, top_p=0.4, repetition_penalty=1.3)


def parse(*arguments: str, defaults: GenerationSettings = DEFAULTS) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser, defaults)
    return parser.parse_args(arguments)


def test_settings_are_the_doors_unless_an_argument_says_otherwise() -> None:
    assert settings_of(parse()) == DEFAULTS
    for name in SAMPLING:
        assert settings_of(parse(f"--{name}", "0.5")) == dataclasses.replace(DEFAULTS, **{name: 0.5})
    assert settings_of(parse("--max_gen_len", "9")) == dataclasses.replace(DEFAULTS, max_new_tokens=9)


def test_the_terminals_settings_are_the_references() -> None:
    settings = settings_of(cli.build_parser().parse_args([]))
    assert settings == GenerationSettings(max_new_tokens=512, temperature=0.2, top_p=0.95, repetition_penalty=1.1)


def test_a_request_samples_as_it_says_and_else_as_the_server_was_told() -> None:
    chat = pytest.importorskip("deepseek_vl.serve.api.chat")
    parse = pytest.importorskip("deepseek_vl.serve.api.parse").parse
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi."}]}

    def settings(**fields: float) -> GenerationSettings:
        return parse(json.dumps({**body, **fields}).encode(), chat.ChatCompletionRequest).settings(DEFAULTS)

    assert settings() == DEFAULTS
    for name in (*SAMPLING, "min_p"):
        assert settings(**{name: 0.5}) == dataclasses.replace(DEFAULTS, **{name: 0.5})
    assert settings(top_k=7) == dataclasses.replace(DEFAULTS, top_k=7)
    for greedy in ({"temperature": 0}, {"top_p": 0}):
        assert settings(**greedy).greedy
        penalised = settings(**greedy, repetition_penalty=1.5)
        assert (penalised.top_k, penalised.repetition_penalty, penalised.greedy) == (1, 1.5, False)


def test_settings_have_names() -> None:
    with pytest.raises(TypeError):
        GenerationSettings(64)


def test_an_engine_is_opened_as_the_arguments_say() -> None:
    engine, processor = open_engine(parse("--device", "cpu", "--dtype", "float32"), "tiny")
    assert (str(engine.model.device), str(engine.model.dtype)) == ("cpu", "torch.float32")
    assert engine.tokenizer is processor.tokenizer
