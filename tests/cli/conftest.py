"""What tests of the caches share: a tiny model of one expert, and of two."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module", params=[1, 2], ids=["one expert", "two experts"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.fakes import tiny_folder

    return tiny_folder(tmp_path_factory.mktemp("model"), experts=request.param)
