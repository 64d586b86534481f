"""Settings, each declared once.

A field's name is its flag (`flow_shift` is `--flow-shift`), its preset key and its record key; its
description is its help; its bounds are its check; its group is a preset's table and a help panel.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from wancli.errors import SettingsError, closest

MAX_SEED = 2**53  # the largest integer that every JSON reader keeps
RopePolicy = Literal["absolute", "relative", "sink"]
STEPS_LIST = r"^\d+(,\d+)*$"


class Group(BaseModel):
    """One table of a preset, one panel of `--help`, one object of the record."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class Sampling(Group):
    """How the latents are denoised."""

    steps: int = Field(50, ge=1, le=1000, description="Denoising steps.")
    guidance_scale: float = Field(
        5.0, ge=0, le=100, description="Guidance scale; 1 or less turns guidance off."
    )
    guidance_scale_2: float | None = Field(
        None, ge=0, le=100, description="Guidance scale of the low-noise expert (Wan 2.2 A14B)."
    )
    flow_shift: float = Field(
        5.0, gt=0, le=100, description="Shift of the sigmas; more spends more steps at high noise."
    )
    scheduler: Literal["unipc", "dpm++", "euler"] = Field(
        "unipc", description="Solver: unipc, dpm++ or euler."
    )
    negative_prompt: str = Field("", description="What the video must not show.")


class Video(Group):
    """What the video measures."""

    num_frames: int = Field(81, ge=1, le=100_000, description="Video frames.")
    width: int = Field(832, ge=16, le=16_384, description="Width in pixels.")
    height: int = Field(480, ge=16, le=16_384, description="Height in pixels.")
    fps: int = Field(16, ge=1, le=240, description="Video frames per second.")


class Machine(Group):
    """What it is computed on."""

    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N, mps."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights and activations: auto, float32, bfloat16 or float16."
    )
    lora: tuple[str, ...] = Field(
        (), description="LoRA to merge into the transformer, PATH or PATH=SCALE; repeatable."
    )


class Output(Group):
    """How the MP4 is written."""

    crf: int = Field(18, ge=0, le=51, description="H.264 quality; lower is better and larger.")
    lossless: bool = Field(default=False, description="Keep every pixel exactly (RGB H.264).")
    metadata: bool = Field(default=True, description="Put the record inside the MP4.")


class Rollout(Group):
    """How a rollout goes from chunk to chunk."""

    chunks: int = Field(7, ge=1, le=1_000_000, description="Chunks to make.")
    chunk_frames: int = Field(3, ge=1, le=1000, description="Latent frames of a chunk.")
    rolling_window: int = Field(
        0, ge=0, description="Latent frames a chunk attends to, its own included; 0 is all."
    )
    sink_frames: int = Field(
        0, ge=0, description="First latent frames that never leave the window."
    )
    trim: Literal["before", "after"] = Field(
        "before",
        description="When the window is cut: before attention (Self-Forcing), or after (append).",
    )
    rope: Literal["auto", "absolute", "relative", "sink"] = Field(
        "auto", description="Positions: auto is absolute without sinks and relative with them."
    )
    sampler: Literal["few-step", "unipc"] = Field(
        "few-step", description="few-step (--steps-list) or unipc (--steps, --guidance-scale)."
    )
    steps_list: str = Field(
        "1000,750,500,250", pattern=STEPS_LIST, description="Timesteps of the few-step sampler."
    )
    first_chunk_steps: str = Field(
        "", pattern=f"{STEPS_LIST}|^$", description="The same for the first chunk, if others."
    )
    warp_steps: bool = Field(default=True, description="Move the listed timesteps by --flow-shift.")
    context_noise: float = Field(0.0, ge=0, le=1000, description="Timestep of the clean passes.")
    independent_first_frame: bool = Field(
        default=False, description="Make the first latent frame a chunk by itself."
    )
    noise: Literal["indexed", "compat"] = Field(
        "indexed", description="indexed (any length, any chunk again) or compat (original order)."
    )
    recache: bool = Field(
        default=False, description="Read the remembered chunks again when the prompt changes."
    )
    blend: int = Field(0, ge=0, description="Chunks over which a new prompt is faded in.")
    text_length: int | None = Field(
        None, ge=1, le=4096, description="Text tokens. (default: the model's)"
    )


