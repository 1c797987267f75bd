"""Pushes a run to the hub with its card, in one commit, so that nobody ever loads half of a model."""

import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open

from tunesmith.errors import TunesmithError
from tunesmith.runs.checkpoints import checkpoints
from tunesmith.runs.parts import named_by
from tunesmith.runs.record import RUN, RunRecord
from tunesmith.secrets import known_secrets, scrub
from tunesmith.ship.card import CARD, ModelFolder, base_origin, hub_name, model_card, read_settings, with_samples

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZER_AND_MORE = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json", "processor_config.json"),
    "preprocessor_config.json",
)
TEMPLATES = "additional_chat_templates"
MODEL_FILE = re.compile(
    rf"{re.escape(CONFIG)}|{re.escape(ADAPTER_CONFIG)}|{re.escape(ADAPTER_WEIGHTS)}|{re.escape(INDEX)}"
    r"|model(-\d+-of-\d+)?\.safetensors"
)
"""What decides which weights are loaded: one of these that an earlier push left behind would be loaded as well."""
PATH_KEYS = ("_name_or_path", "name_or_path")

MAIN = "main"
MESSAGE = "Upload a model tuned with tunesmith"
PLACEHOLDER = "more information needed"
"""Cards that libraries leave in a folder are full of this."""
NO_TOKEN = (
    "the hub takes files only from who has logged in. Make a token that may write at "
    "https://huggingface.co/settings/tokens, then run `hf auth login`, or set the environment variable HF_TOKEN"
)
AGAIN = "Run the same command again: files that have arrived whole are not sent a second time"

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class PushOptions:
    """How a run is pushed. `private` is for a new repository; a public one that is there is refused. `revision` is a
    branch, made when it is missing. `licence`: the hub's identifier. `base_model`: the hub's name of the base model,
    where the run names a folder. `samples`: whether prompts and answers are shown to the world."""

    private: bool = False
    revision: str = MAIN
    message: str = MESSAGE
    licence: str | None = None
    base_model: str | None = None
    samples: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """A file of the repository: its path there, and the file here, or its bytes."""

    path: str
    source: Path | bytes

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    def content(self) -> bytes:
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What would be sent, in bytes or files, and what would not: names at the top of the folder."""

    repo: str
    items: tuple[Item, ...]
    left_out: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Of all files, in bytes."""
        return sum(item.size for item in self.items)


@dataclass(frozen=True, kw_only=True, slots=True)
class PushReport:
    """What is on the hub now. `removed` are files of an earlier push that would have been loaded as well."""

    url: str
    commit: str
    plan: Plan
    removed: tuple[str, ...] = ()


def plan(run: str | Path, repo: str, options: PushOptions | None = None) -> Plan:
    """What `push` would send; nobody is asked. Raises TunesmithError for what can't be pushed."""
    options = options or PushOptions()
    _check(repo, options)
    folder = _finished_run(run)
    record = RunRecord.read(folder)
    if record is None and folder.name.startswith("checkpoint-"):
        record = RunRecord.read(folder.parent)
    items, notes = _model_files(folder, options.base_model), []
    own_card = (folder / CARD).read_bytes() if (folder / CARD).is_file() else None
    if own_card is not None and PLACEHOLDER not in own_card.decode("utf-8", errors="replace").lower():
        notes.append(f"{CARD} is the one in {run}: it is yours")
        items.append(Item(path=CARD, source=own_card))
    else:
        chosen: dict[str, Any] = {name: getattr(options, name) for name in ("base_model", "licence", "samples")}
        card = model_card(folder, record, repo, **chosen)
        items += [Item(path=name, source=content) for name, content in card.items()]
    if record is None:
        notes.append(f"there is no {RUN}: the card can't say what the model learned from")
    else:
        public = replace(record, prompts=(), samples=record.samples if options.samples else ())
        items.append(Item(path=RUN, source=public.to_json().encode()))
    items.sort(key=lambda item: item.path)
    sent = {item.path.split("/")[0] for item in items}
    left_out = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in sent)
    return Plan(repo=repo, items=tuple(items), left_out=tuple(left_out), notes=tuple(notes))


