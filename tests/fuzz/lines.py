"""Command lines over all commands and flags, with valid and invalid values mixed."""

import random
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.fuzz import judge, values
from tests.fuzz.campaign import Case
from tests.fuzz.child import Broken, Closed, File, Full, Null
from tests.fuzz.flags import Line, add_flag, commands
from tests.fuzz.judge import Fault
from tests.fuzz.materials import CHUNKED
from tests.fuzz.place import USER_FILES

SIZE = 10_000
_TINY = ("--model", "tiny", "--size", "32x32", "--fps", "8", "--num-frames", "5", "--steps", "1")
# A line that runs each command, to which flags are added.
BASES: dict[tuple[str, ...], tuple[str, ...]] = {
    ("generate",): ("a red circle", *_TINY),
    ("rollout",): ("a red circle", "--model", "tiny", *CHUNKED, "--chunks", "2"),
    ("repro",): ("made.mp4", "--model", "tiny"),
    ("decode",): ("latents.safetensors", "-o", "new.mp4"),
    ("bench",): ("a red circle", *_TINY, "--variant", "e: --no-prompt-kv", "-o", "new"),
    ("preview",): ("made.mp4",),
    ("show",): ("made.mp4",),
    ("compare",): ("made.mp4", "clip.mp4"),
    ("model", "convert"): ("checkpoint.safetensors", "new", "--config", "heads.json"),
    ("preset", "save"): ("quick", "--steps", "3"),
    ("preset", "validate"): ("good.toml",),
}
DRY = (("generate",), ("rollout",), ("repro",))
WEIGHTS: dict[tuple[str, ...], float] = {
           ("generate",): 30, ("rollout",): 18, ("plan",): 10, ("repro",): 8, ("bench",): 5,
           ("preview",): 8, ("decode",): 5, ("compare",): 4, ("show",): 4,
           ("doctor",): 0.15}  # fmt: skip
SLOW = ("measure", "compile")  # these take seconds
OUTPUT_FLAGS = ("--json", "--quiet", "-q", "--verbose", "-v", "--no-color")
ENVIRONMENT = {
    "COLUMNS": ("1", "0", "-5", "abc", "99999", ""),
    "NO_COLOR": ("1", ""),
    "TERM": ("dumb", "", "xterm-kitty", "\x1b[31m"),
    "WANCLI_MODEL": ("tiny", "", "nosuch", "\udcff", "\x1b[31m", "demo"),
    "WANCLI_PRESET": ("demo", "nosuch", "\x1b[31m.toml", "good.toml"),
    "WANCLI_OUTPUT_DIR": ("folder", "none", "notes.txt", "\udcff", "/dev/null", "~nosuch"),
    "WANCLI_PRESET_PATH": ("folder", "notes.txt", ":::", "\x1b[31m", "/proc/self"),
    "WANCLI_CACHE_DIR": ("folder", "notes.txt", "/dev/null", "none/none"),
    "HF_HOME": ("notes.txt", "folder", "\udcff", "$HF_HOME"),
    "HOME": ("/nonexistent", "", "notes.txt"),
    "XDG_CONFIG_HOME": ("notes.txt", "/nonexistent", "relative", "\udcff"),
    "TMPDIR": ("/nonexistent", "notes.txt"),
    "CUDA_VISIBLE_DEVICES": ("", "-1", "0", "abc", "9" * 30),
    "OMP_NUM_THREADS": ("1", "0", "abc", "-1", "99999"),
    "LANG": ("C", "tr_TR.UTF-8", "nonsense"),
}  # fmt: skip


def attempt(case: Case) -> Iterator[Fault]:
    """Run one line; yields its faults."""
    yield from check_line(case, make_line(case.rng))


def check_line(case: Case, line: Line) -> Iterator[Fault]:
    """Run a line in an environment that may be odd too; yields its faults."""
    rng = case.rng
    for name in dict.fromkeys((*ALWAYS, *line.reads, *line.arguments)):
        if is_material(case, name):
            case.place.copy_in(name)
    variables = {
        name: rng.choice(texts) for name, texts in ENVIRONMENT.items() if rng.random() < 0.02
    }
    streams, encoding = _streams(rng)
    unprivileged = rng.random() < 0.06
    if unprivileged:
        _forbid(case, rng)
    before = case.place.snapshot()
    stdin = rng.choice((b"", b"a red circle\n", b"\xff\xfe\n", b"y\n", b"\x1b[31m" * 99))
    outcome = case.run(
        line.words, variables=variables, streams=streams, encoding=encoding, stdin=stdin,
        unprivileged=unprivileged,
    )  # fmt: skip
    yield from judge.check_streams(outcome, streams=streams)
    dry = "--dry-run" in line.arguments or line.command in READERS
    yield from judge.check_files(
        outcome, case.place, before, may=replaceable(line), chosen=line.writes, dry=dry
    )
    if streams == (Null, File, File) or streams == (File, File, File):
        # "-hot" is -h and more of one letter: Click stops at the first.
        helped = any(word == "--help" or word.startswith("-h") for word in line.arguments)
        yield from judge.check_results(
            outcome,
            case.place,
            json_lines="--json" in line.arguments and not helped,
            paths=line.command in MAKERS and not dry and not helped,
        )


