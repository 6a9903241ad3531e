"""Conversation templates: the exact strings that they give, and the registry."""

import dataclasses

import pytest

from deepseek_vl.models import VLChatProcessor
from deepseek_vl.utils.conversation import (
    Conversation,
    SeparatorStyle,
    conv_templates,
    get_conv_template,
    register_conv_template,
)

END = "<｜end▁of▁sentence｜>"
LLAMA_SYSTEM = "[INST] <<SYS>>\n{system_message}\n<</SYS>>\n\n"
IMAGE_TUPLE = ("a", "image", "crop")  # how clients attach an image to a text


@pytest.fixture
def registry():
    """The registry of templates, restored after the test."""
    saved = dict(conv_templates)
    yield conv_templates
    conv_templates.clear()
    conv_templates.update(saved)


def talk(name: str, *texts, system: str | None = None, **fields) -> Conversation:
    """A conversation that alternates the template's roles over `texts`; `fields` replace fields of the template."""
    conversation = dataclasses.replace(get_conv_template(name), **fields)
    if system is not None:
        conversation.set_system_message(system)
    for i, text in enumerate(texts):
        conversation.append_message(conversation.roles[i % 2], text)
    return conversation


# The templates


@pytest.mark.parametrize(
    "expected",
    [
        {
            "name": "deepseek",
            "system_template": "{system_message}",
            "system_message": "",
            "roles": ("User", "Assistant"),
            "sep_style": SeparatorStyle.DeepSeek,
            "sep": "\n\n",
            "sep2": END,
            "stop_str": ["User:", END],
            "stop_token_ids": [100001],
        },
        {
            "name": "llama-2",
            "system_template": LLAMA_SYSTEM,
            "system_message": "",
            "roles": ("[INST]", "[/INST]"),
            "sep_style": SeparatorStyle.LLAMA2,
            "sep": " ",
            "sep2": " </s><s>",
            "stop_str": None,
            "stop_token_ids": [2],
        },
        {
            "name": "llava_llama2",
            "system_template": LLAMA_SYSTEM,
            "system_message": VLChatProcessor.system_prompt,
            "roles": ("[INST]", "[/INST]"),
            "sep_style": SeparatorStyle.LLAMA2,
            "sep": " ",
            "sep2": " </s><s>",
            "stop_str": None,
            "stop_token_ids": [2],
        },
        *(
            {
                "name": name,
                "system_template": "",
                "system_message": "",
                "roles": ("", ""),
                "sep_style": style,
                "sep": "",
                "sep2": "",
                "stop_str": ["</s>"],
                "stop_token_ids": [2],
            }
            for name, style in (("plain", SeparatorStyle.PLAIN), ("alignment", SeparatorStyle.ALIGNMENT))
        ),
    ],
    ids=lambda expected: expected["name"],
)
def test_a_template_has_exactly_these_fields_and_no_messages(expected):
    template = get_conv_template(expected["name"])
    assert dataclasses.asdict(template) == {**expected, "messages": [], "offset": 0}


def test_the_registry_holds_exactly_the_published_templates():
    assert set(conv_templates) == {"deepseek", "llama-2", "llava_llama2", "plain", "alignment"}


def test_fields_come_in_the_order_that_positional_callers_use():
    assert [field.name for field in dataclasses.fields(Conversation)] == [
        "name",
        "system_template",
        "system_message",
        "roles",
        "messages",
        "offset",
        "sep_style",
        "sep",
        "sep2",
        "stop_str",
        "stop_token_ids",
    ]


def test_separator_styles_keep_their_names_order_and_numbers():
    expected = [
        ("ADD_COLON_SINGLE", 1),
        ("ADD_COLON_TWO", 2),
        ("ADD_COLON_SPACE_SINGLE", 3),
        ("NO_COLON_SINGLE", 4),
        ("NO_COLON_TWO", 5),
        ("ADD_NEW_LINE_SINGLE", 6),
        ("LLAMA2", 7),
        ("CHATGLM", 8),
        ("CHATML", 9),
        ("CHATINTERN", 10),
        ("DOLLY", 11),
        ("RWKV", 12),
        ("PHOENIX", 13),
        ("ROBIN", 14),
        ("DeepSeek", 15),
        ("PLAIN", 16),
        ("ALIGNMENT", 17),
    ]
    assert [(style.name, int(style)) for style in SeparatorStyle] == expected
    assert SeparatorStyle.ALIGNMENT == 17


# get_prompt


