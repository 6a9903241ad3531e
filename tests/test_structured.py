"""Structured output: answers by a JSON schema, a regular expression or a choice, batched with free answers."""

import json
import queue
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_server import Server, about
from conftest import PARROT_ANSWERS, ROOT

from deepseek_vl.engine.engine import Engine
from deepseek_vl.engine.generation import END, AnswerStream, Generation
from deepseek_vl.engine.settings import GenerationSettings, StructuredOutput
from deepseek_vl.engine.structured import StructureError
from deepseek_vl.serve.inference import load_model, stream_answer
from deepseek_vl.utils.io import load_image

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

Loaded = tuple[Any, Any, Any]


@pytest.fixture(scope="module")
def random_model(siglip_checkpoint: Path) -> Loaded:
    """A random model, whose answers would break any form that is not enforced."""
    return load_model(str(siglip_checkpoint), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def tiny() -> Loaded:
    return load_model("tiny", device="cpu", dtype="float32")


# --- generated schemas ---

WORDS = ["red", "a b", "é", 'say "x"', "tab\t", "", "<a>", "世界", "back\\slash", "🙂"]
PATTERNS = ["^[a-c]{1,4}$", "^\\d{3}-\\d{2}$", "^(ab|cd)e?$", "^[A-Z][a-z]{0,5}$", "^x{2,3}\\.y$"]
FORMATS_CHECKED = jsonschema.FormatChecker(["date", "ipv4", "uuid"])  # of times it knows outdated formats only
FORMATS = ["date", "time", "date-time", "ipv4", "uuid"]


DEPTH = 3


def generated_schema(rng: random.Random, depth: int = DEPTH) -> dict[str, Any]:
    """A random schema of short values, with most of the keywords that are supported."""
    plain = ["boolean", "null", "integer", "number", "string", "pattern", "format", "enum", "const", "types", "allOf"]
    nested = ["array", "tuple", "object", "object", "map", "anyOf", "ref"]
    kind = rng.choice(nested if depth == DEPTH else plain if depth == 0 else [*plain, *nested])

    def inner() -> dict[str, Any]:
        return generated_schema(rng, depth - 1)

    match kind:
        case "integer":
            least = rng.randint(-200, 200)
            return {
                "type": "integer",
                "minimum": least,
                rng.choice(["maximum", "exclusiveMaximum"]): least + rng.randint(1, 999),
            }
        case "number":
            return {"enum": [rng.randint(-9, 9) / 4 for _ in range(3)]}
        case "string":
            least = rng.randint(0, 3)
            return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 6)}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(PATTERNS)}
        case "format":
            return {"type": "string", "format": rng.choice(FORMATS)}
        case "enum":
            return {"enum": rng.sample([*WORDS, 1, -2.5, None, True, {"a": [1]}, []], 4)}
        case "const":
            return {"const": rng.choice([*WORDS, 7, {"k": "v"}, [None]])}
        case "array":
            least = rng.randint(0, 2)
            return {"type": "array", "items": inner(), "minItems": least, "maxItems": least + rng.randint(0, 2)}
        case "tuple":
            return {"type": "array", "prefixItems": [inner(), inner()], "items": False, "minItems": rng.randint(0, 2)}
        case "object":
            names = rng.sample(WORDS, rng.randint(1, 4))
            required = rng.sample(names, rng.randint(0, len(names)))
            properties = {name: inner() for name in names}
            return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        case "map":
            return {
                "type": "object",
                "patternProperties": {"^k[0-9]$": inner()},
                "additionalProperties": False,
                "maxProperties": 2,
            }
        case "anyOf":
            return {"anyOf": [inner(), inner()], "description": "one of two"}
        case "types":
            return {"type": ["boolean", "null"], "title": "perhaps", "default": None}
        case "allOf":
            return {"allOf": [{"type": "string", "maxLength": 5}, {"minLength": 1}]}
        case "ref":
            name = f"d{rng.randint(0, 10**6)}"
            return {"$ref": f"#/$defs/{name}", "$defs": {name: inner()}}
        case _:
            return {"type": kind}


def lift_definitions(schema: Any, found: dict[str, Any]) -> Any:
    """Move all `$defs` of a schema into `found`, to be put at the root, where references look for them."""
    if isinstance(schema, list):
        return [lift_definitions(item, found) for item in schema]
    if not isinstance(schema, dict):
        return schema
    rest = {name: lift_definitions(value, found) for name, value in schema.items() if name != "$defs"}
    found.update({name: lift_definitions(value, found) for name, value in schema.get("$defs", {}).items()})
    return rest


