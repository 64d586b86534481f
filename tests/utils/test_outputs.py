"""Outputs of a command: checked before anything loads, and locked against other processes."""

import fcntl
import os
import signal
import socketserver
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from wancli.errors import OutputError, UsageError
from wancli.utils.files import part_name
from wancli.utils.locks import FILE, FolderLock, NameLocked, as_typed
from wancli.utils.outputs import OutputFile, OutputSet

A_VIDEO = [OutputFile(Path("a.mp4"), "`output`")]


@pytest.fixture(autouse=True)
def _in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def outputs(*names: str, overwrite: bool = False, reads: tuple[str, ...] = ()) -> OutputSet:
    """Outputs of the flags --a, --b, ..."""
    output_set = OutputSet(overwrite=overwrite, reads=[Path(name) for name in reads])
    output_set.add(*(OutputFile(Path(name), f"--{'abc'[i]}") for i, name in enumerate(names)))
    return output_set


def own_command() -> str:
    return Path(Path("/proc/self/cmdline").read_bytes().split(b"\0")[0].decode()).name


@contextmanager
def other_process(ready: Callable[[], object]) -> Iterator[int]:
    """A fork that calls `ready` and then waits to be killed; yields its process id."""
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        try:
            ready()
            os.write(writable, b"1")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writable)
    try:
        assert os.read(readable, 1) == b"1"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(readable)


MAKERS: dict[str, Callable[[Path], object]] = {
    "a folder": lambda path: path.mkdir(),
    "a symbolic link": lambda path: path.symlink_to("elsewhere"),
    "a FIFO": os.mkfifo,
    "a socket": lambda path: socketserver.UnixStreamServer(
        str(path), socketserver.BaseRequestHandler
    ).server_close(),
    "a device": lambda path: os.mknod(path, 0o600 | 0o020000, os.makedev(1, 3)),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_overwrite_replaces_only_regular_files(kind: str):
    try:
        MAKERS[kind](Path("a.mp4"))
    except PermissionError:
        pytest.skip("devices take root")
    with pytest.raises(UsageError, match=f"a.mp4 is {kind} and is not replaced"):
        outputs("a.mp4", overwrite=True).check()


def test_an_existing_file_needs_overwrite():
    Path("a.mp4").write_text("mine")
    with pytest.raises(UsageError, match=r"a\.mp4 exists\.") as caught:
        outputs("a.mp4").check()
    assert caught.value.hint == "`overwrite`, or another `output`"
    output_set = outputs("a.mp4", "b.json", overwrite=True)
    output_set.check()
    assert output_set.replaced == {Path("a.mp4"), Path("b.json")}
    free = outputs("b.json")
    free.check()
    assert free.replaced == frozenset()  # a file that appears later is not replaced


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_side_output_replaces_only_our_own_file(overwrite: bool):
    Path("a.json").write_text("mine")
    for ours in (False, True):
        output_set = OutputSet(overwrite=overwrite)
        role = "the record of a.mp4"
        output_set.add(OutputFile(Path("a.json"), role, lambda _path, o=ours: o, named=False))  # type: ignore[misc]
        if ours:
            output_set.check()
            assert output_set.replaced == {Path("a.json")}
        else:
            with pytest.raises(UsageError, match=r"exists and is not the record of a\.mp4"):
                output_set.check()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("x.mp4", "x.mp4"),
        ("x.mp4", "X.MP4"),
        ("x.mp4", "sub/../x.mp4"),
        ("sub/x.mp4", "link/x.mp4"),
        ("old.mp4", "hard.mp4"),
        ("stra\N{LATIN SMALL LETTER SHARP S}e", "STRASSE"),
        ("e\N{COMBINING ACUTE ACCENT}", "\N{LATIN SMALL LETTER E WITH ACUTE}"),
    ],
)
def test_outputs_may_not_share_a_file_with_each_other_or_an_input(one: str, other: str):
    Path("sub").mkdir()
    Path("link").symlink_to("sub")
    Path("old.mp4").write_text("mine")
    Path("hard.mp4").hardlink_to("old.mp4")
    with pytest.raises(UsageError, match="would be --a and --b at once"):
        outputs(one, other, overwrite=True)
    with pytest.raises(UsageError, match="is an input, and cannot be --a too"):
        outputs(one, reads=(other,), overwrite=True).check()


def test_several_videos_of_one_name_are_rejected():
    output_set = OutputSet()
    with pytest.raises(UsageError, match="several videos would be written to a.mp4") as caught:
        output_set.add(*A_VIDEO, *A_VIDEO)
    assert "{seed}" in caught.value.hint


@pytest.mark.parametrize("swapped", [False, True])
def test_a_replaced_folder_may_hold_no_other_output_and_no_input(swapped: bool):
    both = [
        OutputFile(Path("bench"), "--output", lambda _: True, folder=True),
        OutputFile(Path("bench/z"), "--z"),
    ]
    with pytest.raises(UsageError, match="at once"):
        OutputSet().add(*(reversed(both) if swapped else both))
    Path("bench").mkdir()
    output_set = OutputSet(reads=[Path("bench/x.png")])
    output_set.add(both[0])
    with pytest.raises(UsageError, match="is an input"):
        output_set.check()


def test_unwritable_paths_are_rejected():
    Path("file").write_text("mine")
    for name in ("file/a.mp4", "/proc/none/a.mp4"):
        with pytest.raises(OutputError, match=f"cannot write {name}: "), outputs(name).locked():
            pass
    with pytest.raises(UsageError, match=r"'a\\nb.mp4' has a control character"):
        outputs("a\nb.mp4").check()
    with pytest.raises(UsageError, match="256 bytes"):
        outputs("a" * 256).check()


