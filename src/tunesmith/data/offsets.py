"""Tokenizers that say where each token's characters are, white space included."""

import json
from typing import Any

from tunesmith.errors import TunesmithError


def untrimmed(tokenizer: Any) -> Any:
    """The tokenizer's backend, with offsets that include the white space at a token's ends.

    Byte-level tokenizers can leave it out of the offsets they report, which would hide that a token straddles a
    boundary.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TunesmithError(
            f"{type(tokenizer).__name__} has no `tokenizers` backend, which says where each token's characters are; "
            "use the fast tokenizer of this model"
        )
    backend = Tokenizer.from_str(backend.to_str())
    if (processor := backend.post_processor) is not None:
        state = json.loads(processor.__getstate__())
        _keep_offsets(state)
        processor.__setstate__(json.dumps(state).encode())
        backend.post_processor = processor
    backend.encode_special_tokens = tokenizer.split_special_tokens
    backend.no_truncation()
    backend.no_padding()
    return backend


def _keep_offsets(part: Any) -> None:
    """Turn `trim_offsets` off in a post-processor, and in those that it is made of."""
    if isinstance(part, dict):
        if "trim_offsets" in part:
            part["trim_offsets"] = False
        for processor in part.get("processors", ()):
            _keep_offsets(processor)