class Settings(BaseModel):
    """The settings of `wancli generate`: a model, and groups."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    model: str = Field(
        "demo", min_length=1, description="Model: a known name, a hub id or a local folder."
    )
    sampling: Sampling = Sampling()
    video: Video = Video()
    machine: Machine = Machine()
    output: Output = Output()


class RolloutSettings(Settings):
    """The settings of `wancli rollout`, and every table a preset may hold."""

    rollout: Rollout = Rollout()


Kind = TypeVar("Kind", bound=Settings)


@dataclass(frozen=True)
class Layer:
    """Values from one place, by table; a later layer wins over an earlier one."""

    source: str
    tables: Mapping[str, Any]


@dataclass(frozen=True)
class Resolved(Generic[Kind]):
    """Settings, and where each value came from, by dotted key."""

    settings: Kind
    sources: Mapping[str, str]


def fields_of(settings: type[Settings]) -> Iterator[tuple[str | None, str, FieldInfo]]:
    """Yield (table, name, field) of every setting in declaration order; table None is the top."""
    for name, field in settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Group):
            for inner, inner_field in field.annotation.model_fields.items():
                yield name, inner, inner_field
        else:
            yield None, name, field


def flag(name: str) -> str:
    """Flag of a setting: `flow_shift` is `--flow-shift`."""
    return "--" + name.replace("_", "-")


def dotted(table: str | None, name: str) -> str:
    """Key of a setting in sources and messages: `sampling.steps`."""
    return f"{table}.{name}" if table else name


def resolve(layers: Sequence[Layer], settings: type[Kind]) -> Resolved[Kind]:
    """Overlay `layers` on the declared defaults and check every value.

    A preset may hold tables of another command: they are checked by name, and left out.
    Raises SettingsError for the first value that cannot be, in the words the user gave it in.
    """
    merged: dict[str, Any] = {}
    sources = {dotted(table, name): "default" for table, name, _ in fields_of(settings)}
    for layer in layers:
        check_names(layer)
        for table, values in layer.tables.items():
            if table not in settings.model_fields:
                continue
            for name, value in values.items() if isinstance(values, Mapping) else [(None, values)]:
                if name is None:
                    merged[table] = value
                else:
                    merged.setdefault(table, {})[name] = value
                sources[f"{table}.{name}" if name else table] = layer.source
    try:
        return Resolved(settings.model_validate(merged), sources)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise SettingsError(
            f"{_spelling(where, sources.get(where, 'settings'))} {first['input']!r}: "
            f"{first['msg'][0].lower()}{first['msg'][1:]}.",
            hint=_range_hint(settings, where),
        ) from None


def check_names(layer: Layer) -> None:
    """Raise SettingsError for a table or key that no setting has, with the likely one."""
    known: dict[str | None, list[str]] = {}
    for table, name, _ in fields_of(RolloutSettings):
        known.setdefault(table, []).append(name)
    for table, values in layer.tables.items():
        if table in known[None]:
            continue
        if table not in known:
            homes = [t for t, names in known.items() if t and table in names]
            hint = (
                f"put it under [{homes[0]}]"
                if homes
                else _meant(table, [*known[None], *filter(None, known)])
            )
            raise SettingsError(f"{layer.source}: unknown key '{table}'.", hint=hint)
        if not isinstance(values, Mapping):
            raise SettingsError(
                f"{layer.source}: '{table}' is a table, not a value.", hint=f"[{table}]"
            )
        for name in values:
            if name not in known[table]:
                raise SettingsError(
                    f"{layer.source}: [{table}] unknown key '{name}'.",
                    hint=_meant(name, known[table]),
                )


def _meant(name: str, known: Sequence[str]) -> str:
    match = closest(name, known)
    return f"'{match}'" if match else f"known: {', '.join(known)}"


def _spelling(where: str, source: str) -> str:
    return flag(where.split(".")[-1]) if source == "flag" else f"{source}: {where}"


def _range_hint(settings: type[Settings], where: str) -> str:
    for table, name, field in fields_of(settings):
        if dotted(table, name) == where:
            return f"{flag(name)}: {field.description}{_bounds(field)}"
    return "wancli generate --help"


def _bounds(field: FieldInfo) -> str:
    words = {"ge": "at least", "gt": "more than", "le": "at most"}
    said = [
        f"{word} {getattr(rule, name)}"
        for rule in field.metadata
        for name, word in words.items()
        if getattr(rule, name, None) is not None
    ]
    return f" ({', '.join(said)})" if said else ""