def schemas(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        definitions: dict[str, Any] = {}
        root = lift_definitions(generated_schema(rng), definitions)
        made.append({**root, "$defs": definitions} if definitions else root)
    return made


class Reader:
    """Submit a generation; `text` waits for its whole text."""

    def __init__(self, engine: Engine, inputs: Any, settings: GenerationSettings):
        self.items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.generation = Generation(engine, inputs, settings, self.items.put)
        engine.submit(self.generation)

    def text(self) -> str:
        pieces = []
        while (item := self.items.get()) is not END:
            if isinstance(item, BaseException):
                raise item
            pieces.append(item)
        return "".join(pieces)


def question(loaded: Loaded, text: str) -> Any:
    processor = loaded[2]
    prompt = processor.render([{"role": "user", "content": text}, {"role": "assistant", "content": ""}])
    return processor(prompt=prompt)


def test_answers_to_500_generated_schemas_are_valid(random_model: Loaded) -> None:
    """Every answer that ends by itself fits its schema, and free answers in the same batch are the same as alone."""
    tokenizer, model, _ = random_model
    engine = Engine(model, tokenizer)
    plain = GenerationSettings(max_new_tokens=30)
    alone = Reader(engine, question(random_model, "Hello!"), plain).text()
    asked, beside = [], []
    for i, schema in enumerate(schemas(500, seed=20)):
        jsonschema.Draft202012Validator.check_schema(schema)
        form = StructuredOutput(json_schema=schema)
        settings = GenerationSettings(
            max_new_tokens=250, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0, seed=i, structured=form
        )
        asked.append((schema, Reader(engine, question(random_model, f"{i}?"), settings)))
        if i % 25 == 0:
            beside.append(Reader(engine, question(random_model, "Hello!"), plain))
    ended = 0
    for schema, reader in asked:
        text = reader.text()
        if reader.generation.finish_reason == "stop":
            ended += 1
            checker = jsonschema.Draft202012Validator(schema, format_checker=FORMATS_CHECKED)
            checker.validate(json.loads(text))
    assert ended > 450, "else this shows little"
    assert {reader.text() for reader in beside} == {alone}


def test_schemas_are_many_and_different() -> None:
    made = [json.dumps(schema) for schema in schemas(500, seed=20)]
    assert len(set(made)) > 400
    for keyword in ("pattern", "format", "prefixItems", "$ref", "anyOf", "allOf", "patternProperties", "minItems"):
        assert sum(f'"{keyword}"' in schema for schema in made) > 10, keyword


# --- forms ---


def said(loaded: Loaded, form: StructuredOutput | None, text: str = "Hi", **settings: Any) -> tuple[str, str | None]:
    _, model, processor = loaded
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]
    fields = {"max_new_tokens": 100, "structured": form, **settings}
    with stream_answer(model, processor, messages, GenerationSettings(**fields)) as answer:
        return "".join(answer), answer.finish_reason


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_an_expression_or_a_choice_is_kept_to(random_model: Loaded, temperature: float) -> None:
    expressions = [
        r"\d{3}-\d{4}", "(red|blue) .{2,5}!", "a/b", r"a\/b", "^ab?c$", "  two", "é{2}", "[^a]b", "(?i)yes",
        r"\p{Lu}x", "a\nb", r"#\{%", "🙂{1,3}x", "",
    ]  # fmt: skip
    for expression in expressions:
        form = StructuredOutput(regex=expression)
        text, reason = said(random_model, form, temperature=temperature, seed=1, repetition_penalty=1.0)
        assert reason == "stop" or temperature == 0, (expression, text)
        if reason == "stop" and "\\p" not in expression:
            assert re.fullmatch(expression, text), (expression, text)
    for texts in (["red", "blue"], [" red", "  "], ['"', "\\", "/", "\n"], ["世界", "🙂"], ["a", "ab", "abc"], [""]):
        text, reason = said(random_model, StructuredOutput(choice=texts), temperature=temperature, seed=2)
        assert (text in texts, reason) == (True, "stop")
    many = [f"option {i}, which is long" for i in range(2000)]
    assert said(random_model, StructuredOutput(choice=many), temperature=temperature)[0] in many


def test_json_is_an_object(random_model: Loaded) -> None:
    for seed in range(20):
        text, reason = said(random_model, StructuredOutput(json_object=True), temperature=1.0, seed=seed)
        if reason == "stop":
            assert isinstance(json.loads(text), dict)


