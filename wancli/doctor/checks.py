"""Checks of packages, devices, disks and ffmpeg, each with the command that fixes it."""

import importlib
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Literal

import platformdirs

from wancli.catalog.hub_cache import cache_folder
from wancli.cost.devices import find_cpu, find_gpus
from wancli.cost.estimate import read_rates
from wancli.errors import WancliError
from wancli.utils.disk import existing, free_disk, user_cache
from wancli.utils.packages import package_version
from wancli.utils.threads import thread_settings
from wancli.utils.units import gib

State = Literal["ok", "missing", "broken", "note"]
IMPORTED = ("torch", "diffusers", "transformers", "safetensors", "accelerate")
OPTIONAL = {  # package: what it is for
    "torchao": "--quantize",
    "nvidia-ml-py": "GPU memory without nvidia-smi",
    "kernels": "attention kernels from the hub",
    "flash-attn": "--attention-backend flash",
    "sageattention": "--attention-backend sage",
    "xformers": "--attention-backend xformers",
}
LITTLE_DISK = 2**30  # bytes; a model takes more


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `mend` is what to type where it is not well."""

    group: str
    name: str
    value: str
    state: State = "ok"
    mend: str = ""
    needed: bool = False  # generate cannot run without it

    @property
    def fatal(self) -> bool:
        """Whether generate cannot run."""
        return self.needed and self.state in ("missing", "broken")


def find_all(output: Path) -> Iterator[Finding]:
    """Everything; `output` is the folder that videos would go to."""
    yield Finding("versions", "python", platform.python_version())
    yield Finding("versions", "wancli", package_version("wancli") or "not installed")
    yield from required_packages()
    yield from imports()
    for name, purpose in OPTIONAL.items():
        found = package_version(name)
        mend = "" if found else f"pip install {name}"
        yield Finding("optional", name, found or purpose, "ok" if found else "note", mend)
    yield from devices()
    yield from disks(output)
    yield ffmpeg()
    yield from folders()


def required_packages() -> Iterator[Finding]:
    """Those that wancli asks for, against the versions that it asks for."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(text) for text in requires("wancli") or ()]
    except PackageNotFoundError:
        return
    for requirement in asked:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found, mend = package_version(requirement.name), f"pip install '{requirement}'"
        if not found:
            yield Finding("versions", requirement.name, "", "missing", mend, needed=True)
        elif not requirement.specifier.contains(found, prereleases=True):
            yield Finding("versions", requirement.name, found, "broken", mend, needed=True)
        else:
            yield Finding("versions", requirement.name, found, needed=True)


def imports() -> Iterator[Finding]:
    """The libraries that do the work load; only what does not is found."""
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - nobody has listed what a broken build raises
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            mend = f"pip install --force-reinstall {name}"
            yield Finding("versions", f"import {name}", said, "broken", mend, needed=True)


def devices() -> Iterator[Finding]:
    """GPUs, whether torch can use them, and memory."""
    gpus, cpu = find_gpus(), find_cpu()
    for gpu in gpus:
        memory = f"{gib(gpu.total)}, {gib(gpu.free)} free"
        yield Finding("GPU", gpu.name, f"{memory}, driver {gpu.driver}")
    if not gpus:
        yield Finding("GPU", "none", "computes on the CPU", "note")
    with suppress(ImportError):
        import torch

        if gpus and not torch.cuda.is_available():
            mend = "pip install torch, from an index with a CUDA build for this driver"
            yield Finding("GPU", "torch", "cannot use CUDA here", "broken", mend)
    yield Finding("memory", cpu.name, f"{gib(cpu.total)}, {gib(cpu.free)} free")
    yield Finding("memory", "CPU threads", thread_settings())
    measured = read_rates((gpus or [cpu])[0])
    when = f"measured {measured.measured}" if measured else "never measured"
    mend = "" if measured else "wancli doctor --measure"
    yield Finding("memory", "rates", when, "ok" if measured else "note", mend)


def disks(output: Path) -> Iterator[Finding]:
    """Room where files will go, and whether they may."""
    for name, path, variable in (
        ("output", output, "WANCLI_OUTPUT_DIR"),
        ("hub cache", cache_folder(), "HF_HOME"),
        ("wancli cache", user_cache(), "WANCLI_CACHE_DIR"),
    ):
        free, there = free_disk(path), existing(path)
        value = f"{path.absolute()}: {gib(free)} free"
        if not os.access(there, os.W_OK):
            mend = f"chmod u+w {there}, or set {variable}"
            yield Finding("disk", name, f"{value}, not writable", "broken", mend, name == "output")
        elif free < LITTLE_DISK:
            yield Finding("disk", name, value, "note", f"free some space, or set {variable}")
        else:
            yield Finding("disk", name, value)
    size = sum(p.stat().st_size for p in cache_folder().glob("models--*/blobs/*") if p.is_file())
    yield Finding("disk", "models cached", gib(size))


def ffmpeg() -> Finding:
    """A tiny video, written as every other, and read back."""
    try:
        import numpy as np

        from wancli.video.ffmpeg import Encoding, check_encoder, ffmpeg_exe, run_ffmpeg
        from wancli.video.write import VideoWriter

        for encoding in (Encoding(), Encoding(lossless=True)):
            check_encoder(encoding)
        words = run_ffmpeg("-version").stdout.decode(errors="replace").split()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tiny.mp4"
            with VideoWriter(path, size=(32, 32), fps=8, encoding=Encoding()) as writer:
                writer.write(np.zeros((3, 32, 32, 3), np.uint8))
                frames = writer.finish({}).frames
        said = (
            f"{words[2] if len(words) > 2 else '?'} encodes, tags BT.709, {frames} frames read back"
        )
        return Finding("video", "ffmpeg", f"{said}: {ffmpeg_exe()}", needed=True)
    except (WancliError, ImportError, OSError) as error:
        mend = error.hint if isinstance(error, WancliError) else "pip install imageio-ffmpeg numpy"
        return Finding("video", "ffmpeg", str(error), "broken", mend, needed=True)


def folders() -> Iterator[Finding]:
    """Where settings and presets of the user's are looked for."""
    config = platformdirs.user_config_path("wancli")
    for name, path in (("config", config / "config.toml"), ("presets", config / "presets")):
        there = "" if path.exists() else " (none yet)"
        yield Finding("folders", name, f"{path}{there}")
    yield Finding("folders", "python", sys.executable)