def in_full(name: str, token: str | None = None) -> str:
    """The repository `name` with its owner; if none is named, it is the one whom the token belongs to."""
    if "/" in name:
        return name
    with _client(name, token) as api:
        return f"{api.whoami()['name']}/{name}"


def make_repository(name: str, options: PushOptions, token: str | None = None) -> str:
    """Makes the repository `name` if it is missing, and returns it with its owner. Raises TunesmithError."""
    repo = in_full(name, token)
    with _client(repo, token) as api:
        _make(api, repo, options)
    return repo


def push(
    run: str | Path,
    repo: str,
    options: PushOptions | None = None,
    progress: Progress | None = None,
    token: str | None = None,
) -> PushReport:
    """Makes the repository `repo` (OWNER/NAME) if it is missing, and uploads the model of `run` with its card.

    A second run after an interruption sends what has not arrived. Without `token` it is the one of `HF_TOKEN`, or of
    `hf auth login`; it is in no file and in no message. Prompts of the run that have no answers yet are
    answered by the models before and after training, and the answers are kept in `run.json`. `progress` is told what
    happens. Raises TunesmithError that says how to fix it.
    """
    options, say = options or PushOptions(), progress or (lambda text: None)
    plan(run, repo, options)  # what can't be pushed is refused before anything is asked
    folder = _finished_run(run)
    record = RunRecord.read(folder) if options.samples else None
    if record is not None and record.prompts and not record.samples:
        with_samples(record, folder, say).write(folder)
    planned = plan(run, repo, options)
    with _client(repo, token, say) as api:
        for item in planned.items:
            if not item.path.endswith(".safetensors") and str(api.token).encode() in item.content():
                raise TunesmithError(f"{item.path} has your hub token in it, so nothing was sent; take it out")
        _make(api, repo, options)
        present = api.list_repo_files(repo, revision=options.revision)
        sent = {item.path for item in planned.items}
        removed = tuple(name for name in present if MODEL_FILE.fullmatch(name) and name not in sent)
        say(f"sending {len(planned.items)} files to {repo}")
        changes: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(path_in_repo=item.path, path_or_fileobj=item.source) for item in planned.items),
            *(CommitOperationDelete(path_in_repo=name) for name in removed),
        ]
        commit = api.create_commit(repo, changes, commit_message=options.message, revision=options.revision)
        branch = "" if options.revision == MAIN else f"/tree/{options.revision}"
        return PushReport(url=f"{api.endpoint}/{repo}{branch}", commit=commit.oid, plan=planned, removed=removed)


def _check(repo: str, options: PushOptions) -> None:
    """Checks the names, before anything is read or sent."""
    for name, what in ((repo, "--repo"), (options.base_model, "--base-model")):
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise TunesmithError(f"{what} is {name!r}: {error}") from error
    if "/" not in repo:
        raise TunesmithError(f"--repo is {repo!r}; write OWNER/NAME, your name on the hub or an organization's first")
    if not options.message.strip():
        raise TunesmithError("--message is empty; say what the commit is")
    if not options.revision.strip() or options.revision.startswith("refs/"):
        raise TunesmithError(f"--revision is {options.revision!r}; write the name of a branch, such as {MAIN}")


def _make(api: HfApi, repo: str, options: PushOptions) -> None:
    """Makes the repository and the branch, where they are missing."""
    api.create_repo(repo, private=options.private or None, exist_ok=True)
    if options.private and not api.repo_info(repo).private:
        raise TunesmithError(
            f"{repo} is there already, and public: nothing was sent. Make it private on the hub, or leave --private out"
        )
    if options.revision != MAIN:
        api.create_branch(repo, branch=options.revision, exist_ok=True)


# Which files are sent, and in which form: a list of what may be sent, not of what may not


