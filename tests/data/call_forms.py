"""Chat templates that write tool calls in the forms of well-known models."""

from tests.conftest import HERMES

CALLED = (
    '{% for call in message.tool_calls or [] %}{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", '
    "\"arguments\": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}"
)
assert CALLED in HERMES


def with_calls(calls: str) -> str:
    """A template that writes calls in this way."""
    return HERMES.replace(CALLED, "{% set calls = message.tool_calls or [] %}" + calls)


def each(call: str, between: str = "") -> str:
    return (
        "{% for call in calls %}{% set name, given = call.function.name, call.function.arguments %}"
        + call
        + (f"{{{{ '{between}' if not loop.last }}}}" if between else "")
        + "{% endfor %}"
    )


BARE_VALUE = (
    "{% macro value(x) %}{% if x is string %}{{ '<|q|>' + x + '<|q|>' }}{% elif x is mapping %}{{ '{' }}"
    "{% for k, v in x.items() %}{{ k + ':' }}{{ value(v) }}{{ ',' if not loop.last }}{% endfor %}{{ '}' }}"
    "{% elif x is sequence %}{{ '[' }}{% for v in x %}{{ value(v) }}{{ ',' if not loop.last }}{% endfor %}{{ ']' }}"
    "{% else %}{{ x | tojson }}{% endif %}{% endmacro %}"
)
TYPED = "{{ v if v is string else v | tojson }}"
FORMS = {
    "hermes": HERMES,
    "llama": with_calls(
        "{% if calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
        + each('{{ \'{"name": "\' + name + \'", "parameters": \' + (given | tojson) + "}" }}')
    ),
    "list": with_calls(
        "{% if calls %}[TOOL_CALLS] [{% endif %}"
        + each('{{ \'{"name": "\' + name + \'", "arguments": \' + (given | tojson) + "}" }}', ", ")
        + "{% if calls %}]{% endif %}"
    ),
    "mistral": with_calls(
        "{% for call in calls %}{% if call.id | default('') | length != 9 %}{{ raise_exception('id') }}{% endif %}"
        "{{ '[TOOL_CALLS]' + call.function.name + '[CALL_ID]' + call.id + '[ARGS]' }}"
        "{{ call.function.arguments | tojson }}{% endfor %}"
    ),
    "fenced": with_calls(
        "{% if calls %}<calls>{% endif %}"
        + each("{{ '<call>function<sep>' + name + '\n```json\n' + (given | tojson) + '\n```</call>' }}", "\n")
        + "{% if calls %}</calls>{% endif %}"
    ),
    "numbered": with_calls(
        "{% if calls %}<|section|>{% endif %}{% for call in calls %}{{ '<|call|>functions.' + call.function.name }}"
        "{{ ':' ~ loop.index0 ~ '<|argument|>' }}{{ call.function.arguments | tojson }}<|end|>{% endfor %}"
        "{% if calls %}<|section_end|>{% endif %}"
    ),
    "coder": with_calls(
        each(
            "{{ '\n<tool_call>\n<function=' + name + '>\n' }}{% for k, v in given.items() %}"
            "{{ '<parameter=' + k + '>\n' }}{{ v if v is string else (v | tojson if v is mapping or v is sequence"
            " else v | string) }}{{ '\n</parameter>\n' }}{% endfor %}{{ '</function>\n</tool_call>' }}"
        )
    ),
    "glm": with_calls(
        each(
            "{{ '\n<tool_call>' + name }}{% for k, v in given.items() %}"
            "{{ '\n<arg_key>' + k + '</arg_key>\n<arg_value>' }}"
            + TYPED
            + "{{ '</arg_value>' }}{% endfor %}{{ '\n</tool_call>' }}"
        )
    ),
    "invoke": with_calls(
        "{% if calls %}<calls>\n{% endif %}"
        + each(
            "{{ '<invoke name=\"' + name + '\">' }}{% for k, v in given.items() %}"
            "{{ '<parameter name=\"' + k + '\" string=\"' + ('true' if v is string else 'false') + '\">' }}"
            + TYPED
            + "</parameter>{% endfor %}{{ '</invoke>\n' }}"
        )
        + "{% if calls %}</calls>{% endif %}"
    ),
    "gemma": BARE_VALUE + with_calls(each("{{ '<|call>call:' + name }}{{ value(given) }}<call|>")),
}