def test_more_output_folders_than_files_may_be_open_are_rejected(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("resource.getrlimit", lambda _kind: (4, 4))
    with pytest.raises(UsageError, match="3 folders cannot be written to at once; 2 can"):
        outputs("a/a.mp4", "b/a.mp4", "c/a.mp4").locked().__enter__()
    assert list(Path().iterdir()) == []


def test_names_are_locked_and_the_lock_file_is_removed():
    output_set = outputs("new/a.mp4", "new/b.json")
    Path("new").mkdir()
    for _ in range(2):
        with output_set.locked():
            assert [path.name for path in Path("new").iterdir()] == [FILE]
        assert list(Path("new").iterdir()) == []


@pytest.mark.parametrize("name", ["a.mp4", "A.mp4"])
def test_a_second_process_is_rejected_at_once_and_learns_who_is_writing(name: str):
    lock = outputs("a.mp4", "x.json").locked()
    with other_process(lock.__enter__) as pid:
        with pytest.raises(UsageError) as caught, outputs(name).locked():
            pass
        assert f"{name} is being written by process {pid} (" in str(caught.value)
        assert f"({own_command()}" in str(caught.value)
        assert f"kill {pid}" in caught.value.hint
        with outputs("c.mp4").locked():  # another name in that folder
            assert Path(FILE).exists()
        assert Path(FILE).exists()
    with outputs(name).locked():  # the process was killed
        pass
    assert not Path(FILE).exists()


def test_only_parts_of_dead_processes_are_removed():
    lock = outputs("a.mp4").locked()

    def work() -> None:
        lock.__enter__()
        part_name(Path("a.mp4")).write_text("half")

    with other_process(work):
        with pytest.raises(UsageError), outputs("a.mp4").locked():
            pass
        with outputs("b.mp4").locked():
            pass
        assert len(list(Path().glob(".a.mp4.*"))) == 1
    with outputs("a.mp4").locked():
        assert [path.name for path in Path().iterdir()] == [FILE]


def test_names_of_a_killed_process_are_free_while_another_still_writes():
    with other_process(outputs("a.mp4").locked().__enter__) as number:
        with other_process(outputs("b.mp4", "c.mp4").locked().__enter__):
            pass
        with outputs("d.mp4", "c.mp4").locked():
            pass
        with (
            pytest.raises(UsageError, match=rf"^a\.mp4 is being written by process {number} \("),
            outputs("b.mp4", "a.mp4").locked(),
        ):
            pass


def test_many_names_take_no_more_locks_than_one(monkeypatch: pytest.MonkeyPatch):
    lock, calls = fcntl.lockf, []

    def counted(file: int, *more: int) -> None:
        calls.append(more)
        lock(file, *more)

    monkeypatch.setattr(fcntl, "lockf", counted)
    counts = []
    for number in (1, 300):
        calls.clear()
        output_set = OutputSet()
        output_set.add(*(OutputFile(Path(f"{i}.mp4"), f"--{i}") for i in range(number)))
        with output_set.locked():
            counts.append(len(calls))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", ["a FIFO", "a symbolic link", "a folder"])
def test_a_lock_that_is_not_a_file_is_left_alone(kind: str):
    Path("elsewhere").write_text("mine")
    MAKERS[kind](Path(FILE))
    before = Path(FILE).lstat()
    with outputs("a.mp4").locked():
        pass
    assert os.path.samestat(Path(FILE).lstat(), before)
    assert Path("elsewhere").read_text() == "mine"


def test_a_foreign_file_with_the_name_of_the_lock_stays():
    Path(FILE).write_text("mine")
    with outputs("a.mp4").locked():
        pass
    assert Path(FILE).read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["/bin/python", "/a/bin/wancli", "generate", "a red circle"], "generate 'a red circle'"),
        (["python", "-m", "wancli", "generate", "a\n\x1b\x9bb"], "generate 'a???b'"),
        (["/a/wancli", "generate", "wancli", "x" * 200], f"generate wancli {'x' * 77}…"),
    ],
)
def test_a_process_is_named_by_its_command_line(words: list[str], expected: str):
    assert as_typed(b"".join(os.fsencode(word) + b"\0" for word in words)) == f"wancli {expected}"


@pytest.mark.slow
def test_concurrent_processes_never_share_a_name_and_leave_no_files(tmp_path: Path):
    program = """
        import os, sys, time
        from pathlib import Path
        from wancli.utils.locks import FolderLock, NameLocked
        for turn in range(400):
            lock = FolderLock(Path())
            assert lock.works
            try:
                lock.acquire(f"name{turn % 2}")
            except NameLocked:
                pass
            else:
                mark = Path(f"mark{turn % 2}")
                os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
                mark.unlink()
            lock.release()
    """
    command = [sys.executable, "-c", "\n".join(line[8:] for line in program.splitlines())]
    running = [subprocess.Popen(command, cwd=tmp_path) for _ in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alias", ["link", "folder/../folder"])
def test_a_folder_has_the_same_locks_under_all_of_its_paths(alias: str):
    Path("folder").mkdir()
    Path("link").symlink_to("folder")
    first, second = FolderLock(Path("folder")), FolderLock(Path(alias))
    first.acquire("a")
    with pytest.raises(NameLocked):
        second.acquire("a")
    second.release()
    first.release()


def test_a_lock_may_be_released_twice():
    lock = FolderLock(Path())
    lock.release()
    lock.release()
    assert not lock.works


@pytest.mark.parametrize("written", [True, False])
def test_a_folder_created_in_vain_is_removed(written):
    with outputs("new/folder/a.mp4").locked():
        assert Path("new/folder").is_dir()
        if written:
            Path("new/folder/a.mp4").touch()
    assert Path("new").exists() == written
