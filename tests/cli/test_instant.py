"""Commands that compute nothing import nothing heavy."""

import json
import subprocess
import sys

import pytest

from tests.forked import HEAVY, Run, environment
from wancli.records.record import RunRecord

RUNNING = ("rich", "wancli.cost", "wancli.generation", "wancli.rollouts")  # what runs a command
WATCHED = f"""
import json, sys
sys.argv[0] = "wancli"
code = None
try:
    from wancli.cli.app import main
    main()
except SystemExit as ended:
    code = ended.code
heavy = [name for name in {HEAVY} if name in sys.modules]
print()
print(json.dumps([code or 0, heavy]))
"""


FIRST = f"""
import json, os, sys

class First:
    def write(self, text):
        heavy = [name for name in {HEAVY} if name in sys.modules]
        print(json.dumps([text, heavy, len(sys.modules)]), flush=True)
        os._exit(0)

sys.argv[0], sys.stderr = "wancli", First()
from wancli.cli.app import main
main()
"""


def run(*arguments, folder, program=WATCHED, **variables):
    """Exit code, heavy modules that were imported, stdout and stderr of `wancli ARGUMENTS`."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    stdout, _, last = done.stdout.rstrip("\n").rpartition("\n")
    assert last, done.stderr
    code, heavy = json.loads(last)
    return code, heavy, stdout, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["rollout", "--help"],
        ["preset", "list", "--json"],
        ["bench", "x", "--variant", "fast: --use-cachedit --cachedit-fn 8"],
    ],
    ids=" ".join,
)
def test_a_fork_behaves_like_a_separate_process(arguments, forked: Run, tmp_path):
    code, heavy, stdout, stderr = run(*arguments, folder=tmp_path)
    assert heavy == []
    exit_code, imported, out, err = forked(*arguments, folder=tmp_path)
    assert (exit_code, imported, out.strip(), err) == (code, heavy, stdout.strip(), stderr)


def test_imports_of_a_fork_are_detected_and_stay_in_it(forked: Run, tmp_path):
    code, heavy, _, stderr = forked("model", "pull", "some-owner/some-model", folder=tmp_path)
    assert (code, heavy) == (4, ["huggingface_hub"]), stderr
    assert forked("--help", folder=tmp_path)[:2] == (0, [])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["generate", "--help"],
        ["rollout", "--help"],
        ["rollout", "a red circle", "--chunks", "5", "--dry-run"],
        ["doctor", "--help"],
        ["plan", "--help"],
        ["plan"],
        ["plan", "--chunks", "5", "--json"],
        ["plan", "--model", "wan2.1-t2v-14b", "--force"],
        ["model", "--help"],
        ["model", "convert", "--help"],
        ["model", "list"],
        ["model", "info", "demo"],
        ["model", "info", "wan2.1-t2v-1.3b", "--json"],
        ["model", "path", "demo"],
        ["model", "pull", "--help"],
        ["model", "rm", "--help"],
        ["preview", "--help"],
        ["repro", "--help"],
        ["show", "--help"],
        ["bench", "--help"],
        ["compare", "--help"],
        ["generate", "a red circle", "--use-cachedit", "--dry-run"],
        ["decode", "--help"],
        ["preset", "--help"],
        ["preset", "list"],
        ["preset", "list", "--json"],
        ["preset", "show", "demo"],
        ["preset", "path", "demo"],
    ],
    ids=" ".join,
)
def test_commands_that_only_print_import_nothing_heavy(arguments, forked: Run, tmp_path):
    code, heavy, stdout, stderr = forked(*arguments, folder=tmp_path)
    assert (code, heavy) == (0, []), stderr
    assert stdout.strip()


# What was imported for one line stays for the next: those that import most come last.
IMPORTING = (
    (["--help"], 0, ("rich", "pydantic")),
    (["--version"], 0, RUNNING),
    (["generate", "--help"], 0, (*RUNNING, "wancli.catalog.local", "tomli_w")),
    (["model", "--help"], 0, RUNNING),
    (["show", "--help"], 0, RUNNING),
    (["rollout", "--help"], 0, RUNNING),
    (["bench", "--help"], 0, RUNNING),
    (["generate", "x", "--steps", "abc"], 2, RUNNING),
    (["generate", "x", "--num-frames", "80"], 2, ("rich", "wancli.cost", "wancli.rollouts")),
)
EACH = """
import json, sys
from wancli.cli.app import main
found = []
for arguments, unwanted in json.loads(sys.argv[1]):
    sys.argv = ["wancli", *arguments]
    try:
        main()
    except SystemExit as ended:
        found.append([ended.code or 0, [name for name in unwanted if name in sys.modules]])
