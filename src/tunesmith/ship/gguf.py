"""Exporting a model to GGUF, the format of llama.cpp and Ollama.

    model folder -> settings and tensors (`gguf_weights`), tokenizer (`gguf_tokenizer`) -> a file beside the target
                 -> read back through `transformers` and compared -> renamed to the target, with a Modelfile for Ollama

Tensors are read and written one at a time. `transformers` leaves a few things out as it reads a file. They are read
from the file itself and put in their place; what was treated so is said.

Shapes: T tokens of a prompt and its continuation, V rows of the vocabulary.
"""

import gc
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from tunesmith.data.sandbox import rendered
from tunesmith.errors import TunesmithError, nearest
from tunesmith.model.demo_model import quiet
from tunesmith.model.load import ADAPTERS, CONFIG, load_model, load_tokenizer, resolve_model, run_folder
from tunesmith.ship.gguf_tokenizer import TokenizerMetadata, tokenizer_metadata
from tunesmith.ship.gguf_weights import (
    QUANTS,
    ROPE_FACTORS,
    Family,
    add_settings,
    head_size,
    plan_weights,
    read_config,
    read_weights,
    rope_factors,
    stored_values,
)
from tunesmith.ship.licence import card_header
from tunesmith.ship.merge import Trace, drift_of, logits_of, merge, traces
from tunesmith.ship.modelfile import Modelfile, modelfile
from tunesmith.ship.shards import check_room, workplace

SUFFIX = ".gguf"
DEFAULT_NAME = "model.gguf"
ROOM = 64_000_000
"""Bytes that must be free beside the tensors: the vocabulary, and some air."""
FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model", "README.md")

QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Count from 1 to 10.",
    "Explain in one sentence why the sky is blue.",
)
NEW_TOKENS = 16
TEXTS = (
    *QUESTIONS,
    "I've told you: it's 1234567 or 3.14, isn't it?\n\n\tNo!  two  spaces   three\r\n",
    "Ünïcödé, 日本語, Привет, 🙂👍🏽, ﬁ, \u00a0 x\u200dy",
    "def f(x):\n    return x ** 2  # comment\n",
    " leading and trailing ",
)
ROUNDING = {Kind.F32: 0.0, Kind.F16: 2**-11, Kind.Q8_0: 0.57 / 127}
"""How far a value may be from the model's, relative to the largest of its tensor: half a step, and for Q8_0, whose step
is an f16 itself, what that adds to 127 of them."""
LARGEST_DIFFERENCE = {"f32": 1e-4, "f16": 5e-2, "q8_0": float("inf")}
"""Of a logit, relative to the model's largest."""
TIE = {"f32": 1e-4, "f16": 1e-2}
"""How much likelier the model's own token may be to it, in the same measure, when the file prefers another."""
SETTINGS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("max_position_embeddings", "vocab_size", "tie_word_embeddings"),
)
UNREAD = ("head_dim", "attention_bias", "mlp_bias")
"""What `transformers` may not read, depending on the architecture."""
SCALING = "the scaling of positions"


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
class _Model:
    """The model to be written: whole, in safetensors. `run` is what the user calls it."""

    run: str
    folder: Path
    config: PreTrainedConfig
    family: Family
    tokenizer: PreTrainedTokenizerBase


