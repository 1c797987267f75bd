"""Exporting a model to GGUF, the format of llama.cpp and Ollama.

    model folder -> settings and tensors (`gguf_weights`), tokenizer (`gguf_tokens`) -> a file beside the target
                 -> read back and compared (`gguf_check`) -> renamed to the target, with a Modelfile for Ollama

Tensors are read and written one at a time.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import yaml
from huggingface_hub import snapshot_download
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from tunesmith.errors import TunesmithError, nearest
from tunesmith.model.load import ADAPTERS, CONFIG, load_tokenizer, newest_checkpoint, resolve_model
from tunesmith.ship import gguf_weights as weights
from tunesmith.ship.gguf_check import check_gguf
from tunesmith.ship.gguf_tokenizer import Vocabulary, vocabulary
from tunesmith.ship.modelfile import Modelfile, modelfile

SUFFIX = ".gguf"
DEFAULT_NAME = "model.gguf"
CARD_HEADER = re.compile(r"\A\s*---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)
ROOM = 64_000_000
"""Bytes that must be free beside the tensors: the vocabulary, and some air."""
FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "README.md")

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written. `size` of the GGUF in bytes; `modelfile` is None where there is none, and `notes` say why.
    `checked` are the results of reading it back, a sentence each; empty where that was not asked for."""

    gguf: Path
    size: int
    modelfile: Path | None
    checked: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The model to be written: whole, in safetensors. `run` is what the user calls it."""

    run: str
    folder: Path
    config: PreTrainedConfig
    family: weights.Family
    tokenizer: PreTrainedTokenizerBase


def export_gguf(
    run: str, output: str | Path, *, quant: str = "f16", check: bool = True, progress: Progress | None = None
) -> Exported:
    """Writes the model `run` as GGUF, and an Ollama Modelfile beside it.

    `run` is a model's folder or name, or a run's folder; adapters are merged into their base model first. `output` is
    a file that ends in .gguf (the Modelfile is then NAME.Modelfile), or a folder, for model.gguf and Modelfile. `quant`
    is what matrices are stored as: f32, f16 or q8_0. `check` reads the file back through `transformers` and compares it
    with the model, which takes both in float32, one after the other. `progress` is told what happens.

    Nothing is left behind by an export that fails. Raises TunesmithError for a target that is there already, too little
    space, a model, tokenizer or setting that GGUF can't hold, and a file that doesn't do what the model does.
    """
    say = progress or _unheard
    if quant not in weights.QUANTS:
        raise TunesmithError(
            f"quant is {quant!r}; write {', '.join(weights.QUANTS)}{nearest(quant, weights.QUANTS)}. Other types are "
            "made from f16 by llama.cpp's llama-quantize, or by `ollama create --quantize`"
        )
    target, target_modelfile = _targets(Path(output))
    with _workplace(target) as workplace:
        source = _source(run, workplace, say)
        written = workplace / target.name
        say(f"Writing {target.name} ({quant})")
        tokens = _write(source, quant, written)
        checked: list[str] = []
        if check:
            say("Reading it back and comparing it with the model")
            checked = check_gguf(written, source.folder, quant, tokens)
        made, notes = _modelfile(source, tokens, target.name)
        size = written.stat().st_size
        _publish(written, target)
        if made is not None:
            text = workplace / target_modelfile.name
            text.write_text(made.text, encoding="utf-8")
            _publish(text, target_modelfile)
    return Exported(
        gguf=target,
        size=size,
        modelfile=None if made is None else target_modelfile,
        checked=tuple(checked),
        notes=(*tokens.notes, *notes),
    )


def _unheard(_message: str) -> None:
    """Where nobody listens to the progress."""


def _targets(output: Path) -> tuple[Path, Path]:
    """The files to be written. Raises TunesmithError where one is there already."""
    output = output.expanduser()
    if output.suffix == SUFFIX and not output.is_dir():
        files = output, output.with_suffix(".Modelfile")
    else:
        if output.is_file():
            raise TunesmithError(f"{output} is a file; name a folder, or a file that ends in {SUFFIX}")
        files = output / DEFAULT_NAME, output / "Modelfile"
    for file in files:
        if os.path.lexists(file):
            raise TunesmithError(f"{file} is there already; name another --output, or remove it")
    return files


@contextmanager
def _workplace(target: Path) -> Iterator[Path]:
    """An empty folder on the disk of the target, removed in the end, whatever happens. A folder made for the target is
    removed with it, if nothing came of it."""
    made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.stem}-", dir=target.parent))
    except OSError as error:
        raise TunesmithError(f"can't write into {target.parent}: {error.strerror}") from error
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # somebody else has put something there
            for empty in made:
                empty.rmdir()
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _source(run: str, workplace: Path, say: Progress) -> Source:
    folder = _folder(run, say)
    if (folder / ADAPTERS).is_file():
        folder = _merged(str(folder), workplace / "merged", say)
    config, family = weights.read_config(folder)
    return Source(run=run, folder=folder, config=config, family=family, tokenizer=load_tokenizer(str(folder)))


def _folder(run: str, say: Progress) -> Path:
    """The folder of the model or the adapters that `run` names; a model on the hub is downloaded into its cache."""
    path = Path(resolve_model(run, say))
    if not path.is_dir():
        try:
            path = Path(snapshot_download(run, allow_patterns=list(FILES)))
        except (OSError, ValueError) as error:
            raise TunesmithError(f"model {run} could not be loaded: {error}") from error
    if any((path / name).is_file() for name in (CONFIG, ADAPTERS)):
        return path
    checkpoint = newest_checkpoint(path)
    if checkpoint is None:
        raise TunesmithError(f"{run} is no model: it has no {CONFIG}")
    return checkpoint


def _merged(adapters: str, output: Path, say: Progress) -> Path:
    """The whole model of a folder with adapters."""
    from tunesmith.ship.merge import merge

    merge(adapters, output, progress=say)
    return output


def _write(source: Source, quant: str, path: Path) -> Vocabulary:
    """The whole file. Returns its vocabulary."""
    planned = weights.plan(source.folder, source.config, source.family, quant)
    rows = next(weight.shape[0] for weight in planned if weight.name == "token_embd.weight")
    tokens = vocabulary(source.tokenizer, rows, _end_ids(source.folder, source.config))
    factors = weights.rope_factors(source.config)
    _require_space(path.parent, sum(weight.size for weight in planned))
    writer = gguf.GGUFWriter(path, source.family.name)
    try:
        _add_general(writer, source, quant)
        weights.add_settings(writer, source.config, source.family, rows)
        _add_tokens(writer, tokens)
        for weight in planned:
            float32 = np.dtype(np.float32)
            writer.add_tensor_info(weight.name, weight.shape, float32, weight.size, raw_dtype=weight.kind)
        if factors is not None:
            writer.add_tensor_info(weights.ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        _label_size(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight, values in weights.read(planned):
            writer.write_tensor_data(weights.stored(weight, values))
        if factors is not None:
            writer.write_tensor_data(factors)
        writer.flush()
    except OSError as error:
        raise TunesmithError(f"can't write {path.name} into {path.parent.parent}: {error.strerror or error}") from error
    finally:
        writer.close()
    return tokens


def _end_ids(folder: Path, config: Any) -> list[int]:
    """Where the model's generation settings, or else its own, say that an answer ends."""
    try:
        settings = json.loads((folder / "generation_config.json").read_bytes())
    except (OSError, ValueError):
        settings = {}
    found = settings.get("eos_token_id", config.eos_token_id)
    return [number for number in (found if isinstance(found, list) else [found]) if isinstance(number, int)]


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size + ROOM:
        raise TunesmithError(
            f"the file takes {(size + ROOM) / 1e6:,.0f} MB, but only {free / 1e6:,.0f} MB are free in {folder.parent}"
        )


