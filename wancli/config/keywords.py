"""Settings as keyword arguments: typed for Python callers, and turned into a layer by name.

The names and types are those of `settings.py`; a test compares them.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from wancli.config.resolve import Layer, closest_setting, fields_of
from wancli.config.settings import ALIASES, RolloutSettings
from wancli.errors import SettingsError, UsageError, shortened

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class SharedSettings(TypedDict, total=False):
    """Settings of clips and rollouts."""

    steps: int
    guidance_scale: float
    guidance_scale_2: float | None
    boundary_ratio: float | None
    flow_shift: float
    scheduler: Literal["unipc", "dpm++", "euler", "few-step"]
    steps_list: str
    warp_steps: bool
    negative_prompt: str
    size: str | tuple[int, int]  # "832x480": width and height
    width: int
    height: int
    fps: int
    use_cachedit: bool  # step_cache="cachedit"
    step_cache: Literal["none", "cachedit", "first-block", "magcache", "seacache"]
    cachedit_fn: int
    cachedit_bn: int
    cachedit_residual_threshold: float
    cachedit_max_warmup_steps: int
    cachedit_max_continuous: int
    taylorseer: bool
    taylorseer_order: int
    step_cache_threshold: float | None
    cfg_gate: float | None
    crf: int
    lossless: bool
    encoder: Literal["x264", "nvenc", "auto"]
    encoder_preset: Literal[
        "auto", "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower",
        "veryslow",
    ]  # fmt: skip
    metadata: bool


class ClipSettings(TypedDict, total=False):
    """Settings of clips alone."""

    true_cfg_scale: float
    strength: float
    num_frames: int
    segment_frames: int
    prompt_kv: bool
    kv_align: str
    free_kv_weights: bool


class ChunkSettings(TypedDict, total=False):
    """Settings of rollouts alone."""

    chunks: int
    chunk_frames: int
    rolling_window: int
    sink_frames: int
    trim: Literal["before", "after"]
    rope: Literal["auto", "absolute", "relative", "sink"]
    first_chunk_steps: str
    context_noise: float
    independent_first_frame: bool
    image_start: Literal["context", "first-frame"]
    noise: Literal["indexed", "compat"]
    recache: bool
    recache_by: Literal["chunk", "window"]
    kv_recompute: bool
    reencode_first: bool
    blend: int
    shot_prefix: str
    shot_offset: int
    shot_sink: bool
    text_length: int | None


class MachineSettings(TypedDict, total=False):
    """Settings that the weights are loaded with."""

    device: str
    dtype: Dtype
    layers: int | None
    attention_backend: str
    quantize: Literal["none", "int8", "fp8", "fp8-dynamic"]
    fuse_qkv: bool
    compile: bool
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"]
    offload: Literal["auto", "none", "model", "group", "sequential"]
    vae_tiling: bool
    vae_dtype: Dtype
    vae_exact: bool | None
    vae_decoder: str
    transformer: str | Sequence[str]
    vae: str
    text_encoder: str
    lora: str | Sequence[str]


# Hints for settings that another command has.
_INSTEAD = {
    ("rollout", "num_frames"): "`chunks N`, each of `chunk_frames` latent frames",
    ("generate", "chunks"): "a rollout has `chunks N`",
    ("generate", "defaults"): '{"defaults": {...}} is the first line, and alone there',
}


def instead(command: str, name: str) -> str:
    """The hint for a setting that a command lacks, but has another for; "" for others."""
    return _INSTEAD.get((command, ALIASES.get(name, name)), "")


def keyword_layer(source: str, values: Mapping[str, Any]) -> Layer:
    """A layer of settings by name, without tables. None, [] and () leave a setting unset.

    Raises UsageError for a setting that is set twice, to different values.
    """
    tables: dict[str, Any] = {}
    known = {name: table for table, name, _ in fields_of(RolloutSettings)}
    for keyword, value in values.items():
        if value in (None, [], ()):
            continue
        for name, expanded in _expand(keyword, value).items():
            table = known[name]
            place = tables.setdefault(table, {}) if table else tables
            first = place.setdefault(name, expanded)
            if first is not expanded and first != expanded:  # NaN, rejected later, equals nothing
                raise UsageError(
                    f"`{name}` is set twice, to different values.", hint=f"set `{name}` once"
                )
    return Layer(source, tables)


def _expand(keyword: str, value: Any) -> dict[str, Any]:
    """The settings that a shorthand stands for."""
    if keyword == "size":
        several = isinstance(value, list | tuple)
        width, height = _parse_size("x".join(map(str, value)) if several else str(value))
        return {"width": width, "height": height}
    if keyword == "use_cachedit":
        return {"step_cache": "cachedit" if value else "none"}
    if keyword in ("lora", "transformer") and isinstance(value, str):
        return {keyword: (value,)}
    return {keyword: value}


def _parse_size(text: str) -> tuple[int, int]:
    """Width and height of `832x480` or `832*480`. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*[x*]\s*(\d{1,9})\s*", text.lower())
    if not match:
        raise UsageError(f"`size {shortened(text)}` is not a size.", hint="`size 832x480`")
    return int(match[1]), int(match[2])


def is_setting(keyword: str) -> bool:
    """Whether a keyword argument is a setting, or stands for one."""
    names = (name for _, name, _ in fields_of(RolloutSettings))
    return keyword in ("size", "use_cachedit", *names)


def check_keywords(values: Iterable[str], known: Collection[str], *, of: str) -> None:
    """Raise SettingsError for a keyword argument that the function `of` does not take."""
    for name in values:
        if name not in known:
            near = closest_setting(name, known)
            similar = (
                f"did you mean `{near}`?" if near else f"help(wancli.{of.split()[0]}) lists them"
            )
            hint = instead(of.rpartition(".")[2], name) or similar
            raise SettingsError(f"`{name}` is not a setting of {of}.", hint=hint)
