"""Conversation templates: from a list of (role, text) messages to the prompt string.

The names, fields and separators are the reference's `deepseek_vl.utils.conversation`, which in turn follows FastChat.
"""

import copy
import dataclasses
from dataclasses import dataclass, field
from enum import IntEnum, auto
from typing import Any

DEFAULT_SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)

DEEPSEEK_CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content or [] -%}
            {{- '<image_placeholder>' if part.type == 'image' else part.text -}}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if messages and messages[0].role == 'system' -%}
    {%- set system, turns = text_of(messages[0].content), messages[1:] -%}
{%- else -%}
    {%- set system, turns = system_prompt | default('@SYSTEM@'), messages -%}
{%- endif -%}
{%- set prompt = namespace(text=system ~ '\\n\\n' if system else '') -%}
{%- for message in turns -%}
    {%- set role, text = message.role | capitalize, text_of(message.content) | trim -%}
    {%- set separator = '<｜end▁of▁sentence｜>' if loop.index0 % 2 else '\\n\\n' -%}
    {%- set prompt.text = prompt.text ~ role ~ ':' ~ (' ' ~ text ~ separator if text else '') -%}
{%- endfor -%}
{{- (prompt.text ~ ('Assistant:' if add_generation_prompt else '')) | trim -}}
""".replace("@SYSTEM@", DEFAULT_SYSTEM_PROMPT)
"""The `deepseek` format as a Jinja template, for messages in transformers' form: a `system` message (without one,
`system_prompt` or the default), then `user` and `assistant`; content is a string, or a list of image and text parts."""


class SeparatorStyle(IntEnum):
    """How messages are joined. The numbers are the reference's; only the four that a template uses can be rendered."""

    ADD_COLON_SINGLE = auto()
    ADD_COLON_TWO = auto()
    ADD_COLON_SPACE_SINGLE = auto()
    NO_COLON_SINGLE = auto()
    NO_COLON_TWO = auto()
    ADD_NEW_LINE_SINGLE = auto()
    LLAMA2 = auto()
    CHATGLM = auto()
    CHATML = auto()
    CHATINTERN = auto()
    DOLLY = auto()
    RWKV = auto()
    PHOENIX = auto()
    ROBIN = auto()
    DeepSeek = auto()
    PLAIN = auto()
    ALIGNMENT = auto()


def _text(message: Any) -> str | None:
    """The text of a message, which may be a tuple whose first item is the text."""
    return message[0] if isinstance(message, tuple) else message


