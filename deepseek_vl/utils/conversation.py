"""Conversation templates, and the one renderer: from messages to the prompt.

The names, fields and separators are the reference's `deepseek_vl.utils.conversation`, which in turn follows FastChat.
A new template is a `register_conv_template` below; training, every front-end and `apply_chat_template` then follow it.
"""

import copy
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, auto
from typing import Any, NamedTuple

IMAGE_TAG = "<image_placeholder>"
"""The tag for an image in a text, unless a processor has another one."""

DEFAULT_SYSTEM_PROMPT = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)

Spans = tuple[tuple[int, int], ...]
"""Parts of a text: the [start, end) characters of each, in order."""


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


@dataclass(frozen=True)
class Rendered:
    """A prompt, or one message's text, with the spans that are learnt and those that are literal.

    Attributes:
        text: all of it.
        learnt: the answers. In a prompt, a span begins where the prompt that asks for the answer ends, and includes the
            separator that ends the answer.
        literal: untrusted text, in which special tokens are read as plain text.
    """

    text: str
    learnt: Spans = ()
    literal: Spans = ()

    def strip(self) -> "Rendered":
        """A copy without outer white space, with the spans moved."""
        text = self.text.strip()
        shift = len(self.text) - len(self.text.lstrip())

        def moved(spans: Spans) -> Spans:
            cut = ((max(start - shift, 0), min(end - shift, len(text))) for start, end in spans)
            return tuple((start, end) for start, end in cut if start < end)

        return Rendered(text, moved(self.learnt), moved(self.literal))


class _Frame(NamedTuple):
    """How a message is written: `before`, its text (if `has_text`) and `after`; or `alone`, if its text is empty."""

    before: str
    after: str
    alone: str
    has_text: bool = True


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
        return self._render().text

    def _render(self, first: int = 0) -> Rendered:
        """The prompt; messages and the system message may be `Rendered`.

        Args:
            first: the number of the first message: 1 if it is the assistant's, as templates tell roles by even and odd.
        """
        prompt, learnt, literal = "", [], []
        for i, (role, message) in enumerate([("", self.system_message), *self.messages], -1):
            frame = self._opening() if i == -1 else self._frame(i + first, role)
            message = message[0] if isinstance(message, tuple) else message
            part = message if isinstance(message, Rendered) else Rendered(str(message or ""))
            if not part.text:
                prompt += frame.alone
                continue
            prompt += frame.before
            asked = start = len(prompt)
            while asked and prompt[asked - 1].isspace():
                asked -= 1
            if frame.has_text:
                prompt += part.text
                literal += [(start + first, start + last) for first, last in part.literal]
            prompt += frame.after
            if part.learnt:
                learnt.append((asked, len(prompt)))
        return Rendered(prompt, tuple(learnt), tuple(literal))

    def _opening(self) -> _Frame:
        """How the system message is written."""
        before, place, after = self.system_template.partition("{system_message}")
        before, after = before.format(), after.format()
        if self.sep_style == SeparatorStyle.DeepSeek:
            alone = f"{before}{after}{self.sep}" if before or after else ""
            return _Frame(before, f"{after}{self.sep}" if place or before else "", alone, bool(place))
        if self.sep_style == SeparatorStyle.LLAMA2:
            # The system message begins with the opening tag, so the first message does not repeat it.
            return _Frame(before, after, "[INST] ", bool(place))
        if self.sep_style in (SeparatorStyle.PLAIN, SeparatorStyle.ALIGNMENT):
            return _Frame("", "", "", has_text=False)
        raise ValueError(f"Separator style {self.sep_style!r} of template {self.name!r} cannot be rendered.")

    def _frame(self, i: int, role: str) -> _Frame:
        """How message number i is written."""
        separator = (self.sep2 if i % 2 else self.sep) or ""
        if self.sep_style == SeparatorStyle.DeepSeek:
            return _Frame(f"{role}: ", separator, f"{role}:")
        if self.sep_style == SeparatorStyle.LLAMA2:
            tag = self.roles[i % 2]
            return _Frame(f"{tag} ", separator, tag) if i else _Frame("", " ", tag)
        is_image = self.sep_style == SeparatorStyle.ALIGNMENT and i % 2 == 0
        return _Frame("<image>\n" if is_image else "", separator, "", has_text=not is_image)

    def _role_numbers(self) -> dict[str, int]:
        """Map lower-case role names (user, assistant, or the template's own) to positions in `roles`."""
        own = {name.lower(): number for number, name in enumerate(self.roles) if name}
        return {**own, "user": 0, "assistant": 1}

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
        """Add a message; its text is None if it is still to be generated."""
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
        """A copy that can be changed without changing this one; contents of messages other than text are shared."""
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


