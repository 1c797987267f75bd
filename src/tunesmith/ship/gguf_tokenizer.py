"""A tokenizer as the metadata of a GGUF file.

GGUF holds no tokenizer but names one of llama.cpp's and its data. Two of them can be what `tokenizers` does:

- `gpt2`: byte-level BPE by merges. How text is cut before them is named by `tokenizer.ggml.pre`. llama.cpp's own
  converter finds that name by hashing the ids of a text; here it is read off the pre-tokenizer itself, which is what
  the name stands for, and which added tokens and a post-processor do not change.
- `llama`: SentencePiece's BPE, bytes where a character is missing. It has no merges: of all neighbours it joins those
  whose joined piece has the highest score.

What neither can do as the tokenizer does it is refused by name.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType

from tunesmith.data.sandbox import rendered
from tunesmith.errors import TunesmithError
from tunesmith.text import shorten

Pieces = list[tuple[str, str]]

LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}|{REST}"
QWEN2_SPLIT = rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}|{REST}"
QWEN35_SPLIT = (
    rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS: dict[tuple[str, bool], str] = {
    ("bytes", False): "gpt-2",
    ("digits+bytes", False): "smollm",
    (LLAMA3_SPLIT, True): "llama-bpe",
    (LLAMA3_SPLIT, False): "smaug-bpe",
    (QWEN2_SPLIT, False): "qwen2",
    (QWEN35_SPLIT, False): "qwen35",
}
"""llama.cpp's name by the rule, and by whether a word that is a token is taken without merging."""

SPACE = "▁"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
UNMERGED = -1e4
"""The score of what must not come from joining: below those of all pieces that do."""
GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
PROBE = "Xprobe answerX"


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizerMetadata:
    """The `tokenizer.*` metadata of a file.

    `tokens` and `types` (`gguf.TokenType`) have a row for each of the model's embeddings. `scores` is for the model
    `llama`, `merges` for `gpt2`. `special` are ids by role (bos, eos, eot, eom, unk, pad). `ends` are all tokens that
    end an answer, the first of them `eos`. `notes` tell the user what GGUF can't say.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    special: Mapping[str, int]
    ends: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool | None = None
    chat_template: str | list[dict[str, str]] | None = None
    notes: tuple[str, ...] = ()

    def add_to(self, writer: GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        for role, number in self.special.items():
            getattr(writer, f"add_{role}_token_id")(number)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.add_space_prefix is not None:
            writer.add_add_space_prefix(self.add_space_prefix)
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kind:
    """The part of the metadata in which the two tokenizer models differ."""

    model: str
    pre: str
    scores: Mapping[str, float] = field(default_factory=dict)
    merges: tuple[str, ...] = ()
    add_space_prefix: bool | None = None
    notes: tuple[str, ...] = ()


def tokenizer_metadata(tokenizer: Any, rows: int, ends: Sequence[int] = ()) -> TokenizerMetadata:
    """The metadata of `tokenizer` for a model with `rows` embeddings.

    `ends` are the ids at which the model's generation settings end an answer; the tokenizer's own end token and the one
    that its chat template puts behind an answer are added. Raises TunesmithError for a tokenizer that llama.cpp has
    none for, one with more tokens than `rows`, and one without an end token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TunesmithError(f"{type(tokenizer).__name__} has no tokenizer.json, which GGUF is written from")
    program = json.loads(backend.to_str())
    kind = _kind(program)
    by_id = {number: token for token, number in backend.get_vocab(with_added_tokens=True).items()}
    if by_id and max(by_id) >= rows:
        raise TunesmithError(
            f"the tokenizer has tokens up to number {max(by_id)}, but the model has {rows} embeddings; "
            "resize them to the tokenizer, and save the model again"
        )
    all_ends = _ends(tokenizer, [number for number in ends if number < rows])
    adds_bos, adds_eos = _added_around(tokenizer)
    starts, template = _chat(tokenizer)
    notes = list(kind.notes)
    if adds_bos and starts is False:
        notes.append(f"the chat template writes no {tokenizer.bos_token}, so add_bos_token is false in the file")
    tokens = _rows(by_id, rows)
    unmerged = min([UNMERGED, *(score - 1 for score in kind.scores.values())])
    # llama.cpp looks for further tokens that end an answer at `eot` and `eom`.
    roles = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "unk", "pad")}
    roles |= dict(zip(("eos", "eot", "eom"), all_ends, strict=False))
    if more := ", ".join(tokens[number] for number in all_ends[3:]):
        notes.append(f"GGUF names three end tokens; {more} end an answer, too")
    return TokenizerMetadata(
        model=kind.model,
        pre=kind.pre,
        tokens=tokens,
        types=_types(tokenizer, by_id, rows, kind.model == "llama", all_ends),
        scores=tuple(kind.scores.get(token, unmerged) for token in tokens) if kind.model == "llama" else (),
        merges=kind.merges,
        special={role: int(number) for role, number in roles.items() if number is not None},
        ends=all_ends,
        add_bos=adds_bos and starts is not False,
        add_eos=adds_eos,
        add_space_prefix=kind.add_space_prefix,
        chat_template=template,
        notes=tuple(notes),
    )


