"""An Ollama Modelfile: the file, the chat template, and the tokens that end an answer.

Ollama's templates are Go's. Nothing is translated: what a chat template writes around each message is found by
rendering conversations whose contents are known, and put into one Go template. Then both are compared on other
conversations, so any template works that writes the same around every message of a role, a system message in front
excepted, which may also be part of the first user message, or be given by default.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n<|im_start|>user\\nBye<|im_end|>\\n...
    ~~~~~~~~~~~~~~~~~  ~~~~~~~~~~~~ ~~~~~~~~~~~~~~~~~~~~~~~      ~~~~~~~~~~~~
       before user      after user     before assistant         after assistant
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tunesmith.data.sandbox import rendered
from tunesmith.errors import TunesmithError

CONTEXT = 8192
"""The most tokens that a Modelfile asks Ollama to hold, which takes memory for all of them at once."""
CONTENTS = ("Xfirst probeX", "Xsecond probeX", "Xthird probeX")
SYSTEM = "Xsystem probeX"
Turns = list[dict[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Around:
    """What a template writes before and after a message."""

    before: str
    after: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """A chat template, taken apart.

    `head` begins every conversation, `default` one without a system message. `system` is None where the template takes
    none; where it is `folded` into the first user message, that has no `user.before`. `answer` is what follows the last
    user message's `user.after` when the assistant is to answer; an answer's own `assistant.before` may say more.
    """

    head: str
    default: str
    system: Around | None
    folded: bool
    user: Around
    assistant: Around
    answer: str

    def render(self, turns: Turns) -> str:
        """The text of `turns`, which end with a user message, up to where the assistant answers."""
        pieces = [self.head, "" if turns[0]["role"] == "system" else self.default]
        folded = False
        for turn in turns:
            around = {"system": self.system, "user": self.user, "assistant": self.assistant}[turn["role"]]
            assert around is not None
            pieces += ["" if folded else around.before, turn["content"], around.after]
            folded = self.folded and turn["role"] == "system"
        return "".join([*pieces, self.answer])

    def go(self) -> str:
        """The same as a Go template. A last assistant message is left open, for Ollama to go on with."""
        text = _literal(self.head)
        if self.default:
            text += f"{{{{ if not .System }}}}{_literal(self.default)}{{{{ end }}}}"
        before = _literal(self.user.before)
        if self.folded:
            text += "{{ $folded := false }}"
            before = f"{{{{ if not $folded }}}}{before}{{{{ end }}}}{{{{ $folded = false }}}}"
        text += '{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}{{ if eq .Role "user" }}'
        text += f"{before}{{{{ .Content }}}}{_literal(self.user.after)}"
        text += f'{{{{ else if eq .Role "assistant" }}}}{_literal(self.assistant.before)}{{{{ .Content }}}}'
        text += f"{{{{ if not $last }}}}{_literal(self.assistant.after)}{{{{ end }}}}"
        if self.system is not None:
            text += f'{{{{ else if eq .Role "system" }}}}{_literal(self.system.before)}{{{{ .Content }}}}'
            text += _literal(self.system.after) + "{{ $folded = true }}" * self.folded
        text += '{{ end }}{{ if and $last (ne .Role "assistant") }}' + _literal(self.answer)
        return text + "{{ end }}{{ end }}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Modelfile:
    """The text of a Modelfile, and what the user should know of it."""

    text: str
    notes: tuple[str, ...] = ()


def modelfile(tokenizer: Any, gguf_name: str, *, stops: Sequence[str], context: int, bos_is_added: bool) -> Modelfile:
    """The Modelfile for the file `gguf_name` beside it.

    `stops` are the texts of all end tokens, `context` the model's most tokens; `bos_is_added` says that the file has
    the bos token added to every text, so that the template must not write it. Without a chat template the prompt is
    passed on as it is. Raises TunesmithError for a chat template that can't be taken apart, and for text that a
    Modelfile can't hold.
    """
    notes: list[str] = []
    if tokenizer.chat_template is None:
        template = "{{ .Prompt }}"
    else:
        parts = take_apart(tokenizer, bos_is_added=bos_is_added)
        template = parts.go()
        notes = _notes(tokenizer, parts)
    held = min(context, CONTEXT)
    lines = [f"FROM ./{gguf_name}", f'TEMPLATE """{template}"""']
    for stop in stops:
        quotes = '"""' if '"' in stop else '"'
        lines.append(f"PARAMETER stop {quotes}{stop}{quotes}")
    if held < context:
        lines.append(f"# The model has room for {context} tokens; more take more memory.")
    lines.append(f"PARAMETER num_ctx {held}")
    text = "\n".join(lines) + "\n"
    unheld = [char for char in text if not char.isprintable() and char not in "\n\t "]
    if unheld or '"""' in template:
        raise TunesmithError(f"the chat template writes {(unheld or [chr(34) * 3])[0]!r}, which a Modelfile can't hold")
    return Modelfile(text=text, notes=tuple(notes))


