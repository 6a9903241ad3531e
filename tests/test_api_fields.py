"""Fields of requests: empty and harmless values are accepted, values that would change the answer are refused."""

import itertools
import json
import re
from typing import Any

import httpx
import openai
import pytest
from api_server import Server, about
from conftest import PARROT_ANSWERS, ROOT

from deepseek_vl.serve.api.chat import ChatCompletionRequest
from deepseek_vl.serve.api.completions import CompletionRequest
from deepseek_vl.serve.api.embeddings import EmbeddingRequest
from deepseek_vl.serve.api.messages import AssistantMessage, ImagePart, ImageURL, SystemMessage, TextPart, UserMessage
from deepseek_vl.serve.api.responses_request import InputImage, InputMessage, InputText, ResponseRequest
from deepseek_vl.serve.api.tokenization import TokenizeRequest

GREETING = PARROT_ANSWERS["Greet me."]
NOTHING = [None, "", [], {}]
CHAT = {"model": "parrot", "messages": [{"role": "user", "content": "Greet me."}]}


def post(server: Server, route: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{server.url}{route}", json=body, timeout=60)


def greets(server: Server, **fields: Any) -> None:
    answer = post(server, "/v1/chat/completions", {**CHAT, **fields})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == GREETING


def refuses(server: Server, field: str, **fields: Any) -> str:
    answer = post(server, "/v1/chat/completions", {**CHAT, **fields})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == field, answer.text
    return answer.json()["error"]["message"]


DEFAULTS = {
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "none",
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "store": False,
    "metadata": {"run": "7"},
    "service_tier": "auto",
    "modalities": ["text"],
    "user": "someone",
    "safety_identifier": "someone",
    "prompt_cache_key": "a",
    "prompt_cache_retention": "24h",
    "reasoning_effort": "medium",
    "verbosity": "medium",
    "prediction": None,
    "audio": None,
    "web_search_options": {},
    "n": 1,
    "stop": "",
    "seed": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "stream": False,
    "stream_options": {},
    "max_tokens": None,
    "max_completion_tokens": None,
    "top_k": -1,
    "min_p": 0,
    "best_of": 1,
    "use_beam_search": False,
    "length_penalty": 1.0,
    "stop_token_ids": [],
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "min_tokens": 0,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "echo": False,
    "add_generation_prompt": True,
    "continue_final_message": False,
    "add_special_tokens": False,
    "documents": [],
    "chat_template": None,
    "chat_template_kwargs": {},
    "structured_outputs": {},
    "guided_json": None,
    "guided_regex": "",
    "guided_choice": [],
    "priority": 0,
    "request_id": "a",
}


def test_fields_at_values_that_change_nothing_are_taken_all_together(server: Server) -> None:
    greets(server, **DEFAULTS)
    answer = server.client().chat.completions.create(**CHAT, extra_body=DEFAULTS)
    assert answer.choices[0].message.content == GREETING


@pytest.mark.parametrize("value", NOTHING, ids=repr)
def test_fields_that_say_nothing_are_taken(server: Server, value: Any) -> None:
    """Empty values are accepted in requests, messages, parts and nested objects, whatever the field's name."""
    names = [*(set(DEFAULTS) | set(ChatCompletionRequest.model_fields)) - {"model", "messages"}, "made_up"]
    fields = dict.fromkeys(names, value)
    text = {"type": "text", "text": "Greet me.", **dict.fromkeys(("cache_control", "annotations", "x"), value)}
    message = {"role": "user", "content": [text], **dict.fromkeys(("name", "audio", "tool_calls", "x"), value)}
    greets(server, **{**fields, "messages": [message]})
    greets(server, stream_options={"include_usage": value, "x": value})
    greets(server, response_format={"type": "text", "json_schema": value})


def test_a_picture_may_have_labels_and_empty_fields(server: Server, colours: dict[str, Any]) -> None:
    messages = about("Colour?", colours["red"])
    part = messages[0]["content"][0]
    part["cache_control"] = {"type": "ephemeral"}
    for extra in ({"detail": None}, {"detail": "auto"}, {"detail": "original", "format": "image/png"}, {"x": {}}):
        part["image_url"] = {"url": part["image_url"]["url"], **extra}
        answer = post(server, "/v1/chat/completions", {"model": "parrot", "messages": messages})
        assert answer.json()["choices"][0]["message"]["content"] == "It is red.", answer.text


def test_a_picture_may_be_its_address_alone(server: Server, colours: dict[str, Any]) -> None:
    messages = about("Colour?", colours["red"])
    part = messages[0]["content"][0]
    part["image_url"] = part["image_url"]["url"]
    answer = post(server, "/v1/chat/completions", {"model": "parrot", "messages": messages})
    assert answer.json()["choices"][0]["message"]["content"] == "It is red.", answer.text
    part["image_url"] = "red.png"
    answer = post(server, "/v1/chat/completions", {"model": "parrot", "messages": messages})
    assert answer.status_code == 400, answer.text
    assert "This is no picture" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value", "taken"),
    [("frequency_penalty", 0.5, 0), ("presence_penalty", -1, 0), ("length_penalty", 2.0, 1), ("best_of", 2, 1)],
)
def test_a_number_that_is_not_taken_is_answered_with_the_one_that_is(
    server: Server, field: str, value: float, taken: int
) -> None:
    assert f"'{field}': This server takes only {taken} here" in refuses(server, field, **{field: value})
    assert "only" not in refuses(server, field, **{field: "x"})