@pytest.mark.parametrize(
    ("texts", "system", "expected"),
    [
        ((), "", ""),
        ((), "Be kind.", "Be kind.\n\n"),
        (("a",), "", "User: a\n\n"),
        (("a", None), "", "User: a\n\nAssistant:"),
        (("a", ""), "", "User: a\n\nAssistant:"),
        (("", "b"), "", f"User:Assistant: b{END}"),
        (("a", "b"), "Be kind.", f"Be kind.\n\nUser: a\n\nAssistant: b{END}"),
        (("a", "b", "c", None), "S", f"S\n\nUser: a\n\nAssistant: b{END}User: c\n\nAssistant:"),
        (("  a \n", " b "), " S ", f" S \n\nUser:   a \n\n\nAssistant:  b {END}"),
    ],
)
def test_deepseek_prompt_is_exact_and_strips_nothing(texts, system, expected):
    assert talk("deepseek", *texts, system=system).get_prompt() == expected


def test_deepseek_prompt_takes_each_messages_own_role():
    conversation = get_conv_template("deepseek")
    conversation.append_message("Human", "a")
    conversation.append_message("Robot", None)
    assert conversation.get_prompt() == "Human: a\n\nRobot:"


@pytest.mark.parametrize(
    ("texts", "system", "expected"),
    [
        ((), "", "[INST] "),
        (("a",), "", "[INST] a "),
        (("a", None), "", "[INST] a [/INST]"),
        (("a", ""), "", "[INST] a [/INST]"),
        (("a", "b"), "", "[INST] a [/INST] b </s><s>"),
        (("a", "b", "c", None), "", "[INST] a [/INST] b </s><s>[INST] c [/INST]"),
        (("a", None), "S", "[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST]"),
        ((IMAGE_TUPLE, ("b",), ("c", 1), None), "", "[INST] a [/INST] b </s><s>[INST] c [/INST]"),
        ((("", "image"), "b"), "", "[INST] [INST][/INST] b </s><s>"),
    ],
)
def test_llama_2_prompt_is_exact(texts, system, expected):
    assert talk("llama-2", *texts, system=system).get_prompt() == expected


def test_llama_2_tags_follow_the_position_and_not_the_messages_role():
    conversation = get_conv_template("llama-2")
    for role, text in (("x", "a"), ("y", "b"), ("z", "c")):
        conversation.append_message(role, text)
    assert conversation.get_prompt() == "[INST] a [/INST] b </s><s>[INST] c "


def test_llava_llama2_prompt_opens_with_the_default_system_prompt():
    system = VLChatProcessor.system_prompt
    assert talk("llava_llama2", "a", None).get_prompt() == f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\na [/INST]"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ((), ""),
        (("a", "b", "c"), "a|b#c|"),
        ((None, "b", "", "d"), "b#d#"),
        ((IMAGE_TUPLE, ("b",)), "a|b#"),
    ],
)
def test_plain_prompt_is_the_texts_with_their_separators_and_without_the_empty(texts, expected):
    assert talk("plain", *texts, sep="|", sep2="#").get_prompt() == expected


def test_plain_and_alignment_as_registered_separate_by_nothing():
    assert talk("plain", "a\n", "b", "c").get_prompt() == "a\nbc"
    assert talk("alignment", "a", "b", "c").get_prompt() == "<image>\nb<image>\n"


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ((), ""),
        (("a", "b"), "<image>\n|b#"),
        (("a", None), "<image>\n|"),
        (("a", ""), "<image>\n|"),
        ((IMAGE_TUPLE, ("b", 1), "c"), "<image>\n|b#<image>\n|"),
    ],
)
def test_alignment_prompt_has_an_image_for_each_even_message(texts, expected):
    assert talk("alignment", *texts, sep="|", sep2="#").get_prompt() == expected


@pytest.mark.parametrize("name", ["deepseek", "llama-2", "plain", "alignment"])
def test_get_prompt_leaves_the_messages_as_they_are(name):
    conversation = talk(name, "a", None)
    messages = [list(message) for message in conversation.messages]
    assert conversation.get_prompt() == conversation.get_prompt()
    assert conversation.messages == messages


@pytest.mark.parametrize(
    "style",
    sorted(
        set(SeparatorStyle)
        - {SeparatorStyle.DeepSeek, SeparatorStyle.LLAMA2, SeparatorStyle.PLAIN, SeparatorStyle.ALIGNMENT}
    ),
    ids=lambda style: style.name,
)
def test_a_style_that_no_template_uses_cannot_be_rendered(style):
    with pytest.raises(ValueError, match=style.name):
        talk("deepseek", "a", sep_style=style).get_prompt()


# get_prompt_for_current_round


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("Hi", "User: Hi\n\nAssistant:"),
        (" \n Hi  there \n", "User: Hi  there\n\nAssistant:"),
    ],
)
def test_deepseek_current_round_is_the_stripped_content_alone(content, expected):
    conversation = talk("deepseek", "earlier", "answer", system="S")
    assert conversation.get_prompt_for_current_round(content) == expected


