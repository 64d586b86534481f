"""README.md and docs/ say what the program does: their commands parse, plan and run."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import (
    MARKS,
    ROOT,
    Block,
    all_blocks,
    anchors,
    blocks,
    links,
    pages,
)
from tests.forked import Run
from tests.shell import Shell, shell
from wancli.catalog.specs import SPECS
from wancli.cli.app import COMMANDS, app
from wancli.cli.messages import dashed
from wancli.cli.reference import markdown
from wancli.config.presets import validate_file
from wancli.config.settings import ALIASES

LANGUAGES = {"sh", "toml", "python", "text", ""}
PLANNED = ("generate", "rollout", "repro", "plan")
PICTURES = ("cat.png", "day.png", "night.png", "person.png")
CLIPS = {  # by video frames, and how many a second
    (81, 16): ("cat", "mask"),
    (77, 30): ("pose", "face", "street", "person"),
}

# Runs the tasks of an array one after the other, with the variables that SLURM sets.
SBATCH = r"""#!/bin/bash
script=${@: -1}
range=$(sed -n 's/^#SBATCH --array=//p' "$script")
export SLURM_ARRAY_TASK_MIN=${range%-*} SLURM_ARRAY_TASK_MAX=${range#*-} SLURM_ARRAY_TASK_STEP=1
export SLURM_ARRAY_TASK_COUNT=$((SLURM_ARRAY_TASK_MAX - SLURM_ARRAY_TASK_MIN + 1))
for ((n = SLURM_ARRAY_TASK_MIN; n <= SLURM_ARRAY_TASK_MAX; n++)); do
  SLURM_JOB_ID=$((100 + n)) SLURM_ARRAY_TASK_ID=$n bash -e "$script" || exit
done
"""

SMALL = """
[sampling]
steps = 9
[video]
num_frames = 9
width = 48
height = 48
"""


def ids(block: Block) -> str:
    return block.place


def test_every_block_declares_its_language_and_how_it_is_tested():
    wrong = [b.place for b in all_blocks() if b.language not in LANGUAGES or b.mark not in MARKS]
    assert wrong == []
    skipped = [b.place for b in all_blocks() if b.mark == "skip" and b.commands]
    assert skipped == []


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", [*pages(), "CONTRIBUTING.md"])
def test_links_between_pages_lead_somewhere(page: str):
    broken = [
        f"{target}#{anchor}"
        for target, anchor in links(page)
        if not (ROOT / target).exists() or (anchor and anchor not in anchors(target))
    ]
    assert broken == []


def test_the_readme_names_every_known_model():
    readme, models = ((ROOT / name).read_text() for name in ("README.md", "docs/models.md"))
    for name, spec in SPECS.items():
        assert f"`{name}`" in readme
        assert f"| `{name}` |" in models
        assert spec.repo in models


def test_flags_of_every_command_in_the_documents_exist():
    """Parsed as the command line does, and not called."""
    from typer.exceptions import TyperException
    from typer.main import get_command

    whole = get_command(app).make_context("wancli", [], resilient_parsing=True)
    loaded = {name: entry.load(name) for name, entry in COMMANDS.items()}
    wrong = []
    for block in all_blocks():
        for name, *arguments in block.commands:
            if name.startswith("--"):
                continue
            command = loaded[name]
            if subcommands := getattr(command, "commands", None):
                # `wancli batch FILE` is `wancli batch run FILE`.
                command = subcommands[arguments.pop(0) if arguments[0] in subcommands else "run"]
            try:
                command.make_context(name, arguments, parent=whole)
            except TyperException as error:
                wrong.append(f"{block.place}: wancli {name}: {error.format_message()}")
    assert wrong == []


def test_the_documents_name_flags_as_messages_do_and_not_by_their_aliases():
    aliases = [dashed(alias) for alias in ALIASES]
    named = {
        page: re.findall(f"--(?:{'|'.join(aliases)})", (ROOT / page).read_text())
        for page in pages()
    }
    assert {page: flags for page, flags in named.items() if flags} == {}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the pictures and videos that the documents name."""
    import numpy as np
    from PIL import Image

    from wancli.video.ffmpeg import Encoding
    from wancli.video.write import VideoWriter

    folder = tmp_path_factory.mktemp("documents")
    for name in PICTURES:
        Image.new("RGB", (48, 32)).save(folder / name)
    for (frames, fps), (name, *others) in CLIPS.items():
        path = folder / f"{name}.mp4"
        with VideoWriter(path, size=(48, 32), fps=fps, encoding=Encoding(), replaced=[]) as writer:
            writer.write(np.zeros((frames, 32, 48, 3), np.uint8))
            writer.finish({})
        for other in others:
            shutil.copy(path, folder / f"{other}.mp4")
    return folder


@pytest.mark.parametrize("block", [b for b in all_blocks() if b.mark == "plan"], ids=ids)
def test_a_command_that_needs_weights_can_be_planned(block: Block, forked: Run, files: Path):
    for name, *arguments in block.commands:
        if name in PLANNED:
            dry = [] if name == "plan" else ["--dry-run"]
            code, _, _, err = forked(name, *arguments, *dry, "--force", folder=files)
            assert code == 0, f"{block.place}: wancli {name} {arguments}: {err}"


def cards() -> list[tuple[int, list[str], list[float]]]:
    """(GB of the card, flags, [GiB on the GPU, GiB in RAM]) of the README's rows."""
    row = re.compile(r"^\| (\d+) GB \| `(.*)` \|.*\| ([\d.]+) GiB \| ([\d.]+)(?: GiB)? \|$", re.M)
    rows = row.findall((ROOT / "README.md").read_text())
    return [(int(gb), flags.split(), [float(gpu), float(ram)]) for gb, flags, gpu, ram in rows]


def test_the_readme_has_the_bytes_of_the_plan(forked: Run, tmp_path: Path):
    for gb, flags, printed in cards():
        _, _, out, _ = forked("plan", *flags, "--gpu", f"{gb}GB", "--json", folder=tmp_path)
        cost = json.loads(out)["cost"]
        waiting = 0 if cost["offload"] == "none" else sum(cost["weights"].values())
        needed = cost["resident"][cost["offload"]]
        assert [round(n / 2**30, 1) for n in (needed, waiting)] == printed, flags


def test_toml_in_the_documents_is_valid(tmp_path: Path):
    for block in all_blocks():
        if block.language == "toml" and (block.file or "presets/").startswith("presets/"):
            path = tmp_path / "x.toml"
            path.write_text(block.text)
            validate_file(path)


@pytest.fixture(scope="module")
def bash(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Where a user's config.toml makes small videos of the commands."""
    folder = tmp_path_factory.mktemp("shell")
    (folder / "config/wancli").mkdir(parents=True)
    (folder / "config/wancli/config.toml").write_text(SMALL)
    variables = {"XDG_CONFIG_HOME": str(folder / "config"), "TMPDIR": str(folder)}
    with shell(folder, HF_HUB_OFFLINE="1", **variables) as run:
        if not shutil.which("sbatch"):
            (folder / "bin/sbatch").write_text(SBATCH)
            (folder / "bin/sbatch").chmod(0o755)
        yield run


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in pages() if any(b.runs for b in blocks(p))])
def test_the_blocks_of_a_page_run_one_after_the_other(page: str, bash: Shell, tmp_path: Path):
    for block in blocks(page):
        if name := block.file or ("block.py" if block.language == "python" else None):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        if block.runs:
            done = bash(block.text if block.language == "sh" else "python block.py", tmp_path)
            assert done.returncode == 0, f"{block.place}\n{done.stdout}\n{done.stderr}"


def test_the_reference_is_current():
    """`make reference` writes it anew."""
    assert (ROOT / "docs/cli.md").read_text() == f"{markdown()}\n"
