"""Files of every kind that wancli reads, damaged or made up, and what is not a file at all."""

import json
import os
import random
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import imageio_ffmpeg

from tests.fuzz import judge
from tests.fuzz.campaign import Case
from tests.fuzz.judge import Fault
from tests.fuzz.materials import CHUNKED, PICTURES, SMALL
from tests.fuzz.mutations import damage, hostile_json, hostile_tensors, hostile_toml
from tests.fuzz.warm import File, Null

EACH = 2_000
TINY = ("--model", "tiny", *SMALL, "--num-frames", "5", "-q")
ROLL = ("rollout", "x", "--model", "tiny", *CHUNKED, "--seed", "1", "--chunks", "2", "-q")
LATENTS = ("--no-video", "--save-latents", "new.safetensors")
Lines = list[tuple[str, ...]]


def attempt(case: Case) -> Iterator[Fault]:
    """One file, in the place of a good one, and a command that reads it."""
    make = KINDS[case.number % len(KINDS)]
    case.place.take("tiny")
    arguments = case.chance.choice(make(case, case.chance))
    before = case.place.look()
    streams = (Null, File, File)
    ended = case.run(arguments, streams=streams)
    yield from judge.talk(ended, streams=streams)
    may = (
        {"work/" + name for name in GROWS}
        if "--resume" in arguments or "--rerender" in arguments
        else ()
    )
    dry = "--dry-run" in arguments or arguments[0] in ("show", "compare", "plan")
    yield from judge.files(ended, case.place, before, may=may or (), dry=dry)
    yield from judge.results(ended, case.place, json_lines="--json" in arguments, paths=False)


GROWS = ("roll.mp4", "roll.json", "roll.rollout/rollout.json", "roll.rollout/times.jsonl",
         "roll.rollout/lock", *(f"roll.rollout/chunk-{n:06}.safetensors" for n in range(4)),
         "roll.rollout/given.safetensors")  # fmt: skip


def _bytes(case: Case, name: str) -> bytes:
    return (case.materials / name).read_bytes()


def _put(case: Case, name: str, content: bytes) -> None:
    path = case.place.work / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def record(case: Case, chance: random.Random) -> Lines:
    """A sidecar."""
    _put(case, "x.json", hostile_json(json.loads(_bytes(case, "made.json")), chance))
    return [("show", "x.json"), ("show", "x.json", "--json"), ("repro", "x.json", "--dry-run"),
            ("repro", "x.json", *TINY, "-o", "new.mp4")]  # fmt: skip


def record_inside(case: Case, chance: random.Random) -> Lines:
    """The record in a video."""
    told = hostile_json(json.loads(_bytes(case, "made.json")), chance)
    text = (
        told.decode(errors="surrogateescape").replace("\x00", "").encode(errors="surrogateescape")
    )
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", "-i", case.materials / "made.mp4",
               "-c", "copy", "-map_metadata", "-1", "-metadata", b"comment=" + text[:100_000],
               case.place.work / "x.mp4"]  # fmt: skip
    subprocess.run(command, check=False, stdin=subprocess.DEVNULL)
    case.place.take("made.mp4")
    return [("show", "x.mp4"), ("repro", "x.mp4", "--dry-run"), ("compare", "x.mp4", "made.mp4"),
            ("generate", "x", *TINY, "-o", "x.mp4", "--skip-existing", "--dry-run")]  # fmt: skip


def preset(case: Case, chance: random.Random) -> Lines:
    """A preset, by name, by file, or as the user's own settings."""
    text = hostile_toml(tomllib.loads(_bytes(case, "good.toml").decode()), chance)
    _put(case, "x.toml", text)
    lines: Lines = [("preset", "validate", "x.toml"), ("preset", "show", "x.toml"),
                    ("generate", "x", "--preset", "x.toml", "--dry-run"),
                    ("generate", "x", "--cachedit-preset", "x.toml", "--dry-run")]  # fmt: skip
    if chance.random() < 0.3:
        _put(case, "presets/x.toml", text)
        lines = [("preset", "list"), ("preset", "list", "--json"), ("preset", "path", "x"),
                 ("generate", "x", "--preset", "x", "--dry-run")]  # fmt: skip
    elif chance.random() < 0.2:
        _put(case, "../home/.config/wancli/config.toml", text)
        lines = [("generate", "x", "--dry-run"), ("plan",), ("preset", "list"), ("--help",)]
    return lines


