import errno
import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from httpx2 import ConnectError, ReadTimeout, Request, Response
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from wancli.catalog.hub_cache import cache_folder, check_reachable, hub_answers
from wancli.catalog.specs import SPECS
from wancli.errors import ModelError, OutputError, WancliError
from wancli.models.hub import check_space, hub_errors

RESPONSE = Response(403, request=Request("GET", "https://huggingface.co/api/models/a/b"))


@pytest.mark.parametrize(
    ("error", "message", "hint"),
    [
        (GatedRepoError("no", response=RESPONSE), "'a/b' is gated", "set HF_TOKEN"),
        (RepositoryNotFoundError("no", response=RESPONSE), "not on the hub", "check the name"),
        (HFValidationError("no"), "not on the hub", "check the name"),
        (LocalEntryNotFoundError("no"), "not cached and HF_HUB_OFFLINE", "unset HF_HUB_OFFLINE"),
        (IncompleteSnapshotError("no", "/x"), "not completely cached", "model pull a/b"),
        (HfHubHTTPError("500 no\nmore", response=RESPONSE), "answered: 500 no", "later"),
        (ConnectError("refused"), "broke: refused", "wancli model pull a/b"),
        (ReadTimeout("slow"), "broke: slow", "are kept"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_hub_errors_are_one_line_and_exit_4(error: Exception, message: str, hint: str):
    with pytest.raises(ModelError) as caught, hub_errors("a/b"):
        raise error
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 4


def test_errors_name_a_known_model_as_one_types_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    repo = SPECS["wan2.1-t2v-1.3b"].repo
    with pytest.raises(ModelError, match=r"'wan2\.1-t2v-1\.3b'") as caught:
        check_reachable(repo)
    assert caught.value.hint.endswith("wancli model pull wan2.1-t2v-1.3b")
    with pytest.raises(ModelError, match=r"'wan2\.1-t2v-1\.3b'"), hub_errors(repo):
        raise IncompleteSnapshotError("no", "/x")


@pytest.mark.parametrize(
    ("repo", "file", "name"),
    [
        ("a/b", "c.safetensors", "a/b:c.safetensors"),
        ("krea/krea-realtime-video", "krea-realtime-video-14b.safetensors", "krea-realtime-14b"),
    ],
)
def test_a_connection_that_breaks_is_tried_again_for_the_same_file_or_what_it_is_converted_to(
    repo: str, file: str, name: str
):
    with pytest.raises(ModelError) as caught, hub_errors(repo, file):
        raise ConnectError("refused")
    assert f"wancli model pull {name} " in caught.value.hint


def test_an_unreachable_hub_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(ModelError, match="the hub cannot be reached"), hub_errors("a/b"):
        raise LocalEntryNotFoundError("no")


def test_a_full_disk_is_an_output_error_and_other_errors_propagate():
    with pytest.raises(OutputError, match="No space left") as caught, hub_errors("a/b"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "HF_HOME" in caught.value.hint
    with pytest.raises(OutputError, match="Not a directory") as caught, hub_errors("a/b"):
        raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    assert "HF_HOME" in caught.value.hint
    with pytest.raises(OSError, match="no"), hub_errors("a/b"):
        raise OSError(errno.EIO, "no")


def test_too_little_disk_space_is_detected_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "not" / "yet"))
    check_space("a/b", 1)
    with pytest.raises(OutputError, match=r"^file 'a/b:c.safetensors' needs"):
        check_space("a/b", 10**18, only="c.safetensors")
    with pytest.raises(WancliError, match=r"^model 'a/b' needs 1000000000\.0 GB; .* has") as caught:
        check_space("a/b", 10**18)
    assert caught.value.exit_code == 6
    assert "HF_HOME" in caught.value.hint


def test_the_cache_folder_is_that_of_huggingface_hub(monkeypatch: pytest.MonkeyPatch):
    names = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
    cases: list[dict[str, str]] = [
        {},
        {"HF_HOME": "/a"},
        {"HF_HOME": "~/a/$USER"},
        {"HF_HUB_CACHE": "~/b", "HF_HOME": "/a"},
        {"HUGGINGFACE_HUB_CACHE": "/c", "HF_HOME": "/a"},
        {"HUGGINGFACE_HUB_CACHE": "/c", "HF_HUB_CACHE": "/b"},
        {"XDG_CACHE_HOME": "/d"},
    ]
    code = (
        "import importlib, json, os, sys; from huggingface_hub import constants\n"
        "for case in json.loads(sys.argv[1]):\n"
        f"    [os.environ.pop(name, None) for name in {names}]; os.environ.update(case)\n"
        "    print(importlib.reload(constants).HF_HUB_CACHE)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, json.dumps(cases)], capture_output=True, text=True, check=True
    )
    for case, theirs in zip(cases, process.stdout.splitlines(), strict=True):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in case.items():
            monkeypatch.setenv(name, value)
        assert str(cache_folder()) == theirs, case


def test_a_hub_behind_a_firewall_times_out_soon(monkeypatch: pytest.MonkeyPatch):
    """A socket with a full backlog drops further connections, as a firewall does."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("wancli.catalog.hub_cache.CONNECT_S", 0.1)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as server, ExitStack() as clients:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub_answers()
        for _ in range(4):
            client = clients.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(server.getsockname())
        assert not hub_answers()
        with pytest.raises(ModelError, match="the hub cannot be reached"):
            check_reachable("some-owner/some-model")
    monkeypatch.setenv("HF_ENDPOINT", "http://nowhere.invalid")
    assert not hub_answers()
