"""A chat template that would run for ever or fill the memory is stopped, and says nothing of this machine."""

import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.conftest import CHATML
from tunesmith.data import sandbox
from tunesmith.data.sandbox import TooLong, compiled, refuse_long, time_limit
from tunesmith.data.tokenize import Counts, EncodeOptions, Encoder
from tunesmith.errors import TunesmithError
from tunesmith.types import Conversation, Message

LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def encode(tiny_model: Any) -> Callable[[str], Any]:
    """Encodes one conversation with a template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def run(template: str) -> Any:
        tokenizer.chat_template = template
        turns = (
            Message(fields={"role": "user", "content": "a"}),
            Message(fields={"role": "assistant", "content": "b"}),
        )
        encoder = Encoder(tokenizer, EncodeOptions(train_on="all", max_length=64))
        return encoder.encode([("row 1", Conversation(messages=turns))], Counts())

    return run


def test_loops_in_loops_are_ended(encode: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    started = time.perf_counter()
    with pytest.raises(TunesmithError, match=r"row 1: the chat template refuses .* it ran for more than 0.3 seconds"):
        encode(LOOPS + CHATML)
    assert time.perf_counter() - started < 5
    assert encode(CHATML)  # and the next one runs


def test_a_thread_is_ended_where_it_is_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.2)
    ended: list[BaseException] = []

    def endless() -> None:
        try:
            with time_limit():
                while True:
                    pass
        except TooLong as error:
            ended.append(error)

    thread = threading.Thread(target=endless, daemon=True)
    thread.start()
    thread.join(5)
    assert [str(error) for error in ended] == ["it ran for more than 0.2 seconds, or took more than 300 MB"]


def test_what_is_in_time_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.1)
    for _ in range(3):
        with time_limit():
            pass
    time.sleep(0.3)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'abc' * 999999999 }}",
        "{{ 999999999 * 'abc' }}",
        "{{ [1, 2] * 99999999 }}",
        "{{ 9 ** 99999 }}",
        "{% for i in range(1000) %}{{ 'x' * 100000 }}{% endfor %}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'x' * 4000000000 }}",
        "{{ 'x' | center(4000000000) }}",
        "{{ 'x'.ljust(4000000000) }}",
        "{{ '%4000000000d' % 1 }}",
        "{{ '%*d' % (4000000000, 1) }}",
        "{{ '{:{}}'.format(1, 4000000000) }}",
        "{{ '%4000000000d' | format(1) }}",
        "{{ [1, [2]] | tojson(indent=4000000000) }}",
        "{{ ('a' * 9999) | replace('a', 'b' * 9999) }}",
        "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
        "{{ ['a' * 9999] * 9999 | join }}{{ (['a' * 9999] * 9999) | join }}",
        "{{ ''.join(['a' * 9999] * 9999) }}",
        "{% set n = namespace(s='aa') %}{% for i in range(40) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "{% set n = namespace(s='aa') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s=3) %}{% for i in range(40) %}{% set n.s = n.s * n.s %}{% endfor %}",
    ],
)
def test_texts_that_would_fill_the_memory_are_refused(template: str, encode: Callable[[str], Any]) -> None:
    with pytest.raises(TunesmithError, match="the chat template refuses the conversation"):
        encode(template + CHATML)


TWICE = "{% set n = namespace(l=['ab'], m=['ab'], t=(1,)) %}{% macro kept() %}{% set n.t = varargs %}{% endmacro %}"
TWICE += "{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% set n.m = [n.m, n.m] %}{{ kept(n.t, n.t) }}{% endfor %}"
"""60 lists, each of which holds the one before it twice."""
BIG = "{% set big = 'a' * 19000000 %}"


@pytest.mark.parametrize(
    "use",
    [
        "{{ n.l }}",
        "{{ n.l ~ '' }}",
        "{{ n.l | tojson }}",
        "{{ n.l | string }}",
        "{{ '%s' % n.l }}",
        "{{ '{}'.format(n.l) }}",
        "{{ [n.l] | join }}",
        "{{ n.l == n.m }}",
        "{{ n.l in [n.m] }}",
        "{{ n.l is eq n.m }}",
        "{{ [n.l] | select('eq', n.m) | list }}",
        "{{ [n.l].index(n.m) }}",
        "{{ [n.l, n.m] | sort }}",
        "{{ {'a': n.l}.values() }}",
        "{{ {n.t: 1} }}",
        "{{ {}[n.t] }}",
        "{{ {}.get(n.t) }}",
        "{{ [n.t] | unique | list }}",
        "{{ raise_exception(n.l) }}",
    ],
)
def test_what_holds_the_same_often_counts_as_often_where_all_of_it_is_used(use: str) -> None:
    with pytest.raises(OverflowError, match="more than 20,000,000 characters, or 1,000,000 items, are too many"):
        compiled(TWICE + use).render(messages=[])


@pytest.mark.parametrize(
    "template",
    [
        "{{ 5 | round(-1000000000) }}",
        "{{ 5 | round(1000000000, 'floor') }}",
        "{{ ([[1]] * 999999) | sum(start=[]) }}",
        BIG + "{{ ('{0}' * 400).format(big) }}",
        BIG + "{{ ('%(a)s' * 400) % {'a': big} }}",
        "{{ ('%9999999d' * 500) % ((1,) * 500) }}",
        "{{ '%((a))19999999999d' % {'(a)': 1} }}",
        "{{ '{0:{1[a]}}'.format('a', {'a': '>4000000000'}) }}",
        "{{ '%(' * 9000000 % {} }}",
        "{{ ('é' * 19000000).encode('ascii', 'namereplace') }}",
        "{{ 'x'.encode() * 4000000000 }}",
        "{{ 'x'.encode().center(4000000000) }}",
        "{{ '%4000000000d'.encode() % 1 }}",
        "{{ (1).to_bytes(4000000000, 'big') }}",
        BIG + "{{ (big | int(base=16)) // (big[1:] | int(base=16)) }}",
        BIG + "{{ (big | int(base=16)) is divisibleby 3 }}",
        "{{ ('a' * 9999).translate({97: 'b' * 9999999}) }}",
        "{{ ('a' * 999) | replace('a', ['b' * 9999999]) }}",
        "{{ ('a\n' * 9999) | indent('b' * 99999) }}",
        "{{ ('ab,' * 6000000).split(',') }}",
        BIG + "{{ big.rfind('b' ~ 'a' * 200000) }}",
        BIG + "{{ big.strip('b' * 2000000) }}",
        BIG + "{{ big | list }}{{ cycler(*big) }}",
        BIG + "{% for letter in big %}{{ loop.length }}{% endfor %}",
        BIG + "{% set all %}" + 9 * "{{ big }}" + "{% endset %}",
        BIG + "{% macro all() %}" + 9 * "{{ big }}" + "{% endmacro %}{{ all() | length }}",
        9 * "{{ 'x' | center(19000000) }}",
        "{{ ('@a.' * 20000) | urlize }}",
        "{{ ('a-' * 9000000) | title }}",
        "{{ [1] | batch(1000000000, 'x') | list }}",
        "{% set n = namespace(l=[1] * 500000) %}{% for i in range(400) %}{% set n.l = [n.l] %}{% endfor %}"
        "{{ n.l | tojson(indent=100) }}",
    ],
)
def test_no_single_operation_makes_much_or_takes_long(template: str) -> None:
    with pytest.raises(OverflowError):
        compiled(template).render()


@pytest.mark.skipif(not hasattr(time, "pthread_getcpuclockid"), reason="the system does not say what a thread took")
def test_time_in_which_the_thread_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.1)
    with time_limit():
        time.sleep(0.4)


def test_a_thread_that_drops_the_end_is_ended_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that comes while a generator is closed goes nowhere."""
    monkeypatch.setattr(sandbox, "SECONDS", 0.1)
    monkeypatch.setattr(sandbox, "AGAIN", 0.05)
    dropped = 0
    with time_limit():
        while dropped < 3:
            with suppress(TooLong):
                while True:
                    pass
            dropped += 1
    time.sleep(0.2)  # and what follows is not ended
    assert dropped == 3


