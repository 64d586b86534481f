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

from wancli.catalog.hub_cache import cache_folder, cached_bytes, cached_repos
from wancli.catalog.model_folders import VARIABLE, model_roots
from wancli.cost.devices import find_cpu, find_gpus
from wancli.cost.estimate import read_rates, stale_rates
from wancli.errors import WancliError
from wancli.utils.disk import existing, free_disk, user_cache
from wancli.utils.packages import package_version
from wancli.utils.threads import thread_settings
from wancli.utils.units import gib

State = Literal["ok", "missing", "broken", "note"]
IMPORTED = ("torch", "diffusers", "transformers", "safetensors", "accelerate")
OPTIONAL = {  # package: what it is for
    "torchao": "`quantize`",
    "gguf": "quantized weights of GGUF files",
    "nvidia-ml-py": "GPU memory without nvidia-smi",
    "kernels": "attention kernels from the hub",
    "flash-attn": "`attention_backend` flash",
    "sageattention": "`attention_backend` sage",
    "xformers": "`attention_backend` xformers",
}
LITTLE_DISK = 2**30  # bytes; a model needs more


@dataclass(frozen=True)
class Finding:
    """The result of one check; `fix` is what to type where it failed."""

    group: str
    name: str
    value: str
    state: State = "ok"
    fix: str = ""
    needed: bool = False  # generate cannot run without it

    @property
    def fatal(self) -> bool:
        """Whether generate cannot run."""
        return self.needed and self.state in ("missing", "broken")


def run_checks(output: Path) -> Iterator[Finding]:
    """Run all checks; `output` is the directory of videos."""
    yield Finding("versions", "python", platform.python_version())
    yield Finding("versions", "wancli", package_version("wancli") or "not installed")
    yield from check_packages()
    yield from check_imports()
    for name, purpose in OPTIONAL.items():
        version = package_version(name)
        fix = "" if version else f"pip install {name}"
        value = version or f"for {purpose}"
        yield Finding("optional", name, value, "ok" if version else "note", fix)
    yield from check_devices()
    yield from check_disks(output)
    yield check_ffmpeg()
    yield from list_folders()


def check_packages() -> Iterator[Finding]:
    """Compare the installed versions of required packages with wancli's requirements."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in requires("wancli") or ()]
    except PackageNotFoundError:
        return
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version, fix = package_version(requirement.name), f"pip install '{requirement}'"
        if not version:
            yield Finding("versions", requirement.name, "", "missing", fix, needed=True)
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Finding("versions", requirement.name, version, "broken", fix, needed=True)
        else:
            yield Finding("versions", requirement.name, version, needed=True)


def check_imports() -> Iterator[Finding]:
    """Import the libraries that do the work; yields those that fail."""
    for name in IMPORTED:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 - a broken build can raise anything
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            fix = f"pip install --force-reinstall {name}"
            yield Finding("versions", f"import {name}", message, "broken", fix, needed=True)


def check_devices() -> Iterator[Finding]:
    """GPUs, whether torch can use them, CPU, memory and threads, and measured rates."""
    gpus, cpu = [*find_gpus().values()], find_cpu()
    for gpu in gpus:
        memory = f"{gib(gpu.total)}, {gib(gpu.free)} free"
        yield Finding("GPU", gpu.name, f"{memory}, driver {gpu.driver}")
    if not gpus:
        yield Finding("GPU", "none", "computes on the CPU", "note")
    threads = thread_settings()
    with suppress(ImportError):
        import torch

        threads = f"{torch.get_num_threads()}, {threads}"
        if gpus and not torch.cuda.is_available():
            fix = "pip install torch, from an index with a CUDA build for this driver"
            yield Finding("GPU", "torch", "cannot use CUDA here", "broken", fix)
    yield Finding("memory", cpu.name, f"{gib(cpu.total)}, {gib(cpu.free)} free")
    yield Finding("memory", "CPU threads", threads)
    measured = read_rates((gpus or [cpu])[0])
    when = f"measured {measured.measured}" if measured else stale_rates((gpus or [cpu])[0])
    fix = "" if measured else "wancli doctor --measure"
    yield Finding("memory", "rates", when, "ok" if measured else "note", fix)


def check_disks(output: Path) -> Iterator[Finding]:
    """Free space and write permission of the directories that wancli writes to."""
    for name, path, variable in (
        ("output", output, "WANCLI_OUTPUT_DIR"),
        ("hub cache", cache_folder(), "HF_HOME"),
        ("wancli cache", user_cache(), "WANCLI_CACHE_DIR"),
    ):
        free, there = free_disk(path), existing(path)
        value = f"{path.absolute()}: {gib(free)} free"
        if not os.access(there, os.W_OK):
            fix = f"chmod u+w {there}, or set {variable}"
            yield Finding("disk", name, f"{value}, not writable", "broken", fix, name == "output")
        elif free < LITTLE_DISK:
            yield Finding("disk", name, value, "note", f"free some space, or set {variable}")
        else:
            yield Finding("disk", name, value)
    size = sum(map(cached_bytes, cached_repos()))
    yield Finding("disk", "models cached", gib(size) if size else "none")


def check_ffmpeg() -> Finding:
    """Encode a tiny video as any other, and read it back."""
    try:
        import numpy as np

        from wancli.video.ffmpeg import Encoding, check_encoder, ffmpeg_exe, run_ffmpeg
        from wancli.video.write import VideoWriter

        for encoding in (Encoding(), Encoding(lossless=True)):
            check_encoder(encoding)
        words = [*run_ffmpeg("-version").stdout.decode(errors="replace").split(), "?", "?", "?"]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tiny.mp4"
            with VideoWriter(path, size=(32, 32), fps=8, encoding=Encoding()) as writer:
                writer.write(np.zeros((3, 32, 32, 3), np.uint8))
                frames = writer.finish({}).frames
        value = f"{words[2]} encodes, tags BT.709, {frames} frames read back: {ffmpeg_exe()}"
        return Finding("video", "ffmpeg", value, needed=True)
    except (WancliError, ImportError, OSError) as error:
        fix = error.hint if isinstance(error, WancliError) else "pip install imageio-ffmpeg numpy"
        return Finding("video", "ffmpeg", str(error), "broken", fix, needed=True)


def list_folders() -> Iterator[Finding]:
    """The user's configuration, presets and folders of weights, and this Python."""
    config = platformdirs.user_config_path("wancli")
    for name, path in (("config", config / "config.toml"), ("presets", config / "presets")):
        there = "" if path.exists() else " (none yet)"
        yield Finding("folders", name, f"{path}{there}")
    for root in model_roots():
        fix = "" if root.is_dir() else f"correct {VARIABLE}"
        yield Finding("folders", "weights", str(root), "missing" if fix else "ok", fix)
    yield Finding("folders", "python", sys.executable)
