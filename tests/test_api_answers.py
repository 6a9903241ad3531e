"""Log probabilities, several answers, completions, responses, embeddings and tokens, by the real `openai` client."""

import base64
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from api_server import Server, about
from conftest import PARROT_ANSWERS, ROOT, data_url
from PIL import Image

from deepseek_vl.engine.features import embed_images
from deepseek_vl.serve.inference import load_model
from deepseek_vl.utils.conversation import DEFAULT_SYSTEM_PROMPT

GREETING = PARROT_ANSWERS["Greet me."]
GREET = [{"role": "user", "content": "Greet me."}]


def with_responses() -> None:
    if not hasattr(openai.OpenAI, "responses") and not hasattr(openai.resources, "Responses"):
        pytest.skip("this version of the client knows no responses")


# --- log probabilities ---


def test_log_probabilities_are_of_the_answers_tokens(server: Server) -> None:
    client = server.client()
    asked = {"model": "parrot", "messages": GREET, "logprobs": True, "top_logprobs": 3}
    choice = client.chat.completions.create(**asked).choices[0]
    tokens = choice.logprobs.content
    assert choice.message.content == GREETING
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == GREETING
    assert any("\ufffd" in token.token for token in tokens), "a token that is a part of a character"
    for token in tokens:
        assert token.logprob <= 0
        logprobs = [top.logprob for top in token.top_logprobs]
        assert logprobs == sorted(logprobs, reverse=True)
        assert len(token.top_logprobs) == 3
        assert (token.top_logprobs[0].token, token.top_logprobs[0].logprob) == (token.token, token.logprob)
    stream = list(client.chat.completions.create(**asked, stream=True))
    streamed = [token for chunk in stream for c in chunk.choices if c.logprobs for token in c.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in tokens]
    for chunk in stream:  # a chunk with text has the tokens that begin in it
        if chunk.choices[0].delta.content and chunk.choices[0].logprobs:
            assert chunk.choices[0].logprobs.content[0].token
    alone = client.chat.completions.create(**{**asked, "top_logprobs": None}).choices[0].logprobs.content
    assert [token.top_logprobs for token in alone] == [[]] * len(tokens)
    assert client.chat.completions.create(model="parrot", messages=GREET).choices[0].logprobs is None


def test_log_probabilities_end_where_the_text_ends(server: Server) -> None:
    for fields, text in (({"stop": ["世"]}, "Grüße, "), ({"max_tokens": 3}, None)):
        choice = (
            server.client().chat.completions.create(model="parrot", messages=GREET, logprobs=True, **fields).choices[0]
        )
        joined = b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode(errors="replace")
        assert joined == choice.message.content
        assert text is None or joined == text


def test_log_probabilities_are_the_models_own(server: Server, parrot_checkpoint: Path) -> None:
    """Log probabilities are those of the network's logits, whatever the temperature."""
    import torch

    _, model, processor = load_model(str(parrot_checkpoint), device="cpu", dtype="float32")
    prompt = processor.render([*GREET, {"role": "assistant", "content": ""}])
    inputs = processor(prompt=prompt)
    with torch.no_grad():
        expected = model(**inputs).logits[0, -1].log_softmax(-1).topk(5).values
    for temperature in (0, 2):
        answer = server.client().chat.completions.create(
            model="parrot", messages=GREET, logprobs=True, top_logprobs=5, max_tokens=1, temperature=temperature,
            extra_body={"top_k": 1},  # otherwise the token may be an end token, which is not shown
        )  # fmt: skip
        tops = [top.logprob for top in answer.choices[0].logprobs.content[0].top_logprobs]
        assert tops == pytest.approx(expected.tolist(), abs=1e-3)


# --- several answers ---


