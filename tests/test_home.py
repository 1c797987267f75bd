"""Where the cache folder is."""

from pathlib import Path

import pytest

from tunesmith.errors import TunesmithError
from tunesmith.home import home


@pytest.fixture(autouse=True)
def _unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNESMITH_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def test_without_variables_it_is_in_the_users_cache_and_is_not_created(tmp_path: Path) -> None:
    assert home() == tmp_path / ".cache" / "tunesmith"
    assert not home().exists()


def test_xdg_cache_home_holds_a_folder_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert home() == tmp_path / "xdg" / "tunesmith"


@pytest.mark.parametrize("value", ["", "relative/cache"])
def test_an_empty_or_relative_xdg_cache_home_is_ignored(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert home() == tmp_path / ".cache" / "tunesmith"


def test_tunesmith_home_goes_first_and_is_the_folder_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("TUNESMITH_HOME", str(tmp_path / "mine"))
    assert home() == tmp_path / "mine"


def test_tunesmith_home_may_start_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", "~/mine")
    assert home() == tmp_path / "mine"


def test_a_relative_tunesmith_home_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNESMITH_HOME", "mine")
    assert home() == tmp_path / "mine"


def test_an_empty_tunesmith_home_counts_as_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", "")
    assert home() == tmp_path / ".cache" / "tunesmith"


def test_a_user_without_home_folder_is_told_which_variable_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(TunesmithError, match="TUNESMITH_HOME"):
        home()
