"""What the kinds of hostile files share: lines that read them, and how a file is made one."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.campaign import Case
from tests.fuzz.materials import CHUNKED, SMALL
from tests.fuzz.mutations import damage, hostile_json, hostile_tensors

Lines = list[tuple[str, ...]]
Kind = Callable[[Case, random.Random], Lines]  # makes a file, and gives the lines that read it
TINY = ("--model", "tiny", *SMALL, "--num-frames", "5", "-q")
ROLL = ("rollout", "x", "--model", "tiny", *CHUNKED, "--seed", "1", "--chunks", "2", "-q")
LATENTS = ("--no-video", "--save-latents", "new.safetensors")


def good(case: Case, name: str) -> bytes:
    """What a good file holds."""
    return (case.materials / name).read_bytes()


def put(case: Case, name: str, content: bytes) -> None:
    """A file in work/; its folders are made."""
    path = case.place.work / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def spoil(path: Path, chance: random.Random) -> None:
    """Damage a file by its kind, or take it away."""
    content = path.read_bytes()
    if chance.random() < 0.08:
        path.unlink()
        if chance.random() < 0.5:
            no_file(path, chance)
    else:
        path.write_bytes(_spoiled(path.suffix, content, chance))


def _spoiled(kind: str, content: bytes, chance: random.Random) -> bytes:
    try:
        if kind == ".json":
            return hostile_json(json.loads(content), chance)
        if kind == ".safetensors":
            return hostile_tensors(content, chance)
    except ValueError:  # it has been spoilt before
        pass
    return damage(content, chance)


def no_file(path: Path, chance: random.Random) -> None:
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
