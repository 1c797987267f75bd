"""The pages of the hub of `hub_server`."""

import hashlib
import json
import re
from typing import Any
from urllib.parse import parse_qs, unquote

from tunesmith.practice.hub_state import START, Blob, Call, Cut, Refused, Repo, decoded, is_lfs, must_be_valid

Answer = Any
"""JSON, or headers (and "status") with the body."""


def whoami(call: Call) -> Answer:
    call.must_write()
    return {"type": "user", "name": call.hub.owners[0], "orgs": [{"name": name} for name in call.hub.owners[1:]]}


def create(call: Call) -> Answer:
    call.must_write()
    asked = call.data
    owner = asked["organization"] or call.hub.owners[0]
    repo = f"{owner}/{asked['name']}"
    if owner not in call.hub.owners:
        raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}.")
    url = f"{call.hub.url}/{repo}"
    if repo in call.hub.repos:
        raise Refused(409, "You already created this model repo", url=url)
    made = Repo(private=asked.get("visibility") == "private", branches={})
    made.commit("main", "initial commit", {name: Blob(content) for name, content in START.items()})
    call.hub.repos[repo] = made
    return {"url": url, "name": repo}


def validate(call: Call) -> Answer:
    must_be_valid(call.hub, call.data["content"].encode())
    return {"errors": [], "warnings": []}


def info(call: Call) -> Answer:
    call.words["revision"] = call.words.get("revision") or "main"
    oid, files = call.tree()
    listed = [{"rfilename": name} for name in files]
    return {"id": call.words["repo"], "sha": oid, "private": call.repo.private, "siblings": listed, "tags": []}


def refs(call: Call) -> Answer:
    branches = {name: history[-1][0] for name, history in call.repo.branches.items()}
    listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in branches.items()]
    return {"branches": listed, "converts": [], "tags": []}


def _entry(name: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "oid": blob.oid, "size": len(blob.content)}
    if blob.sha256:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}
    return entry


def tree(call: Call) -> Answer:
    _, files = call.tree()
    folder = (call.words.get("path") or "").strip("/")
    inside = [name for name in files if not folder or name.startswith(f"{folder}/")]
    if folder and not inside:
        raise Refused(404, f"{folder} does not exist", "EntryNotFound")
    return [_entry(name, files[name]) for name in inside]


def paths_info(call: Call) -> Answer:
    _, files = call.tree()
    content = call.read().decode()
    asked = json.loads(content)["paths"] if content.startswith("{") else parse_qs(content)["paths"]
    return [_entry(name, files[name]) for name in asked if name in files]


def branch(call: Call) -> Answer:
    call.must_write()
    name = unquote(call.words["revision"])
    if name in call.repo.branches:
        raise Refused(409, f"Reference already exists: refs/heads/{name}")
    call.repo.branches[name] = list(call.repo.branches["main"])
    return {}


def preupload(call: Call) -> Answer:
    call.must_write()
    _, files = call.tree()
    answers = []
    for asked in call.data["files"]:
        known = files.get(asked["path"])
        mode = "lfs" if is_lfs(asked["path"], asked["size"], decoded(asked["sample"])) else "regular"
        oid = (known.sha256 or known.oid) if known else None
        answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return {"files": answers}


def batch(call: Call) -> Answer:
    call.must_write()
    return {"transfer": "basic", "objects": [_instructions(call, asked) for asked in call.data["objects"]]}


def _instructions(call: Call, asked: dict[str, Any]) -> dict[str, Any]:
    """How to upload an object; without actions for one that is there."""
    oid, size, hub = asked["oid"], asked["size"], call.hub
    if oid in hub.objects:
        return {"oid": oid, "size": size}
    upload: dict[str, Any] = {"href": f"{hub.url}/storage/{oid}"}
    if hub.part_size and size > hub.part_size:
        count = -(-size // hub.part_size)
        parts = {str(i): f"{hub.url}/storage/{oid}/{i}" for i in range(1, count + 1)}
        upload = {"href": f"{hub.url}/storage/{oid}/complete", "header": {"chunk_size": str(hub.part_size), **parts}}
    verify = {"href": f"{hub.url}/{call.words['repo']}.git/info/lfs/verify"}
    return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}