def _finished_run(run: str | Path) -> Path:
    """The folder of `run`, if it holds a finished model. Raises TunesmithError."""
    folder = Path(run).expanduser()
    if not folder.is_dir():
        raise TunesmithError(f"there is no folder {run}; give the folder that a run was saved to")
    if (folder / ADAPTER_CONFIG).is_file() or (folder / CONFIG).is_file():
        return folder
    if saved := checkpoints(folder):
        raise TunesmithError(f"{run} holds checkpoints, but no finished model; finish the run, or push {saved[-1]}")
    raise TunesmithError(f"{run} is no run: it has neither {CONFIG} nor {ADAPTER_CONFIG}")


def _model_files(folder: Path, base_model: str | None) -> list[Item]:
    """Weights, settings and tokenizer of the run in `folder`, the settings without paths of this machine.

    `base_model` is the hub's name of the base model, None to take it from the adapters' settings. Raises TunesmithError
    where weights are missing, are no safetensors or are cut off, and where adapters belong to a model that nobody but
    this machine has.
    """
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    names = [ADAPTER_CONFIG] if is_adapter else [CONFIG]
    weights = [ADAPTER_WEIGHTS] if is_adapter else _weights(folder)
    for path in (folder / name for name in weights):
        if not path.is_file():
            raise TunesmithError(f"{path} is missing; save the run again")
        try:
            with safe_open(path, framework="np"):  # reads the header, and that the file is as long as that says
                pass
        except (OSError, SafetensorError) as error:
            raise TunesmithError(
                f"{path} is no safetensors file, or is cut off: {error}. Save the run again"
            ) from error
    if not is_adapter and (folder / INDEX).is_file() and weights != [WEIGHTS]:
        names.append(INDEX)
    names += [name for name in TOKENIZER_AND_MORE if (folder / name).is_file()]
    names += [f"{TEMPLATES}/{path.name}" for path in sorted((folder / TEMPLATES).glob("*.jinja"))]
    items = [Item(path=name, source=_published(folder, name, base_model)) for name in names]
    return sorted(items + [Item(path=name, source=folder / name) for name in weights], key=lambda item: item.path)


def _weights(folder: Path) -> list[str]:
    if (folder / WEIGHTS).is_file():  # which the libraries take before an index
        return [WEIGHTS]
    if (folder / INDEX).is_file():
        names = named_by(folder / INDEX)
        if any(not MODEL_FILE.fullmatch(name) for name in names) or not names:
            raise TunesmithError(f"{folder / INDEX} names no weights, or files of other names: {names[:3]}")
        return names
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise TunesmithError(
            f"{folder} has its weights in pickle files, which can run code when they are read, and are not pushed; "
            "load the model where you trust it and call save_pretrained, which writes safetensors"
        )
    raise TunesmithError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}")


def _published(folder: Path, name: str, base_model: str | None) -> Path | bytes:
    """The file as it is, or without the paths of this machine that it names."""
    path = folder / name
    if not name.endswith(".json") or name in (INDEX, "tokenizer.json", "vocab.json"):
        return path
    values = _read(path)
    public = dict(values)
    if name == ADAPTER_CONFIG:
        base = base_origin(ModelFolder.read(folder), None)
        public["base_model_name_or_path"] = base_model or hub_name(base)
        if public["base_model_name_or_path"] is None:
            raise TunesmithError(
                f"these adapters belong to the model in the local folder {base.name!r}, which nobody else has. Push "
                "that model first and name it: --base-model OWNER/NAME"
            )
        if public["base_model_name_or_path"] != values.get("base_model_name_or_path"):
            public["revision"] = None  # it was one of the other name's
    for key in PATH_KEYS:
        place = public.get(key)
        if isinstance(place, str) and ("\\" in place or place.startswith(("/", ".", "~")) or Path(place).exists()):
            del public[key]
    return path if public == values else (json.dumps(public, indent=2, ensure_ascii=False) + "\n").encode()


def _read(path: Path) -> dict[str, Any]:
    values = read_settings(path)
    if values is None:
        raise TunesmithError(f"{path} can't be read: it is no JSON object. Save the run again")
    return values


# Errors


