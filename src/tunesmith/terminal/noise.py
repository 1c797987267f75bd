"""What libraries say and nobody who runs a command can act on, kept from the terminal.

Each entry says why; whatever else a library warns of is shown.
"""

import logging
import re
import warnings

LOGGERS: dict[str, int] = {
    # For each layer in each step that it rounds its input, for 4 bits that a package would make them faster, for each
    # library that it looks for in vain. What keeps it from working is an error, or a line of `tunesmith doctor`.
    "bitsandbytes": logging.ERROR,
}
MESSAGES: dict[str, str] = {
    # Without a GPU, of `torch_compile`, which was asked for.
    "transformers.training_args": "The speedups for torchdynamo mostly come with",
}
"""What a line begins with, by its logger."""
WARNINGS: tuple[tuple[str, type[Warning]], ...] = (
    ("MatMul8bitLt: inputs will be cast", UserWarning),  # as earlier versions of bitsandbytes said it
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),  # peft reads a name that transformers deprecates
    ("Setting `save_embedding_layers` to `True`", UserWarning),  # of peft, which does what is right
    # Of peft, where adapters have a head whose weight was the embeddings', too: merging parts the two, and says so.
    ("Model has `tie_word_embeddings=True`", UserWarning),
)


def hide_noise() -> None:
    for name, level in LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    for name in MESSAGES:
        logger = logging.getLogger(name)
        if _is_of_use not in logger.filters:  # a second command in one process
            logger.addFilter(_is_of_use)
    for text, kind in WARNINGS:
        warnings.filterwarnings("ignore", re.escape(text), kind)


def _is_of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(MESSAGES[record.name])