@dataclass
class Conversation:
    """A prompt template together with the messages so far.

    Attributes:
        name: the template's name in the registry.
        system_template: format string with the field `system_message`.
        system_message: the system prompt; empty for none.
        roles: the names of the user and of the assistant.
        messages: `[role, text]` lists; the text is None for a message still to be generated.
        offset: number of leading messages that are few-shot examples, which the exports below leave out.
        sep_style, sep, sep2: how messages are joined; `sep` follows even messages, `sep2` odd ones.
        stop_str: text, or texts, that end an answer.
        stop_token_ids: token ids that end an answer.
    """

    name: str
    system_template: str = "{system_message}"
    system_message: str = ""
    roles: tuple[str, str] = ("USER", "ASSISTANT")
    messages: list[list[Any]] = field(default_factory=list)
    offset: int = 0
    sep_style: SeparatorStyle = SeparatorStyle.ADD_COLON_SINGLE
    sep: str = "\n"
    sep2: str | None = None
    stop_str: str | list[str] | None = None
    stop_token_ids: list[int] | None = None

    def get_prompt(self) -> str:
        """The whole conversation as one string, ending with the assistant's tag if its text is still None.

        Raises:
            ValueError: if the separator style has no renderer.
        """
        separators = (self.sep, self.sep2)
        if self.sep_style == SeparatorStyle.DeepSeek:
            system = self.system_template.format(system_message=self.system_message or "")
            prompt = system + self.sep if system else ""
            for i, (role, text) in enumerate(self.messages):
                prompt += f"{role}: {text}{separators[i % 2]}" if text else f"{role}:"
            return prompt
        if self.sep_style == SeparatorStyle.LLAMA2:
            # The opening tag stands in front of the system message, so the first message does not repeat it.
            prompt = (
                self.system_template.format(system_message=self.system_message) if self.system_message else "[INST] "
            )
            for i, (_, message) in enumerate(self.messages):
                tag, text = self.roles[i % 2], _text(message)
                if not text:
                    prompt += tag
                elif i == 0:
                    prompt += f"{text} "
                else:
                    prompt += f"{tag} {text}{separators[i % 2]}"
            return prompt
        if self.sep_style == SeparatorStyle.PLAIN:
            texts = [_text(message) for _, message in self.messages]
            return "".join(f"{text}{separators[i % 2]}" for i, text in enumerate(texts) if text)
        if self.sep_style == SeparatorStyle.ALIGNMENT:
            texts = [_text(message) for _, message in self.messages]
            return "".join(
                f"<image>\n{self.sep}" if i % 2 == 0 else f"{text}{self.sep2}" for i, text in enumerate(texts) if text
            )
        raise ValueError(f"Separator style {self.sep_style!r} of template {self.name!r} cannot be rendered.")

    def get_prompt_for_current_round(self, content: str | None = None) -> str:
        """The text that one more user message `content` appends to the prompt.

        Raises:
            ValueError: if the separator style has no such form.
        """
        if self.sep_style == SeparatorStyle.DeepSeek:
            return f"{self.roles[0]}: {(content or '').strip()}{self.sep}{self.roles[1]}:"
        if self.sep_style == SeparatorStyle.PLAIN:
            return "<image>\n"
        raise ValueError(f"Separator style {self.sep_style!r} of template {self.name!r} has no single-round form.")

    def set_system_message(self, system_message: str) -> None:
        """Replace the system prompt."""
        self.system_message = system_message

    def append_message(self, role: str, message: Any) -> None:
        """Add a message; None for one that is still to be generated."""
        self.messages.append([role, message])

    def reset_message(self) -> None:
        """Remove every message."""
        self.messages = []

    def update_last_message(self, message: Any) -> None:
        """Set the text of the last message, typically None until the answer is generated."""
        self.messages[-1][1] = message

    def to_gradio_chatbot(self) -> list[list[Any]]:
        """The messages as `[user, assistant]` pairs."""
        pairs = []
        for i, (_, text) in enumerate(self.messages[self.offset :]):
            if i % 2 == 0:
                pairs.append([text, None])
            else:
                pairs[-1][-1] = text
        return pairs

    def to_openai_api_messages(self) -> list[dict[str, Any]]:
        """The messages as OpenAI chat messages, the system message first, an assistant's None left out."""
        messages = [{"role": "system", "content": self.system_message}]
        for i, (_, text) in enumerate(self.messages[self.offset :]):
            if i % 2 == 0:
                messages.append({"role": "user", "content": text})
            elif text is not None:
                messages.append({"role": "assistant", "content": text})
        return messages

    def copy(self) -> "Conversation":
        """A copy that can be changed without changing this conversation; what messages hold besides text is shared."""
        return dataclasses.replace(
            self,
            messages=[list(message) for message in self.messages],
            stop_str=copy.copy(self.stop_str),
            stop_token_ids=copy.copy(self.stop_token_ids),
        )

    def dict(self) -> dict[str, Any]:
        """The parts that describe this conversation rather than its template."""
        return {
            "template_name": self.name,
            "system_message": self.system_message,
            "roles": self.roles,
            "messages": self.messages,
            "offset": self.offset,
        }


conv_templates: dict[str, Conversation] = {}


def register_conv_template(template: Conversation, override: bool = False) -> None:
    """Add a template to the registry.

    Raises:
        AssertionError: if the name is taken and `override` is false (the reference's type, kept for its callers).
    """
    if not override and template.name in conv_templates:
        raise AssertionError(f"{template.name} has been registered; pass override=True to replace it.")
    conv_templates[template.name] = template


def get_conv_template(name: str) -> Conversation:
    """A fresh copy of a registered template.

    Raises:
        KeyError: if no template has that name.
    """
    if name not in conv_templates:
        raise KeyError(f"No conversation template {name!r}; registered are {', '.join(sorted(conv_templates))}.")
    return conv_templates[name].copy()


_LLAMA_2 = Conversation(
    name="llama-2",
    system_template="[INST] <<SYS>>\n{system_message}\n<</SYS>>\n\n",
    roles=("[INST]", "[/INST]"),
    sep_style=SeparatorStyle.LLAMA2,
    sep=" ",
    sep2=" </s><s>",
    stop_token_ids=[2],
)

for _template in (
    Conversation(
        name="deepseek",
        roles=("User", "Assistant"),
        sep_style=SeparatorStyle.DeepSeek,
        sep="\n\n",
        sep2="<｜end▁of▁sentence｜>",
        stop_str=["User:", "<｜end▁of▁sentence｜>"],
        stop_token_ids=[100001],
    ),
    _LLAMA_2,
    dataclasses.replace(_LLAMA_2, name="llava_llama2", system_message=DEFAULT_SYSTEM_PROMPT, messages=[]),
    *(
        Conversation(
            name=name,
            system_template="",
            roles=("", ""),
            sep_style=style,
            sep="",
            sep2="",
            stop_str=["</s>"],
            stop_token_ids=[2],
        )
        for name, style in (("plain", SeparatorStyle.PLAIN), ("alignment", SeparatorStyle.ALIGNMENT))
    ),
):
    register_conv_template(_template)