def bench(case: Case, chance: random.Random) -> Lines:
    """A bench's prompts and variants; refused at last for its --layers."""
    tree = tomllib.loads(_bytes(case, "bench.toml").decode())
    _put(case, "x.toml", hostile_toml(tree, chance))
    _put(case, "x.txt", damage(_bytes(case, "prompts.txt"), chance))
    more = ("--model", "tiny", "--layers", "1", "-o", "new-3")
    return [("bench", "x.toml", *more), ("bench", "x.toml", "--model", "tiny", *SMALL, "--steps",
    "0"),
            ("bench", "x.txt", "--variant", "e: --no-prompt-kv", *more)]  # fmt: skip


def script(case: Case, chance: random.Random) -> Lines:
    """Changes of prompts."""
    _put(case, "x.toml", hostile_toml(tomllib.loads(_bytes(case, "script.toml").decode()), chance))
    _put(case, "x.jsonl", hostile_json(json.loads(_bytes(case, "script.jsonl")), chance))
    return [(*ROLL, "--script", name, "--dry-run") for name in ("x.toml", "x.jsonl")]


def latents(case: Case, chance: random.Random) -> Lines:
    """Latents."""
    _put(case, "x.safetensors", hostile_tensors(_bytes(case, "latents.safetensors"), chance))
    case.place.take("latents.safetensors")
    return [("decode", "x.safetensors", "-o", "new.mp4", "-q"),
            ("compare", "x.safetensors", "latents.safetensors"),
            (*ROLL, "--initial-latents", "x.safetensors", *LATENTS)]  # fmt: skip


def video(case: Case, chance: random.Random) -> Lines:
    """A video."""
    name = chance.choice(("clip.mp4", "made.mp4"))
    _put(
        case,
        "x.mp4",
        _odd_video(case, chance) if chance.random() < 0.1 else damage(_bytes(case, name), chance),
    )
    case.place.take("clip.mp4")
    return [("preview", "x.mp4", "-q"), ("preview", "x.mp4", "--gif", "new.gif", "-q"), ("show",
    "x.mp4"),
            ("compare", "x.mp4", "clip.mp4"), (*ROLL, "--extend", "x.mp4", "--dry-run"),
            ("generate", "x", *TINY, "-o", "x.mp4", "--skip-existing", "--dry-run")]  # fmt: skip


def _odd_video(case: Case, chance: random.Random) -> bytes:
    """What is read by ffmpeg as well, and is no MP4 of ours."""
    playlist = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    concat = b"ffconcat version 1.0\nfile /etc/passwd\n"
    return chance.choice((playlist, concat, _bytes(case, "image.gif"), _bytes(case, "image.png"),
                          b"RIFF\xff\xff\xff\xffAVI ", b"\x1aE\xdf\xa3", b"GIF89a", bytes(100),
                          b"<svg xmlns='http://www.w3.org/2000/svg'/>",
                          b"YUV4MPEG2 W1 H1 F1:1\nFRAME\n"))  # fmt: skip


def picture(case: Case, chance: random.Random) -> Lines:
    """A picture."""
    name = chance.choice(PICTURES)
    content = _bomb(chance) if chance.random() < 0.05 else damage(_bytes(case, name), chance)
    shown = "x" + chance.choice((Path(name).suffix, Path(chance.choice(PICTURES)).suffix))
    _put(case, shown, content)
    case.place.take("tiny-image")
    given = (
        "generate",
        "x",
        "--model",
        "tiny-image",
        *SMALL,
        "--num-frames",
        "5",
        "--image",
        shown,
    )
    return [(*given, "--dry-run"), (*given, "--dry-run"), (*ROLL, "--image", shown, "--dry-run"),
            (*ROLL, "--image", shown, *LATENTS), ("preview", shown)]  # fmt: skip


