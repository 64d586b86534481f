"""Hostile text: records, presets, benches, scripts."""

import json
import random
import subprocess
import tomllib

import imageio_ffmpeg

from tests.fuzz.campaign import Case
from tests.fuzz.materials import SMALL
from tests.fuzz.mutations import damage, hostile_json, hostile_toml
from tests.fuzz.spoiling import ROLL, TINY, Lines, good, put


def record(case: Case, rng: random.Random) -> Lines:
    """A sidecar."""
    put(case, "x.json", hostile_json(json.loads(good(case, "made.json")), rng))
    return [("show", "x.json"), ("show", "x.json", "--json"), ("repro", "x.json", "--dry-run"),
            ("repro", "x.json", *TINY, "-o", "new.mp4")]  # fmt: skip


def record_inside(case: Case, rng: random.Random) -> Lines:
    """The record embedded in a video."""
    content = hostile_json(json.loads(good(case, "made.json")), rng)
    text = (
        content.decode(errors="surrogateescape")
        .replace("\x00", "")
        .encode(errors="surrogateescape")
    )
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", "-i", case.materials / "made.mp4",
               "-c", "copy", "-map_metadata", "-1", "-metadata", b"comment=" + text[:100_000],
               case.place.work / "x.mp4"]  # fmt: skip
    subprocess.run(command, check=False, stdin=subprocess.DEVNULL)
    case.place.copy_in("made.mp4")
    return [("show", "x.mp4"), ("repro", "x.mp4", "--dry-run"), ("compare", "x.mp4", "made.mp4"),
            ("generate", "x", *TINY, "-o", "x.mp4", "--skip-existing", "--dry-run")]  # fmt: skip


def preset(case: Case, rng: random.Random) -> Lines:
    """A preset given by name or file, or the user's own settings."""
    text = hostile_toml(tomllib.loads(good(case, "good.toml").decode()), rng)
    put(case, "x.toml", text)
    lines: Lines = [("preset", "validate", "x.toml"), ("preset", "show", "x.toml"),
                    ("generate", "x", "--preset", "x.toml", "--dry-run"),
                    ("generate", "x", "--cachedit-preset", "x.toml", "--dry-run")]  # fmt: skip
    if rng.random() < 0.3:
        put(case, "presets/x.toml", text)
        lines = [("preset", "list"), ("preset", "list", "--json"), ("preset", "path", "x"),
                 ("generate", "x", "--preset", "x", "--dry-run")]  # fmt: skip
    elif rng.random() < 0.2:
        put(case, "../home/.config/wancli/config.toml", text)
        lines = [("generate", "x", "--dry-run"), ("plan",), ("preset", "list"), ("--help",)]
    return lines


def bench(case: Case, rng: random.Random) -> Lines:
    """Prompts and variants of a bench; --layers makes even valid ones fail."""
    tree = tomllib.loads(good(case, "bench.toml").decode())
    put(case, "x.toml", hostile_toml(tree, rng))
    put(case, "x.txt", damage(good(case, "prompts.txt"), rng))
    more = ("--model", "tiny", "--layers", "1", "-o", "new-3")
    return [("bench", "x.toml", *more), ("bench", "x.toml", "--model", "tiny", *SMALL, "--steps",
    "0"),
            ("bench", "x.txt", "--variant", "e: --no-prompt-kv", *more)]  # fmt: skip


def script(case: Case, rng: random.Random) -> Lines:
    """Prompt changes of a rollout."""
    put(case, "x.toml", hostile_toml(tomllib.loads(good(case, "script.toml").decode()), rng))
    put(case, "x.jsonl", hostile_json(json.loads(good(case, "script.jsonl")), rng))
    return [(*ROLL, "--script", name, "--dry-run") for name in ("x.toml", "x.jsonl")]