print()
print(json.dumps(found))
"""


def test_help_and_usage_errors_import_only_what_they_print(tmp_path):
    """In a process of their own: the one that forks has imported all that is light."""
    watched = json.dumps([(line, (*HEAVY, *unwanted)) for line, _, unwanted in IMPORTING])
    done = subprocess.run(
        [sys.executable, "-c", EACH, watched], cwd=tmp_path, env=environment(), check=True,
        capture_output=True, encoding="utf-8",
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == [[code, []] for _, code, _ in IMPORTING], done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["generate", ""], 2),
        (["generate", "x", "--steps", "abc"], 2),
        (["generate", "x", "--num-frames", "80"], 2),
        (["generate", "x", "--preset", "dmeo"], 2),
        (["generate", "x", "--output", "x.gif"], 2),
        (["nosuch"], 2),
        (["generate", "x", "--model", "nosuch"], 4),
        (["show", "nosuch.mp4"], 4),
        (["rollout", "x", "--rolling-window", "2"], 2),
        (["rollout", "x", "--at", "9", "y"], 2),
        (["rollout", "x", "--model", "wan2.1-t2v-1.3b"], 2),
        (["rollout", "--resume", "-o", "nosuch.mp4"], 4),
        (["model", "convert", "nosuch.pt", "out"], 4),
        (["model", "info", "nosuch"], 4),
        (["model", "path", "some-owner/some-model"], 4),
        (["model", "pull", "demo"], 2),
        (["model", "rm", "demo", "--yes"], 2),
        (["preview", "nosuch.mp4"], 4),
        (["plan", "--at", "3", "y"], 2),
        (["plan", "--chunks", "3", "--num-frames", "5"], 2),
        (["generate", "x", "--size", "16384x16384", "--num-frames", "4001"], 5),
        (["rollout", "x", "--size", "16384x16384"], 5),
        (["repro", "nosuch.mp4"], 4),
        (["bench", "x", "--variant", "fast: --use-cachedit --cachedit-fn 8"], 2),
        (["compare", "nosuch.mp4", "nosuch.mp4"], 4),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_errors_are_two_lines_and_import_nothing_heavy(arguments, expected, forked: Run, tmp_path):
    code, heavy, stdout, stderr = forked(*arguments, folder=tmp_path)
    assert (code, heavy) == (expected, []), stderr
    first, second = stderr.splitlines()
    assert first.startswith("error: ")
    assert second.startswith("hint: ")
    assert not stdout.strip()


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x"],
        ["rollout", "x"],
        ["plan"],
        ["plan", "--chunks", "2"],
        ["bench", "x", "--variant", "gate: --cfg-gate 0.5"],
    ],
    ids=" ".join,
)
def test_a_broken_ffmpeg_is_reported_before_anything_loads(arguments, forked: Run, tmp_path):
    *outcome, err = forked(*arguments, folder=tmp_path, IMAGEIO_FFMPEG_EXE="/bin/false")
    assert outcome == [4, [], ""]
    assert err.startswith("error: ffmpeg cannot encode video: ")
    assert list(tmp_path.iterdir()) == []


def test_showing_a_record_imports_nothing_heavy(forked: Run, tmp_path):
    request = {"prompt": "x", "seed": 1, "model": "demo"}
    record = RunRecord("1", "ok", "generate", "2026-01-01T00:00:00+00:00", request, "abc")
    file = tmp_path / "x.json"
    file.write_text(json.dumps(record.as_json()))
    code, heavy, stdout, stderr = forked("show", str(file), "--json", folder=tmp_path)
    assert (code, heavy) == (0, []), stderr
    assert json.loads(stdout)["request"] == request


@pytest.mark.slow
def test_a_clip_imports_only_what_it_needs_and_no_garbage_is_looked_for_meanwhile(tmp_path):
    """Of our own imports: diffusers and transformers import peft, torchao and dynamo themselves."""
    unwanted = ("cache_dit", "imageio", "pytorch_msssim", "wancli.benchmark", "wancli.rollouts")
    program = f"""
import gc, sys
def look(at, about):
    if (at, about["generation"]) == ("start", 2) and "torch" in sys.modules:
        print("looked for garbage", file=sys.stderr)
gc.callbacks.append(look)
{WATCHED.replace(str(HEAVY), str(unwanted))}
gc.callbacks.clear()
"""
    tiny = ["--steps", "1", "--num-frames", "5", "-q"]
    code, imported, _, stderr = run(
        "generate", "a red circle", *tiny, folder=tmp_path, program=program
    )
    assert (code, imported) == (0, [])
    assert stderr.count("looked for garbage") <= 1  # in a few thousand objects of the run


@pytest.mark.parametrize("command", [["generate", "a red circle"], ["rollout", "a red circle"]])
def test_a_run_says_something_before_it_imports_anything_heavy(command, tmp_path):
    """Half a second passes until then; its measure is the modules, which no load changes."""
    program = [sys.executable, "-c", FIRST, *command]
    done = subprocess.run(program, cwd=tmp_path, env=environment(), capture_output=True, check=True)
    text, heavy, modules = json.loads(done.stdout)
    assert text.strip() == "import"
    assert heavy == []
    assert modules < 500