def test_plain_current_round_is_an_image_whatever_the_content():
    assert get_conv_template("plain").get_prompt_for_current_round("text") == "<image>\n"


@pytest.mark.parametrize("name", ["llama-2", "llava_llama2", "alignment"])
def test_other_templates_have_no_current_round(name):
    with pytest.raises(ValueError, match=name):
        get_conv_template(name).get_prompt_for_current_round("text")


# Editing and exporting


def test_messages_can_be_appended_updated_and_reset():
    conversation = get_conv_template("deepseek")
    conversation.append_message("User", "a")
    conversation.append_message("Assistant", None)
    assert conversation.messages == [["User", "a"], ["Assistant", None]]
    conversation.update_last_message("b")
    assert conversation.messages == [["User", "a"], ["Assistant", "b"]]
    conversation.set_system_message("S")
    conversation.reset_message()
    assert (conversation.messages, conversation.system_message) == ([], "S")


@pytest.mark.parametrize(
    ("texts", "offset", "expected"),
    [
        ((), 0, []),
        (("a",), 0, [["a", None]]),
        (("a", "b", "c", None), 0, [["a", "b"], ["c", None]]),
        (("a", "b", "c", "d"), 2, [["c", "d"]]),
    ],
)
def test_gradio_chatbot_gets_pairs_from_the_offset_on(texts, offset, expected):
    assert talk("deepseek", *texts, offset=offset).to_gradio_chatbot() == expected


@pytest.mark.parametrize(
    ("texts", "offset", "expected"),
    [
        ((), 0, []),
        (("a", None), 0, [("user", "a")]),
        (("a", "b", "c", None), 0, [("user", "a"), ("assistant", "b"), ("user", "c")]),
        (("a", ""), 0, [("user", "a"), ("assistant", "")]),
        (("a", "b", "c", "d"), 2, [("user", "c"), ("assistant", "d")]),
    ],
)
@pytest.mark.parametrize("system", ["", "S"])
def test_openai_messages_begin_with_the_system_and_skip_what_is_not_answered_yet(texts, offset, expected, system):
    messages = talk("deepseek", *texts, system=system, offset=offset).to_openai_api_messages()
    assert messages == [{"role": role, "content": content} for role, content in [("system", system), *expected]]


def test_dict_describes_the_conversation_and_not_its_template():
    assert talk("deepseek", "a", None, system="S", offset=1).dict() == {
        "template_name": "deepseek",
        "system_message": "S",
        "roles": ("User", "Assistant"),
        "messages": [["User", "a"], ["Assistant", None]],
        "offset": 1,
    }


def test_a_copy_is_equal_and_independent():
    original = talk("deepseek", "a", None, system="S", offset=1)
    copy = original.copy()
    assert type(copy) is Conversation
    assert copy == original

    copy.update_last_message("b")
    copy.append_message("User", "c")
    copy.set_system_message("T")
    assert original == talk("deepseek", "a", None, system="S", offset=1)


# The registry


def test_a_template_taken_from_the_registry_can_be_changed_without_changing_the_next():
    first = get_conv_template("deepseek")
    first.append_message("User", "a")
    first.set_system_message("S")
    first.stop_str.append("more")
    second = get_conv_template("deepseek")
    assert (second.messages, second.system_message, second.stop_str) == ([], "", ["User:", END])


def test_two_new_conversations_do_not_share_their_messages():
    Conversation(name="a").append_message("User", "hello")
    assert Conversation(name="b").messages == []


def test_an_unknown_template_is_a_key_error_that_names_it():
    with pytest.raises(KeyError, match="no-such-template"):
        get_conv_template("no-such-template")


def test_a_registered_template_can_be_fetched_by_name(registry):
    template = Conversation(name="mine", roles=("A", "B"), sep_style=SeparatorStyle.PLAIN)
    register_conv_template(template)
    assert registry["mine"] is template
    assert get_conv_template("mine") == template


def test_registering_a_taken_name_is_an_assertion_error_and_changes_nothing(registry):
    before = registry["deepseek"]
    with pytest.raises(AssertionError, match="deepseek"):
        register_conv_template(Conversation(name="deepseek"))
    assert registry["deepseek"] is before


def test_a_taken_name_can_be_overridden(registry):
    register_conv_template(Conversation(name="deepseek", system_message="new"), override=True)
    assert get_conv_template("deepseek").system_message == "new"


@pytest.mark.parametrize("system", ["", None])
@pytest.mark.parametrize("name", ["deepseek", "llama-2"])
def test_no_system_message_is_no_text(name, system):
    conversation = get_conv_template(name)
    conversation.set_system_message(system)
    conversation.append_message(conversation.roles[0], "Hi")
    assert conversation.get_prompt() == {"deepseek": "User: Hi\n\n", "llama-2": "[INST] Hi "}[name]