def test_several_answers_run_the_prompt_once(serve: Any, colours: dict[str, Path]) -> None:
    server = serve()
    client = server.client()
    question = about("Anything else?", colours["red"])
    fields = {"temperature": 2, "max_tokens": 12, "seed": 5, "extra_body": {"repetition_penalty": 1.0, "top_k": 0}}
    before = server.metric("deepseek_vl_prompt_tokens_total"), server.metric("deepseek_vl_cached_tokens_total")
    several = client.chat.completions.create(model="parrot", messages=question, n=4, **fields)
    length = several.usage.prompt_tokens
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    texts = [choice.message.content for choice in several.choices]
    assert len(set(texts)) > 1
    assert several.usage.total_tokens == length + several.usage.completion_tokens
    ran = server.metric("deepseek_vl_prompt_tokens_total") - before[0]
    cached = server.metric("deepseek_vl_cached_tokens_total") - before[1]
    assert ran - cached == length + 3, "the others run the last token of the prompt only"
    alone = client.chat.completions.create(model="parrot", messages=question, **fields)
    assert alone.choices[0].message.content == texts[0], "the first is the one that is asked for alone"
    again = client.chat.completions.create(model="parrot", messages=question, n=4, **fields)
    assert [choice.message.content for choice in again.choices] == texts
    pieces = ["", "", "", ""]
    reasons: dict[int, str] = {}
    stream = client.chat.completions.create(
        model="parrot", messages=question, n=4, stream=True, stream_options={"include_usage": True}, **fields
    )
    for chunk in stream:
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert pieces == texts
    assert set(reasons) == {0, 1, 2, 3}
    assert chunk.usage.completion_tokens == several.usage.completion_tokens


def test_several_answers_wait_for_their_turn_and_leave_together(serve: Any) -> None:
    server = serve("--max_batch", "2", "--max_waiting", "1")
    client = server.client()
    eight = client.chat.completions.create(model="parrot", messages=GREET, n=8)
    assert [choice.message.content for choice in eight.choices] == [GREETING] * 8
    sing = {"model": "parrot", "messages": [{"role": "user", "content": "Sing."}], "max_tokens": 10000, "stream": True}
    with client.chat.completions.create(**sing, n=3) as stream:
        next(iter(stream))
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="parrot", messages=GREET)
    server.wait_until_idle()
    assert client.chat.completions.create(model="parrot", messages=GREET).choices[0].message.content == GREETING


# --- completions ---