def test_an_answer_goes_back_as_the_client_gives_it(server: Server) -> None:
    """An answer is accepted as a message as `model_dump()` gives it, and with the fields that other servers add."""
    client = server.client()
    question = {"role": "user", "content": "Greet me."}
    message = client.chat.completions.create(**CHAT).choices[0].message
    empty = {
        "annotations": [], "refusal": None, "tool_calls": [], "function_call": None, "audio": None,
        "reasoning_content": "", "reasoning": None, "provider_specific_fields": None, "images": [],
    }  # fmt: skip
    labels = {"id": "msg_1", "name": "parrot", "cache_control": {"type": "ephemeral"}, "metadata": {"a": 1}}
    dumped = message.model_dump()
    others = {**empty, **labels, "role": "assistant", "content": GREETING}
    for answer in (dumped, message, {**dumped, **empty}, others):
        again = client.chat.completions.create(
            model="parrot", messages=[question, answer, {**question, "name": "someone", "id": "1"}]
        )
        assert again.choices[0].message.content
    # An empty answer, as of a request that was stopped before its first token.
    for content in ("", None, []):
        answers = [question, {"role": "assistant", "content": content}, question]
        assert client.chat.completions.create(model="parrot", messages=answers).choices[0].message.content


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("tools", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("functions", {"functions": [{"name": "f"}]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
        ("function_call", {"function_call": {"name": "f"}}),
        ("logit_bias", {"logit_bias": {"5": 1}}),
        ("frequency_penalty", {"frequency_penalty": 0.5}),
        ("presence_penalty", {"presence_penalty": -1}),
        ("store", {"store": True}),
        ("store", {"store": 0}),
        ("modalities", {"modalities": ["text", "audio"]}),
        ("modalities", {"modalities": ["text", "text"]}),
        ("audio", {"audio": {"voice": "a"}}),
        ("prediction", {"prediction": {"type": "content", "content": "a"}}),
        ("reasoning_effort", {"reasoning_effort": "high"}),
        ("verbosity", {"verbosity": "low"}),
        ("web_search_options", {"web_search_options": {"a": 1}}),
        ("ignore_eos", {"ignore_eos": True}),
        ("min_tokens", {"min_tokens": 5}),
        ("stop_token_ids", {"stop_token_ids": [1]}),
        ("chat_template", {"chat_template": "{{ messages }}"}),
        ("best_of", {"best_of": 2}),
        ("use_beam_search", {"use_beam_search": True}),
        ("length_penalty", {"length_penalty": 2.0}),
        ("made_up", {"made_up": 0}),
        ("made_up", {"made_up": False}),
        ("top_logprobs", {"top_logprobs": 3}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("top_k", {"top_k": -2}),
        ("top_k", {"top_k": 1.5}),
        ("min_p", {"min_p": 1.5}),
        ("n", {"n": 9}),
        ("response_format", {"response_format": {"type": "xml"}}),
        ("response_format", {"response_format": "json"}),
        ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
        (
            "response_format.json_schema.name",
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "string"}}}},
        ),
        ("response_format", {"response_format": {"type": "json_object"}, "guided_regex": "a"}),
        ("structured_outputs.grammar", {"structured_outputs": {"grammar": "root ::= a"}}),
        ("structured_outputs.choice.0", {"structured_outputs": {"choice": [1]}}),
        ("stream_options.made_up", {"stream_options": {"made_up": True}}),
        ("add_generation_prompt", {"add_generation_prompt": False}),
        ("continue_final_message", {"continue_final_message": True}),
    ],
)  # fmt: skip
def test_what_would_change_the_answer_is_refused_by_its_name(
    server: Server, field: str, fields: dict[str, Any]
) -> None:
    assert field.split(".")[-1] in refuses(server, field, **fields)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_calls", [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
        ("function_call", {"name": "f", "arguments": "{}"}),
        ("audio", {"id": "1"}),
        ("refusal", "No."),
        ("reasoning_content", "Hm."),
        ("annotations", [{"type": "url_citation"}]),
    ],
)
def test_what_an_answer_had_besides_its_text_is_refused(server: Server, field: str, value: Any) -> None:
    answer = {"role": "assistant", "content": "Hi.", field: value}
    messages = [*CHAT["messages"], answer, *CHAT["messages"]]
    assert refuses(server, f"messages.1.{field}", messages=messages) == f"Unsupported parameter 'messages.1.{field}'."