def render(
    messages: Sequence[Mapping[str, Any]],
    template: Conversation | str,
    system_prompt: str | None = None,
    untrusted: bool = False,
    image_tag: str = IMAGE_TAG,
) -> Rendered:
    """Messages -> prompt, with the template's names of the roles. The text of each turn and the whole are stripped.

    Args:
        messages: `{"role", "content"}`. A role is user, assistant, or one of the template's own names, in upper or
            lower case; the first may also be system. A content is a string, or a list of `{"type": "image"}` and
            `{"type": "text", "text": ...}`, or None. An answer with `"weight": 0` is not learnt.
        template: a template, or the name of one.
        system_prompt: the system prompt if there is no system message; None for the template's own.
        untrusted: make all text literal, except for image tags in contents that are strings.
        image_tag: the tag for an image in the prompt and in contents that are strings.

    Raises:
        ValueError: for another role, or a system message that is not the first.
        KeyError: if no template has that name.
    """
    conversation = get_conv_template(template) if isinstance(template, str) else template.copy()
    if system_prompt is not None:
        conversation.set_system_message(system_prompt)
    numbers, first = conversation._role_numbers(), 0
    for i, message in enumerate(messages):
        role, content = message["role"].lower(), _content(message.get("content"), image_tag, untrusted)
        if role == "system" and i == 0:
            conversation.set_system_message(content)  # ty: ignore[invalid-argument-type]  literal spans are kept
        elif role in numbers:
            content = content.strip()
            is_learnt = numbers[role] == 1 and message.get("weight", 1) != 0
            first = first if conversation.messages else numbers[role]
            answer = ((0, len(content.text)),) if is_learnt else ()
            conversation.append_message(conversation.roles[numbers[role]], dataclasses.replace(content, learnt=answer))
        else:
            raise ValueError(f"The role of message {i + 1} is {message['role']!r}; {_ROLES_ALLOWED}")
    return conversation._render(first).strip()


def _content(content: Any, image_tag: str, untrusted: bool) -> Rendered:
    """A message's content as one text."""
    if isinstance(content, str):
        pieces = [(piece, piece == image_tag) for piece in re.split(f"({re.escape(image_tag)})", content)]
    else:
        pieces = [_piece(part, image_tag) for part in content or ()]
    text, literal = "", []
    for piece, is_image in pieces:
        if untrusted and not is_image:
            literal.append((len(text), len(text) + len(piece)))
        text += piece
    return Rendered(text, literal=tuple(literal))


def text_of(content: Any, image_tag: str = IMAGE_TAG) -> str:
    """The text of a message's content, which is a string, a list of parts, or None. Images become tags.

    Raises:
        ValueError: for a part of another type than image and text.
    """
    return _content(content, image_tag, untrusted=False).text