def _kind(program: Mapping[str, Any]) -> _Kind:
    """The one of the two that does what the tokenizer does. Raises TunesmithError if neither does."""
    model = program["model"]
    if model["type"] == "BPE" and not (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
        return _sentencepiece(program) if model.get("byte_fallback") else _byte_level(program)
    why = (
        "llama.cpp's `llama` joins pieces by score instead of searching the likeliest split, and its `t5` has no bytes "
        "for missing characters"
        if model["type"] == "Unigram"
        else "llama.cpp has no such tokenizer for these models"
    )
    raise TunesmithError(f"a tokenizer of the type {model['type']} can't be written to GGUF: {why}")


def _byte_level(program: Mapping[str, Any]) -> _Kind:
    model = program["model"]
    notes: tuple[str, ...] = ()
    pre = PRE_TOKENIZERS.get((_rule(program["pre_tokenizer"]), bool(model.get("ignore_merges"))))
    if pre is None:
        raise TunesmithError(
            "the tokenizer cuts text in a way that GGUF has no name for here: "
            f"{_short(program['pre_tokenizer'])}. Those of {', '.join(sorted(PRE_TOKENIZERS.values()))} can be written"
        )
    normalizer = program["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise TunesmithError(f"GGUF can't say how the tokenizer changes text before it cuts it: {_short(normalizer)}")
    if normalizer is not None:
        notes = ("GGUF can't say that the tokenizer composes characters (NFC); composed text is not affected",)
    if not model["merges"]:
        raise TunesmithError("the tokenizer has no merges, without which llama.cpp reads no byte-level BPE")
    merges = tuple(" ".join(part.replace(" ", "Ġ") for part in pair) for pair in _merges(model))
    return _Kind(model="gpt2", pre=pre, merges=merges, notes=notes)


def _rule(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """The part of a pre-tokenizer that sets it apart: a key of PRE_TOKENIZERS, or "" for what is none."""
    steps = [] if pre_tokenizer is None else pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return ""
    cuts_words = steps[-1].get("use_regex", True)
    match steps[:-1]:
        case []:
            return "bytes" if cuts_words else ""
        case [{"type": "Digits", "individual_digits": True}]:
            return "digits+bytes" if cuts_words else ""
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]:
            return "" if cuts_words else str(pattern)
    return ""


def _sentencepiece(program: Mapping[str, Any]) -> _Kind:
    model = program["model"]
    missing = 256 - sum(1 for token in model["vocab"] if BYTE.fullmatch(token))
    if missing:
        raise TunesmithError(f"the tokenizer lacks {missing} of the 256 byte tokens <0x00> to <0xFF>")
    normalizer, pre_tokenizer = program["normalizer"], program["pre_tokenizer"]
    steps = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    prefix = spaces = False
    notes: tuple[str, ...] = ()
    for step in steps:
        if step == {"type": "Prepend", "prepend": SPACE}:
            prefix = True
        elif step == {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}:
            spaces = True
        else:
            raise TunesmithError(f"GGUF can't say how the tokenizer changes text before it cuts it: {_short(step)}")
    if pre_tokenizer is not None:
        if pre_tokenizer["type"] != "Metaspace" or pre_tokenizer["replacement"] != SPACE or pre_tokenizer["split"]:
            raise TunesmithError(f"the tokenizer cuts text in a way that GGUF can't say: {_short(pre_tokenizer)}")
        spaces, prefix = True, prefix or pre_tokenizer["prepend_scheme"] != "never"
        if prefix:
            notes = (
                "llama.cpp puts a space before the text behind every special token, and before text that begins with "
                "one; this tokenizer doesn't",
            )
    if not spaces:
        raise TunesmithError("the tokenizer doesn't write spaces as ▁, which llama.cpp's `llama` tokenizer always does")
    return _Kind(
        model="llama", pre="default", scores=_piece_scores(_merges(model)), add_space_prefix=prefix, notes=notes
    )


def _piece_scores(merges: Pieces) -> dict[str, float]:
    """A score for each joined piece, the higher the earlier it is joined: minus its place among them.

    Raises TunesmithError where the merges of a piece don't follow each other: no score can say that.
    """
    scores: dict[str, float] = {}
    last = ""
    for left, right in merges:
        piece = left + right
        if piece != last and piece in scores:
            raise TunesmithError(
                f"the tokenizer's merges don't follow from scores of pieces: {piece!r} is joined in several places"
            )
        scores.setdefault(piece, -float(len(scores)))
        last = piece
    return scores


def _merges(model: Mapping[str, Any]) -> Pieces:
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]


def _rows(by_id: Mapping[int, str], rows: int) -> tuple[str, ...]:
    """The tokens of all rows. Those that the tokenizer lacks get a name of their own, as llama.cpp takes none twice."""
    taken = set(by_id.values())
    tokens = []
    for number in range(rows):
        token = by_id.get(number, f"[PAD{number}]")
        while number not in by_id and token in taken:
            token = f"[{token}]"
        tokens.append(token)
    return tuple(tokens)


def _types(tokenizer: Any, by_id: Mapping[int, str], rows: int, pieces: bool, ends: Sequence[int]) -> tuple[int, ...]:
    """llama.cpp's type of each row. Special tokens and those that end an answer are never shown. Only a tokenizer of
    `pieces` has bytes, and a token for what is unknown."""
    added = tokenizer.added_tokens_decoder

    def kind(number: int) -> TokenType:
        if number not in by_id:
            return TokenType.UNUSED
        if pieces and number == tokenizer.unk_token_id:
            return TokenType.UNKNOWN
        if number in ends or (number in added and added[number].special):
            return TokenType.CONTROL
        if number in added:
            return TokenType.USER_DEFINED
        return TokenType.BYTE if pieces and BYTE.fullmatch(by_id[number]) else TokenType.NORMAL

    return tuple(int(kind(number)) for number in range(rows))


def _ends(tokenizer: Any, of_model: Sequence[int]) -> tuple[int, ...]:
    numbers = [tokenizer.eos_token_id, _end_of_turn(tokenizer), *of_model]
    ends = tuple(dict.fromkeys(number for number in numbers if number is not None))
    if not ends:
        raise TunesmithError(
            "the model has no end token, so llama.cpp would take one of its own; name the tokenizer's eos_token"
        )
    return ends


def _end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind an answer."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": PROBE}]
    try:
        text = rendered(tokenizer, turns)
    except Exception:  # what a template raises is its author's choice; `_chat` says it
        return None
    after = text.rpartition(PROBE)[2].lstrip()
    added = tokenizer.added_tokens_decoder.items()
    return next((number for number, token in added if token.special and after.startswith(token.content)), None)


