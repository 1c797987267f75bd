"""A pushed run is loaded by a stranger and answers alike; nothing else of it leaves the machine, and no token shows."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.ship.conftest import TOKEN
from tests.ship.runs import LEFTOVERS, adapter_run, full_run, record
from tunesmith.errors import TunesmithError
from tunesmith.practice.hub_state import Hub
from tunesmith.ship.hub import PushOptions, plan, push

REPO_ROOT = Path(__file__).resolve().parents[2]
BASE = PushOptions(base_model="org/base")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Of three shards."""
    return full_run(tmp_path_factory.mktemp("runs") / "full", tiny_model, shards=3)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Without curves, whose picture takes longer to draw than the rest to send."""
    return adapter_run(tmp_path_factory.mktemp("runs") / "adapters", tiny_model, run_record=record(history=()))


# What arrives

STRANGER = """
import contextlib, io, json, re, sys
from pathlib import Path
import torch
from huggingface_hub import hf_hub_download
from peft import AutoPeftModelForCausalLM
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

found = {}
for repo, kind in (("org/base", AutoModelForCausalLM), ("org/adapters", AutoPeftModelForCausalLM)):
    card = Path(hf_hub_download(repo, "README.md")).read_text()
    code = re.search(r"```python\\n(.*?)\\n```", card, re.S)[1].replace("max_new_tokens=200", "max_new_tokens=8")
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    Path(sys.argv[1], kind.__name__ + ".txt").write_text(said.getvalue())
    with torch.no_grad():
        found[repo] = kind.from_pretrained(repo).eval()(torch.arange(20)[None]).logits