def export_gguf(
    run: str,
    output: str | Path,
    *,
    quant: str = "f16",
    check: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Exported:
    """Writes the model `run` as GGUF, and an Ollama Modelfile beside it.

    `run` is a model's folder or name, or a run's folder; adapters are merged into their base model first. `output` is
    a file that ends in .gguf (the Modelfile is then NAME.Modelfile), or a folder, for model.gguf and Modelfile. `quant`
    is what matrices are stored as: f32, f16 or q8_0. `check` reads the file back through `transformers` and compares it
    with the model, which takes both in float32, one after the other. `progress` is told what happens.

    Nothing is left behind by an export that fails. Raises TunesmithError for a target that is there already, too little
    space, a model, tokenizer or setting that GGUF can't hold, and a file that doesn't do what the model does.
    """
    say = progress or (lambda text: None)
    if quant not in QUANTS:
        raise TunesmithError(
            f"quant is {quant!r}; write {', '.join(QUANTS)}{nearest(quant, QUANTS)}. Other types are "
            "made from f16 by llama.cpp's llama-quantize, or by `ollama create --quantize`"
        )
    target, target_modelfile = _targets(Path(output).expanduser())
    with workplace(target) as folder:
        model = _whole_model(run, folder, say)
        written = folder / target.name
        say(f"Writing {target.name} ({quant})")
        tokens = _write(model, quant, written, target)
        checked: list[str] = []
        if check:
            say("Reading it back and comparing it with the model")
            checked = check_gguf(written, model.folder, quant, tokens)
        text, notes = _modelfile(model, tokens, target.name)
        size = written.stat().st_size
        _publish(written, target)
        if text is not None:
            (folder / target_modelfile.name).write_text(text.text, encoding="utf-8")
            _publish(folder / target_modelfile.name, target_modelfile)
    return Exported(
        gguf=target,
        size=size,
        modelfile=None if text is None else target_modelfile,
        checked=tuple(checked),
        notes=(*tokens.notes, *notes),
    )


def _targets(output: Path) -> tuple[Path, Path]:
    """The files to be written. Raises TunesmithError where one is there already."""
    if output.suffix == SUFFIX and not output.is_dir():
        files = output, output.with_suffix(".Modelfile")
    elif output.is_file():
        raise TunesmithError(f"{output} is a file; name a folder, or a file that ends in {SUFFIX}")
    else:
        files = output / DEFAULT_NAME, output / "Modelfile"
    for file in files:
        _refuse_existing(file)
    return files


def _refuse_existing(file: Path) -> None:
    if os.path.lexists(file):
        raise TunesmithError(f"{file} is there already; name another --output, or remove it")


def _whole_model(run: str, place: Path, say: Callable[[str], None]) -> _Model:
    """The model that `run` names. One on the hub is downloaded into its cache; adapters are merged into `place`."""
    folder = Path(resolve_model(run, say))
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(run, allow_patterns=list(FILES)))
        except (OSError, ValueError) as error:
            raise TunesmithError(f"model {run} could not be loaded: {error}") from error
    folder = run_folder(folder)
    if not any((folder / name).is_file() for name in (CONFIG, ADAPTERS)):
        raise TunesmithError(f"{run} is no model: it has no {CONFIG}")
    if (folder / ADAPTERS).is_file():
        folder = merge(folder, place / "merged", progress=say).folder
    config, family = read_config(folder)
    return _Model(run=run, folder=folder, config=config, family=family, tokenizer=load_tokenizer(str(folder)))


def _write(model: _Model, quant: str, path: Path, target: Path) -> TokenizerMetadata:
    """Writes the whole file that is to become `target`. Returns what it says of the tokenizer."""
    planned = plan_weights(model.folder, model.config, model.family, quant)
    rows = next(weight.shape[0] for weight in planned if weight.name == "token_embd.weight")
    tokens = tokenizer_metadata(model.tokenizer, rows, _end_ids(model.folder, model.config))
    factors = rope_factors(model.config)
    check_room(target, sum(weight.size for weight in planned) + ROOM)
    writer = gguf.GGUFWriter(path, model.family.name)
    try:
        _add_general(writer, model, quant)
        add_settings(writer, model.config, model.family, rows)
        tokens.add_to(writer)
        for weight in planned:
            float32 = np.dtype(np.float32)
            writer.add_tensor_info(weight.name, weight.shape, float32, weight.size, raw_dtype=weight.kind)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        writer.add_size_label(gguf.size_label(*writer.get_total_parameter_count()))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for weight, values in read_weights(planned):
            writer.write_tensor_data(stored_values(weight, values))
        if factors is not None:
            writer.write_tensor_data(factors)
        writer.flush()
    finally:
        writer.close()
    return tokens


