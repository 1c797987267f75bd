"""The values that travel from a source row to the loss, one type per stage.

source row -> Conversation | Text | Tokens | Pair | Judged -> Example (token ids, labels, weights)
-> Batch (`data.batches`)
"""

from dataclasses import dataclass, field
from typing import Any, Literal

IGNORE_INDEX = -100
"""The label of a token that is not supervised; the value PyTorch's cross-entropy ignores."""

TrainOn = Literal["all", "completion", "assistant", "last_assistant"]
"""Which part of a row is supervised: everything, what follows the prompt, every assistant turn, or only the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn of a conversation, as the chat template will see it.

    `fields` is the turn itself in OpenAI's form (`data.messages`): `role`, `content`, and where the row has them
    `tool_calls`, `tool_call_id`, `name`, `reasoning_content`, and keys of its own. `weight` scales the loss of its
    supervised tokens; 0 leaves the turn unsupervised.
    """

    fields: dict[str, Any]
    weight: float = 1.0

    @property
    def role(self) -> str:
        return str(self.fields["role"])


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Messages to be rendered by a chat template.

    The first `prompt_length` messages are the prompt of a prompt-completion row; None when the row makes no such
    difference. `tools` are in OpenAI's form. `notes`: what a report is to say once of how the row was read.
    """

    messages: tuple[Message, ...]
    prompt_length: int | None = None
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Text:
    """Plain text; `prompt` is the part before the completion, None when the row makes no such difference."""

    text: str
    prompt: str | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """A row that was tokenized by its owner; taken as it is. `labels` None supervises every token."""

    input_ids: list[int]
    labels: list[int] | None = None
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two answers to one prompt, each with the prompt before it; `chosen` is the better one.

    Conversations have their prompt as the first `prompt_length` messages, texts as `prompt`. `margin` says by how much
    the better one is better, in units of the reward, where the row knows. `weight` scales the loss of the pair.
    """

    chosen: Conversation | Text
    rejected: Conversation | Text
    margin: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A prompt with one answer, which is one that the model should give (`good`) or should not."""

    answer: Conversation | Text
    good: bool
    weight: float = 1.0


Row = Conversation | Text | Tokens | Pair | Judged


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Characters [start, stop) of a rendered text, supervised with `weight`."""

    start: int
    stop: int
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Rendered:
    """A text and what is supervised of it.

    `prompt` is the number of characters before the completion of a prompt-completion row, else None.
    `special_tokens`: the tokenizer is to add its own, as it does to plain text. `closed`: the text ends with what is
    supervised, so that an end token belongs there. `literal` are the places behind the first character of each
    text in a message that reads as a control token and is to be ordinary characters.
    """

    text: str
    spans: tuple[Span, ...]
    prompt: int | None = None
    special_tokens: bool = False
    closed: bool = True
    literal: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether all tokens are treated alike: then nobody asks where a token's characters are."""
        return not self.prompt and all(span.start == 0 and span.stop == len(self.text) for span in self.spans)


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A row in tokens: three lists of equal length.

    `labels[i]` is `input_ids[i]` where token `i` is supervised, IGNORE_INDEX elsewhere (not shifted);
    `weights[i]` scales the loss of token `i`, and is None when every supervised token weighs 1.

    Documents of one row that begin alike are one example: `parts` has the lengths of the segments that it is made of,
    and for each the segment that it continues, or -1 (`data.prefix`). None where the example is one document.

    `score` is what is known of an answer beside its tokens: the margin of the pair that it belongs to; 1 for one that
    is judged good, -1 for one that is judged bad; else 0. `reference[i]` is the log-probability in nats that the
    reference gives token `i` where that is supervised, None where nobody has computed it yet.
    """

    input_ids: list[int]
    labels: list[int]
    weights: list[float] | None = None
    parts: tuple[list[int], list[int]] | None = None
    score: float = 0.0
    reference: list[float] | None = None

    @property
    def supervised(self) -> int:
        """How many tokens have a label. The first token never contributes to the loss: nothing predicts it."""
        return sum(label != IGNORE_INDEX for label in self.labels)

    @property
    def target_count(self) -> int:
        """How many tokens contribute to the loss: those with a label, but for the first."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])