save_file(found, Path(sys.argv[1], "logits.safetensors"))
"""


@pytest.mark.slow
def test_a_stranger_runs_the_cards_code_and_gets_the_same_logits_and_answers(
    hub: Hub, full: Path, adapters: Path, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file

    from tunesmith.model.generate import generate
    from tunesmith.model.load import load_run

    push(full, "org/base")
    push(adapters, "org/adapters", BASE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "empty"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-c", STRANGER, str(tmp_path)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    logits = load_file(tmp_path / "logits.safetensors")
    asked = [[{"role": "user", "content": "Hello! What can you do?"}]]
    for run, repo, name in (
        (full, "org/base", "AutoModelForCausalLM"),
        (adapters, "org/adapters", "AutoPeftModelForCausalLM"),
    ):
        model, tokenizer = load_run(str(run))
        with torch.no_grad():
            assert torch.equal(model(torch.arange(20)[None]).logits, logits[repo])
        [answer] = generate(model, tokenizer, asked, max_new_tokens=8)
        assert (tmp_path / f"{name}.txt").read_text() == f"{answer}\n"
    assert not torch.equal(logits["org/base"], logits["org/adapters"])


def test_only_what_a_stranger_needs_is_sent_and_it_names_no_place_here(
    hub: Hub, full: Path, tiny_model: Path, tmp_path: Path
) -> None:
    adapters = adapter_run(tmp_path / "adapters", tiny_model, run_record=record())
    reports = [push(full, "org/base"), push(adapters, "org/adapters", BASE)]
    common = {".gitattributes", "README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    whole = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    expected = [
        common | shards | whole,
        common | {"adapter_config.json", "adapter_model.safetensors", "curves.png", "run.json"},
    ]
    for report, repo, names in zip(reports, ("org/base", "org/adapters"), expected, strict=True):
        files = hub.files(repo)
        assert files.keys() == names
        assert report.plan.left_out == LEFTOVERS
        assert not [name for name, content in files.items() if b"/tmp" in content or b"/home" in content]
        assert report.url == f"{hub.url}/{repo}"
        assert {item.path for item in report.plan.items} == names - {".gitattributes"}
    adapter_settings = json.loads(hub.files("org/adapters")["adapter_config.json"])
    assert adapter_settings["base_model_name_or_path"] == "org/base"
    for name in shards:
        assert hub.files("org/base")[name] == (full / name).read_bytes()


def test_adapters_of_the_demo_model_name_the_model_that_strangers_can_have(adapters: Path, tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", adapters)
    settings = json.loads((run / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "/home/me/.cache/tunesmith/demo-b179c9523d0e-v1"
    (run / "adapter_config.json").write_text(json.dumps(settings))
    sent = {item.path: item.source for item in plan(run, "org/a").items}["adapter_config.json"]
    assert isinstance(sent, bytes)
    public = {"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    assert json.loads(sent) == settings | public


def test_rows_that_nobody_was_shown_stay_here(hub: Hub, adapters: Path) -> None:
    push(adapters, "org/shown", BASE)
    sent = json.loads(hub.files("org/shown")["run.json"])
    assert (sent["prompts"], len(sent["samples"])) == ([], 1)
    assert b"Four." in hub.files("org/shown")["README.md"]
    push(adapters, "org/hidden", PushOptions(base_model="org/base", samples=False))
    assert json.loads(hub.files("org/hidden")["run.json"])["samples"] == []
    assert not [name for name, content in hub.files("org/hidden").items() if b"two plus two" in content]


def test_the_same_run_again_makes_no_new_commit(hub: Hub, adapters: Path) -> None:
    first, again = push(adapters, "org/a", BASE), push(adapters, "org/a", BASE)
    assert again.commit == first.commit
    assert len(hub.repos["org/a"].branches["main"]) == 2
    assert set(hub.puts.values()) == {1}


def test_weights_of_an_earlier_push_are_not_left_to_be_loaded(
    hub: Hub, full: Path, adapters: Path, tiny_model: Path
) -> None:
    push(full, "org/a")
    whole = push(tiny_model, "org/a")
    assert [name for name in hub.files("org/a") if name.endswith(".safetensors")] == ["model.safetensors"]
    assert whole.removed == (
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    )
    assert set(push(adapters, "org/a", BASE).removed) == {"config.json", "model.safetensors"}


def test_a_branch_and_a_message_are_those_that_were_asked_for(hub: Hub, adapters: Path) -> None:
    report = push(adapters, "org/a", PushOptions(base_model="org/base", revision="second/try", message="Better"))
    branches = hub.repos["org/a"].branches
    assert branches["second/try"][-1][:2] == (report.commit, "Better")
    assert hub.files("org/a").keys() == {".gitattributes"}
    assert report.url.endswith("/org/a/tree/second/try")


def test_private_is_private_or_nothing_is_sent(hub: Hub, adapters: Path) -> None:
    private = PushOptions(base_model="org/base", private=True)
    push(adapters, "org/mine", private)
    push(adapters, "org/mine", private)
    assert hub.repos["org/mine"].private
    push(adapters, "org/open", BASE)
    hub.puts.clear()
    with pytest.raises(TunesmithError, match="org/open is there already, and public: nothing was sent"):
        push(adapters, "org/open", private)
    assert not hub.puts


def test_a_card_of_the_users_own_is_kept_and_a_librarys_is_not(adapters: Path, hub: Hub, tmp_path: Path) -> None:
    assert "More Information Needed" in (adapters / "README.md").read_text()
    made = {item.path: item.source for item in plan(adapters, "org/a", BASE).items}["README.md"]
    assert isinstance(made, bytes)
    assert b"## Training" in made
    assert b"More Information Needed" not in made
    mine = full_run(tmp_path / "mine", adapters)
    (mine / "README.md").write_text("---\nlicense: mit\npipeline_tag: text-generation\n---\nMine.")
    assert push(mine, "org/a", BASE).plan.notes == (f"README.md is the one in {mine}: it is yours",)
    assert hub.files("org/a")["README.md"].endswith(b"Mine.")
    (mine / "README.md").write_text("---\nlicense: nobody's\n---\nMine.")
    with pytest.raises(TunesmithError, match=r'Invalid metadata in README.md.\n- "license" must be one of'):
        push(mine, "org/a", BASE)


# Interrupted


@pytest.mark.parametrize("part_size", [None, 10_000])
def test_an_interrupted_upload_goes_on_with_what_is_missing(hub: Hub, full: Path, part_size: int | None) -> None:
    sizes = [path.stat().st_size for path in full.glob("*.safetensors")]
    hub.part_size = part_size
    # Two uploads are missing in the end, of one shard or of two: they go side by side.
    hub.uploads_left = sum(-(-size // (part_size or size)) for size in sizes) - 2
    with pytest.raises(TunesmithError, match=r"the connection to .* failed: .*Run the same command again"):
        push(full, "org/base")
    stored = set(hub.objects)
    assert 1 <= len(stored) < 3
    assert hub.files("org/base").keys() == {".gitattributes"}  # half of a model is never there to be loaded
    hub.uploads_left = None
    hub.puts.clear()
    push(full, "org/base")
    assert len(hub.objects) == 3
    assert hub.puts.keys() == hub.objects.keys() - stored


PUSHER = "import sys; from tunesmith.ship.hub import push; push(sys.argv[1], 'org/base')"


def test_a_killed_upload_goes_on_with_what_is_missing(hub: Hub, full: Path, tmp_path: Path) -> None:
    hub.uploads_left = 1
    environment = dict(os.environ) | {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    child = subprocess.Popen([sys.executable, "-c", PUSHER, str(full)], env=environment, stderr=subprocess.PIPE)
    assert child.stderr is not None
    for line in child.stderr:  # it goes on trying
        if b"Retrying" in line and hub.objects:
            break
    child.send_signal(signal.SIGKILL)
    child.communicate()
    [stored] = hub.objects
    hub.uploads_left = None
    hub.puts.clear()
    push(full, "org/base")
    assert hub.puts.keys() == hub.objects.keys() - {stored}
    assert len(hub.files("org/base")) == 11


# Without anybody


def test_a_plan_contacts_nobody(hub: Hub, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        pytest.fail("a connection was made")

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    planned = plan(adapters, "org/a", BASE)
    assert planned.size == sum(item.size for item in planned.items) > 10_000
    assert not hub.requests


# The token


@pytest.mark.parametrize(
    ("page", "status"),
    [
        ("POST /api/repos/create", 400),
        ("POST /api/repos/create", 401),
        ("POST /api/validate-yaml", 400),
        ("GET .*/tree/main", 403),
        ("POST .*/preupload/main", 500),
        ("POST .*/objects/batch", 422),
        ("POST .*/commit/main", 403),
    ],
)
def test_the_token_is_in_no_message_even_if_the_hub_quotes_it(
    page: str,
    status: int,
    hub: Hub,
    adapters: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub.refuse[page] = (status, "odd header: {authorization}")
    hub.warning = f"{page} {status}; careful with {{authorization}}"
    said: list[str] = []
    with pytest.raises(TunesmithError) as caught, caplog.at_level(logging.DEBUG):
        push(adapters, "org/a", BASE, said.append)
    shown = "".join(traceback.format_exception(caught.value))
    assert "odd header: Bearer <secret>" in str(caught.value)
    output = capfd.readouterr()
    assert TOKEN not in shown + output.out + output.err + caplog.text + "".join(said)
    assert "careful with Bearer <secret>" in caplog.text


def test_the_token_is_in_no_file(hub: Hub, adapters: Path) -> None:
    push(adapters, "org/a", BASE)
    on_disk = [path for path in adapters.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    sent = [name for name, content in hub.files("org/a").items() if TOKEN.encode() in content]
    assert not on_disk + sent


def test_a_file_with_the_token_in_it_is_not_sent(hub: Hub, adapters: Path, tmp_path: Path) -> None:
    run = full_run(tmp_path / "run", adapters)
    (run / "chat_template.jinja").write_text(f"{{# {TOKEN} #}}")
    with pytest.raises(TunesmithError, match=r"chat_template.jinja has your hub token in it, so nothing was sent"):
        push(run, "org/a", BASE)
    assert not hub.requests


# Refusals


def test_without_a_token_it_says_how_to_log_in(hub: Hub, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(TunesmithError, match="run `hf auth login`, or set the environment variable HF_TOKEN"):
        push(adapters, "org/a", BASE)
    assert not hub.requests


def test_the_login_of_the_hubs_own_command_is_used(hub: Hub, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    push(adapters, "org/a", BASE)
    assert "org/a" in hub.repos


def test_a_wrong_token_a_strange_owner_and_offline_mode_are_told_apart(
    hub: Hub, adapters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TunesmithError, match=r"may not write to else/a. Is else you, or an organization"):
        push(adapters, "else/a", BASE)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(TunesmithError, match="the hub doesn't know the token"):
        push(adapters, "org/a", BASE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TunesmithError, match="HF_HUB_OFFLINE is set"):
        push(adapters, "org/a", BASE)
    assert not hub.repos


def test_without_a_network_it_says_so(hub: Hub, adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(TunesmithError, match=r"the connection to http://127.0.0.1:\d+ failed: .*refused"):
            push(adapters, "org/a", BASE)


@pytest.mark.parametrize(
    ("repo", "options", "said"),
    [
        ("mine", BASE, "--repo is 'mine'; write OWNER/NAME"),
        ("a/b/c", BASE, "--repo is 'a/b/c': Repo id must be in the form"),
        ("org/what?", BASE, "--repo is 'org/what?': Repo id must use alphanumeric"),
        ("org/a", PushOptions(base_model="a b"), "--base-model is 'a b'"),
        ("org/a", PushOptions(message=" "), "--message is empty"),
        ("org/a", PushOptions(revision="refs/pr/1"), "--revision is 'refs/pr/1'; write the name of a branch"),
        ("org/a", PushOptions(), "belong to the model in the local folder '.*'.*--base-model OWNER/NAME"),
        ("org/a", PushOptions(base_model="org/base", licence="My own!"), "--license is 'My own!'"),
    ],
)
def test_what_can_not_be_meant_is_refused_before_anybody_is_asked(
    repo: str, options: PushOptions, said: str, hub: Hub, adapters: Path
) -> None:
    with pytest.raises(TunesmithError, match=said.replace("?'", r"\?'")):
        push(adapters, repo, options)
    assert not hub.requests


def test_a_folder_that_is_no_finished_run_is_refused_with_the_reason(tiny_model: Path, tmp_path: Path) -> None:
    def refusal(run: Path) -> str:
        with pytest.raises(TunesmithError) as caught:
            plan(run, "org/a")
        return str(caught.value).replace(str(tmp_path), "")

    assert refusal(tmp_path / "nowhere").startswith("there is no folder /nowhere; give")
    assert refusal(tmp_path).startswith(" is no run: it has neither config.json nor")
    checkpoints = tmp_path / "half"
    for step in (9, 10):
        (checkpoints / f"checkpoint-{step}").mkdir(parents=True)
    assert refusal(checkpoints).endswith("finish the run, or push /half/checkpoint-10")
    run = full_run(tmp_path / "run", tiny_model)
    content = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(content[:-9])
    assert re.match("/run/model.safetensors is no safetensors file, or is cut off", refusal(run))
    (run / "model.safetensors").unlink()
    assert refusal(run).startswith("/run has its weights in pickle files")
    (run / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    assert "names ../../etc/passwd, which is not in its folder" in refusal(run)
    (run / "model.safetensors.index.json").write_text('{"weight_map": {"a": "more/weights.safetensors"}}')
    assert "names no weights, or files of other names" in refusal(run)
    (run / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert refusal(run).startswith("/run/model-00001-of-00002.safetensors is missing")


def test_a_checkpoint_is_pushed_with_the_record_of_its_run(adapters: Path, tmp_path: Path) -> None:
    full_run(tmp_path / "checkpoint-3", adapters)
    (tmp_path / "checkpoint-3" / "run.json").unlink()
    assert plan(tmp_path / "checkpoint-3", "org/a", BASE).notes == (
        "there is no run.json: the card can't say what the model learned from",
    )
    record().write(tmp_path)
    assert "run.json" in [item.path for item in plan(tmp_path / "checkpoint-3", "org/a", BASE).items]