def _end_ids(folder: Path, config: Any) -> list[int]:
    """Where the model's generation settings, or else its own, say that an answer ends."""
    try:
        settings = json.loads((folder / "generation_config.json").read_bytes())
    except (OSError, ValueError):
        settings = {}
    ends = settings.get("eos_token_id", config.eos_token_id)
    return [number for number in (ends if isinstance(ends, list) else [ends]) if isinstance(number, int)]


def _add_general(writer: gguf.GGUFWriter, model: _Model, quant: str) -> None:
    """What the file says about itself. The base model and the licence are those of the model's card, if it has one."""
    writer.add_type("model")
    writer.add_name(Path(model.run).expanduser().resolve().name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(int(QUANTS[quant][1]))
    card = card_header(model.folder / "README.md")
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


def _modelfile(model: _Model, tokens: TokenizerMetadata, name: str) -> tuple[Modelfile | None, tuple[str, ...]]:
    """The Modelfile for the file `name`, or None, and what the user should know of it."""
    stops = [tokens.tokens[number] for number in tokens.ends]
    context = int(model.config.max_position_embeddings)
    try:
        text = modelfile(model.tokenizer, name, stops=stops, context=context, bos_is_added=tokens.add_bos)
    except TunesmithError as error:
        return None, (f"there is no Modelfile: {error}",)
    return text, text.notes


def _publish(written: Path, target: Path) -> None:
    """Renames the whole file to its name, unless somebody else has taken that meanwhile."""
    with written.open("rb") as file:
        os.fsync(file.fileno())
    _refuse_existing(target)
    written.rename(target)


# Whether the file is the model


def check_gguf(file: Path, folder: Path, quant: str, tokens: TokenizerMetadata) -> list[str]:
    """Compares `file`, written as `quant`, with the model and the tokenizer in `folder`; says what was found.

    Raises TunesmithError where settings, tokens or tensors differ, those by more than rounding to `quant`; for f32 and
    f16, where logits do, or greedy tokens other than by a tie. What q8_0 does to an answer is told.
    """
    tokenizer = load_tokenizer(str(folder))
    with quiet():
        results = [_compare_tokens(file, tokenizer, tokens)]
        config, unread = _config(file, AutoConfig.from_pretrained(str(folder)))
        expected = traces(load_model(str(folder)).eval(), tokenizer, QUESTIONS, tokens=NEW_TOKENS, stop=False)
        gc.collect()
        place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(
            **place, config=config, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        ).eval()
        results.append(_compare_tensors(model.state_dict(), folder, quant))
        logits = [logits_of(model, trace.ids) for trace in expected]
    results.append(compare_logits(expected, logits, quant))
    if unread:
        results.append(f"transformers doesn't read {', '.join(unread)}; compared in the file itself")
    return results


def _compare_tensors(tensors: Mapping[str, Tensor], folder: Path, quant: str) -> str:
    """Compares every tensor with the model's files."""
    weights = plan_weights(folder, *read_config(folder), quant)
    for weight, values in read_weights(weights):
        exact, back = values.to(torch.float32), tensors[weight.source]
        largest, worst = float(exact.abs().max()), float((exact - back).abs().max())
        if not worst <= ROUNDING[weight.kind] * largest:
            raise TunesmithError(
                f"{weight.name} in the file does not hold {weight.source}: they differ by up to {worst:.1e}, where the "
                f"largest value is {largest:.1e}. Nothing was written"
            )
    return f"tensors equal but for rounding: {len(weights)} of {len(weights)}"


def compare_logits(expected: Sequence[Trace], found: Sequence[Tensor], quant: str) -> str:
    """What model and file (T, V) say of the same sequences, as a sentence. Raises TunesmithError."""
    drift = drift_of(found, expected, LARGEST_DIFFERENCE[quant], tie=TIE.get(quant))
    result = (
        f"greedy tokens equal: {drift.equal} of {drift.tokens}; largest difference of logits: {drift.relative:.1e} of "
        "the largest"
    )
    if not drift.within or (quant in TIE and drift.equal + drift.ties < drift.tokens):
        raise TunesmithError(f"the {quant} file does not do what the model does: {result}. Nothing was written")
    return f"{result} ({drift.ties} tied)" if drift.ties else result


def _config(file: Path, source: PreTrainedConfig) -> tuple[PreTrainedConfig, list[str]]:
    """The settings as `transformers` reads them from the file, completed, and the names of what it doesn't read."""
    config: Any = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
    differing = [name for name in SETTINGS if getattr(config, name) != getattr(source, name)]
    floats = [
        {"rms_norm_eps": each.rms_norm_eps, "rope_theta": each.rope_parameters["rope_theta"]}
        for each in (config, source)
    ]
    differing += [name for name in floats[0] if not np.isclose(floats[1][name], floats[0][name], rtol=1e-6)]
    unread = [name for name in UNREAD if getattr(config, name, None) != getattr(source, name, None)]
    for name in unread:
        setattr(config, name, getattr(source, name))
    if source.rope_parameters["rope_type"] != config.rope_parameters["rope_type"]:
        unread.append(SCALING)
        config.rope_parameters = source.rope_parameters
    if unread:
        differing += _differing_in_file(gguf.GGUFReader(file), source, unread)
    if differing:
        raise TunesmithError(f"the file says something else than the model about {', '.join(differing)}")
    return config, unread


def _differing_in_file(reader: gguf.GGUFReader, source: PreTrainedConfig, names: Sequence[str]) -> list[str]:
    """Those of `names` that the file itself has otherwise. Biases are tensors: without them, logits differ."""
    differing = []
    size = reader.get_field(f"{source.model_type}.attention.key_length")
    if "head_dim" in names and (size is None or size.contents() != head_size(source)):
        differing.append("head_dim")
    factors = [tensor.data for tensor in reader.tensors if tensor.name == ROPE_FACTORS]
    wanted = rope_factors(source)
    if SCALING in names and (wanted is None or not factors or not np.array_equal(factors[0], wanted)):
        differing.append(SCALING)
    return differing


def _compare_tokens(file: Path, tokenizer: Any, tokens: TokenizerMetadata) -> str:
    """Encodes texts with the tokenizer and with that of the file, and renders a chat with both."""
    other: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    own, read = tokenizer.backend_tokenizer, other.backend_tokenizer
    is_unread = str(read.pre_tokenizer) != str(own.pre_tokenizer) or str(read.normalizer) != str(own.normalizer)
    if is_unread:
        read.pre_tokenizer, read.normalizer = own.pre_tokenizer, own.normalizer
    if getattr(own.model, "ignore_merges", False):
        read.model.ignore_merges = True
    texts = list(TEXTS)
    if tokenizer.chat_template is not None:
        chat = [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": TEXTS[2]}]
        texts.append(rendered(tokenizer, chat))
        found_text = rendered(other, chat)
        if found_text != texts[-1]:
            raise TunesmithError(f"the chat template of the file renders {found_text!r}, not {texts[-1]!r}")
    compared = 0
    for text in texts:
        if type(own.normalizer).__name__ == "NFC":  # which GGUF doesn't hold
            text = str(own.normalizer.normalize_str(text))
        expected, found = (each(text, add_special_tokens=False)["input_ids"] for each in (tokenizer, other))
        if expected != found:
            raise TunesmithError(f"the tokenizer of the file makes {found} of {text!r}, not {expected}")
        compared += len(expected)
    from_model = f" (with the rule {tokens.pre}, which transformers doesn't read, taken from the model)"
    return f"tokens equal: {compared} of {compared}{from_model if is_unread else ''}"