def _add_general(writer: gguf.GGUFWriter, source: Source, quant: str) -> None:
    """What the file says about itself. The base model and the licence are those of the model's card, if it has one."""
    writer.add_type("model")
    writer.add_name(Path(source.run).expanduser().resolve().name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(int(weights.QUANTS[quant][1]))
    card = _card(source.folder)
    if isinstance(licence := card.get("license"), str):
        writer.add_license(licence)
    bases = card.get("base_model")
    names = [name for name in (bases if isinstance(bases, list) else [bases]) if isinstance(name, str)]
    if names:
        writer.add_base_model_count(len(names))
    for number, name in enumerate(names):
        owner, _, short = name.rpartition("/")
        writer.add_base_model_name(number, short)
        if owner and not Path(name).is_dir():
            writer.add_base_model_organization(number, owner)
            writer.add_base_model_repo_url(number, f"https://huggingface.co/{name}")


def _card(folder: Path) -> Mapping[str, Any]:
    try:
        header = CARD_HEADER.match((folder / "README.md").read_text(encoding="utf-8"))
        found = yaml.safe_load(header[1]) if header else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _label_size(writer: gguf.GGUFWriter) -> None:
    writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))


def _add_tokens(writer: gguf.GGUFWriter, tokens: Vocabulary) -> None:
    writer.add_tokenizer_model(tokens.model)
    writer.add_tokenizer_pre(tokens.pre)
    writer.add_token_list(tokens.tokens)
    writer.add_token_types(tokens.types)
    if tokens.scores:
        writer.add_token_scores(tokens.scores)
    if tokens.merges:
        writer.add_token_merges(tokens.merges)
    for role, number in tokens.special.items():
        getattr(writer, f"add_{role}_token_id")(number)
    writer.add_add_bos_token(tokens.add_bos)
    writer.add_add_eos_token(tokens.add_eos)
    if tokens.add_space_prefix is not None:
        writer.add_add_space_prefix(tokens.add_space_prefix)
    if tokens.chat_template is not None:
        writer.add_chat_template(tokens.chat_template)


def _modelfile(source: Source, tokens: Vocabulary, name: str) -> tuple[Modelfile | None, tuple[str, ...]]:
    stops = [tokens.tokens[number] for number in tokens.ends]
    context = int(source.config.max_position_embeddings)
    try:
        made = modelfile(source.tokenizer, name, stops=stops, context=context, bos_is_added=tokens.add_bos)
    except TunesmithError as error:
        return None, (f"there is no Modelfile: {error}",)
    return made, made.notes


def _publish(written: Path, target: Path) -> None:
    """Renames the whole file to its name, unless somebody else has taken that meanwhile."""
    with written.open("rb") as file:
        os.fsync(file.fileno())
    if os.path.lexists(target):
        raise TunesmithError(f"{target} is there already; name another --output, or remove it")
    written.rename(target)