def _piece(part: Any, image_tag: str) -> tuple[str, bool]:
    """The text of a part of a content, and whether it stands for an image."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return image_tag, True
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"], False
    shown = f"of type {kind!r}" if isinstance(part, Mapping) else repr(part)
    allowed = '{"type": "image"} or {"type": "text", "text": ...}'
    raise ValueError(f"A part of a content is {shown}; it must be {allowed}.")


_ROLES_ALLOWED = "it must be user or assistant, and only that of the first may be system."
_JINJA = """\
{%- macro text_of(content) -%}
    {%- for part in ([{'text': content}] if content is string else content or []) -%}
        {{- @IMAGE@ if part.type == 'image' else part.text -}}
    {%- endfor -%}
{%- endmacro -%}
{%- macro framed(frame, text) -%}
    {{- frame[0] ~ (text if frame[3] else '') ~ frame[1] if text else frame[2] -}}
{%- endmacro -%}
{%- set frames = @FRAMES@ -%}
{%- if messages and messages[0].role | lower == 'system' -%}
    {%- set system, turns = text_of(messages[0].content), messages[1:] -%}
{%- else -%}
    {%- set system, turns = system_prompt | default(@SYSTEM@), messages -%}
{%- endif -%}
{%- set turns = @EXAMPLES@ + turns | list + ([{'role': 'assistant'}] if add_generation_prompt else []) -%}
{%- set first = 1 if turns and turns[0].role | lower in @ANSWERS@ else 0 -%}
{%- set prompt = namespace(text=framed(@OPENING@, system), learnt=[]) -%}
{%- for message in turns -%}
    {%- if message.role | lower not in frames -%}
        {{- raise_exception("The role of a message is '" ~ message.role ~ "'; " ~ @ALLOWED@) -}}
    {%- endif -%}
    {%- set i = loop.index0 + first -%}
    {%- set frame = frames[message.role | lower][2 - i % 2 if i else 0] -%}
    {%- set text = text_of(message.content) | trim -%}
    {%- set asked = (prompt.text ~ frame[0]).rstrip() | length -%}
    {%- set prompt.text = prompt.text ~ framed(frame, text) -%}
    {%- if text and message.role | lower in @ANSWERS@ and message.weight | default(1) != 0 -%}
        {%- set prompt.learnt = prompt.learnt + [[asked, prompt.text | length]] -%}
    {%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- set place = namespace(written=(prompt.text | length) - (prompt.text.lstrip() | length)) -%}
{%- set end = prompt.text.rstrip() | length -%}
{%- for span in prompt.learnt -%}
    {%- set start = [span[0], place.written] | max -%}
    {{- prompt.text[place.written:start] -}}
    {%- set place.written = [[span[1], end] | min, start] | max -%}
    {%- generation -%}{{- prompt.text[start:place.written] -}}{%- endgeneration -%}
{%- endfor -%}
{{- prompt.text[place.written:end] -}}
"""


def jinja_template(template: Conversation, image_tag: str = IMAGE_TAG) -> str:
    """`render` for trusted messages as a Jinja template, for transformers' `apply_chat_template`.

    Spans that are learnt are between generation marks. The prompt begins with the variable `bos_token`, if it is
    defined. Without a system message, the system prompt is the variable `system_prompt`, or else the template's own.
    """
    values = {
        "ALLOWED": _ROLES_ALLOWED,
        "IMAGE": image_tag,
        "SYSTEM": template.system_message or "",
        "OPENING": template._opening(),
        "EXAMPLES": [{"role": role, "content": text} for role, text in template.messages],
        "ANSWERS": [name for name, number in template._role_numbers().items() if number == 1],
        "FRAMES": {  # of the first message, of odd and of even ones
            name: [template._frame(i, template.roles[number]) for i in range(3)]
            for name, number in template._role_numbers().items()
        },
    }
    return re.sub("@([A-Z]+)@", lambda match: json.dumps(values[match[1]], ensure_ascii=False), _JINJA)


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

DEEPSEEK_CHAT_TEMPLATE = jinja_template(
    dataclasses.replace(conv_templates["deepseek"], system_message=DEFAULT_SYSTEM_PROMPT)
)
"""The `deepseek` format with the default system prompt as a Jinja template."""