def _added_around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether the tokenizer puts its first token before a text, and its end token behind."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before, after in ((False, False), (True, False), (False, True), (True, True)):
        if whole == bos * before + plain + eos * after:
            return before, after
    names = tokenizer.convert_ids_to_tokens(whole)
    raise TunesmithError(f"GGUF can't say what the tokenizer puts around a text: {' '.join(map(repr, names))}")


def _chat(tokenizer: Any) -> tuple[bool | None, str | list[dict[str, str]] | None]:
    """Whether chats begin with the bos token (None without a template), and the template for the file."""
    templates = tokenizer.chat_template
    if templates is None:
        return None, None
    if isinstance(templates, str):
        written: str | list[dict[str, str]] = plain_jinja(templates)
    else:
        written = [{"name": name, "template": plain_jinja(text)} for name, text in templates.items()]
    try:
        text = rendered(tokenizer, [{"role": "user", "content": PROBE}])
    except Exception as error:
        raise TunesmithError(f"the chat template fails on a single user message: {error}") from error
    return bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token), written


def plain_jinja(template: str) -> str:
    """The template without `{% generation %}`, an extension of `transformers`: what is in it is always said."""
    return GENERATION.sub(lambda m: f"{m[1]}{'endif' if m[2] else 'if true'}{m[3]}", template)


def _short(part: Any) -> str:
    return shorten(json.dumps(part, ensure_ascii=False), 300)