def test_a_models_answer_in_json_is_its_answer(tiny: Loaded) -> None:
    """A form does not change an answer that fits it: the leading space, which the model has learnt, stays allowed."""
    _, model, processor = tiny
    colours = ["green", "yellow", "red", "blue"]
    form = StructuredOutput(regex="The star is (red|green|yellow|blue)\\.")
    content = "<image_placeholder>What colour is the star?"
    messages = [
        {"role": "user", "content": content, "images": [load_image(ROOT / "images" / "shapes.png")]},
        {"role": "assistant", "content": ""},
    ]

    def answer(form: StructuredOutput) -> str:
        settings = GenerationSettings(max_new_tokens=40, structured=form)
        return "".join(stream_answer(model, processor, messages, settings))

    assert answer(form) == "The star is blue."
    assert answer(StructuredOutput(choice=[f"The star is {colour}." for colour in colours])) == "The star is blue."


def test_template_stop_words_do_not_cut_a_form(random_model: Loaded) -> None:
    """The caller's stop words end an answer within a form, the template's do not."""
    form = StructuredOutput(choice=["User: and more"])
    settings = GenerationSettings(max_new_tokens=50, structured=form).with_stop_words(["User:"])
    assert settings.stop == ()
    assert said(random_model, form) == ("User: and more", "stop")
    assert said(random_model, form, stop=["and"]) == ("User: ", "stop")


def test_settings_take_one_form() -> None:
    two = [{"regex": "a", "choice": ["a"]}, {"json_object": True, "json_schema": {}}]
    for fields in (*two, {}, {"json_object": False}):
        with pytest.raises(ValueError, match="exactly one of json_object, json_schema, regex, choice"):
            StructuredOutput(**fields)
    with pytest.raises(ValueError, match="no texts"):
        StructuredOutput(choice=[])


UNSUPPORTED = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"minLength": 2}},
    "contains": {"type": "array", "contains": {"type": "string"}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "a"}},
    "dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "unevaluatedProperties": {"unevaluatedProperties": False},
    "oneOf": {"oneOf": [{"type": "string"}, {"minLength": 3}]},
    "format": {"type": "string", "format": "idn-email"},
    "type": {"type": "text"},
    "http://example.com/a": {"$ref": "http://example.com/a"},
    "file:///etc/passwd": {"$ref": "file:///etc/passwd"},
    "/definitions/a": {"$ref": "#/definitions/a"},
    "look-around": {"type": "string", "pattern": "(?=a)b"},
    "properties": {"type": "object", "properties": 5},
}


IMPOSSIBLE = {
    "minLength": {"type": "string", "minLength": 5, "maxLength": 3},
    "minimum": {"type": "integer", "minimum": 5, "maximum": 3},
    "anyOf": {"enum": []},
    "No answer can have the form": {"$ref": "#"},
}


@pytest.mark.parametrize("word", IMPOSSIBLE)
def test_a_schema_of_nothing_is_refused(random_model: Loaded, word: str) -> None:
    with pytest.raises(StructureError, match=word):
        said(random_model, StructuredOutput(json_schema=IMPOSSIBLE[word]))


@pytest.mark.parametrize("word", UNSUPPORTED)
@pytest.mark.parametrize("nested", [False, True])
def test_a_keyword_that_is_not_supported_is_named(random_model: Loaded, word: str, nested: bool) -> None:
    schema: dict[str, Any] = UNSUPPORTED[word]
    if nested and "$ref" not in schema:
        items = {"type": "array", "items": schema, "minItems": 1}
        schema = {"type": "object", "properties": {"a": items}, "required": ["a"]}
    with pytest.raises(StructureError, match=re.escape(word)) as refused:
        said(random_model, StructuredOutput(json_schema={**schema, "x-guidance": {"lenient": True}}))
    assert len(str(refused.value)) < 250
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("expression", ["((((", "(a)\\1", "a(?=b)", r"\bfoo\b", "[", "*", "a{2,1}"])
def test_an_expression_that_is_not_supported_is_refused(random_model: Loaded, expression: str) -> None:
    with pytest.raises(StructureError, match="Regular expression: "):
        said(random_model, StructuredOutput(regex=expression))


def test_a_form_is_refused_before_anything_is_generated(random_model: Loaded) -> None:
    tokenizer, model, _ = random_model
    settings = GenerationSettings(structured=StructuredOutput(regex="(("))
    with pytest.raises(StructureError):
        AnswerStream(Engine(model, tokenizer), question(random_model, "Hi"), settings)