ALWAYS = ("tiny", "made.mp4", "made.json", "clip.mp4", "latents.safetensors")
MAKERS = (("generate",), ("repro",), ("decode",), ("preview",))
_PRESET = (("preset", "list"), ("preset", "show"), ("preset", "path"), ("preset", "validate"))
PRINTING = (*DRY, *_PRESET, ("preset", "save"), ("plan",), ("show",), ("model", "list"))
READERS = (*_PRESET, ("plan",), ("show",), ("compare",), ("model", "list"), ("model", "info"),
           ("model", "path"), ("doctor",))  # fmt: skip


def make_line(rng: random.Random, *, printing: bool = False) -> Line:
    """A random command line; with `printing`, of a command that only prints."""
    offered = [name for name in commands() if not printing or name in PRINTING]
    command = rng.choices(offered, [WEIGHTS.get(name, 1.5) for name in offered])[0]
    by_name = {flag.name: flag for flag in commands()[command]}
    dry = printing or command not in DRY or rng.random() < 0.6
    making = command in BASES and not (dry and command in DRY)
    line = Line(command, small=making or command == ("bench",))
    if command in BASES and rng.random() < 0.85:
        line.arguments += BASES[command]
    else:
        _required(line, rng)
    odd = rng.choice((0.0, 0.15, 0.4, 0.8))
    for _ in range(min(int(rng.expovariate(0.45)), 12)):
        flag = rng.choice(tuple(by_name.values()))
        if flag.name in SLOW or (not flag.spellings and rng.random() < 0.7):
            continue
        add_flag(line, flag, rng, good=rng.random() >= odd)
    if dry and command in DRY:
        line.arguments.append("--dry-run")
    line.arguments += [flag for flag in OUTPUT_FLAGS if rng.random() < 0.08]
    _twist(line, rng)
    if "--" in line.arguments and "--dry-run" in line.arguments:
        line.arguments.remove("--dry-run")  # behind a -- it would be a prompt
        line.arguments.insert(0, "--dry-run")
    return line


def _required(line: Line, rng: random.Random) -> None:
    for flag in commands()[line.command]:
        if flag.required or (not flag.spellings and rng.random() < 0.8):
            add_flag(line, flag, rng, good=rng.random() < 0.7)
    if line.small:
        _bound(line)


def _bound(line: Line) -> None:
    """Append flags that make the run short."""
    names = {flag.name for flag in commands()[line.command]}
    if "model" in names:
        line.arguments += ["--model", "tiny"]
    if "num_frames" in names:
        line.arguments += _TINY[2:]
    elif "chunks" in names:
        line.arguments += [*CHUNKED, "--chunks", "2"]


def _twist(line: Line, rng: random.Random) -> None:
    """Occasionally insert a typing mistake: a doubled, stray or unknown flag."""
    if rng.random() < 0.1 and line.arguments:
        at = rng.randrange(len(line.arguments))
        pick = rng.randrange(4)
        if pick == 0 and line.arguments[at] != "--dry-run":
            line.arguments.insert(at, line.arguments[at])
        elif pick == 1:
            line.arguments.insert(at, values.odd_text(rng))
        elif pick == 2:
            line.arguments.insert(at, rng.choice(("--nosuch", "--help", "-x", "--", "--size=")))
        else:
            line.arguments.append(rng.choice(("--overwrite", "--skip-existing", "--force")))
    elif rng.random() < 0.15:
        line.arguments.append("--overwrite")


def _streams(rng: random.Random) -> tuple[tuple[str, str, str], str]:
    """Random targets of the three streams, and their encoding."""
    if rng.random() < 0.9:
        return (rng.choice((Null, Null, File)), File, File), "utf-8"
    kinds = (File, Null, Closed, Full, Broken)
    encoding = rng.choice(("utf-8", "utf-8", "ascii", "latin-1", "locale"))
    stdin = rng.choice((Null, Closed, File))
    return (stdin, rng.choice(kinds), rng.choice(kinds)), encoding


def _forbid(case: Case, rng: random.Random) -> None:
    """Remove permissions of random files, for an unprivileged user."""
    work, home = case.place.work, case.place.home
    (home / ".config" / "wancli").mkdir(parents=True)
    config = home / ".config" / "wancli" / "config.toml"
    config.write_text("[sampling]\nsteps = 2\n")
    several = (work, work / "folder", work / "tiny", work / "tiny" / "vae", home, case.place.tmp,
               home / ".config", config, config.parent, work / "made.mp4", work / "made.json",
               work / "latents.safetensors", work / "tiny" / "model_index.json")  # fmt: skip
    for path in rng.sample(several, rng.randint(1, 2)):
        if not path.exists() or case.place.root not in path.resolve().parents:
            continue  # a link leads out of here
        path.chmod(rng.choice((0o000, 0o555, 0o444, 0o111, 0o333)))


def is_material(case: Case, name: str) -> bool:
    """Whether the name is a material, not a file of the user."""
    return name in _names(case.materials)


@cache
def _names(materials: Path) -> frozenset[str]:
    return frozenset(path.name for path in materials.iterdir()).difference(USER_FILES)


def replaceable(line: Line) -> set[str]:
    """Files that --overwrite may replace: the outputs and their sidecars."""
    if "--overwrite" not in line.arguments:
        return set()
    allowed = set()
    outputs = [*line.writes, *(["made.png"] if line.command == ("preview",) else [])]
    for name in outputs:
        path = Path(name)
        if name in line.reads or path.name != name:
            continue
        allowed |= {f"work/{name}"}
        if name == "made.mp4":
            allowed |= {"work/made.json"}
    return allowed
