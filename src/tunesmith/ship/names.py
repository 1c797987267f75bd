"""What a model's files call its weights: `transformers` renames some, and rearranges others, as it loads them."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from tunesmith.ship.merge_base import shared_names


@dataclass(frozen=True, kw_only=True, slots=True)
class NamesInFiles:
    """`files` has the name in the files for each weight by its name in the model; `kept` those of them that a file to
    load needs. The others are of a bare decoder, without the part that a causal language model puts before them."""

    files: dict[str, str]
    kept: dict[str, str]


def names_in_files(model: PreTrainedModel, stored: Sequence[str]) -> tuple[NamesInFiles, str | None]:
    """What the weights of `model` are called in its files, which have the names `stored`. And a reason, where there is
    one, why the files' tensors are not the model's: then only `transformers` can load them."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    tensors = model.state_dict()
    files: dict[str, str] = {}
    kept: dict[str, str] = {}
    for name in stored:
        bare, converted = rename_source_key(name, renamings, converters)
        own, _ = rename_source_key(name, renamings, converters, model.base_model_prefix or None, tensors)
        if own not in tensors:
            continue  # transformers leaves it out, too
        if converted is not None:
            return NamesInFiles(files={}, kept={}), f"its files hold {own} in another arrangement than the model"
        files[own] = name
        if own == bare:
            kept[own] = name
    aliases = {name: group for group in shared_names(model) for name in group}
    missing = [name for name in tensors if not files.keys() & set(aliases.get(name, (name,)))]
    reason = f"its files have no weight that becomes {missing[0]}" if missing else None
    return NamesInFiles(files=files, kept=kept), reason