@contextmanager
def _client(repo: str, token: str | None, say: Progress = lambda text: None) -> Iterator[HfApi]:
    """The hub's client. Whatever it raises, logs or warns of is told in words, and without the token and other secrets.

    Without `token` it is the one that the environment or the hub's login has.
    """
    token = token or get_token()
    if token is None:
        raise TunesmithError(NO_TOKEN)
    secrets = [*known_secrets(), token]
    try:
        with _scrubbed_logs(secrets), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield HfApi(token=token)
            finally:
                for warning in caught:
                    if issubclass(warning.category, UserWarning):
                        say(scrub(f"note: {warning.message}", secrets))
    except TunesmithError:
        raise
    except Exception as error:
        # From None: a traceback would quote what was raised, and in it, maybe, the token.
        raise TunesmithError(scrub(_words(error, repo), secrets)) from None


def _words(error: BaseException, repo: str) -> str:
    head, _, faults = str(error).partition("\n")
    if head.startswith("Invalid metadata") and faults.strip():  # the cause is the bare answer, without the file's name
        return f"the hub refused. {error}"
    while True:
        if isinstance(error, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so the hub can't be reached; unset it to push"
        if isinstance(error, HfHubHTTPError):
            return _refusal(error, repo)
        # The client's HTTP library is its own affair, and not always the same: it is known by its errors' names.
        if any(kind.__name__ == "TransportError" for kind in type(error).__mro__) or isinstance(error, ConnectionError):
            return f"the connection to {constants.ENDPOINT} failed: {error or type(error).__name__}. {AGAIN}"
        if error.__cause__ is None:
            return f"pushing to {repo} failed: {error}. {AGAIN}"
        error = error.__cause__


def _refusal(error: HfHubHTTPError, repo: str) -> str:
    answer = (error.server_message or "").strip()
    quoted = f"\nThe hub says: {answer}" if answer else ""
    match error.response.status_code:
        case 401:
            return f"the hub doesn't know the token: it may be mistyped or have expired. {NO_TOKEN}{quoted}"
        case 403:
            return (
                f"the token may not write to {repo}. Is {repo.split('/')[0]} you, or an organization that you may "
                f"write to? Does the token have the permission to write?{quoted}"
            )
        case 404:
            return f"the hub has no {repo} that this token may see{quoted}"
        case status if status >= 500 or status == 429:
            return f"the hub is busy or out of order ({status}). {AGAIN}{quoted}"
        case status:
            return f"the hub refused ({status}){quoted or f': {error}'}"


@contextmanager
def _scrubbed_logs(secrets: list[str]) -> Iterator[None]:
    def blacken(record: logging.LogRecord) -> bool:
        record.msg, record.args = scrub(record.getMessage(), secrets), ()
        record.exc_info = record.exc_text = None
        return True

    handlers = [*logging.getLogger("huggingface_hub").handlers, *logging.getLogger().handlers]
    for handler in handlers:
        handler.addFilter(blacken)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(blacken)


class HubPublisher:
    """Sends what a trainer (`train.trainer.BaseTrainer`) has trained, as its settings `hub_...` say."""

    def begin(self, trainer: Any, token: str | None, private: bool | None) -> str:
        """Makes the repository, so that what is wrong with it shows at the start; returns its full name."""
        args = trainer.args
        wanted = args.hub_private_repo if private is None else private
        name = args.hub_model_id or Path(str(args.output_dir)).name
        return make_repository(name, PushOptions(private=bool(wanted)), token or args.hub_token)

    def send_checkpoint(self, trainer: Any, folder: str) -> None:
        """A checkpoint's model, without what only this run needs."""
        args, step = trainer.args, trainer.state.global_step
        if trainer.is_world_process_zero() and str(getattr(args.hub_strategy, "value", args.hub_strategy)) != "end":
            trainer.record().write(str(args.output_dir))
            message = f"Training in progress, step {step}"
            options = PushOptions(revision=args.hub_revision or MAIN, message=message, samples=False)
            push(folder, in_full(trainer.hub_model_id or "", args.hub_token), options, token=args.hub_token)