def test_a_text_is_completed(server: Server) -> None:
    client = server.client()
    # Without the system prompt, what the parrot says depends on the version of torch that it was trained with.
    prompt = f"{DEFAULT_SYSTEM_PROMPT}\n\nUser: Greet me.\n\nAssistant:"
    whole = client.completions.create(model="parrot", prompt=prompt, max_tokens=60)
    assert whole.object == "text_completion"
    assert whole.choices[0].text.strip() == GREETING
    assert whole.choices[0].text.startswith(" "), "what follows the prompt, to the letter"
    short = client.completions.create(model="parrot", prompt=f"{DEFAULT_SYSTEM_PROMPT}\n\nUser: Sing.\n\nAssistant:")
    assert (short.usage.completion_tokens, short.choices[0].finish_reason) == (16, "length")
    stream = client.completions.create(
        model="parrot", prompt=prompt, max_tokens=60, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert last.usage.total_tokens == whole.usage.total_tokens
    ids = httpx.post(f"{server.url}/tokenize", json={"prompt": prompt}).json()["tokens"]
    by_ids = client.completions.create(model="parrot", prompt=ids, max_tokens=60)
    assert by_ids.choices[0].text == whole.choices[0].text
    assert by_ids.usage.prompt_tokens == len(ids)


def test_several_texts_are_completed(server: Server) -> None:
    client = server.client()
    prompts = [f"{DEFAULT_SYSTEM_PROMPT}\n\nUser: {text}\n\nAssistant:" for text in ("Greet me.", "Sing.")]
    texts = [
        client.completions.create(model="parrot", prompt=prompt, max_tokens=9).choices[0].text for prompt in prompts
    ]
    both = client.completions.create(model="parrot", prompt=prompts, max_tokens=9, n=2)
    assert [(choice.index, choice.text) for choice in both.choices] == list(enumerate(np.repeat(texts, 2)))
    assert both.usage.completion_tokens == 36
    with pytest.raises(openai.BadRequestError, match="more than 8 answers"):
        client.completions.create(model="parrot", prompt=prompts, n=5)


def test_log_probabilities_of_a_completion(server: Server) -> None:
    client = server.client()
    prompt = "User: What do you say?\n\nAssistant:"
    choice = client.completions.create(model="parrot", prompt=prompt, max_tokens=8, logprobs=2).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert choice.text[offset:].startswith(token)
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    stream = client.completions.create(model="parrot", prompt=prompt, max_tokens=8, logprobs=2, stream=True)
    offsets = [offset for chunk in stream for offset in chunk.choices[0].logprobs.text_offset]
    assert offsets == logprobs.text_offset


def test_what_cannot_be_completed_is_refused(server: Server) -> None:
    def refused(field: str, **body: Any) -> None:
        answer = httpx.post(f"{server.url}/v1/completions", json={"model": "parrot", "prompt": "a", **body})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text

    refused("prompt", prompt=[])
    refused("prompt", prompt=None)
    refused("prompt", prompt=5)
    refused("prompt", prompt=[10**6])
    refused("prompt.1", prompt=["a", [10**6]])
    refused("prompt", prompt="word " * 50_000)
    refused("prompt", prompt=["a"] * 9)
    refused("echo", echo=True)
    refused("suffix", suffix="b")
    refused("best_of", best_of=2)
    refused("logprobs", logprobs=6)
    tag = httpx.post(f"{server.url}/v1/completions", json={"model": "parrot", "prompt": "<image_placeholder>"})
    assert tag.status_code == 200, "a typed placeholder is text"


# --- responses ---


def test_a_response_is_as_the_client_reads_it(server: Server, colours: dict[str, Path]) -> None:
    with_responses()
    client = server.client()
    response = client.responses.create(model="parrot", input="Greet me.")
    assert (response.output_text, response.status) == (GREETING, "completed")
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.store is False
    picture = {"type": "input_image", "image_url": data_url(colours["red"].read_bytes()), "detail": "auto"}
    items = [{"role": "user", "content": [picture, {"type": "input_text", "text": "Colour?"}]}]
    assert client.responses.create(model="parrot", input=items).output_text == "It is red."
    short = client.responses.create(model="parrot", input="Sing.", max_output_tokens=5)
    assert (short.status, short.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    # A response's output is accepted as an item of the next input.
    first = client.responses.create(model="parrot", input="Sing.", max_output_tokens=5, store=False)
    items = [{"role": "user", "content": "Sing."}, *first.output, {"role": "user", "content": "Greet me."}]
    dumped = [items[0], *(item.model_dump() for item in first.output), items[2]]
    answers = [client.responses.create(model="parrot", input=these, instructions="S") for these in (items, dumped)]
    assert answers[0].output_text == answers[1].output_text


def test_a_response_streams_its_events(server: Server) -> None:
    with_responses()
    client = server.client()
    with client.responses.stream(model="parrot", input="Greet me.") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == GREETING
    kinds = [event.type for event in client.responses.create(model="parrot", input="Greet me.", stream=True)]
    deltas = kinds.count("response.output_text.delta")
    assert deltas > 4
    assert kinds == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
        *["response.output_text.delta"] * deltas, "response.output_text.done", "response.content_part.done",
        "response.output_item.done", "response.completed",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == sorted(event.sequence_number for event in events)
    *_, last = client.responses.create(model="parrot", input="Sing.", stream=True, max_output_tokens=4)
    assert (last.type, last.response.status) == ("response.incomplete", "incomplete")


def test_a_response_has_log_probabilities_and_forms(server: Server) -> None:
    with_responses()
    pydantic = pytest.importorskip("pydantic")
    pytest.importorskip("llguidance")
    client = server.client()
    response = client.responses.create(
        model="parrot", input="Greet me.", top_logprobs=2, include=["message.output_text.logprobs"]
    )
    tokens = response.output[0].content[0].logprobs
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == GREETING

    class Answer(pydantic.BaseModel):
        sure: bool

    parsed = client.responses.parse(model="parrot", input="Greet me.", text_format=Answer)
    assert isinstance(parsed.output_parsed, Answer)


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("previous_response_id", {"previous_response_id": "resp_1"}),
        ("conversation", {"conversation": "conv_1"}),
        ("store", {"store": True}),
        ("background", {"background": True}),
        ("tools", {"tools": [{"type": "web_search"}]}),
        ("truncation", {"truncation": "auto"}),
        ("prompt", {"prompt": {"id": "p"}}),
        ("include.0", {"include": ["reasoning.encrypted_content"]}),
        ("reasoning.effort", {"reasoning": {"effort": "high"}}),
        ("text.format", {"text": {"format": {"type": "xml"}}}),
        ("text.format.name", {"text": {"format": {"type": "json_schema", "schema": {}}}}),
        ("input", {"input": []}),
        ("input", {"input": None}),
        ("input.0.type", {"input": [{"type": "function_call_output", "role": "user", "content": "a"}]}),
        ("input.0.content.0", {"input": [{"role": "user", "content": [{"type": "input_file"}]}]}),
        ("input.0.content", {"input": [{"role": "assistant", "content": [{"type": "input_image", "image_url": "a"}]}]}),
        ("input.1.role", {"input": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}),
        ("input", {"input": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        ("made_up", {"made_up": 1}),
    ],
)
def test_what_a_response_would_have_to_remember_is_refused(server: Server, field: str, fields: dict[str, Any]) -> None:
    answer = httpx.post(f"{server.url}/v1/responses", json={"model": "parrot", "input": "a", **fields}, timeout=60)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text


def test_fields_of_a_response_that_change_nothing_are_taken(server: Server) -> None:
    fields = {
        "previous_response_id": None, "conversation": None, "store": False, "background": False, "tools": [],
        "tool_choice": "auto", "parallel_tool_calls": True, "truncation": "disabled", "prompt": None, "include": [],
        "reasoning": {"effort": None}, "text": {"format": {"type": "text"}, "verbosity": "medium"}, "metadata": {},
        "service_tier": "auto", "top_logprobs": 0, "max_tool_calls": None, "user": "a", "stream_options": None,
        "instructions": None, "max_output_tokens": None, "prompt_cache_key": "a", "safety_identifier": "b",
    }  # fmt: skip
    body = {"model": "parrot", "input": "Greet me.", **fields}
    answer = httpx.post(f"{server.url}/v1/responses", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["output"][0]["content"][0]["text"] == GREETING


# --- embeddings ---


def test_pictures_as_vectors(server: Server, colours: dict[str, Path], parrot_checkpoint: Path) -> None:
    client = server.client()
    _, model, processor = load_model(str(parrot_checkpoint), device="cpu", dtype="float32")
    images = [Image.open(path).convert("RGB") for path in colours.values()]
    expected = embed_images(model, processor, images)
    expected = expected / expected.norm(dim=-1, keepdim=True)
    urls = [data_url(path.read_bytes()) for path in colours.values()]
    for encoding in (None, "float", "base64"):
        options = {} if encoding is None else {"encoding_format": encoding}
        answer = client.embeddings.create(model="parrot", input=urls, **options)
        assert [item.index for item in answer.data] == [0, 1]
        vectors = [
            np.frombuffer(base64.b64decode(item.embedding), dtype="<f4")
            if isinstance(item.embedding, str) else np.array(item.embedding)
            for item in answer.data
        ]  # fmt: skip
        assert np.allclose(np.stack(vectors), expected.numpy(), atol=1e-5)
    assert answer.usage.prompt_tokens == 2 * processor.positions_per_image
    part = {"type": "image_url", "image_url": {"url": urls[0]}}
    for one in (urls[0], part, [part]):
        body = {"model": "parrot", "input": one, "user": "a", "dimensions": None}
        answer = httpx.post(f"{server.url}/v1/embeddings", json=body)
        assert np.allclose(answer.json()["data"][0]["embedding"], expected[0].numpy(), atol=1e-5), answer.text
        assert math.isclose(np.linalg.norm(answer.json()["data"][0]["embedding"]), 1, rel_tol=1e-4)


def test_what_is_no_picture_has_no_vector(server: Server) -> None:
    wrong = {"A text.": "no picture", (): "'input'", (1, 2): "'input.0'", ("data:,a",): "cannot be read"}
    for value, words in wrong.items():
        answer = httpx.post(f"{server.url}/v1/embeddings", json={"model": "parrot", "input": value})
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"], answer.text
    body = {"model": "parrot", "input": "data:,a", "dimensions": 5}
    assert httpx.post(f"{server.url}/v1/embeddings", json=body).json()["error"]["param"] == "dimensions"


# --- tokens ---


def test_tokens_are_counted_as_answers_count_them(server: Server, colours: dict[str, Path]) -> None:
    def tokenize(**body: Any) -> dict[str, Any]:
        answer = httpx.post(f"{server.url}/tokenize", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    messages = about("Colour?", colours["red"])
    tokens = tokenize(model="parrot", messages=messages)
    used = server.client().chat.completions.create(model="parrot", messages=messages).usage.prompt_tokens
    assert tokens["count"] == len(tokens["tokens"]) == used
    assert tokens["max_model_len"] == 16384
    plain = tokenize(prompt="Greet me.", return_token_strs=True)
    assert "".join(plain["token_strs"]).endswith("Greet me.")
    bare = tokenize(prompt="Greet me.", add_special_tokens=False)
    assert bare["tokens"] == plain["tokens"][len(plain["tokens"]) - bare["count"] :]
    assert tokenize(prompt="")["count"] == plain["count"] - bare["count"]
    asks, ends = tokenize(messages=GREET), tokenize(messages=GREET, add_generation_prompt=False)
    assert asks["tokens"][: ends["count"] - 2] == ends["tokens"][:-2]
    assert ends["count"] < asks["count"]
    begun = [*GREET, {"role": "assistant", "content": "Grüße"}]
    assert tokenize(messages=begun, continue_final_message=True)["count"] > asks["count"]
    for body in ({"prompt": "a", "messages": GREET}, {"model": "gpt"}, {"prompt": 5}):
        assert httpx.post(f"{server.url}/tokenize", json=body).status_code in (400, 404)


def test_curl_is_answered_on_every_route(server: Server) -> None:
    def curl(route: str, **body: Any) -> str:
        command = ["curl", "--silent", "--fail", "--no-buffer", f"{server.url}{route}"]
        command += ["-H", "Content-Type: application/json", "-d", json.dumps(body)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout

    text = json.loads(curl("/v1/completions", model="parrot", prompt="User: Greet me.\n\nAssistant:", max_tokens=40))
    assert text["choices"][0]["text"]
    response = json.loads(curl("/v1/responses", model="parrot", input="Greet me."))
    assert response["output"][0]["content"][0]["text"] == GREETING
    assert json.loads(curl("/tokenize", prompt="Greet me."))["count"] > 1
    stream = curl("/v1/responses", model="parrot", input="Greet me.", stream=True)
    assert stream.startswith("event: response.created\ndata: {")
    assert "event: response.completed\n" in stream


def test_what_the_docs_show_runs(serve: Any) -> None:
    with_responses()
    pytest.importorskip("llguidance")
    server = serve("--model_name", "tiny", model_path="tiny")
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    snippets = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert "http://127.0.0.1:8000" in snippets
    command = [sys.executable, "-c", snippets.replace("http://127.0.0.1:8000", server.url)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    first, second = result.stdout.splitlines()
    assert first
    assert second in ("I can look.", "I can sing.")
