"""Preference rows: how a pair is found in a row, what is refused, and the tree of tokens that it becomes."""

from typing import Any

import pytest

from tests.data.styles import words
from tunesmith.data.batches import FlatCollator, pairs_of
from tunesmith.data.formats import FormatOptions, detect, parse, parse_rows
from tunesmith.data.notes import UNANSWERED
from tunesmith.data.pack import pack_dataset
from tunesmith.data.preflight import judge
from tunesmith.data.prepare import Preparation, prepare
from tunesmith.data.samplers import with_blank_rows
from tunesmith.data.tokenize import Counts, EncodeOptions, Encoder
from tunesmith.errors import TunesmithError
from tunesmith.types import IGNORE_INDEX, Conversation, Example, Judged, Pair, Text

SYSTEM = {"role": "system", "content": "Be brief"}
USER = {"role": "user", "content": "Hi"}
YES, NO = {"role": "assistant", "content": "Yes"}, {"role": "assistant", "content": "No"}


def read(row: dict[str, Any], task: Any = "pairs", **options: Any) -> Any:
    made = FormatOptions(task=task, **options)
    return parse(row, detect(row, made), made)


def said(answer: Conversation | Text) -> tuple[int | None, list[Any]]:
    assert isinstance(answer, Conversation)
    return answer.prompt_length, [message.fields for message in answer.messages]


def test_texts() -> None:
    pair = read({"prompt": "2+2=", "chosen": "4", "rejected": "5", "margin": 0.5, "weight": 2})
    assert pair == Pair(
        chosen=Text(text="2+2=4", prompt="2+2="), rejected=Text(text="2+2=5", prompt="2+2="), margin=0.5, weight=2.0
    )


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": YES, "rejected": NO},
        {"prompt": [USER], "chosen": "Yes", "rejected": "No"},
        {"prompt": "Hi", "chosen": [YES], "rejected": [NO]},
        {"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"instruction": "Hi", "chosen": "Yes", "rejected": "No"},
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": {"from": "gpt", "value": "Yes"},
            "rejected": {"from": "gpt", "value": "No"},
        },
    ],
    ids=["messages", "one", "texts", "text+messages", "whole+prompt", "whole", "instruction", "sharegpt"],
)
def test_each_way_to_write_a_pair_of_messages(row: dict[str, Any]) -> None:
    pair = read(row)
    assert (said(pair.chosen), said(pair.rejected)) == ((1, [USER, YES]), (1, [USER, NO]))


def test_whole_conversations_have_their_common_messages_as_prompt() -> None:
    long = [SYSTEM, USER, YES, USER]
    pair = read({"chosen": [*long, {"role": "assistant", "content": "Yes, it is"}], "rejected": [*long, YES, USER, NO]})
    assert (pair.chosen.prompt_length, pair.rejected.prompt_length) == (4, 4)
    same = read({"chosen": [USER, YES], "rejected": [USER, YES, USER, NO]})  # the last of the shorter is its answer
    assert (same.chosen.prompt_length, same.rejected.prompt_length) == (1, 1)