def take_apart(tokenizer: Any, *, bos_is_added: bool = False) -> Parts:
    """What the tokenizer's chat template writes around messages, compared with the template itself.

    Raises TunesmithError for one that does not write the same around every message of a role, with an example.
    """
    bos = tokenizer.bos_token if bos_is_added else None
    first, second, third = CONTENTS
    start, between, back, asked = _pieces(tokenizer, [first, second, third], bos)
    user_after = _render(tokenizer, _turns(first), bos, ask=False).rpartition(first)[2]
    if not (between.startswith(user_after) and asked.startswith(user_after)):
        user_after = ""
    answer_after = _render(tokenizer, _turns(first, second), bos, ask=False).rpartition(second)[2]
    if not back.startswith(answer_after):  # the last answer ends otherwise than those before
        answer_after = back.removesuffix(start)
    user = Around(before=back.removeprefix(answer_after), after=user_after)
    if not start.endswith(user.before):
        raise TunesmithError(f"the chat template writes {start!r} before the first user message, {back!r} later")
    head, default = "", start.removesuffix(user.before)
    system, folded = _system(tokenizer, user, bos)
    if system is None or system.before.startswith(default):
        head, default = default, ""
    if system is not None:
        system = Around(before=system.before.removeprefix(head), after=system.after)
    parts = Parts(
        head=head,
        default=default,
        system=system,
        folded=folded,
        user=user,
        assistant=Around(before=between.removeprefix(user_after), after=answer_after),
        answer=asked.removeprefix(user_after),
    )
    _compare(tokenizer, parts, bos)
    return parts


def _system(tokenizer: Any, user: Around, bos: str | None) -> tuple[Around | None, bool]:
    """What is around a system message, None where the template takes none, and whether a user message takes it in."""
    turns = _turns(CONTENTS[0], system=SYSTEM)
    try:
        text = _render(tokenizer, turns, bos)
    except TunesmithError:
        return None, False
    if SYSTEM not in text:
        return None, False
    before, _, rest = text.partition(SYSTEM)
    after = rest.partition(CONTENTS[0])[0]
    is_own = after.endswith(user.before)
    return Around(before=before, after=after.removesuffix(user.before) if is_own else after), not is_own


def _compare(tokenizer: Any, parts: Parts, bos: str | None) -> None:
    """Raises unless both templates write the same text for other conversations than the probes."""
    contents = ("Hi", 'two\n\nlines, "quotes" and {{ braces }}', "x", "- a\n- b", "Why?")
    for system in (None, "Be brief.", "One.\nTwo."):
        if system is not None and parts.system is None:
            continue
        for count in (1, 3, 5):
            turns = _turns(*contents[:count], system=system)
            expected, derived = _render(tokenizer, turns, bos), parts.render(turns)
            if expected != derived:
                at = next((i for i, (a, b) in enumerate(zip(expected, derived, strict=False)) if a != b), len(derived))
                raise TunesmithError(
                    "the chat template does not write the same around every message, so no Modelfile can be derived: "
                    f"of {count} messages{'' if system is None else ' and a system message'} it makes "
                    f"{expected[max(0, at - 40) : at + 40]!r} where {derived[max(0, at - 40) : at + 40]!r} follows"
                )


def _notes(tokenizer: Any, parts: Parts) -> list[str]:
    notes = []
    if parts.system is None:
        notes.append("the chat template takes no system message, so the Modelfile leaves it out")
    if "strftime_now" in tokenizer.get_chat_template():
        notes.append("the chat template writes the date; the Modelfile has that of today")
    function = {"name": "look_up", "description": "x", "parameters": {"type": "object", "properties": {}}}
    tool = {"type": "function", "function": function}
    with suppress(Exception):  # what a template raises is its author's choice
        if "look_up" in rendered(tokenizer, _turns(CONTENTS[0]), tools=[tool]):
            notes.append("the Modelfile's template has no place for tools; that in the GGUF does")
    return notes


def _pieces(tokenizer: Any, contents: Sequence[str], bos: str | None) -> list[str]:
    """The text between the contents of a conversation that asks for an answer."""
    text = _render(tokenizer, _turns(*contents), bos)
    pieces = []
    for content in contents:
        if content not in text:
            raise TunesmithError(f"the chat template does not write the message {content!r} as it is")
        before, _, text = text.partition(content)
        pieces.append(before)
    return [*pieces, text]


def _turns(*contents: str, system: str | None = None) -> Turns:
    """User and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def _render(tokenizer: Any, turns: Turns, bos: str | None, *, ask: bool = True) -> str:
    try:
        text = rendered(tokenizer, turns, add_generation_prompt=ask)
    except Exception as error:  # what a template raises is its author's choice
        roles = ", ".join(turn["role"] for turn in turns)
        raise TunesmithError(f"the chat template fails on messages of {roles}: {error}") from error
    return text.removeprefix(bos) if bos else text


def _literal(text: str) -> str:
    """Text as it is in a Go template."""
    return text.replace("{{", '{{ "{{" }}')
