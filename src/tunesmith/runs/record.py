"""What a run was: written beside its model as `run.json`, and read by whatever tells others of it."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tunesmith.data.folders import is_file_name
from tunesmith.home import DEMO, DEMO_FOLDER
from tunesmith.runs.files import as_json, from_json, last_part, read, unreadable, write_whole
from tunesmith.secrets import known_secrets, scrub

RUN = "run.json"
FORMAT = 1
"""Raise it with a change that an older version would read wrongly."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)

Text = str | tuple[dict[str, Any], ...]
"""A text, or the messages of a conversation as dictionaries of `role` and `content`."""


def prompt_text(prompt: Text) -> str:
    """A prompt as one text. Messages are written with their roles, except for a single message of a user."""
    if isinstance(prompt, str):
        return prompt
    contents = []
    for message in prompt:
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "".join(str(part.get("text", "")) if isinstance(part, dict) else str(part) for part in content)
        contents.append(str(content))
    if len(prompt) == 1 and prompt[0].get("role") == "user":
        return contents[0]
    return "\n\n".join(f"{message.get('role')}: {text}" for message, text in zip(prompt, contents, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a model or data come from. Local files and folders have only their name, never a path of this machine."""

    kind: Literal["hub", "folder", "file", "memory", "demo"]
    name: str

    @classmethod
    def of_model(cls, name: str) -> "Origin":
        """From `model` in a recipe: a name on the hub, a folder, or the demo model, by its name or its cache folder."""
        last = last_part(name)
        if name == DEMO or DEMO_FOLDER.fullmatch(last):
            return cls(kind="demo", name=DEMO)
        local = Path(name).expanduser().is_dir() or not HUB_ID.fullmatch(name)
        return cls(kind="folder", name=last) if local else cls(kind="hub", name=name)

    @classmethod
    def of_data(cls, name: str | None) -> "Origin":
        """From `data` in a recipe: files here, or a name on the hub, which may end in `:configuration`. None is for
        rows that a program made."""
        if name is None:
            return cls(kind="memory", name="rows made by a program")
        return cls(kind="file", name=last_part(name)) if is_file_name(name) else cls(kind="hub", name=name)


ADAPTERS = {"lora": "LoRA", "adalora": "AdaLoRA", "loha": "LoHa", "lokr": "LoKr", "vera": "VeRA"}


def setting_text(value: Any) -> str:
    """A value of a run's settings, as a recipe has it."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def adapters_of(kind: str) -> str:
    """Adapters of the `kind` that `peft` names, in upper or lower case, as papers spell it."""
    return f"{ADAPTERS.get(kind.lower(), kind.upper())} adapters"


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """What was trained. `kind` is "full" or the kind of adapter in lower case, such as "lora"; `bits` is the precision
    of a quantized base model, 4 or 8."""

    kind: str = "full"
    rank: int | None = None
    alpha: float | None = None
    dropout: float | None = None
    targets: tuple[str, ...] = ()
    bits: int | None = None

    def __str__(self) -> str:
        """`LoRA adapters, rank 16, alpha 32, on q_proj, v_proj, over a base model in 4 bits`."""
        parts = ["full fine-tuning" if self.kind == "full" else adapters_of(self.kind)]
        values = {"rank": self.rank, "alpha": self.alpha, "dropout": self.dropout or None}
        parts += [f"{name} {value:g}" for name, value in values.items() if value is not None]
        parts += [f"on {', '.join(self.targets)}"] if self.targets else []
        parts += [f"over a base model in {self.bits} bits"] if self.bits else []
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceCount:
    """One source of one split, in numbers. `split` is "train", "eval", or the name under which a set is evaluated;
    `source` its name in a mixture, or the split's."""

    split: str
    source: str
    origin: Origin
    examples: int
    tokens: int
    supervised_tokens: int
    dropped: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What the model is asked, and the answer in the data."""

    prompt: Text
    expected: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One prompt, answered before training and after."""

    prompt: Prompt
    before: str
    after: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """A run as far as it has come: `steps` of `planned_steps`. `ended` says how: "finished", "stopped" or "error";
    empty while the run goes on, and of earlier versions. `seconds` is the time that training took; `history` the
    trainer's `state.log_history`, `metrics` the last evaluation's; `prompts` are for whoever wants to ask the model,
    `samples` were asked.

    `trainer` is "sft", or "distill" for a run with a teacher; "dpo" for a run on pairs, "reward" for a reward model of
    pairs, or "kto" for a run on judged answers, whose losses are of these rather than of tokens; "grpo" or "rloo" for
    one on rewards.

    Numbers that are not finite are None in what is written, and tokens and passwords are blacked out.
    """

    versions: dict[str, str]
    trainer: str = "sft"
    base_model: Origin
    base_revision: str | None = None
    method: Method = field(default_factory=Method)
    trainable_parameters: int
    total_parameters: int
    data: tuple[SourceCount, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    metrics: dict[str, float | None] = field(default_factory=dict)
    steps: int | None = None
    planned_steps: int | None = None
    ended: str = ""
    seconds: float | None = None
    device: str = ""
    prompts: tuple[Prompt, ...] = ()
    samples: tuple[Sample, ...] = ()

    @property
    def trained_share(self) -> str:
        """`1,000 of 100,000 (1.00%)` parameters."""
        trained, total = self.trainable_parameters, self.total_parameters
        return f"{trained:,} of {total:,} ({trained / max(1, total):.2%})"

    def to_json(self) -> str:
        """The text of the file."""
        text = json.dumps({"format": FORMAT, **as_json(self)}, indent=1, ensure_ascii=False, allow_nan=False)
        return scrub(text, [json.dumps(secret, ensure_ascii=False)[1:-1] for secret in known_secrets()]) + "\n"

    def write(self, folder: Path | str) -> Path:
        """Writes `run.json` in `folder` atomically, and returns its path."""
        path = Path(folder) / RUN
        write_whole(path, self.to_json())
        return path

    @classmethod
    def read(cls, folder: Path | str) -> "RunRecord | None":
        """The record in `folder`, None if there is none. Raises TunesmithError for a file that can't be read."""
        path = Path(folder) / RUN
        values = read(path)
        if values is None:
            return None
        try:
            version = values.pop("format", None)
            if not isinstance(version, int) or version > FORMAT:
                raise ValueError(f"its format is {version!r}, this version of tunesmith reads {FORMAT}")
            record: RunRecord = from_json(values, cls)
        except ValueError as error:
            raise unreadable(path, error) from error
        return record