def test_a_system_prompt_and_tools_beside_it_belong_to_both_sides() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    pair = read({"system": "Be brief", "prompt": "Hi", "chosen": "Yes", "rejected": "No"})
    assert said(pair.rejected) == (2, [SYSTEM, USER, NO])
    pair = read({"chosen": [USER, YES], "rejected": [USER, NO], "tools": [tool], "system": "Be brief"})
    assert said(pair.chosen) == (2, [SYSTEM, USER, YES])
    assert pair.chosen.tools == pair.rejected.tools == [tool]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"chosen": "\n\nHuman: Hi", "rejected": "x"}, "the row has no prompt"),
        ({"chosen": [USER, YES], "rejected": [SYSTEM, USER, NO]}, "share no prompt"),
        ({"chosen": [USER, YES, USER, NO], "rejected": [USER, YES, SYSTEM, NO]}, "part at message 3"),
        ({"prompt": "Bye", "chosen": [USER, YES], "rejected": [USER, NO]}, "no message before the answers says that"),
        ({"prompt": "Hi", "chosen": "Yes", "rejected": [NO]}, "of two kinds"),
        ({"prompt": "Hi", "completion": "Yes"}, "no pair: the columns are completion, prompt"),
        ({"chosen_messages": [], "rejected_messages": []}, r"columns: \{chosen: chosen_messages"),
        ({"messages": [USER, YES], "label": True}, "tunesmith kto"),
        ({"prompt": "Hi", "chosen": "Yes", "rejected": "No", "margin": "big"}, "'margin' is text"),
        ({"prompt": "Hi", "chosen": "Yes", "rejected": "No", "margin": 1e300}, "'margin' is a number"),
        ({"prompt": "Hi", "chosen": "Yes", "rejected": "No", "history": [["a", "b"]]}, "'history' would be lost"),
    ],
)
def test_what_is_refused(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(TunesmithError, match=problem):
        read(row)


def test_columns_are_renamed() -> None:
    row = {"question": "Hi", "good": "Yes", "bad": "No"}
    pair = read(row, columns={"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert pair.rejected == Text(text="HiNo", prompt="Hi")
    with pytest.raises(TunesmithError, match="'chosen' is not a column that a format uses"):
        FormatOptions(columns={"chosen": "good"})


def test_judged_answers() -> None:
    answer = read({"messages": [USER, YES], "label": False, "weight": 0.5}, "judged")
    assert isinstance(answer, Judged)
    assert (answer.good, answer.weight, said(answer.answer)) == (False, 0.5, (1, [USER, YES]))
    assert read({"prompt": "Hi", "completion": "Yes", "label": True}, "judged") == Judged(
        answer=Text(text="HiYes", prompt="Hi"), good=True
    )
    with pytest.raises(TunesmithError, match="'label' is text"):
        read({"messages": [USER, YES], "label": "good"}, "judged")
    with pytest.raises(TunesmithError, match="no label"):
        read({"messages": [USER, YES]}, "judged")


# Tokens


TALK = [{"role": "user", "content": "Hi Be brief"}]


def pair_of(better: str, worse: str, prompt: Any = TALK, **more: Any) -> dict[str, Any]:
    sides = {"chosen": better, "rejected": worse}
    return {"prompt": prompt} | {name: [{"role": "assistant", "content": text}] for name, text in sides.items()} | more


def encode(*rows: dict[str, Any], task: Any = "pairs", **options: Any) -> tuple[Any, list[Example], Counts]:
    tokenizer, counts = words("chatml", "<|im_end|>"), Counts()
    typed = list(parse_rows([(f"row {i}", row) for i, row in enumerate(rows)], FormatOptions(task=task)))
    return tokenizer, Encoder(tokenizer, EncodeOptions(**options)).encode(typed, counts), counts


def test_a_pair_is_a_tree_of_its_prompt_and_two_answers() -> None:
    tokenizer, (example,), counts = encode(pair_of("Yes", "Yes No", weight=3.0, margin=0.25))
    prompt = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert example.parts is not None
    lengths, parents = example.parts
    assert (lengths[0], parents) == (len(prompt), [-1, 0, 0])
    assert example.input_ids[: lengths[0]] == prompt
    assert {*example.labels[: lengths[0]]} == {IGNORE_INDEX}
    scored = example.labels[lengths[0] :]
    assert scored == example.input_ids[lengths[0] :]  # all that is generated, and the answers begin alike
    assert scored[lengths[1] - 1] == scored[-1] == end
    assert (example.weights, example.score) == ([3.0] * sum(lengths), 0.25)
    assert (counts.pairs, counts.longer, counts.answer_tokens) == (1, (0, 1), (lengths[1], lengths[2]))
    assert counts.ends == {end: 1}


def test_what_is_too_long_is_cut_from_the_prompts_front_or_dropped() -> None:
    _, (whole,), _ = encode(pair_of("Yes", "No Why"))
    assert whole.parts is not None
    (prompt, better, worse), _ = whole.parts
    limit = prompt + max(better, worse) - 2
    _, (cut,), counts = encode(pair_of("Yes", "No Why"), max_length=limit)
    assert cut.parts == ([prompt - 2, better, worse], [-1, 0, 0])
    assert cut.input_ids == whole.input_ids[2:]
    assert (counts.truncated, counts.lost_tokens) == (1, 2)
    _, none, counts = encode(pair_of("Yes", "No Why"), max_length=worse)
    assert none == []
    assert counts.dropped == {f"an answer leaves no room for its prompt within max_length {worse}": (1, ["row 0"])}
    _, none, counts = encode(pair_of("Yes", "No Why"), max_length=limit, overlong="drop")
    assert (none, [*counts.dropped]) == ([], [f"longer than max_length {limit}"])
    with pytest.raises(TunesmithError, match=r"row 0: \d+ tokens, more than max_length"):
        encode(pair_of("Yes", "No Why"), max_length=limit, overlong="error")


def test_equal_answers_and_weightless_pairs_are_dropped_and_counted() -> None:
    _, examples, counts = encode(pair_of("Yes", "Yes"), pair_of("Yes", "No", weight=0), pair_of("Yes", "No"))
    assert len(examples) == 1
    assert counts.dropped == {
        "both answers are the same": (1, ["row 0"]),
        "nothing in it to train on": (1, ["row 1"]),
    }


def test_a_message_of_the_answer_with_a_weight_of_its_own_is_refused() -> None:
    row = {"prompt": TALK, "chosen": YES | {"weight": 0.5}, "rejected": NO}
    with pytest.raises(TunesmithError, match="row 0: chosen: a message of the answer has a weight of its own"):
        encode(row)


def test_an_empty_answer_is_told_where_it_is_learned() -> None:
    _, _, chosen = encode(pair_of("", "No"))
    _, _, rejected = encode(pair_of("Yes", ""))
    _, _, judged = encode(
        *({"messages": [*TALK, YES | {"content": ""}], "label": good} for good in (True, False)), task="judged"
    )
    assert chosen.notes == {UNANSWERED: (1, ["row 0"])}
    assert rejected.notes == {}
    assert judged.notes == {UNANSWERED: (1, ["row 0"])}


def test_judged_answers_are_one_document_with_their_judgement() -> None:
    row = {"messages": [*TALK, YES]}
    _, (good, bad), counts = encode(row | {"label": True}, row | {"label": False}, task="judged")
    assert (good.score, bad.score, good.parts) == (1.0, -1.0, None)
    assert counts.judged == (1, 1)


def test_prepared_pairs_are_told_in_the_preflight_and_packed_whole(home: Any) -> None:
    tokenizer = words("chatml", "<|im_end|>")
    rows = [pair_of("Yes", "No Why " * (i % 3) + "Well", margin=float(i)) for i in range(7)]
    preparation = Preparation(tokenizer=tokenizer, encode=EncodeOptions(), formats=FormatOptions(task="pairs"))
    dataset, report = prepare([(f"row {i}", row) for i, row in enumerate(rows)], preparation)
    again = Counts.from_json({**report.as_json()["counts"], "bad": []})
    assert (again.pairs, again.longer) == (7, report.counts.longer)
    notes = judge({"train": report}, shared={}, allow_no_eos=False, end_tokens="x").notes
    assert any("of 7 pairs, chosen answers have" in note for note in notes)
    packed = pack_dataset(dataset, 2 * max(len(row["input_ids"]) for row in dataset))
    assert len(packed) < len(dataset)
    margins = [pair[0].score for row in packed for pair in pairs_of(row)]
    assert sorted(margins) == [float(i) for i in range(7)]
    alone = {tuple(map(str, pairs_of(row)[0])) for row in dataset}
    assert {tuple(map(str, pair)) for row in packed for pair in pairs_of(row)} == alone
    blank = with_blank_rows(dataset, 4)[7]
    assert [[document.target_count for document in pair] for pair in pairs_of(blank)] == [[0, 0]]


def test_a_batch_has_the_prompt_once_and_both_answers_scored() -> None:
    _, (example,), _ = encode(pair_of("Yes", "Yes No"))
    assert example.parts is not None
    row = {
        "input_ids": example.input_ids,
        "labels": example.labels,
        "seq_lengths": example.parts[0],
        "parents": example.parts[1],
    }
    batch = FlatCollator(read=pairs_of)([row, row])
    assert [len(group) for group in batch.groups] == [2, 2]
    assert batch.computed_tokens <= 2 * len(example.input_ids)
    assert int(batch.supervised) == 2 * sum(example.parts[0][1:])