# --- the order of messages ---


def say(server: Server, *turns: tuple[str, Any], **fields: Any) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    answer = server.client().chat.completions.create(model="parrot", messages=messages, **fields)
    return answer.choices[0].message.content


def test_an_assistant_message_may_come_first(server: Server) -> None:
    for turns in itertools.product([(), (("system", "S"),)], [("Hello!",), ("Hello!", "There!")]):
        system, hellos = turns
        assert say(server, *system, *(("assistant", text) for text in hellos), ("user", "Greet me."))
    messages = [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "A"}]
    tokens = post(server, "/tokenize", {"messages": messages, "return_token_strs": True}).json()["token_strs"]
    text = "".join(tokens)
    assert "Assistant: Hi.<｜end▁of▁sentence｜>User: A\n\nAssistant:" in text


def test_system_messages_stand_in_front(server: Server) -> None:
    one = post(server, "/tokenize", {"messages": [{"role": "system", "content": "A\nB"}, *CHAT["messages"]]})
    two = [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}, *CHAT["messages"]]
    assert post(server, "/tokenize", {"messages": two}).json() == one.json()
    late = [*CHAT["messages"], {"role": "system", "content": "S"}]
    for messages in (late, [*late, *CHAT["messages"]], [{"role": "assistant", "content": "A"}, late[1], late[0]]):
        message = refuses(server, "messages.1.role", messages=messages)
        assert "the model's template has a place for system messages at the beginning only" in message
    greets(server, messages=[*CHAT["messages"], {"role": "system", "content": " "}])
    assert "no message of the user" in refuses(server, "messages", messages=[{"role": "system", "content": "S"}])


def test_top_p_0_is_greedy(server: Server) -> None:
    anything = ("user", "Anything")
    greedy = say(server, anything, temperature=0, max_tokens=20)
    assert {say(server, anything, temperature=1.5, top_p=0, max_tokens=20, seed=seed) for seed in range(3)} == {greedy}
    ones = {"repetition_penalty": 1.0, "top_k": 1}
    assert say(server, anything, temperature=1.5, max_tokens=20, extra_body=ones) == greedy
    assert say(server, anything, temperature=1.5, max_tokens=20, extra_body={**ones, "top_k": 0, "min_p": 1}) == greedy
    assert say(server, anything, temperature=0, max_tokens=20, extra_body={"repetition_penalty": 1.0}) == greedy


