"""Fixtures for tests of commands: a tiny model of two experts, and an empty cache."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.fakes import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("model"), experts=2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, not the user's."""
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"
