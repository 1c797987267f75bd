"""What the hub of `hub_server` keeps, and how tests tell it to fail."""

import base64
import binascii
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

LFS_SUFFIXES = (".safetensors", ".bin", ".model")
REGULAR_LIMIT = 10_000_000
START = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


@dataclass(frozen=True)
class Blob:
    """A committed file. `sha256` is set for one in LFS."""

    content: bytes
    sha256: str | None = None

    @property
    def oid(self) -> str:
        """Git's: of the content, or of the pointer to it."""
        content = self.content
        if self.sha256:
            content = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """Branches by name, each with its commits, oldest first: (id, message, files)."""

    private: bool
    branches: dict[str, list[tuple[str, str, dict[str, Blob]]]]

    def commit(self, branch: str, message: str, files: dict[str, Blob]) -> str:
        history = self.branches.setdefault(branch, [])
        before = history[-1][0] if history else ""
        listed = json.dumps([before, message, {name: blob.oid for name, blob in files.items()}])
        oid = hashlib.sha1(listed.encode()).hexdigest()
        history.append((oid, message, files))
        return oid

    def at(self, revision: str) -> tuple[str, dict[str, Blob]]:
        """The commit and the files of a branch or a commit. Raises KeyError."""
        if revision in self.branches:
            oid, _, files = self.branches[revision][-1]
            return oid, files
        commits = {oid: files for history in self.branches.values() for oid, _, files in history}
        return revision, commits[revision]


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class Cut(Exception):
    """The connection ends without an answer."""


@dataclass
class Hub:
    """The state, and the ways to fail. `part_size`: objects above it are uploaded in parts of so many bytes."""

    token: str
    owners: tuple[str, ...] = ("org",)
    part_size: int | None = None
    uploads_left: int | None = None
    """How many more LFS uploads get through before connections break; None: all."""
    refuse: dict[str, tuple[int, str]] = field(default_factory=dict)
    """Regular expressions for "METHOD path" to an answer; {authorization} in it is the header of the request."""
    warning: str | None = None
    """Sent with every answer, for the client to log; {authorization} as above."""
    card_faults: Callable[[str], list[str]] = lambda card: []
    """What is wrong with a model card, which is then refused."""
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    puts: Counter[str] = field(default_factory=Counter)
    """How often the whole of an object, or a part of it, was stored."""
    arriving: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        return {name: blob.content for name, blob in self.repos[repo].at(revision)[1].items()}


@dataclass
class Call:
    """One request: `words` are the groups of its route."""

    hub: Hub
    method: str
    words: dict[str, str]
    headers: Any
    read: Callable[[], bytes]

    @property
    def logged_in(self) -> bool:
        return bool(self.headers.get("Authorization") == f"Bearer {self.hub.token}")

    @property
    def data(self) -> Any:
        return json.loads(self.read())

    @property
    def repo(self) -> Repo:
        """The one the path names, if the caller may see it."""
        found = self.hub.repos.get(self.words["repo"])
        if found is None or (found.private and not self.logged_in):
            raise Refused(404 if self.logged_in else 401, "Repository not found", "RepoNotFound")
        return found

    def tree(self) -> tuple[str, dict[str, Blob]]:
        try:
            return self.repo.at(unquote(self.words["revision"]))
        except KeyError:
            raise Refused(404, "Invalid rev id", "RevisionNotFound") from None

    def must_write(self) -> None:
        if not self.logged_in:
            raise Refused(401, "Invalid credentials in Authorization header")


def decoded(content: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as error:
        raise Refused(400, "content is not base64") from error


def must_be_valid(hub: Hub, card: bytes) -> None:
    if faults := hub.card_faults(card.decode()):
        raise Refused(400, "Invalid metadata", errors=[{"message": fault} for fault in faults], warnings=[])


def is_lfs(name: str, size: int, sample: bytes) -> bool:
    try:
        sample.decode()
        text = b"\0" not in sample
    except UnicodeDecodeError as error:
        text = error.start > len(sample) - 4  # cut within a character
    return name.endswith(LFS_SUFFIXES) or size > REGULAR_LIMIT or not text
