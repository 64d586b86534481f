"""Every command and flag that the app declares, with values for each."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args, get_origin

from tests.fuzz import values
from tests.fuzz.materials import MODELS, PICTURES, VIDEOS
from tests.fuzz.place import FIFOS, LINKS, USER_FILES
from wancli.catalog.tasks import TASKS
from wancli.cli.app import COMMANDS
from wancli.config.resolve import fields_of
from wancli.config.settings import RolloutSettings

# Flags that take a file: valid input files, and the suffixes of output files.
READS = {
    "image": PICTURES, "last_image": PICTURES, "ref_image": PICTURES, "video": VIDEOS,
    "mask": VIDEOS, "pose_video": VIDEOS, "face_video": VIDEOS, "background_video": VIDEOS,
    "extend": VIDEOS, "files": VIDEOS, "file": (*VIDEOS, "made.json", "good.toml"),
    "one": (*VIDEOS, "latents.safetensors"), "other": (*VIDEOS, "latents.safetensors"),
    "latents": ("latents.safetensors",), "initial_latents": ("start.safetensors",),
    "noise_file": ("noise.safetensors",), "prompt_embeds": ("embeds.safetensors",),
    "script": ("script.toml", "script.jsonl"), "source": ("checkpoint.safetensors", "lora.pt"),
    "config": ("heads.json",), "lora": ("lora.safetensors", "lora.pt", "lora.safetensors=0.5"),
    "vae": ("checkpoint.safetensors",), "text_encoder": ("checkpoint.safetensors",),
    "transformer": ("checkpoint.safetensors", "checkpoint.safetensors@high"),
    "base": MODELS,
}  # fmt: skip
NO_CHOICES: tuple[str, ...] = ()
WRITES = {
    "output": ".mp4", "save_latents": ".safetensors", "perf_json": ".json", "report": ".html",
    "sheet": ".png", "gif": ".gif", "webp": ".webp", "out": "", "output_dir": "",
}  # fmt: skip
DEVICES = ("/dev/null", "/dev/full", "/proc/self/mem", "/proc/version", "/dev/fd/0", "/dev/stdin")
KNOWN_MODELS = ("demo", "wan2.1-t2v-1.3b", "wan2.2-t2v-a14b", "self-forcing", "hunyuanvideo",
         "wan2.1-vace-1.3b", "wan2.2-animate-14b", "random:wan2.1-t2v-1.3b", "random:demo",
         "wan2.2-ti2v-5b", "some-owner/some-model")  # fmt: skip
# Settings that determine the time of a run, and values that make it short.
SMALL: dict[str, tuple[str, ...]] = {
    "steps": ("1", "2", "3"), "num_frames": ("1", "5", "9"), "width": ("16", "32", "48"),
    "height": ("16", "32", "48"), "chunks": ("1", "2", "3"), "chunk_frames": ("1", "2", "3"),
    "num_videos": ("1", "2"), "steps_list": ("1000", "1000,500"), "first_chunk_steps": ("1000", ""),
    "layers": ("1", "2"), "text_length": ("1", "16"), "segment_frames": ("5", "77"),
    "rows": ("1", "3"), "columns": ("1", "4"), "cfg_gate": ("0.5", "2"),
}  # fmt: skip


@dataclass(frozen=True)
class Flag:
    """One parameter of a command."""

    name: str
    spellings: tuple[str, ...]  # empty for a positional argument
    kind: type
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    switch: bool = False
    several: bool = False
    required: bool = False


@dataclass
class Line:
    """A command line under construction, and the files it names."""

    command: tuple[str, ...]
    small: bool  # the run must be short, because it is executed
    arguments: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)

    @property
    def words(self) -> list[str]:
        return [*self.command, *self.arguments]


@cache
def commands() -> dict[tuple[str, ...], tuple[Flag, ...]]:
    """Flags by command, such as ("generate",) and ("model", "list")."""
    flags_by_command: dict[tuple[str, ...], tuple[Flag, ...]] = {}
    for name, entry in COMMANDS.items():
        loaded: Any = entry.load(name)
        for inner, command in getattr(loaded, "commands", {None: loaded}).items():
            key = (name, inner) if inner else (name,)
            flags_by_command[key] = tuple(_flags(command))
    return flags_by_command


def _flags(command: Any) -> Iterator[Flag]:
    settings = {name: info for _, name, info in fields_of(RolloutSettings)}
    for parameter in command.params:
        kind = parameter.type_descriptor.annotation
        several = get_origin(kind) is list
        info = settings.get(parameter.name)
        low, high, choices = parameter.min, parameter.max, NO_CHOICES
        if info is not None:
            low, high, choices = _bounds(info)
        yield Flag(
            parameter.name,
            (*parameter.opts, *parameter.secondary_opts)
            if parameter.param_type_name == "option" else (),
            get_args(kind)[0] if several else kind,
            low,
            high,
            choices,
            switch=kind is bool,
            several=several,
            required=parameter.required,
        )  # fmt: skip


def _bounds(info: Any) -> tuple[float | None, float | None, tuple[str, ...]]:
    bounds = {
        name: getattr(rule, name)
        for rule in info.metadata
        for name in ("ge", "gt", "le", "lt")
        if getattr(rule, name, None) is not None
    }
    choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    return bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt")), choices


def add_flag(line: Line, flag: Flag, rng: random.Random, *, good: bool) -> None:
    """Append a flag and a value to the line."""
    if flag.switch:
        line.arguments.append(rng.choice(flag.spellings))
        return
    value = (_good_value if good else _odd_value)(line, flag, rng)
    if not flag.spellings:
        line.arguments.append(value)
        return
    spelling = rng.choice(flag.spellings)
    if spelling.startswith("--") and rng.random() < 0.3:
        if rng.random() < 0.2:
            spelling = spelling[:2] + spelling[2:].replace("-", "_")
        line.arguments.append(f"{spelling}={value}")
    else:
        line.arguments += [spelling, value]


def _good_value(line: Line, flag: Flag, rng: random.Random) -> str:
    for kinds, make_value in _GOOD_VALUES:
        if flag.name in kinds:
            return make_value(line, flag, rng)
    if flag.choices:
        return rng.choice(flag.choices)
    if line.small and flag.name in SMALL:
        return rng.choice(SMALL[flag.name])
    if flag.kind in (int, float):
        return values.number(rng, flag.low, flag.high, whole=flag.kind is int)
    return values.prompt(rng)


def _odd_value(line: Line, flag: Flag, rng: random.Random) -> str:
    if flag.name in READS or flag.name in WRITES:
        return _odd_path(line, flag, rng)
    if flag.name in ("model", "preset", "cachedit_preset", "name", "save_preset"):
        return _odd_name(line, flag, rng)
    if flag.name == "size":
        return values.odd_size(rng)
    if flag.name == "seed":
        return values.odd_seeds(rng)
    if flag.kind in (int, float) or flag.low is not None:
        return values.odd_number(rng, flag.low, flag.high)
    return values.odd_text(rng)


def _read(line: Line, flag: Flag, rng: random.Random) -> str:
    name = rng.choice(READS[flag.name])
    line.reads.append(name.partition("=")[0])
    return name


def _write(line: Line, flag: Flag, rng: random.Random) -> str:
    ending = ending_of(line, flag)
    name = rng.choice(("new", "new", "new-2", "made", "mine", "folder/new", "none/new"))
    if flag.name == "output" and line.command[0] == "generate":
        name = rng.choice((name, "{prompt:10}-{seed}", "{steps}-{width}-{seed}"))
    written = name + ending
    line.writes.append(written)
    return written


def _odd_path(line: Line, flag: Flag, rng: random.Random) -> str:
    ending = ending_of(line, flag)
    pick = rng.random()
    if pick < 0.35:
        value = rng.choice(
            (*USER_FILES, *LINKS, *FIFOS, "folder", "mine.rollout", "new.part", "nosuch" + ending)
        )
    elif pick < 0.5:
        value = rng.choice(DEVICES)
    elif pick < 0.65:
        value = rng.choice((*VIDEOS, *PICTURES, "latents.safetensors", "made.json", *MODELS))
        line.reads.append(value)
    else:
        value = values.odd_text(rng) + rng.choice(("", ending, ending.upper()))
    if flag.name in WRITES:
        line.writes.append(value)
    return value


def ending_of(line: Line, flag: Flag) -> str:
    if flag.name == "output" and line.command[0] == "bench":
        return ""
    return WRITES.get(flag.name, "")


def _model(line: Line, _: Flag, rng: random.Random) -> str:
    name = rng.choice(MODELS if line.small else (*MODELS, *KNOWN_MODELS))
    if name in MODELS:
        line.reads.append(name)
    return name


def _named(line: Line, flag: Flag, rng: random.Random) -> str:
    """A value for NAME: a model or a preset."""
    return (_model if line.command[0] == "model" else _preset)(line, flag, rng)


def _preset(line: Line, flag: Flag, rng: random.Random) -> str:
    if flag.name == "save_preset" or line.command == ("preset", "save"):
        return rng.choice(("mine", "quick", "saved"))
    name = rng.choice(("demo", "demo-cached", "self-forcing", "good.toml", "wan2.1-t2v-1.3b"))
    if name.endswith(".toml"):
        line.reads.append(name)
    return name


def _odd_name(line: Line, flag: Flag, rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(
            (
                *USER_FILES,
                *LINKS,
                *FIFOS,
                *DEVICES,
                "folder",
                ".",
                "..",
                "/",
                "random:",
                "random:x",
                "a/b/c",
                "dmeo",
                "~nosuchuser/x",
                "owner/" + "x" * 300,
                "random:random:demo",
            )
        )
    value = values.odd_text(rng)
    return value + rng.choice(("", "", ".toml", "/" + value))


VARIANTS = ("e: --no-prompt-kv", "f: --use-cachedit --cachedit-fn 1 --cachedit-max-warmup-steps 1",
            "g: --cfg-gate 0.5", "s: --step-cache seacache", "k: --kv-align 8",
            "q: --fuse-qkv")  # fmt: skip
_GOOD_VALUES: tuple[tuple[Any, Callable[[Line, Flag, random.Random], str]], ...] = (
    (READS, _read),
    (WRITES, _write),
    (("model",), _model),
    (("name",), _named),
    (("preset", "cachedit_preset", "save_preset"), _preset),
    (("size",), lambda line, _, rng: values.size(rng, small=line.small)),
    (("seed",), lambda line, _, rng: values.seeds(rng, several=line.command != ("rollout",))),
    (("task",), lambda _, __, rng: rng.choice(tuple(TASKS))),
    (("at",), lambda _, __, rng: f"{rng.randint(0, 3)} {values.prompt(rng)}"),
    (("variant",), lambda _, __, rng: rng.choice(VARIANTS)),
    (("device",), lambda _, __, rng: rng.choice(("auto", "cpu", "cuda", "cuda:3", "mps"))),
    (("kv_align",), lambda _, __, rng: rng.choice(("auto", "off", "8", "128"))),
    (("attention_backend",), lambda _, __, rng: rng.choice(("auto", "native", "flash",
    "sage"))),
    (("steps_list",), lambda _, __, rng: rng.choice(("1000", "1000,500",
    "1000,750,500,250"))),
    (("first_chunk_steps",), lambda _, __, rng: rng.choice(("", "1000", "1000,250"))),
)  # fmt: skip
