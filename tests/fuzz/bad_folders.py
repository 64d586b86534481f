"""Hostile folders: models, rollouts, caches; and what is not a regular file."""

import random
import shutil

from tests.fuzz.campaign import Case
from tests.fuzz.materials import SMALL
from tests.fuzz.mutations import hostile_json
from tests.fuzz.spoiling import LATENTS, ROLL, TINY, Lines, make_non_file, spoil


def model(case: Case, rng: random.Random) -> Lines:
    """A model folder with a damaged configuration, index, tokenizer, or weights."""
    name = rng.choice(("tiny", "tiny", "tiny-two", "tiny-image"))
    case.place.copy_in(name)
    folder = case.place.work / name
    for _ in range(rng.choice((1, 1, 2))):
        path = rng.choice([path for path in folder.rglob("*") if path.is_file()])
        spoil(path, rng)
    inspect: Lines = [("model", "info", name), ("model", "info", name, "--json"), ("model", "path",
    name),
                    ("generate", "x", "--model", name, "--dry-run"), ("plan", "--model",
                    name)]  # fmt: skip
    generate = (
        "generate",
        "a red circle",
        "--model",
        name,
        *SMALL,
        "--num-frames",
        "5",
        "-q",
        "-o",
        "new.mp4",
    )
    return [*inspect, generate, (*ROLL[:2], "--model", name, *ROLL[4:], *LATENTS)]


def rollout(case: Case, rng: random.Random) -> Lines:
    """A damaged rollout folder."""
    case.place.copy_in("roll.rollout", "roll.mp4", "roll.json")
    folder = case.place.work / "roll.rollout"
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.15:
            odd = rng.choice(
                (
                    "chunk-abc.safetensors",
                    "chunk-.safetensors",
                    "chunk-000009.safetensors",
                    "x",
                    "chunk-000002.safetensors",
                    "given.safetensors",
                    "replaced-0",
                    "replaced-x",
                )
            )
            shutil.rmtree(folder / odd, ignore_errors=True)
            (folder / odd).write_bytes(rng.randbytes(20))
            continue
        path = rng.choice(
            sorted(path for path in folder.rglob("*") if path.is_file()) or [folder / "lock"]
        )
        if path.exists():
            spoil(path, rng)
    resume = ("rollout", "-o", "roll.mp4", "-q")
    return [(*resume, "--resume", "--dry-run"), (*resume, "--resume"), (*resume, "--resume",
    "--chunks", "3"),
            (*resume, "--rerender", "1", "--seed", "2"), ("rollout", "--resume", "--dry-run",
            "-q")]  # fmt: skip


def cache(case: Case, rng: random.Random) -> Lines:
    """Damaged rates and a damaged hub cache."""
    folder = case.place.home / ".cache"
    rates = {"cpu": {"matmul": {"float32": 1e9}, "attention": {"float32": 1e9}, "convolution": 1e9,
                     "small_convolution": 1e9, "copy": 1e9, "measured": "2026"}}  # fmt: skip
    hub = folder / "hub" / "hub" / "models--some-owner--some-model"
    commit = rng.choice(("abc", "", "../../..", "\x00", "a" * 300, "\x1b[31m", "\udcff"))
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_bytes(commit.encode(errors="surrogateescape"))
    snapshot = hub / "snapshots" / "abc"
    shutil.copytree(case.materials / "tiny", snapshot)
    spoil(rng.choice([path for path in snapshot.rglob("*") if path.is_file()]), rng)
    (folder / "wancli").mkdir()
    (folder / "wancli" / "rates.json").write_bytes(hostile_json(rates, rng))
    name = "some-owner/some-model"
    return [("model", "list"), ("model", "list", "--json"), ("model", "info", name), ("model",
    "path", name),
            ("plan", "--model", name), ("generate", "x", "--model", name, "--dry-run")]  # fmt: skip


def special(case: Case, rng: random.Random) -> Lines:
    """Something other than a regular file, for every flag that reads one."""
    endings = ("mp4", "png", "safetensors", "toml", "json", "jsonl", "txt", "pt")
    for ending in endings:
        make_non_file(case.place.work / f"x.{ending}", rng)
    make_non_file(case.place.work / "x", rng)
    if rng.random() < 0.3:
        (case.place.work / "presets").mkdir()
        make_non_file(case.place.work / "presets" / "x.toml", rng)
    if rng.random() < 0.2:
        (case.place.home / ".config" / "wancli").mkdir(parents=True)
        make_non_file(case.place.home / ".config" / "wancli" / "config.toml", rng)
    case.place.copy_in(
        "tiny-image", "latents.safetensors", "checkpoint.safetensors", "clip.mp4", "heads.json"
    )
    image = (
        "generate",
        "x",
        "--model",
        "tiny-image",
        *SMALL,
        "--num-frames",
        "5",
        "--dry-run",
        "--image",
    )
    return [
        ("show", "x.mp4"), ("show", "x.json"), ("repro", "x.mp4", "--dry-run"), ("repro",
        "x.json", "--dry-run"),
        ("decode", "x.safetensors", "-o", "new.mp4"), ("compare", "x.mp4", "clip.mp4"),
        ("compare", "clip.mp4", "x.mp4"),
        ("compare", "x.safetensors", "latents.safetensors"), ("preview", "x.mp4"), ("preview",
        "x.png"),
        (*image, "x.png"), (*ROLL, "--image", "x.png", "--dry-run"), (*ROLL, "--extend", "x.mp4",
        "--dry-run"),
        (*ROLL, "--initial-latents", "x.safetensors", "--dry-run"), (*ROLL, "--noise-file",
        "x.safetensors", "--dry-run"),
        (*ROLL, "--prompt-embeds", "x.safetensors", "--dry-run"), (*ROLL, "--script", "x.toml",
        "--dry-run"),
        (*ROLL, "--script", "x.jsonl", "--dry-run"), ("generate", "x", *TINY, "--lora",
        "x.safetensors", "--dry-run"),
        ("generate", "x", *TINY, "--lora", "x.pt", "--dry-run"), ("generate", "x", "--preset",
        "x.toml", "--dry-run"),
        ("preset", "validate", "x.toml"), ("preset", "list"), ("preset", "show", "x"), ("bench",
        "x.toml"),
        ("bench", "x.txt", "--variant", "e: --no-prompt-kv"), ("model", "convert", "x.pt", "new-3"),
        ("model", "convert", "x.safetensors", "new-3"), ("model", "convert", "x", "new-3"),
        ("model", "convert", "checkpoint.safetensors", "new-3", "--config", "x.json"),
        ("model", "convert", "checkpoint.safetensors", "new-3", "--config", "heads.json",
        "--base", "x"),
        ("model", "info", "./x"), ("generate", "x", "--model", "./x", "--dry-run"), ("generate",
        "x", "--model", "./x"),
        ("rollout", "--resume", "-o", "x.mp4", "-q"), ("generate", "x", *TINY, "-o", "x.mp4"),
        ("generate", "x", *TINY, "-o", "x.mp4", "--overwrite"), ("generate", "x", *TINY, "-o",
        "x.mp4", "--skip-existing"),
        (*ROLL, "-o", "x.mp4"), ("decode", "latents.safetensors", "-o", "x.mp4"),
    ]  # fmt: skip
