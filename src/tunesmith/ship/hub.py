"""A run to the hub, with its card: one commit, so that nobody ever loads half of a model."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from tunesmith.errors import TunesmithError
from tunesmith.runs.record import RUN, RunRecord
from tunesmith.secrets import known_secrets, scrub
from tunesmith.ship.card import CARD, CardOptions, model_card
from tunesmith.ship.hub_files import MODEL_FILE, Item, left_out, model_files, run_folder, small_texts

MAIN = "main"
MESSAGE = "Upload a model tuned with tunesmith"
PLACEHOLDER = "more information needed"
"""What the cards that libraries leave in a folder are full of."""
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
    folder = run_folder(run)
    record = _record(folder)
    items, notes = model_files(folder, options.base_model), []
    card = _own_card(folder)
    if card is not None:
        notes.append(f"{CARD} is the one in {run}: it is yours")
        items.append(Item(path=CARD, source=card))
    else:
        card_options = CardOptions(
            repo=repo, base_model=options.base_model, licence=options.licence, samples=options.samples
        )
        made = model_card(folder, record, card_options)
        items += [Item(path=name, source=content) for name, content in made.items()]
    if record is None:
        notes.append(f"there is no {RUN}: the card can't say what the model learned from")
    else:
        public = replace(record, prompts=(), samples=record.samples if options.samples else ())
        items.append(Item(path=RUN, source=public.to_json().encode()))
    items.sort(key=lambda item: item.path)
    return Plan(repo=repo, items=tuple(items), left_out=tuple(left_out(folder, items)), notes=tuple(notes))


def in_full(name: str, token: str | None = None) -> str:
    """The repository `name` with its owner: the one the token belongs to, where none is named."""
    if "/" in name:
        return name
    with _in_words(name, _unheard) as secrets:
        token = _token(token, secrets)
        return f"{HfApi(token=token).whoami()['name']}/{name}"


def made(name: str, options: PushOptions, token: str | None = None) -> str:
    """The repository `name`, with its owner, which is there now. Raises TunesmithError."""
    repo = in_full(name, token)
    with _in_words(repo, _unheard) as secrets:
        _make(HfApi(token=_token(token, secrets)), repo, options)
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
    `hf auth login`; it is in no file and in no message. Prompts of the run that nobody has answered are, before and
    after training, and the answers kept in `run.json`. `progress` is told, in sentences, what goes on. Raises
    TunesmithError with what to do.
    """
    options, say = options or PushOptions(), progress or _unheard
    plan(run, repo, options)  # what can't be pushed is refused before anything is asked
    if options.samples:
        _answer(run_folder(run), say)
    planned = plan(run, repo, options)
    with _in_words(repo, say) as secrets:
        token = _token(token, secrets)
        _refuse_secrets(planned, token)
        api = HfApi(token=token)
        _make(api, repo, options)
        present = api.list_repo_files(repo, revision=options.revision)
        sent = {item.path for item in planned.items}
        removed = tuple(name for name in present if MODEL_FILE.fullmatch(name) and name not in sent)
        say(f"sending {len(planned.items)} files to {repo}")
        commit = api.create_commit(
            repo,
            [*_additions(planned), *(CommitOperationDelete(path_in_repo=name) for name in removed)],
            commit_message=options.message,
            revision=options.revision,
        )
        branch = "" if options.revision == MAIN else f"/tree/{options.revision}"
        return PushReport(url=f"{api.endpoint}/{repo}{branch}", commit=commit.oid, plan=planned, removed=removed)


def _token(given: str | None, secrets: list[str]) -> str:
    token = given or get_token()
    if token is None:
        raise TunesmithError(NO_TOKEN)
    secrets.append(token)
    return token


def _answer(folder: Path, say: Progress) -> None:
    record = RunRecord.read(folder)
    if record is not None and record.prompts and not record.samples:
        from tunesmith.ship.card_samples import with_samples  # torch and transformers

        with_samples(record, folder, say).write(folder)