def test_the_library_is_imported_when_it_is_needed() -> None:
    """Without llguidance everything except structured output works."""
    code = (
        "import sys\n"
        "sys.modules['llguidance'] = None\n"
        "from deepseek_vl.engine.settings import GenerationSettings, StructuredOutput\n"
        "from deepseek_vl.serve.inference import load_model, stream_answer\n"
        "tokenizer, model, processor = load_model('tiny', device='cpu', dtype='float32')\n"
        "messages = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': ''}]\n"
        "print(len(''.join(stream_answer(model, processor, messages, GenerationSettings(max_new_tokens=5)))) > 0)\n"
        "form = StructuredOutput(regex='a')\n"
        "try:\n"
        "    stream_answer(model, processor, messages, GenerationSettings(structured=form))\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=ROOT)
    answered, message = result.stdout.splitlines()
    assert answered == "True"
    assert message == "Answers of a given form need the package llguidance: pip install llguidance."


# --- by the API ---

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_the_client_gets_the_form_it_asks_for(server: Server, colours: dict[str, Path]) -> None:
    client = server.client()
    named = {"name": "person", "schema": PERSON, "strict": True}
    ask = {"model": "parrot", "messages": about("Who?", colours["red"]), "max_tokens": 100}
    formats: list[dict[str, Any]] = [{"type": "json_schema", "json_schema": named}, {"type": "json_object"}]
    for response_format in formats:
        whole = client.chat.completions.create(**ask, response_format=response_format)
        text = whole.choices[0].message.content
        if whole.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(text), dict)
        stream = client.chat.completions.create(**ask, response_format=response_format, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
    person = client.chat.completions.create(**ask, response_format=formats[0]).choices[0].message.content
    jsonschema.validate(json.loads(person), PERSON)
    for extra, expression in (
        ({"structured_outputs": {"regex": "[0-9]{4}"}}, "[0-9]{4}"),
        ({"guided_regex": "[a-f]{3}"}, "[a-f]{3}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"guided_choice": ["up", "down"]}, "up|down"),
        ({"structured_outputs": {"json": {"const": 5}}}, "5"),
        ({"guided_json": {"enum": [True]}}, "true"),
    ):
        answer = client.chat.completions.create(**ask, extra_body=extra)
        assert re.fullmatch(expression, answer.choices[0].message.content), extra
        with_tokens = client.chat.completions.create(**ask, extra_body=extra, logprobs=True, n=2)
        for choice in with_tokens.choices:
            assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    completed = client.completions.create(model="parrot", prompt="Age:", extra_body={"guided_regex": " [0-9]{2}"})
    assert re.fullmatch(" [0-9]{2}", completed.choices[0].text)


def test_an_unfinished_answer_goes_on_in_its_form(server: Server) -> None:
    def goes_on(begun: str, **extra: Any) -> str:
        messages = [{"role": "user", "content": "Greet me."}, {"role": "assistant", "content": begun}]
        answer = server.client().chat.completions.create(
            model="parrot", messages=messages, extra_body={"continue_final_message": True, **extra}
        )
        return begun + answer.choices[0].message.content

    assert re.fullmatch("It is [0-9]{2}", goes_on("It is", guided_regex=" [0-9]{2}"))
    assert re.fullmatch("It is [0-9]{2}", goes_on("It is ", guided_regex="[0-9]{2}"))


@pytest.mark.parametrize("word", UNSUPPORTED)
def test_the_api_names_a_keyword_that_is_not_supported(server: Server, word: str) -> None:
    response_format = {"type": "json_schema", "json_schema": {"name": "a", "schema": UNSUPPORTED[word]}}
    body = {"model": "parrot", "messages": about("Hi"), "response_format": response_format}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 400
    assert word in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == "response_format"


@pytest.mark.parametrize(
    "form",
    [
        {"regex": "((a{1,1000}){1,1000}){1,1000}"},
        {"regex": "(" * 5000 + ")" * 5000},
        {"regex": "(.*a){60}.{1000}b"},
        {"json": {"type": "string", "minLength": 10**8}},
        {"json": {"type": "string", "pattern": "(a|b|ab)*(a|b|ab)*(a|b|ab)*c{500}"}},
        {"json": {"type": "array", "minItems": 10**6, "items": {"type": "string", "format": "date-time"}}},
        {"json": {"anyOf": [{"const": "a" * i} for i in range(400)]}},
        {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}}},
        {"json": {"$ref": "#"}},
        {"choice": ["x" * 1000 + str(i) for i in range(1000)]},
    ],
    ids=range(10),
)  # fmt: skip
def test_a_hostile_form_is_answered_or_refused_and_harms_nobody(server: Server, form: dict[str, Any]) -> None:
    body = {"model": "parrot", "messages": about("Hi"), "max_tokens": 20, "structured_outputs": form}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code in (200, 400), answer.text
    assert "Traceback" not in answer.text
    greeting = server.client().chat.completions.create(model="parrot", messages=about("Greet me."))
    assert greeting.choices[0].message.content == PARROT_ANSWERS["Greet me."]
