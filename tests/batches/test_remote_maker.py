"""Videos made on another machine: whole files under their names here, or none."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from tests.batches.fakes import FakeMaker, fake_ledger
from wancli.batches.received_files import ReceivedFiles
from wancli.batches.remote_maker import (
    FilePiece,
    NodeNeeds,
    RemoteMaker,
    node_needs,
    report_node,
)
from wancli.batches.worker import JobOutcome
from wancli.errors import OutputError
from wancli.records.ledger_file import LedgerSettings
from wancli.records.ledger_worker import LedgerWorker


class FakeRemoteMaker(RemoteMaker):
    def _new_maker(self, options):
        return FakeMaker(report=self._report, warn=self._warn)


def make(folder, prompt="a", files: Mapping[str, str] | None = None):
    """What a remote maker sends for a job of that prompt."""
    with fake_ledger(folder, [prompt]) as ledger:
        job = LedgerWorker(ledger).claim()
        assert job
        job = replace(job, files=files or {})
        return list(FakeRemoteMaker({}).make(job, send_back=True))


def receive(messages, replaced: Collection[Path] = ()):
    files, outcome = ReceivedFiles(replaced), None
    try:
        for message in messages:
            if isinstance(message, FilePiece):
                files.write(message)
            elif isinstance(message, JobOutcome):
                outcome = files.place(message)
    finally:
        files.drop()
    return outcome


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if "ledger" not in path.name} - {".wancli.lock"}


def test_a_video_sent_back_is_here_with_its_sidecar_and_says_so(tmp_path):
    messages = make(tmp_path)
    assert names(tmp_path) == set()
    outcome = receive(messages)
    assert outcome
    assert names(tmp_path) == {"0.mp4", "0.json"}
    assert (tmp_path / "0.mp4").read_bytes() == b"video"
    assert outcome.record["output"]["path"] == str(tmp_path / "0.mp4")
    assert str(tmp_path / "0.mp4") in (tmp_path / "0.json").read_text()


def test_files_beside_a_video_go_where_the_job_has_them(tmp_path):
    path = tmp_path / "{seed}" / "{x}.html"
    receive(make(tmp_path, files={"report": str(path)}))
    assert path.read_bytes() == b"file"


def test_a_job_that_failed_sends_nothing_back(tmp_path):
    outcome = receive(make(tmp_path, "fail"))
    assert outcome
    assert str(outcome.error) == "no."
    assert names(tmp_path) == set()


def test_a_damaged_file_is_not_placed(tmp_path):
    pieces = [one for one in make(tmp_path) if isinstance(one, FilePiece)]
    first = next(n for n, one in enumerate(pieces) if one.data)
    pieces[first] = replace(pieces[first], data=b"vidEo")
    with pytest.raises(OutputError, match="damaged"):
        receive(pieces)


def test_a_file_of_that_name_that_is_another_is_not_replaced(tmp_path):
    messages = make(tmp_path)
    (tmp_path / "0.mp4").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        receive(messages)
    assert (tmp_path / "0.mp4").read_text() == "mine"
    assert names(tmp_path) == {"0.mp4"}
    receive(messages, replaced=[tmp_path / "0.mp4"])
    assert (tmp_path / "0.mp4").read_text() == "video"


def test_latents_of_somebody_else_are_not_replaced(tmp_path):
    latents = tmp_path / "z.safetensors"
    latents.write_text("mine")
    with pytest.raises(OutputError, match=r"z\.safetensors exists"):
        receive(make(tmp_path, files={"save_latents": str(latents)}))
    assert latents.read_text() == "mine"


def test_files_by_which_a_shared_folder_is_known_do_not_outlive_killed_drivers(tmp_path):
    killed, other = tmp_path / f".b.ledger.{'0' * 16}.part", tmp_path / f".a.{'0' * 16}.part"
    for path in (killed, other):
        path.touch()
    with fake_ledger(tmp_path, ["a"]) as ledger, node_needs(ledger) as first:
        assert not killed.exists()
        with node_needs(ledger) as second:  # of a driver that works on it, too
            assert first.probe.exists()
            assert second.probe.exists()
    assert list(tmp_path.glob(".*.part")) == [other]


def test_a_machine_says_what_it_lacks(tmp_path):
    (tmp_path / "probe").touch()
    settings = [LedgerSettings(0, "generate", {"model": "wan2.1-t2v-1.3b"})]
    report = report_node(NodeNeeds(settings, ["a"], tmp_path / "probe"))
    assert report.sees_folder
    assert "the weights of wan2.1-t2v-1.3b are missing." in [str(e) for e in report.problems]
    assert report.problems[0].hint.startswith("wancli model pull wan2.1-t2v-1.3b")
