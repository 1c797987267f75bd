"""What the templates beside this file must give, written a second time in Python, and tokenizers that know them all.

A style takes a conversation and yields its text in pieces, each with whether the model generates it. The functions
follow the templates' documentation, not `tunesmith.data.chat`: what they say is what the tests expect.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tunesmith.data.chat import Rendering, RenderOptions
from tunesmith.data.chat import render as render_with
from tunesmith.data.template import ChatTemplate
from tunesmith.types import Conversation, Message, TrainOn

TEMPLATES = Path(__file__).parent / "templates"
Pieces = Iterator[tuple[str, bool]]
Turns = Sequence[Mapping[str, Any]]

SPECIAL = """
<unk> <s> </s> <|im_start|> <|im_end|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <start_of_turn>
<end_of_turn> <|user|> <|assistant|> <|system|> <|end|> <|endoftext|> [INST] [/INST] [AVAILABLE_TOOLS]
[/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] <|User|> <|Assistant|> [gMASK] <sop> <|observation|>
<|start|> <|channel|> <|message|> <|return|> <|turn|> <|response|> <|end_response|> <|end_turn|>
"""
# Known as one token each, but not special, as in Qwen's vocabulary.
ADDED = "<think> </think> <tool_call> </tool_call> <tool_response> </tool_response> <tools> </tools>"


@dataclass(frozen=True, kw_only=True)
class Style:
    """A template, what it gives, and which conversations it takes.

    `changes`: it renders an answer in another form while it is the last, or what stands before it.
    """

    name: str
    pieces: Callable[[Turns], Pieces]
    eos: str
    bos: str | None = None
    reasoning: bool = False
    alternates: bool = False
    changes: bool = False

    @property
    def source(self) -> str:
        return (TEMPLATES / f"{self.name}.jinja").read_text()


def chatml(messages: Turns) -> Pieces:
    for message in messages:
        yield f"<|im_start|>{message['role']}\n", False
        yield f"{message['content']}<|im_end|>", message["role"] == "assistant"
        yield "\n", False


def llama2(messages: Turns) -> Pieces:
    system = ""
    for message in messages:
        content = message["content"].strip()
        if message["role"] == "system":
            system = f"<<SYS>>\n{message['content']}\n<</SYS>>\n\n"
        elif message["role"] == "user":
            yield f"<s>[INST] {system}{content} [/INST]", False
            system = ""
        else:
            yield f" {content} </s>", True


def llama3(messages: Turns) -> Pieces:
    yield "<s>", False
    for message in messages:
        yield f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False
        yield f"{message['content'].strip()}<|eot_id|>", message["role"] == "assistant"


def gemma(messages: Turns) -> Pieces:
    yield "<s>", False
    system = ""
    for message in messages:
        if message["role"] == "system":
            system = message["content"] + "\n\n"
            continue
        answer = message["role"] == "assistant"
        yield f"<start_of_turn>{'model' if answer else 'user'}\n{system}", False
        yield message["content"].strip() + "<end_of_turn>", answer
        yield "\n", False
        system = ""


def phi3(messages: Turns) -> Pieces:
    for message in messages:
        yield f"<|{message['role']}|>\n", False
        yield f"{message['content']}<|end|>", message["role"] == "assistant"
        yield "\n", False
    yield "<|endoftext|>", False


def mistral(messages: Turns) -> Pieces:
    yield "<s>", False
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    for i, message in enumerate(messages):
        if message["role"] == "user":
            system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" and i == last else ""
            yield f"[INST] {system}{message['content']}[/INST]", False
        elif message["role"] == "assistant":
            yield f" {message['content'].strip()}</s>", True


def qwen3(messages: Turns) -> Pieces:
    last_user = max(i for i, message in enumerate(messages) if message["role"] == "user")
    for i, message in enumerate(messages):
        yield f"<|im_start|>{message['role']}\n", False
        content = message["content"]
        if message["role"] != "assistant":
            yield f"{content}<|im_end|>", False
        else:
            reasoning = message.get("reasoning_content") or ""
            if i > last_user and (i == len(messages) - 1 or reasoning):
                content = "<think>\n" + reasoning.strip("\n") + "\n</think>\n\n" + content.lstrip("\n")
            yield f"{content}<|im_end|>", True
        yield "\n", False


def deepseek(messages: Turns) -> Pieces:
    yield "<s>", False
    for i, message in enumerate(messages):
        if message["role"] == "system":
            yield message["content"], False
        elif message["role"] == "user":
            yield f"<|User|>{message['content']}", False
        elif i < len(messages) - 1:
            yield "<|Assistant|>", False
            yield f"{message['content']}</s>", True
        else:
            yield "<|Assistant|><think>\n", False
            yield f"{message.get('reasoning_content') or ''}\n</think>\n\n{message['content']}</s>", True


def merged_system(messages: Turns) -> Pieces:
    system = ""
    for message in messages:
        if message["role"] == "system":
            system = message["content"] + "\n\n"
        elif message["role"] == "user":
            yield f"### Instruction:\n{system}{message['content']}\n\n", False
            system = ""
        else:
            yield "### Response:\n", False
            yield f"{message['content']}</s>", True
            yield "\n\n", False


def stripped(messages: Turns) -> Pieces:
    for message in messages:
        yield f"<|{message['role']}|>\n", False
        yield f"{message['content'].strip()}</s>", message["role"] == "assistant"
        yield "\n", False


def endless(messages: Turns) -> Pieces:
    for message in messages:
        yield f"{message['role'].capitalize()}:", False
        yield f" {message['content']}\n", message["role"] == "assistant"


def glm(messages: Turns) -> Pieces:
    yield "[gMASK]<sop>", False
    ends = False
    for message in messages:
        yield f"<|{message['role']}|>", ends
        ends = message["role"] == "assistant"
        yield f"\n{message['content']}", ends


def indexed(messages: Turns) -> Pieces:
    for i, message in enumerate(messages):
        if message["role"] == "system":
            yield f"{message['content']}\n\n", False
        elif message["role"] == "user":
            yield f"[Round {i // 2 + 1}]\n\nQ: {message['content']}\n\n", False
        else:
            yield "A:", False
            yield f" {message['content']}</s>", True
            yield "\n\n", False


def harmony(messages: Turns) -> Pieces:
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            yield f"<|start|>{message['role']}<|message|>{message['content']}<|end|>", False
            continue
        yield "<|start|>assistant", False
        last = i == len(messages) - 1
        if last and message.get("reasoning_content"):
            yield f"<|channel|>analysis<|message|>{message['reasoning_content']}<|end|><|start|>assistant", True
        yield f"<|channel|>final<|message|>{message['content']}", True
        yield ("<|return|>", True) if last else ("<|end|>", False)


def last_end(messages: Turns) -> Pieces:
    for i, message in enumerate(messages):
        if message["role"] == "user":
            yield f"USER: {message['content']}\n", False
            continue
        yield "ASSISTANT:", False
        yield f" {message['content']}", True
        yield ("</s>", True) if i == len(messages) - 1 else ("\n", False)


def two_ends(messages: Turns) -> Pieces:
    yield "<s>", False
    for message in messages:
        yield f"<|turn|><|{message['role']}|>", False
        if message["role"] == "assistant":
            yield f"<|response|>{message['content']}<|end_response|><|end_turn|>", True
        else:
            yield f"{message['content']}<|end_turn|>", False


STYLES = {
    style.name: style
    for style in (
        Style(name="chatml", pieces=chatml, eos="<|im_end|>"),
        Style(name="generation", pieces=chatml, eos="<|im_end|>"),
        Style(name="llama2", pieces=llama2, eos="</s>", bos="<s>", alternates=True),
        Style(name="llama3", pieces=llama3, eos="<|eot_id|>", bos="<s>"),
        Style(name="gemma", pieces=gemma, eos="</s>", bos="<s>", alternates=True),
        Style(name="phi3", pieces=phi3, eos="<|endoftext|>"),
        Style(name="mistral", pieces=mistral, eos="</s>", bos="<s>", changes=True),
        Style(name="qwen3", pieces=qwen3, eos="<|im_end|>", reasoning=True, changes=True),
        Style(name="deepseek", pieces=deepseek, eos="</s>", bos="<s>", reasoning=True, changes=True),
        Style(name="merged_system", pieces=merged_system, eos="</s>"),
        Style(name="stripped", pieces=stripped, eos="</s>"),
        Style(name="endless", pieces=endless, eos="</s>"),
        Style(name="glm", pieces=glm, eos="<|endoftext|>"),
        Style(name="indexed", pieces=indexed, eos="</s>"),
        Style(name="harmony", pieces=harmony, eos="<|return|>", reasoning=True, changes=True),
        Style(name="last_end", pieces=last_end, eos="</s>", changes=True),
        Style(name="two_ends", pieces=two_ends, eos="<|end_turn|>", bos="<s>"),
    )
}


def _tokenizer(backend: Tokenizer, name: str, **tokens: str | None) -> Any:
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL.split()])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED.split()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **tokens)
    if name:
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    return tokenizer


WORDS = (
    "System system user assistant model Hi Yes No Be brief Why Because Well Hm \n 0 1 2 3 Instruction "
    "Response User Assistant USER ASSISTANT Round Q A final analysis SYS of Today ipython call name arguments "
    'f g x y {{ }} . , ! ? : ; # < > / [ ] { } " ( ) - _ | '
)


@cache
def words(name: str, eos: str, bos: str | None = None) -> Any:
    """A tokenizer with a token for each of some words, signs, and white spaces: ids are easy to follow by eye."""
    listed = [*SPECIAL.split(), *ADDED.split(), " ", "\n", *dict.fromkeys(WORDS.split())]
    vocabulary = {word: i for i, word in enumerate(listed)}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|\s|[^\w\s]"), "isolated")
    backend.decoder = decoders.Fuse()
    return _tokenizer(backend, name, eos_token=eos, bos_token=bos)


@cache
def bytes_(name: str, eos: str, bos: str | None = None) -> Any:
    """A byte-level tokenizer with few merges: some cross the bounds of characters, of words, of lines."""
    smile, you = (
        pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)[0][0] for text in ("😀", " 你")
    )
    merges = [(smile[1], smile[2]), (you[0], you[1]), ("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("Ġ", "Ġ"), ("Ċ", "Ċ")]
    merges += [(":", "Ġ"), (".", "Ċ"), ("Ċ", "Ġ"), ("!", "Ċ"), ("r", "Ċ"), ("t", "Ċ"), ("Ċ", "A")]
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(one + two for one, two in merges)]
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    return _tokenizer(backend, name, eos_token=eos, bos_token=bos)


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def calls(*names: str, **fields: Any) -> dict[str, Any]:
    made = [
        {"type": "function", "function": {"name": name, "arguments": {"x": i}}} for i, name in enumerate(names, start=1)
    ]
    return assistant("", tool_calls=made, **fields)


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def conversation(messages: Turns, **fields: Any) -> Conversation:
    """Messages as a Conversation; `weight` in a message is its weight."""
    made = tuple(
        Message(fields={k: v for k, v in message.items() if k != "weight"}, weight=message.get("weight", 1.0))
        for message in messages
    )
    return Conversation(messages=made, **fields)


def template(name: str, eos: str = "</s>", bos: str | None = "<s>", **kwargs: Any) -> ChatTemplate:
    style = STYLES.get(name, Style(name=name, pieces=lambda messages: iter(()), eos=eos, bos=bos))
    return ChatTemplate(words(name, style.eos, style.bos), kwargs)


def render(talk: Conversation, template: ChatTemplate, train_on: TrainOn = "assistant", **options: Any) -> Rendering:
    return render_with(talk, template, RenderOptions(train_on=train_on, **options))


def spans(rendering: Rendering) -> list[str]:
    """What is supervised, over all documents in order."""
    return [document.text[span.start : span.stop] for document in rendering.documents for span in document.spans]


def supervised(name: str, messages: Any, train_on: TrainOn = "assistant", **fields: Any) -> list[str]:
    return spans(render(conversation(messages, **fields), template(name), train_on))


def with_template(source: str) -> ChatTemplate:
    tokenizer = words("chatml", "<|im_end|>")
    own = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>", unk_token="<unk>")
    own.chat_template = source
    return ChatTemplate(own)
