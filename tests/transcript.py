"""What stays the same in what commands print: their words, without the numbers that a machine measures."""

import re

MEASURED = (
    # `doctor`: whole lines that tell of the machine and of what is installed, with the lines that they go on in.
    (
        r"^\w+ +(Python|torch|libraries|processor|precision|cache folder|this folder|FlashAttention) .*\n(?:  .*\n)*",
        r"\1: #\n",
    ),
    (r"\d+\.\d+\.\d+", "#"),  # a version
    (r"\b(?:fp32|bf16|fp16)(?: \d[\d,]*)?(?:, (?:bf16|fp16) \d[\d,]*)*", "#"),  # the precision, and what was measured
    (r"\d[\d,.]*(?= ?(?:GB|MB|MiB|kB|tokens/s|s left)\b)", "#"),
    (r"\d:\d\d:\d\d", "#"),
    # Columns of numbers, as in the table of `plan`.
    (r"(?<=  )\d[\d,.]*(?=  |$)", "#"),
    # Training. At which steps there is a line follows from `logging_steps` alone, so the numbers of the steps count.
    (r"^(step \d+/\d+  loss )[\d.]+(.*  )\d+(?=% supervised)", r"\1#\2#"),
    # What the model answered, and scores of that.
    (r"^\{.*\}$", "{an answer}"),
    (r"[+-]?\d+%? \([+-]?\d+, [+-]?\d+\)", "# (#, #)"),
    (r"(?<=^cut off: ).*?(?= within \d+ tokens)", "# answers did not end"),
    (r"(?<=which lowers scores )\(.*?\)", "(#)"),
    (r"logits \S+ \(\S+ of", "logits # (# of"),
    (r"\d+ of \d+(?= greedy tokens)", "# of #"),
    # The widths of tables, which follow from the numbers in them.
    (r"([ ─━]){2,}", r"\1"),
)


def stable(text: str) -> list[str]:
    """The lines of `text` with `#` for what is measured."""
    for pattern, neutral in MEASURED:
        text = re.sub(pattern, neutral, text, flags=re.MULTILINE)
    return [line.strip() for line in text.splitlines()]
