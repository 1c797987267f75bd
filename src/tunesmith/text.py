"""Numbers in sentences."""


def counted(count: int, noun: str) -> str:
    """`1 row`, and `2,000 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def verb(count: int, one: str, several: str) -> str:
    """The verb that goes with so many: `one` with 1, `several` with any other number."""
    return one if count == 1 else several
