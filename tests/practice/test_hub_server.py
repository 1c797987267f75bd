"""The hub to practise on: the client of a fresh process is logged in there, and nobody is sent there too late."""

import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith import TunesmithError, practice_hub

PROGRAM = """
from pathlib import Path
from tunesmith import practice_hub
hub = practice_hub("cache", owner="mei")
from huggingface_hub import HfApi, hf_hub_download
api = HfApi()
api.create_repo("notes", private=True)
api.upload_file(path_or_fileobj=b"hello", path_in_repo="notes.txt", repo_id="mei/notes")
file = Path(hf_hub_download("mei/notes", "notes.txt"))
found = file.is_relative_to(Path("cache").absolute()), hub.repos["mei/notes"].private
print(api.whoami()["name"], file.read_text(), *found)
"""


def test_what_is_uploaded_comes_back_and_stays_here(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    child = subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True)
    assert child.stdout.split() == ["mei", "hello", "True", "True"]


def test_a_client_that_is_imported_already_would_talk_to_another_hub(tmp_path: Path) -> None:
    assert "huggingface_hub" in sys.modules
    with pytest.raises(TunesmithError, match="restart the kernel"):
        practice_hub(tmp_path)
