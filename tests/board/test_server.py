"""What the board's server tells and does, and whom it refuses."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tunesmith.board.chat import name_of
from tunesmith.board.jobs import Jobs
from tunesmith.board.server import Board, Tools
from tunesmith.errors import TunesmithError
from tunesmith.report.inspect import Document, InspectedRow, Piece

TOKEN = "secret"
TEXTS = ["a red hat", "a BLUE hat", "a blue <b>coat</b>"]


class FewRows:
    """Three rows, whose last word is trained on."""

    facts = (("rows", "3"),)

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe

    def __len__(self) -> int:
        return len(TEXTS)

    def row(self, number: int) -> InspectedRow:
        pieces = (Piece(text=TEXTS[number - 1], ids=(number,), weight=1.0),)
        return InspectedRow(title=f"example {number}", documents=(Document(pieces=pieces),))

    def text(self, number: int) -> str:
        return TEXTS[number - 1]


def resolved(path: str) -> str:
    text = Path(path).read_text(encoding="utf-8")
    if "wrong" in text:
        raise TunesmithError(f"{path}, line 1: wrong is no setting")
    return text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = tmp_path / "runs" / "first"
    run.mkdir(parents=True)
    lines = [{"step": step, "loss": 1 / step, "seconds": step} for step in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("model: demo\n", encoding="utf-8")
    (tmp_path / "secret.txt").write_text("no recipe", encoding="utf-8")
    return tmp_path


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    tools: Any = Tools(
        resolve=resolved,  # type: ignore[arg-type]
        prepare=FewRows,  # type: ignore[arg-type]
        command=lambda words, home: f"{' '.join(words)} in {home.name}",
        schema=lambda: {"properties": {}},
    )
    board = Board(folder / "runs", folder, TOKEN, tools)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with TestClient(board.app, base_url="http://127.0.0.1:8000", headers=headers) as asking:
        yield asking


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {}, 401),
        ("/?token=other", {}, 401),
        (f"/?token={TOKEN}", {}, 200),
        ("/board.js", {}, 200),
        ("/api/runs", {}, 401),
        ("/api/runs", {"Authorization": "Bearer secret"}, 200),
        ("/api/runs", {"Authorization": "Bearer secret", "Host": "evil.example"}, 403),
        ("/api/runs", {"Authorization": "Bearer secret", "Origin": "http://evil.example"}, 403),
    ],
)
def test_who_may_ask(client: TestClient, path: str, headers: dict[str, str], status: int) -> None:
    del client.headers["Authorization"]
    assert client.get(path, headers=headers).status_code == status


def test_a_start_needs_the_token_in_a_header_and_json(client: TestClient) -> None:
    assert client.post("/api/check", content="{}", headers={"Content-Type": "text/plain"}).status_code == 415
    del client.headers["Authorization"]
    assert client.post(f"/api/train/recipe.yaml?token={TOKEN}", json={}).status_code == 401


@pytest.mark.parametrize("body", ["[" * 100_000, "{", "[]"])
def test_a_body_that_is_no_object_is_refused(client: TestClient, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    assert client.post("/api/check", content=body, headers=headers).status_code == 400


def test_the_page_asks_nobody_else(client: TestClient) -> None:
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for text in (page.text, client.get("/board.js").text, client.get("/board.css").text):
        assert not [word for word in text.split() if "://" in word and "www.w3.org" not in word]


def test_a_run_is_read_while_it_is_written(client: TestClient, folder: Path) -> None:
    (line,) = client.get("/api/runs").json()["runs"]
    assert (line["name"], line["state"], line["step"], line["loss"]) == ("first", "not finished", 2, 0.5)
    first = client.get("/api/lines/first").json()
    assert [entry["step"] for entry in first["lines"]] == [1, 2]
    file = folder / "runs" / "first" / "metrics.jsonl"
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"step": 3, "loss": 0.3}\n{"step": 4, "lo')  # the last line is not whole yet
    then = client.get(f"/api/lines/first?offset={first['offset']}").json()
    assert [entry["step"] for entry in then["lines"]] == [3]
    file.write_text('{"step": 1, "loss": 9}\n', encoding="utf-8")
    anew = client.get(f"/api/lines/first?offset={then['offset']}").json()
    assert (anew["anew"], anew["lines"][0]["loss"]) == (True, 9)
    (folder / "runs" / "first" / ".owner").write_text(f"process {os.getpid()} on {os.uname().nodename}, since now\n")
    assert client.get("/api/runs").json()["runs"][0]["state"] == "running"


@pytest.mark.parametrize("name", ["..", "../secret.txt", "first/../..", "second"])
def test_no_run_outside_of_the_folder_is_read(client: TestClient, name: str) -> None:
    answer = client.get(f"/api/lines/{name.replace('/', '%2F')}")
    assert answer.status_code in (400, 404)


@pytest.mark.parametrize("name", ["secret.txt", "..%2Fother.yaml", ".hidden.yaml", "a%2Fb.yaml"])
def test_only_recipes_of_the_folder_are_read_and_written(client: TestClient, folder: Path, name: str) -> None:
    assert client.get(f"/api/recipe/{name}").status_code in (400, 404, 405)
    assert client.put(f"/api/recipe/{name}", json={"text": "model: x\n"}).status_code in (400, 404, 405)
    assert sorted(file.name for file in folder.iterdir()) == ["recipe.yaml", "runs", "secret.txt"]


def test_a_recipe_is_checked_saved_and_planned(client: TestClient, folder: Path) -> None:
    assert client.post("/api/check", json={"text": "wrong: 1"}).json()["error"] == "recipe, line 1: wrong is no setting"
    assert client.post("/api/check", json={"text": "model: demo"}).json()["error"] is None
    client.put("/api/recipe/other.yaml", json={"text": "model: demo\nlora: true\n"})
    assert client.get("/api/recipes").json()["recipes"] == ["other.yaml", "recipe.yaml"]
    assert client.get("/api/recipe/other.yaml").json()["text"] == "model: demo\nlora: true\n"
    assert (
        client.post("/api/look", json={"command": "plan", "text": ""}).json()["text"].startswith("plan recipe.yaml in")
    )
    assert client.post("/api/look", json={"command": "push", "text": ""}).status_code == 400
    answer = client.post("/api/init", json={"name": "new.yaml", "data": "rows.csv", "model": "demo"}).json()
    assert answer["text"].startswith("init new.yaml --yes --data rows.csv --model demo in ")
    assert client.post("/api/init", json={"name": "other.yaml", "data": "rows.csv"}).status_code == 400


def test_rows_are_shown_and_found(client: TestClient) -> None:
    shown = client.post("/api/rows", json={"text": "model: demo", "first": 2}).json()
    assert (shown["about"], shown["total"]) == ("rows 2 to 3 of 3", 3)
    assert "a BLUE hat" in shown["html"]
    found = client.post("/api/rows", json={"text": "model: demo", "search": "blue"}).json()
    assert found["about"] == "2 of 3 rows have “blue”"
    assert "&lt;b&gt;coat" in found["html"]
    assert client.post("/api/rows", json={"text": "model: demo", "first": 9}).status_code == 400


def test_a_job_runs_is_stopped_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "tunesmith"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import sys, time\nprint('training', sys.argv[2:], flush=True)\n"
        "try:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('saved', flush=True)\n    sys.exit(130)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    jobs = Jobs()
    job = jobs.start(tmp_path / "recipe.yaml")
    _until(lambda: "recipe.yaml" in job.output())
    assert jobs.all()[0]["running"]
    jobs.stop(1)
    assert job.process.wait(timeout=60) == 130
    assert jobs.all()[0]["output"].endswith("saved\n")
    with pytest.raises(TunesmithError, match="no job 2"):
        jobs.stop(2)


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"messages": "hello"}, "messages is no list of objects"),
        ({}, "messages is no list of objects"),
        ({"messages": [], "temperature": "hot"}, "temperature is 'hot'; write a number"),
        ({"messages": [], "base": True}, "trained all weights"),
    ],
)
def test_a_question_that_is_none_loads_no_model(client: TestClient, question: dict[str, Any], message: str) -> None:
    answer = client.post("/api/chat", json={"run": "first", **question})
    assert (answer.status_code, message in answer.json()["error"]) == (400, True)


def test_the_base_of_adapters_of_the_demo_model_is_found_on_any_machine(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "/elsewhere/demo-0123456789ab-v2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert (name_of(tmp_path, base=True), name_of(tmp_path, base=False)) == ("demo", str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"revision": "v2"}), encoding="utf-8")
    with pytest.raises(TunesmithError, match="at the revision v2"):
        name_of(tmp_path, base=True)


def _until(holds: Any) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
