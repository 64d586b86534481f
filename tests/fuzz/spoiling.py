"""Shared by the kinds of hostile files: command lines that read them, and ways to damage a file."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

from tests.fuzz.campaign import Case
from tests.fuzz.materials import CHUNKED, SMALL
from tests.fuzz.mutations import damage, hostile_json, hostile_tensors

Lines = list[tuple[str, ...]]
Kind = Callable[[Case, random.Random], Lines]  # makes a file and returns the lines that read it
TINY = ("--model", "tiny", *SMALL, "--num-frames", "5", "-q")
ROLL = ("rollout", "x", "--model", "tiny", *CHUNKED, "--seed", "1", "--chunks", "2", "-q")
LATENTS = ("--no-video", "--save-latents", "new.safetensors")


def good(case: Case, name: str) -> bytes:
    """Content of a valid file."""
    return (case.materials / name).read_bytes()


def put(case: Case, name: str, content: bytes) -> None:
    """Write a file in work/, creating its folders."""
    path = case.place.work / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def spoil(path: Path, rng: random.Random) -> None:
    """Damage a file according to its kind, or remove it."""
    content = path.read_bytes()
    if rng.random() < 0.08:
        path.unlink()
        if rng.random() < 0.5:
            make_non_file(path, rng)
    else:
        path.write_bytes(_spoil_content(path.suffix, content, rng))


def _spoil_content(kind: str, content: bytes, rng: random.Random) -> bytes:
    try:
        if kind == ".json":
            return hostile_json(json.loads(content), rng)
        if kind == ".safetensors":
            return hostile_tensors(content, rng)
    except ValueError:  # already damaged
        pass
    return damage(content, rng)


def make_non_file(path: Path, rng: random.Random) -> None:
    """Create something of that name that is not a regular file."""
    pick = rng.randrange(5)
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
            rng.choice(("/dev/zero", "/dev/null", "/proc/self/mem", "/etc/passwd", "/"))
        )
