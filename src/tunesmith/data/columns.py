"""What columns are called elsewhere: a guess at the `columns` setting for rows that have no known format."""

from collections.abc import Mapping, Sequence
from typing import Any

QUESTIONS = (
    *("instruction", "question", "query", "prompt", "user", "human", "request", "problem", "source", "input", "text"),
    *("sentence", "review", "message", "問題", "问题", "提問", "提问", "指令", "題目", "题目", "輸入", "输入", "質問"),
    *("文本", "內容", "内容", "frage", "pregunta", "pergunta", "domanda"),
)
ANSWERS = (
    *("output", "answer", "response", "completion", "target", "reply", "assistant", "solution", "label", "category"),
    *("class", "intent", "sentiment", "summary", "translation", "答案", "回答", "回覆", "回复", "輸出", "输出", "標籤"),
    *("标签", "類別", "类别", "分類", "分类", "摘要", "応答"),
    *("antwort", "réponse", "respuesta", "resposta", "risposta"),
)
CONTEXTS = ("context", "input", "passage", "background", "背景", "上下文", "補充", "补充")
TEXTS = ("content", "body", "document", "article", "passage", "文本", "內容", "内容", "文章", "正文")
"""What columns are called elsewhere, the likeliest first."""
ASKS = ("question", "query", "prompt", "instruction", "request", "問題", "问题", "提問", "提问", "質問")
REPLIES = ("answer", "reply", "response", "答案", "回答", "回覆", "回复")
"""Words of longer names: Customer question, 客服回覆."""


def guessed_columns(row: Mapping[str, Any], *, templated: bool) -> dict[str, str] | None:
    """A `columns` setting for a row without a known format; None when the names of its columns say nothing.

    `templated`: the model has a chat template, so a question and an answer become two turns of it.
    """
    answer = named_column(row, ANSWERS) or _column_with(row, REPLIES)
    question = named_column(row, QUESTIONS, but=answer) or _column_with(row, ASKS, but=answer)
    talks = [name for name, value in row.items() if _is_talk(value)]
    if question is not None and answer is not None and question in talks:
        # Turns and a text can't be joined: that takes a `formatting_func`.
        return {"prompt": question, "completion": answer} if answer in talks else None
    if talks:
        has_roles = any("role" in turn for turn in row[talks[0]])
        return {"messages" if has_roles else "conversations": talks[0]}
    if question is not None and answer is not None:
        return question_columns(row, question, answer, templated=templated)
    text = named_column(row, TEXTS)
    return None if text is None else {"text": text}


def _column_with(row: Mapping[str, Any], words: Sequence[str], but: str | None = None) -> str | None:
    """The first column of `row` that has one of `words` in its name, and prose in it: no date, and no number."""
    for name, value in row.items():
        if name == but or not isinstance(value, str) or not is_prose(value):
            continue
        parts = str(name).casefold().replace("-", " ").replace("_", " ").split()
        if any(word in parts if word.isascii() else word in str(name) for word in words):
            return name
    return None


def is_prose(text: str) -> bool:
    """Whether more of a text is letters than not, white space aside."""
    letters, others = sum(map(str.isalpha, text)), sum(not character.isspace() for character in text)
    return 2 * letters > others


def _is_talk(value: Any) -> bool:
    """Whether a value is a list of turns that say who speaks."""
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        return False
    return any("role" in turn or "from" in turn for turn in value)


def likely_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of `rows` whose names say nothing, in their order, as far as they are texts in the first row; before
    them the two that hold most prose, which are likelier a question and an answer than a number, a date and a name."""
    first = rows[0]
    texts = [str(name) for name, value in first.items() if isinstance(value, str)]
    prose = {name: sum(len(text) for row in rows if is_prose(text := str(row.get(name) or ""))) for name in texts}
    most = sorted(texts, key=lambda name: -prose[name])[:2]
    return sorted(texts, key=lambda name: name not in most)


def pair_columns(question: str, answer: str, *, templated: bool) -> dict[str, str]:
    """The `columns` setting for rows whose column `question` is answered by `answer`."""
    ours = ("instruction", "output") if templated else ("prompt", "completion")
    # A name that is ours already needs no line.
    return {name: theirs for name, theirs in zip(ours, (question, answer), strict=True) if name != theirs}


def question_columns(row: Mapping[str, Any], question: str, answer: str, *, templated: bool) -> dict[str, str]:
    """As `pair_columns`, with the column that belongs to the question as its input."""
    columns = pair_columns(question, answer, templated=templated)
    context = named_column(row, CONTEXTS, but=question)
    if context not in (None, answer, "input") and "prompt" not in columns and templated:
        columns["input"] = str(context)
    return columns


def named_column(row: Mapping[str, Any], names: Sequence[str], but: str | None = None) -> str | None:
    """The first of `names` that is a column of `row` with content, in any spelling: its name there."""
    known = {"_".join(str(name).casefold().replace("-", " ").split()): name for name in reversed(list(row))}
    there = (known[name] for name in names if name in known)
    return next((name for name in there if name != but and row[name] not in (None, "")), None)
