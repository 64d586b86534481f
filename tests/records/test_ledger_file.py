"""The file of a ledger: whole or not there, and never another program's."""

import os
import sqlite3
from pathlib import Path

import pytest

from tests.records.test_ledger import claim, fresh
from wancli.errors import InputError, OutputError, RunError, UsageError
from wancli.records.ledger import create_ledger, open_ledger
from wancli.records.ledger_file import check_local
from wancli.records.ledger_worker import LedgerWorker


def test_a_new_ledger_takes_nothing_from_a_deleted_one(tmp_path):
    with fresh(tmp_path) as ledger:
        worker = LedgerWorker(ledger)
        for _ in range(3):
            worker.failed(claim(worker), RunError("no.", hint=""))
        ledger.path.unlink()  # the changes are still in its WAL
        assert (tmp_path / "b.ledger-wal").stat().st_size > 0
        with fresh(tmp_path) as new:
            assert new.counts()["pending"] == 6


def test_what_a_killed_process_left_of_a_new_ledger_is_removed(tmp_path):
    left = [tmp_path / f".b.ledger.{'0' * 16}.part{end}" for end in ("", "-wal", "-shm")]
    other = tmp_path / f".c.ledger.{'0' * 16}.part"
    for path in (*left, other):
        path.write_text("x")
    fresh(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [other.name, "b.ledger"]


@pytest.mark.parametrize("name", ["file/b.ledger", f"{'x' * 300}.ledger"])
def test_a_ledger_that_cannot_be_written_says_why(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot (write|use)"):
        create_ledger(tmp_path / name, "d", [], [], version="1")


def test_a_ledger_is_known_by_its_folder_while_it_is_the_only_one(tmp_path):
    with pytest.raises(InputError, match="no ledger in") as none:
        open_ledger(tmp_path)
    assert none.value.hint.startswith("wancli batch status FOLDER")
    fresh(tmp_path).close()
    with open_ledger(tmp_path) as ledger:
        assert ledger.path == tmp_path / "b.ledger"
    for name, changed in (("a.ledger", 1), ("c.ledger", 2)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (changed, changed))
    with pytest.raises(UsageError, match="has 3 ledgers") as caught:
        open_ledger(tmp_path)
    newest = ", ".join(str(tmp_path / f"{name}.ledger") for name in "bca")
    assert caught.value.hint == f"one of: {newest}"


def test_the_ledger_of_another_version_is_refused(tmp_path):
    fresh(tmp_path).close()
    with sqlite3.connect(tmp_path / "b.ledger") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    for opening in (lambda: fresh(tmp_path), lambda: open_ledger(tmp_path / "b.ledger")):
        with pytest.raises(UsageError, match="of wancli 1, with tables 99"):
            opening()


@pytest.mark.parametrize("opening", [fresh, lambda folder: open_ledger(folder / "b.ledger")])
def test_what_is_no_ledger_stays_as_it_is(tmp_path, opening):
    path = tmp_path / "b.ledger"
    path.write_text("notes of mine\n" * 100)
    with pytest.raises(InputError, match="not a ledger"):
        opening(tmp_path)
    assert path.read_text() == "notes of mine\n" * 100
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE jobs (x)")
    db.close()
    with pytest.raises(UsageError, match="another program's"):
        opening(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match="FIFO"):
        opening(tmp_path)


@pytest.mark.parametrize("name", ["my share", "données", "a\N{NO-BREAK SPACE}b", "\udcff"])
def test_a_network_file_system_is_refused(name):
    escaped = name.replace(" ", "\\040")
    mounts = f"/dev/a / ext4 rw 0 0\nserver:/x /mnt/{escaped} nfs4 rw 0 0\n"
    check_local(Path("/mnt"), mounts)
    with pytest.raises(UsageError, match="network file system .nfs4"):
        check_local(Path(f"/mnt/{name}/videos"), mounts)
