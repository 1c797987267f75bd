"""The prompt that a conversation is at inference, in the form that the model was trained in.

A run may have turned a switch of its chat template, so that answers without reasoning follow a prompt without thinking.
What it turned is kept with the tokenizer, in `tokenizer_config.json`, and asked for wherever the model answers. Text of
a message that reads as a control token stays text: nobody who asks can end his turn and open another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.data.content import MARKED, control_tokens, marked
from tunesmith.data.sandbox import rendered
from tunesmith.data.template import special_pattern
from tunesmith.data.tokenize import untrimmed, without_prefix
from tunesmith.errors import TunesmithError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEY = "tunesmith"
"""In `tokenizer_config.json`."""
WHITE = 8
"""So many times as long a prompt may be with its white space, of which a tokenizer may make few tokens or none."""


class PromptTooLong(TunesmithError):
    """A prompt has more characters than its reader takes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedForm:
    """How a run rendered its conversations: with which arguments of the chat template, and whether text that reads as a
    control token was one (`keep`) or ordinary characters (`text`)."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    specials: Literal["keep", "text"] = "text"


def remember(tokenizer: "PreTrainedTokenizerBase", form: TrainedForm) -> None:
    """Keep the form with the tokenizer, where it is not that of any model."""
    tokenizer.init_kwargs.pop(KEY, None)
    kept: dict[str, Any] = {"chat_template_kwargs": dict(form.arguments)} if form.arguments else {}
    if form.specials == "keep":
        kept["specials_in_content"] = "keep"
    if kept:
        tokenizer.init_kwargs[KEY] = kept


def form_of(tokenizer: "PreTrainedTokenizerBase") -> TrainedForm:
    """The form in which the model of this tokenizer was trained, as far as that was kept."""
    return form_in(getattr(tokenizer, "init_kwargs", {}))


def form_in(settings: Mapping[str, Any]) -> TrainedForm:
    """The form that `tokenizer_config.json` has."""
    kept = settings.get(KEY)
    arguments = kept.get("chat_template_kwargs") if isinstance(kept, dict) else None
    specials = kept.get("specials_in_content") if isinstance(kept, dict) else None
    return TrainedForm(
        arguments=arguments if isinstance(arguments, dict) else {}, specials="keep" if specials == "keep" else "text"
    )


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any] | None = None,
    *,
    keep_specials: bool = False,
    most: int | None = None,
) -> list[int]:
    """The tokens of a conversation up to where the assistant answers. Without a chat template there are no roles: the
    one message is the text to go on with. `arguments` are the chat template's, `tools` among them; those that the model
    was trained with need not be given. `keep_specials`: text of a message that reads as a control token is one, where
    the model was trained so. `most`: characters that are read, white space left out, and with it
    `WHITE` times as many.

    Raises:
        PromptTooLong: there are more; it has not been tokenized then, which takes long.
    """
    if tokenizer.chat_template is None:
        if len(messages) == 1:
            return text_ids(tokenizer, messages[0]["content"], most)
        raise TunesmithError(
            f"the tokenizer has no chat template, so a prompt is one text; this one is {len(messages)} messages"
        )
    text = shown_text(tokenizer, messages, arguments, keep_specials=keep_specials)
    _check_length(text, most)
    ids = shown_ids(tokenizer, text)
    if not ids:
        raise TunesmithError("the prompt is empty")
    return ids


def shown_text(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any] | None = None,
    *,
    keep_specials: bool = False,
    ask: bool = True,
) -> str:
    """A conversation as its template shows it, for `shown_ids`: with a mark in what reads as a control token and is
    none. `ask` adds the generation prompt; the others as for `prompt_ids`."""
    form, turns = form_of(tokenizer), [dict(message) for message in messages]
    keep = keep_specials and form.specials == "keep"
    literal = [] if keep else control_tokens(turns, special_pattern(tokenizer))
    return rendered(
        tokenizer,
        marked(turns, literal) if literal else turns,
        add_generation_prompt=ask,
        **{**form.arguments, **(arguments or {})},
    )


def shown_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The tokens of a text of `shown_text`."""
    if MARKED.search(text):
        return _ids_in_parts(tokenizer, text)
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _ids_in_parts(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """The tokens of a text that is cut at its marks, within what would be control tokens."""
    backend = untrimmed(tokenizer)
    bounds = [0, *(place for mark in MARKED.finditer(text) for place in mark.span()), len(text)]
    parts = [text[start:stop] for start, stop in [*pairwise(bounds)][::2]]
    ids: list[int] = backend.encode(parts[0], add_special_tokens=False).ids
    bare = without_prefix(backend)
    for part in parts[1:]:
        ids += bare.encode(part, add_special_tokens=False).ids
    return ids


def _check_length(text: str, most: int | None) -> None:
    if most is None or len(text) <= most:
        return
    size = sum(map(len, text.split()))
    if size > most:
        raise PromptTooLong(f"the prompt has {size:,} characters, and at most {most:,} are read")
    if len(text) > WHITE * most:
        raise PromptTooLong(
            f"the prompt has {len(text):,} characters with its white space, and at most {WHITE * most:,} are read"
        )


def text_ids(tokenizer: "PreTrainedTokenizerBase", text: str, most: int | None = None) -> list[int]:
    """The tokens of a text to go on with. Raises TunesmithError where there are none. `most`: as for `prompt_ids`."""
    _check_length(text, most)
    ids = tokenizer(text, verbose=False)["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        ids = ids[:-1]
    if not ids:
        raise TunesmithError("the prompt is empty")
    return list(ids)
