"""Hints suggest similar names, or nothing; messages below the command line name settings."""

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import wancli
from wancli.catalog.specs import SPECS
from wancli.errors import OutputError, closest, missing

PACKAGE = Path(wancli.__file__).parent


@pytest.mark.parametrize(
    ("typed", "existing", "expected"),
    [
        ("cat.pgn", "cat.png", True),
        ("cta.png", "cat.png", True),
        ("Cat.PNG", "cat.png", True),
        ("clip1.mp4", "clip.mp4", True),
        ("a.mp4", "b.mp4", False),  # only the suffix is alike
        ("none.mp4", "x.mp4", False),
        ("dog.png", "cat.png", False),
        ("red.mp4", "red.json", False),
    ],
)
def test_only_a_file_with_a_similar_name_is_suggested(
    tmp_path: Path, typed: str, existing: str, expected: bool
):
    (tmp_path / existing).touch()
    suggestion = f"did you mean '{tmp_path / existing}'?"
    assert missing("file", tmp_path / typed).hint == (suggestion if expected else "check the path")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("dmeo", "demo"),
        ("wan-2.1-t2v-1.3b", "wan2.1-t2v-1.3b"),
        ("Wan2.1-T2V-14B", "wan2.1-t2v-14b"),
        ("self-forcng", "self-forcing"),
        ("my-model", None),
        ("mode", None),
        ("flux", None),
        ("sdxl-turbo", None),
    ],
)
def test_only_a_model_with_a_similar_name_is_suggested(typed: str, expected: str | None):
    assert closest(typed, SPECS) == expected


def messages(module: Path) -> Iterator[str]:
    """Text in errors, notes and warnings, without f-string values."""
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            spoken = name.endswith(("Error", "Warning")) or name in ("say", "warn")
            texts = node.args if spoken else []
            for text in [*texts, *(k.value for k in node.keywords if k.arg == "hint")]:
                parts = [part for part in ast.walk(text) if isinstance(part, ast.Constant)]
                yield "".join(part.value for part in parts if isinstance(part.value, str))


def test_messages_below_the_command_line_name_settings_and_not_flags():
    modules = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "cli"]
    texts = [(path.name, text) for path in modules for text in messages(path)]
    assert len(texts) > 300
    typed = re.compile(r"\b(wancli|pip|ray) .*|`[^`]*`")  # commands, and settings with their values
    assert [t for t in texts if re.search(r"--[a-z]", typed.sub("", t[1]))] == []


def test_an_error_passes_between_processes_with_its_hint():
    error = pickle.loads(pickle.dumps(OutputError("full.", hint="free some space")))
    assert (type(error), str(error), error.hint) == (OutputError, "full.", "free some space")