def _check(repo: str, options: PushOptions) -> None:
    """The names, before anything is read or sent."""
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


def _record(folder: Path) -> RunRecord | None:
    """A checkpoint's is that of its run."""
    record = RunRecord.read(folder)
    return RunRecord.read(folder.parent) if record is None and folder.name.startswith("checkpoint-") else record


def _own_card(folder: Path) -> bytes | None:
    """A card that the user wrote into the folder, none that a library left there to be filled in."""
    path = folder / CARD
    if not path.is_file():
        return None
    text = path.read_bytes()
    return None if PLACEHOLDER in text.decode("utf-8", errors="replace").lower() else text


def _refuse_secrets(planned: Plan, token: str) -> None:
    for path, text in small_texts(list(planned.items)):
        if token.encode() in text:
            raise TunesmithError(f"{path} has your hub token in it, so nothing was sent; take it out")


def _make(api: HfApi, repo: str, options: PushOptions) -> None:
    """The repository and the branch."""
    api.create_repo(repo, private=options.private or None, exist_ok=True)
    if options.private and not api.repo_info(repo).private:
        raise TunesmithError(
            f"{repo} is there already, and public: nothing was sent. Make it private on the hub, or leave --private out"
        )
    if options.revision != MAIN:
        api.create_branch(repo, branch=options.revision, exist_ok=True)


def _additions(planned: Plan) -> Iterator[CommitOperationAdd]:
    for item in planned.items:
        yield CommitOperationAdd(path_in_repo=item.path, path_or_fileobj=item.source)


# Errors


@contextmanager
def _in_words(repo: str, say: Progress) -> Iterator[list[str]]:
    """Whatever the client raises, logs or warns of, in words and without the secrets in the list."""
    secrets = list(known_secrets())
    try:
        with _scrubbed_logs(secrets), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                yield secrets
            finally:
                for warning in caught:
                    if issubclass(warning.category, UserWarning):
                        say(scrub(f"note: {warning.message}", secrets))
    except TunesmithError:
        raise
    except Exception as error:
        # From None: a traceback would quote what was raised, and in it, maybe, the token.
        raise TunesmithError(scrub(_words(error, repo), secrets)) from None


def _words(error: Exception, repo: str) -> str:
    head, _, faults = str(error).partition("\n")
    if head.startswith("Invalid metadata") and faults.strip():  # the cause is the bare answer, without the file's name
        return f"the hub refused. {error}"
    chain = list(_causes(error))
    for cause in chain:
        if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, so the hub can't be reached; unset it to push"
        if isinstance(cause, HfHubHTTPError):
            return _refusal(cause, repo)
        # The client's HTTP library is its own affair, and not always the same: it is known by its errors' names.
        if any(kind.__name__ == "TransportError" for kind in type(cause).__mro__) or isinstance(cause, ConnectionError):
            return f"the connection to {constants.ENDPOINT} failed: {cause or type(cause).__name__}. {AGAIN}"
    return f"pushing to {repo} failed: {chain[-1]}. {AGAIN}"


def _refusal(error: HfHubHTTPError, repo: str) -> str:
    said = (error.server_message or "").strip()
    quoted = f"\nThe hub says: {said}" if said else ""
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


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


class _Scrubber(logging.Filter):
    def __init__(self, secrets: list[str]) -> None:
        super().__init__()
        self._secrets = secrets

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = scrub(record.getMessage(), self._secrets), ()
        record.exc_info = record.exc_text = None
        return True


@contextmanager
def _scrubbed_logs(secrets: list[str]) -> Iterator[None]:
    handlers: list[Any] = [*logging.getLogger("huggingface_hub").handlers, *logging.getLogger().handlers]
    scrubber = _Scrubber(secrets)
    for handler in handlers:
        handler.addFilter(scrubber)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(scrubber)


def _unheard(_message: str) -> None:
    """Where nobody listens."""
