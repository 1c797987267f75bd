"""Strategies for what nobody should trust: values, rows, and chat templates, right ones among them."""

from typing import Any

from hypothesis import strategies as st

# Values


def texts() -> st.SearchStrategy[str]:
    special = st.sampled_from(
        ["<|im_end|>", "<|im_start|>assistant\n", "{{ 7 }}", "\ud800", "\0", "\ufeff", " \n", "é" * 300]
    )
    return st.text(max_size=20) | special | st.text(st.characters(exclude_categories=()), max_size=8)


NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -0.0, 2**63, float("nan"), float("inf")])
ATOMS = st.none() | st.booleans() | NUMBERS | texts()
VALUES = st.recursive(
    ATOMS | st.binary(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(texts(), inner, max_size=4)
        | st.dictionaries(st.integers() | st.none(), inner, max_size=1)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)
COLUMNS = st.sampled_from(
    [
        *("messages", "conversations", "prompt", "completion", "instruction", "input", "output", "text", "input_ids"),
        *("labels", "completion_mask", "assistant_masks", "tools", "chat_template_kwargs", "weight", "system"),
        *("chosen", "rejected", "role", "content", "from", "value", "tool_calls", "name", "type"),
    ]
)
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]}
VALID: list[dict[str, Any]] = [
    {"messages": TURNS, "weight": 0.5},
    {
        "messages": [TURNS[0], {**TURNS[1], "weight": 0}, *TURNS],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
    {"messages": [TURNS[0], CALL, {"role": "tool", "content": "1"}, TURNS[1]], "chat_template_kwargs": {"a": 1}},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"},
    {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
        ]
    },
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": TURNS[:1], "completion": TURNS[1:]},
    {"instruction": "add", "input": "1 1", "output": "2", "system": "s"},
    {"text": "some text", "weight": 2},
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1], "assistant_masks": [1, 1, 0]},
]


@st.composite
def mutated(draw: st.DrawFn, valid: st.SearchStrategy[Any], keys: st.SearchStrategy[str], depth: int = 4) -> Any:
    """A valid value in which something was replaced, removed, doubled or added, at some depth."""
    value = draw(valid)
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(VALUES)
    if isinstance(value, dict) and value:
        key = draw(st.sampled_from(list(value)))
        step = draw(st.sampled_from(["inside", "remove", "add", "rename"]))
        rest = {name: item for name, item in value.items() if name != key}
        if step == "inside":
            return value | {key: draw(mutated(st.just(value[key]), keys, depth - 1))}
        if step == "remove":
            return rest
        return (value if step == "add" else rest) | {draw(keys): draw(VALUES) if step == "add" else value[key]}
    if isinstance(value, list) and value:
        at = draw(st.integers(0, len(value) - 1))
        step = draw(st.sampled_from(["inside", "remove", "double"]))
        if step == "inside":
            return [*value[:at], draw(mutated(st.just(value[at]), keys, depth - 1)), *value[at + 1 :]]
        return value[:at] + value[at + 1 :] if step == "remove" else [*value, value[at]]
    return draw(VALUES)


ROWS = st.lists(
    st.dictionaries(COLUMNS | texts(), VALUES, max_size=5)
    | st.sampled_from(VALID)
    | mutated(st.sampled_from(VALID), COLUMNS)
    | VALUES,
    min_size=1,
    max_size=3,
)


PIECES = [
    "{{ messages[0].content }}",
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ m.content }}",
    "{{ m['role'] }}",
    "{% if add_generation_prompt %}",
    "{% endif %}",
    "<|im_start|>",
    "<|im_end|>\n",
    "{% generation %}",
    "{% endgeneration %}",
    "{{ raise_exception('x') }}",
    "{{ ''.__class__ }}",
    "{% set x = namespace(a=1) %}",
    "{{ messages|tojson }}",
    "{{ 'a' * 9 }}",
    "{% macro f() %}",
    "{{ 1 / 0 }}",
    "{{ undefined.x }}",
    "{{ m.content | trim }}",
    "{% else %}",
    "{#",
    "{%",
    "}}",
    "{{ bos_token }}{{ eos_token }}",
]
SOUND = [
    "{% for m in messages %}",
    "{{ '<|im_start|>' + m['role'] + '\\n' }}",
    "{{ m['content'] or '' }}",
    "{{ '<|im_end|>\\n' }}",
    "{% endfor %}",
    "{% if add_generation_prompt %}",
    "{{ '<|im_start|>assistant\\n' }}",
    "{% endif %}",
]


@st.composite
def templates(draw: st.DrawFn) -> str:
    """Any text, pieces in any order, or a sound template with a piece more or less."""
    piece = st.sampled_from(PIECES) | st.text(max_size=4)
    if draw(st.integers(0, 2)) == 0:
        return draw(st.text(max_size=30) | st.lists(piece, max_size=10).map("".join))
    pieces = list(SOUND)
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(pieces) - 1))
        pieces[at : at + draw(st.integers(0, 1))] = draw(st.lists(piece, max_size=1))
    return "".join(pieces)