def store(call: Call) -> Answer:
    """A whole object, or a part of one. The links are signed, as it were: no token is asked for, and none is wanted."""
    if "Authorization" in call.headers:
        raise Refused(400, "the token was sent to the storage")
    hub, oid = call.hub, call.words["oid"]
    hub.arriving.set()
    with hub.lock:
        if hub.uploads_left == 0:
            raise Cut
        if hub.uploads_left is not None:
            hub.uploads_left -= 1
    content = call.read()
    if call.words.get("part"):
        hub.parts.setdefault(oid, {})[int(call.words["part"])] = content
    else:
        _keep(call, content)
    hub.puts[oid] += 1
    return {"ETag": f'"{hashlib.md5(content).hexdigest()}"'}, b""


def _keep(call: Call, content: bytes) -> None:
    oid = call.words["oid"]
    if hashlib.sha256(content).hexdigest() != oid:
        raise Refused(400, "the content has another checksum")
    call.hub.objects[oid] = content


def complete(call: Call) -> Answer:
    asked, parts = call.data, call.hub.parts.pop(call.words["oid"], {})
    for part in asked["parts"]:
        if part["etag"] != f'"{hashlib.md5(parts[part["partNumber"]]).hexdigest()}"':
            raise Refused(400, f"part {part['partNumber']} has another ETag")
    _keep(call, b"".join(parts[part["partNumber"]] for part in asked["parts"]))
    return {}


def verify(call: Call) -> Answer:
    call.must_write()
    asked = call.data
    if len(call.hub.objects.get(asked["oid"], b"")) != asked["size"]:
        raise Refused(404, "the object is not there")
    return {}


def commit(call: Call) -> Answer:
    call.must_write()
    _, before = call.tree()
    files, message = dict(before), ""
    for line in call.read().splitlines():
        key, value = (item := json.loads(line))["key"], item["value"]
        if key == "header":
            message = value["summary"]
        elif key == "file":
            files[value["path"]] = Blob(decoded(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in call.hub.objects:
                raise Refused(400, f"LFS object {value['oid']} is not there")
            files[value["path"]] = Blob(call.hub.objects[value["oid"]], value["oid"])
        elif key == "deletedFile":
            del files[value["path"]]
        else:
            raise Refused(400, f"unknown operation {key}")
    if "README.md" in files:
        must_be_valid(call.hub, files["README.md"].content)
    oid = call.repo.commit(unquote(call.words["revision"]), message, files)
    return {"success": True, "commitOid": oid, "commitUrl": f"{call.hub.url}/{call.words['repo']}/commit/{oid}"}


def resolve(call: Call) -> Answer:
    oid, files = call.tree()
    blob = files.get(unquote(call.words["path"]))
    if blob is None:
        raise Refused(404, "Entry not found", "EntryNotFound")
    headers = {"X-Repo-Commit": oid, "ETag": f'"{blob.sha256 or blob.oid}"', "Accept-Ranges": "bytes"}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
    if wanted:
        start, last = int(wanted[1]), int(wanted[2] or len(blob.content) - 1)
        headers |= {"status": "206", "Content-Range": f"bytes {start}-{last}/{len(blob.content)}"}
        return headers, blob.content[start : last + 1]
    return headers, blob.content


REPO, REVISION = r"(?P<repo>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
ROUTES = (
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/repos/create", create),
    ("POST", r"/api/validate-yaml", validate),
    ("GET", rf"/api/models/{REPO}/refs", refs),
    ("GET", rf"/api/models/{REPO}(/revision/{REVISION})?", info),
    ("GET", rf"/api/models/{REPO}/tree/{REVISION}(?P<path>/.*)?", tree),
    ("POST", rf"/api/models/{REPO}/paths-info/{REVISION}", paths_info),
    ("POST", rf"/api/models/{REPO}/branch/{REVISION}", branch),
    ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", preupload),
    ("POST", rf"/api/models/{REPO}/commit/{REVISION}", commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", batch),
    ("POST", rf"/{REPO}\.git/info/lfs/verify", verify),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})(/(?P<part>\d+))?", store),
    ("POST", r"/storage/(?P<oid>[0-9a-f]{64})/complete", complete),
    ("GET HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve),
)