def _bomb(chance: random.Random) -> bytes:
    """A picture of 100,000 by 100,000 pixels in some bytes."""
    import struct
    import zlib

    side = chance.choice((0, 1, 20_000, 100_000, 2**31 - 1, 2**32 - 1))
    header = struct.pack(
        ">IIBBBBB", side, side, chance.choice((1, 8, 16, 99)), chance.choice((0, 2, 3, 7)), 0, 0, 0
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    data = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


def model(case: Case, chance: random.Random) -> Lines:
    """A model folder: a configuration, an index, a tokenizer, or weights."""
    name = chance.choice(("tiny", "tiny", "tiny-two", "tiny-image"))
    case.place.take(name)
    folder = case.place.work / name
    for _ in range(chance.choice((1, 1, 2))):
        path = chance.choice([path for path in folder.rglob("*") if path.is_file()])
        _spoil(path, chance)
    about: Lines = [("model", "info", name), ("model", "info", name, "--json"), ("model", "path",
    name),
                    ("generate", "x", "--model", name, "--dry-run"), ("plan", "--model",
                    name)]  # fmt: skip
    made = (
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
    return [*about, made, (*ROLL[:2], "--model", name, *ROLL[4:], *LATENTS)]


def _spoil(path: Path, chance: random.Random) -> None:
    content = path.read_bytes()
    if chance.random() < 0.08:
        path.unlink()
        if chance.random() < 0.5:
            _special(path, chance)
    elif path.suffix == ".json":
        path.write_bytes(hostile_json(json.loads(content), chance))
    elif path.suffix == ".safetensors":
        path.write_bytes(hostile_tensors(content, chance))
    else:
        path.write_bytes(damage(content, chance))


def _special(path: Path, chance: random.Random) -> None:
    """What has that name and is no file."""
    pick = chance.randrange(5)
    if pick == 0:
        path.mkdir()
    elif pick == 1:
        os.mkfifo(path)
    elif pick == 2:
        path.symlink_to(path.name)  # to itself
    elif pick == 3:
        path.symlink_to("nowhere")
    else:
        path.symlink_to(
            chance.choice(("/dev/zero", "/dev/null", "/proc/self/mem", "/etc/passwd", "/"))
        )


def rollout(case: Case, chance: random.Random) -> Lines:
    """A rollout's folder."""
    case.place.take("roll.rollout", "roll.mp4", "roll.json")
    folder = case.place.work / "roll.rollout"
    for _ in range(chance.choice((1, 1, 2))):
        if chance.random() < 0.15:
            odd = chance.choice(
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
            (folder / odd).write_bytes(chance.randbytes(20))
            continue
        path = chance.choice(
            sorted(path for path in folder.rglob("*") if path.is_file()) or [folder / "lock"]
        )
        if path.exists():
            _spoil(path, chance)
    again = ("rollout", "-o", "roll.mp4", "-q")
    return [(*again, "--resume", "--dry-run"), (*again, "--resume"), (*again, "--resume",
    "--chunks", "3"),
            (*again, "--rerender", "1", "--seed", "2"), ("rollout", "--resume", "--dry-run",
            "-q")]  # fmt: skip


def lora(case: Case, chance: random.Random) -> Lines:
    """A LoRA."""
    name = chance.choice(("x.safetensors", "x.safetensors", "x.pt"))
    if name == "x.pt":
        _put(case, name, damage(_bytes(case, "lora.pt"), chance))
    else:
        _put(case, name, hostile_tensors(_bytes(case, "lora.safetensors"), chance))
    made = ("generate", "a", *TINY, "-o", "new.mp4", "--lora")
    return [(*made, name), (*made, f"{name}=0.5", "--dry-run"), (*made, name, "--dry-run")]


def noise(case: Case, chance: random.Random) -> Lines:
    """What stands in for seeds and prompts."""
    _put(case, "x.safetensors", hostile_tensors(_bytes(case, "noise.safetensors"), chance))
    _put(case, "y.safetensors", hostile_tensors(_bytes(case, "embeds.safetensors"), chance))
    dry = ("--dry-run",) if chance.random() < 0.4 else ()
    return [(*ROLL, "--noise-file", "x.safetensors", *LATENTS, *dry),
            (*ROLL, "--prompt-embeds", "y.safetensors", *LATENTS, *dry)]  # fmt: skip


def checkpoint(case: Case, chance: random.Random) -> Lines:
    """A checkpoint to convert, or what is said of one."""
    config = ("--config", "heads.json")
    case.place.take("heads.json")
    if chance.random() < 0.25:
        case.place.take("checkpoint.safetensors")
        _put(case, "heads.json", hostile_json({"num_heads": 4}, chance))
        return [("model", "convert", "checkpoint.safetensors", "new-3", *config)]
    if chance.random() < 0.3:
        content = damage(_bytes(case, "lora.pt"), chance) if chance.random() < 0.7 else PICKLED
        _put(case, "x.pt", content)
        return [("model", "convert", "x.pt", "new-3", *config)]
    _put(case, "x.safetensors", hostile_tensors(_bytes(case, "checkpoint.safetensors"), chance))
    return [("model", "convert", "x.safetensors", "new-3", *config)]


# cos\nsystem: a file named `ran` would lie in the working folder, had it been called.
PICKLED = b"cos\nsystem\n(S'touch ran'\ntR."


def cache(case: Case, chance: random.Random) -> Lines:
    """Rates that were measured, and the hub's cache."""
    folder = case.place.home / ".cache"
    rates = {"cpu": {"matmul": {"float32": 1e9}, "attention": {"float32": 1e9}, "convolution": 1e9,
                     "small_convolution": 1e9, "copy": 1e9, "measured": "2026"}}  # fmt: skip
    hub = folder / "hub" / "hub" / "models--some-owner--some-model"
    commit = chance.choice(("abc", "", "../../..", "\x00", "a" * 300, "\x1b[31m", "\udcff"))
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_bytes(commit.encode(errors="surrogateescape"))
    snapshot = hub / "snapshots" / "abc"
    shutil.copytree(case.materials / "tiny", snapshot)
    _spoil(chance.choice([path for path in snapshot.rglob("*") if path.is_file()]), chance)
    (folder / "wancli").mkdir()
    (folder / "wancli" / "rates.json").write_bytes(hostile_json(rates, chance))
    name = "some-owner/some-model"
    return [("model", "list"), ("model", "list", "--json"), ("model", "info", name), ("model",
    "path", name),
            ("plan", "--model", name), ("generate", "x", "--model", name, "--dry-run")]  # fmt: skip


def special(case: Case, chance: random.Random) -> Lines:
    """What is no file, for every flag that reads one."""
    endings = ("mp4", "png", "safetensors", "toml", "json", "jsonl", "txt", "pt")
    for ending in endings:
        _special(case.place.work / f"x.{ending}", chance)
    _special(case.place.work / "x", chance)
    if chance.random() < 0.3:
        (case.place.work / "presets").mkdir()
        _special(case.place.work / "presets" / "x.toml", chance)
    if chance.random() < 0.2:
        (case.place.home / ".config" / "wancli").mkdir(parents=True)
        _special(case.place.home / ".config" / "wancli" / "config.toml", chance)
    case.place.take(
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


KINDS: tuple[Callable[[Case, random.Random], Lines], ...] = (
    record, record_inside, preset, bench, script, latents, video, picture, model, rollout, lora,
    noise, checkpoint, cache, special,
)  # fmt: skip
SIZE = EACH * len(KINDS)
