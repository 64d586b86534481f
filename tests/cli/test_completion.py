"""Shells complete commands, flags, models, presets and choices, and quickly."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forked import Run

BIN = Path(sys.executable).parent
TYPED = [
    ("wancli ge", "generate"),
    ("wancli preset sh", "show"),
    ("wancli generate --num-f", "--num-frames"),
    ("wancli generate --model wan2.1-t2v-1", "wan2.1-t2v-14b"),
    ("wancli model info wan2.2-t", "wan2.2-ti2v-5b"),
    ("wancli generate --preset self", "self-forcing"),
    ("wancli preset show self", "self-forcing-a14b"),
    ("wancli generate --scheduler ", "dpm++"),
    ("wancli generate x --task vi", "video-to-video"),
    ("wancli plan --gpu rtx4", "rtx4090"),
    ("wancli generate --vae wan_", "wan_vae.safetensors"),
    ("wancli rollout --lora st", "style.safetensors"),
]


@pytest.fixture(autouse=True)
def _weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vae/wan_vae", "loras/style"):
        path = tmp_path / "comfy" / f"{name}.safetensors"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    monkeypatch.setenv("WANCLI_MODEL_PATH", str(tmp_path / "comfy"))


@pytest.mark.parametrize(("typed", "offered"), TYPED)
def test_bash_completes(typed: str, offered: str, forked: Run, tmp_path):
    last = str(len(typed.split(" ")) - 1)
    variables = {"_WANCLI_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": last}
    code, heavy, out, err = forked(folder=tmp_path, **variables)
    assert (code, heavy, err) == (0, [], "")
    assert offered in out.split()


@pytest.mark.parametrize("shell", ["zsh", "fish"])
@pytest.mark.parametrize(("typed", "offered"), TYPED[::4])  # only how they ask differs
def test_other_shells_complete_the_same(
    shell: str, typed: str, offered: str, forked: Run, tmp_path
):
    variables = {"_WANCLI_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": typed}
    code, heavy, out, err = forked(
        folder=tmp_path, **variables, _TYPER_COMPLETE_FISH_ACTION="get-args"
    )
    assert (code, heavy, err) == (0, [], "")
    assert offered in out.replace('"', " ").split()


SCRIPTS = {
    "bash": """
        eval "$(_WANCLI_COMPLETE=source_bash wancli)"
        COMP_WORDS=(wancli generate --model wan2.1-t2v) COMP_CWORD=3
        _wancli_completion wancli
        printf '%s\\n' "${COMPREPLY[@]}"
    """,
    "fish": """
        _WANCLI_COMPLETE=source_fish wancli | source
        complete --do-complete "wancli generate --model wan2.1-t2v"
    """,
}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_real_shell_completes(shell: str, tmp_path):
    """With the script sourced that `wancli --show-completion` prints."""
    program = shutil.which(shell)
    if not program:
        pytest.skip(f"no {shell}")
    done = subprocess.run(
        [program, "-c", SCRIPTS[shell]],
        env=os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    offered = [line.partition("\t")[0] for line in done.stdout.splitlines()]
    assert offered == ["wan2.1-t2v-1.3b", "wan2.1-t2v-14b"]