@pytest.mark.parametrize(
    "template", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{% include '/etc/passwd' %}"]
)
def test_nothing_of_the_machine_is_reached(template: str, encode: Callable[[str], Any]) -> None:
    with pytest.raises(TunesmithError, match="the chat template"):
        encode(template + CHATML)


def test_what_is_kept_alive_is_counted_while_it_grows(
    encode: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "MEMORY", 100_000_000)
    many = (
        "{% set n = namespace(l=[]) %}{% for i in range(9999) %}{% set n.l = n.l + ['x' * (9999999 + i)] %}{% endfor %}"
    )
    with pytest.raises(TunesmithError, match="or took more than 100 MB"):
        encode(many + CHATML)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (LOOPS, "can't be rendered: it ran for more than 0.3 seconds"),
        ("{{ 9 ** (9 ** 9) }}", "can't be rendered: a power of 387420489 is too large"),
        ("{{ 'x' * 4000000000 }}", "can't be rendered: 1 characters or items 4000000000 times are too many"),
        ("{{ " + 5000 * "(" + "1" + 5000 * ")" + " }}", "can't be rendered: maximum recursion depth exceeded"),
        ("{% include '/etc/passwd' %}", "refuses the conversation: no loader for this environment specified"),
        (
            "{{ ''.__class__.__mro__ }}",
            "refuses the conversation: access to attribute '__class__' of 'str'",
        ),
        (
            22 * "{% for a in [1] %}" + 22 * "{% endfor %}",
            "refuses the conversation: too many statically nested blocks",
        ),
        ("{{ 'abc' | truncate(1) }}", "refuses the conversation: expected length >= 3, got 1"),
    ],
)
def test_a_prompt_ends_as_soon_and_names_the_template(
    template: str, said: str, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    from tunesmith.data.prompts import prompt_ids

    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = template
    started = time.perf_counter()
    with pytest.raises(TunesmithError, match=re.escape(f"the chat template of {tiny_model} {said}")):
        prompt_ids(tokenizer, [{"role": "user", "content": "a"}])
    assert time.perf_counter() - started < 5


def test_a_namespace_of_a_loop_is_no_argument_of_the_calls_in_it() -> None:
    inner = "{% set ns = namespace(parts=[]) %}{% set ns.parts = ns.parts + [m.get('role')] %}{{ ns.parts | join }}"
    messages = [{"role": "user"}, {"role": "assistant"}]
    loop = f"{{% for m in messages %}}{inner},{{% endfor %}}"
    block = f"{{% block b scoped %}}{loop}{{% endblock %}}"
    assert compiled(loop + block).render(messages=messages) == "user,assistant," * 2


def test_prompts_are_those_of_transformers(tiny_model: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    turns: list[Any] = [
        {"role": "user", "content": "a", "extra": (1, True, None)},
        {"role": "assistant", "content": "b", "reasoning": "because"},
    ]
    tokenizer.chat_template = (
        "{{ bos_token ~ eos_token }}{{ messages | tojson }}{{ tools }}{{ add_generation_prompt }}{{ x }}"
    )
    for arguments in ({}, {"add_generation_prompt": True, "x": ["y"]}, {"tools": [{"name": "z"}]}):
        theirs = tokenizer.apply_chat_template(turns, tokenize=False, **arguments)
        assert sandbox.rendered(tokenizer, turns, **arguments) == theirs


def test_ordinary_arithmetic_is_as_ever() -> None:
    plain = "{{ 'a' ~ 1 ~ none }}{{ '%5.1f' % 2.25 }}{{ '{:>4}'.format(7) }}{{ 'ab' | center(6) }}|"
    plain += "{{ [1, 'x'] | join('-') }}"
    more = "{{ 'a\\nb' | indent(2) }}{{ {'a': [1]} | tojson(indent=1) }}{{ '{}'.format(1700000000) }}{{ [1] + [2] }}"
    assert compiled(plain).render() == "a1None  2.2   7  ab  |1-x"
    assert compiled(more).render() == 'a\n  b{\n "a": [\n  1\n ]\n}1700000000[1, 2]'
    forms = "{{ '%s is %05.1f' % ('a', 2.25) }}|{{ '{:>{}}'.format(7, 4) }}|{{ 'on 20260101: {}'.format(1) }}|"
    forms += "{{ (1, 2) == (1, 2) }}{{ 'a' in ['a', 'b'] }}{{ 2.345 | round(2) }}{{ [[1], [2]] | sum(start=[]) }}"
    forms += "{% for a, b in {'k': 'v'}.items() %}{{ a }}{{ b }}{{ loop.length }}{% endfor %}{{ 7 // 2 }}{{ 7 % 4 }}"
    assert compiled(forms).render() == "a is 002.2|   7|on 20260101: 1|TrueTrue2.35[1, 2]kv133".replace(
        "2.35", str(2.35)
    )
    assert compiled("{{ '-' * 3 }}{{ 2 ** 10 }}{{ 6 * 7 }}{{ 2.5 * 2 }}").render() == "---1024425.0"
    assert list(refuse_long(iter(["a", "b"]))) == ["a", "b"]


def test_what_rows_have_left_in_memory_is_not_the_next_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of long rows is large, and no template's fault."""
    taken = iter(range(0, 10**12, sandbox.MEMORY // 2))
    last = [0]

    def resident() -> int:
        return last[0]

    monkeypatch.setattr(sandbox, "_resident", resident)
    with sandbox.time_limit() as begin_anew:
        for _ in range(4):
            begin_anew()
            last[0] = next(taken)
            time.sleep(2 * sandbox.WATCHED)