def test_a_penalty_that_is_asked_for_is_in_greedy_answers_too(server: Server) -> None:
    sing = ("user", "Sing.")
    plain = say(server, sing, temperature=0, max_tokens=30)
    assert say(server, sing, temperature=0, max_tokens=30, extra_body={"repetition_penalty": 5.0}) != plain


# --- an unfinished answer ---


def test_an_unfinished_answer_is_continued(server: Server) -> None:
    client = server.client()
    question = {"role": "user", "content": "Greet me."}
    for cut, extra in itertools.product((5, 8, len(GREETING) - 5), ({}, {"add_generation_prompt": False})):
        begun = GREETING[:cut]
        messages = [question, {"role": "assistant", "content": begun}]
        fields = {"continue_final_message": True, **extra}
        answer = client.chat.completions.create(model="parrot", messages=messages, extra_body=fields, max_tokens=40)
        assert begun + answer.choices[0].message.content == GREETING
        stream = client.chat.completions.create(
            model="parrot", messages=messages, extra_body=fields, max_tokens=40, stream=True
        )
        assert begun + "".join(chunk.choices[0].delta.content or "" for chunk in stream) == GREETING
    spaced = [question, {"role": "assistant", "content": "Grüße, "}]
    answer = client.chat.completions.create(
        model="parrot", messages=spaced, extra_body={"continue_final_message": True}, max_tokens=40
    )
    assert "Grüße, " + answer.choices[0].message.content == GREETING
    # To continue an empty answer is to answer from the beginning.
    answer = client.chat.completions.create(
        model="parrot", messages=[question, {"role": "assistant", "content": ""}],
        extra_body={"continue_final_message": True},
    )  # fmt: skip
    assert answer.choices[0].message.content == GREETING


def test_how_a_prompt_ends_is_said_without_contradiction(server: Server) -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "Hi"}]
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert "cannot both be true" in refuses(server, "add_generation_prompt", messages=messages, **both)
    assert "continue_final_message has it continued" in refuses(server, "messages", messages=messages)


# --- the table in the docs ---

MODELS = {
    "/v1/chat/completions": [ChatCompletionRequest],
    "/v1/completions": [CompletionRequest],
    "/v1/responses": [ResponseRequest],
    "/v1/embeddings": [EmbeddingRequest],
    "/tokenize": [TokenizeRequest],
    "messages": [SystemMessage, UserMessage, AssistantMessage, TextPart, ImagePart, ImageURL],
    "items": [InputMessage, InputText, InputImage],
}  # fmt: skip


@pytest.mark.parametrize("section", MODELS)
def test_the_docs_name_every_field(section: str) -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"`([a-z_.]+)(?:: [^`]*)?`", text))
    for model in MODELS[section]:
        fields = {field.alias or name for name, field in model.model_fields.items()}
        assert fields <= documented, fields - documented


def test_the_openapi_description_has_every_route(server: Server) -> None:
    described = httpx.get(f"{server.url}/openapi.json").json()
    posts = {path for path, operations in described["paths"].items() if "post" in operations}
    assert posts == set(MODELS) - {"messages", "items"}
    assert "/version" in described["paths"]
    text = json.dumps(described)
    for name in re.findall(r'"#/components/schemas/([^"]+)"', text):
        assert name in described["components"]["schemas"], name


@pytest.mark.parametrize("path", sorted(set(MODELS) - {"messages", "items"}))
def test_the_openapi_description_has_an_example_of_every_body(server: Server, path: str) -> None:
    described = httpx.get(f"{server.url}/openapi.json").json()
    example = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
    answer = httpx.post(f"{server.url}{path}", json=example, timeout=60)
    assert answer.status_code == 200, answer.text


def test_the_version_and_the_models_length(server: Server) -> None:
    import deepseek_vl

    assert httpx.get(f"{server.url}/version").json() == {"version": deepseek_vl.__version__}
    model = server.client().models.retrieve("parrot")
    assert model.model_dump()["max_model_len"] == 16384
    with pytest.raises(openai.NotFoundError):
        server.client().models.retrieve("parrot/other")
