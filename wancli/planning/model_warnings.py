"""Warnings about a model: settings that are not its authors', files that are not for these."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from wancli.catalog.file_names import expert_by_name, is_distilled_by_name
from wancli.catalog.specs import SPECS, ModelSpec
from wancli.catalog.tasks import EXPERTS, TASKS
from wancli.config.presets import PACKAGED, layers, read_file
from wancli.config.resolve import Resolved, resolve
from wancli.config.settings import Settings, VideoShape
from wancli.errors import PlanWarning
from wancli.planning.distilled import guidance_name, preset_of
from wancli.planning.lora import find_lora

_MUCH = 1.25  # times the frames of training: authors and users go somewhat beyond
_MUCH_AREA = 1.5  # times the pixels of training
_SIGN = "sampling.flow_shift"  # which no model does well with another's


def model_warnings(spec: ModelSpec, resolved: Resolved[Any]) -> tuple[PlanWarning, ...]:
    """All warnings of a clip."""
    return (
        *missing_preset_warnings(spec, resolved),
        *length_warnings(spec, resolved),
        *size_warnings(spec, resolved),
        *swapped_expert_warnings(spec, resolved),
        *distilled_name_warnings(spec, resolved),
    )


def swapped_expert_warnings(spec: ModelSpec, resolved: Resolved[Any]) -> tuple[PlanWarning, ...]:
    """Warnings of files for one expert whose names tell that they are for the other."""
    if spec.experts < 2:
        return ()
    return tuple(
        PlanWarning(
            f"`{setting}` {path.name}@{expert}: by its name it is for {named} noise.",
            f"`{setting}` {path.name}@{named}",
        )
        for setting, path, expert in _files_of_experts(spec, resolved)
        if (named := expert_by_name(path)) not in ("", expert)
    )


def distilled_name_warnings(spec: ModelSpec, resolved: Resolved[Any]) -> tuple[PlanWarning, ...]:
    """Warnings of guidance with files that were distilled to run without, as their names tell.

    Of LoRAs that a packaged preset has, `check_distilled` knows it.
    """
    sampling, warnings = resolved.settings.sampling, []
    preset = f"{spec.name}-4step"
    steps = f"`preset {preset}`" if (PACKAGED / f"{preset}.toml").is_file() else "few `steps`"
    for setting, path, expert in _files_of_experts(spec, resolved):
        name = guidance_name(sampling, expert)
        scale = getattr(sampling, name)
        guided = scale > 1 and sampling.scheduler != "few-step"
        if guided and is_distilled_by_name(path) and not preset_of(path):
            text = f"`{setting}` {path.name}: by its name it is distilled, to run without guidance;"
            warning = PlanWarning(f"{text} `{name}` is {scale:g}.", f"`{name} 1`, and {steps}")
            warnings.append(warning)
    return tuple(warnings)


def _files_of_experts(spec: ModelSpec, resolved: Resolved[Any]) -> Iterator[tuple[str, Path, str]]:
    """The files of transformers and LoRAs: their setting, their path, and their expert."""
    for expert, part in EXPERTS.items():
        if file := spec.file_of(part):
            yield "transformer", file.path, expert
    for lora in map(find_lora, resolved.settings.machine.lora):
        yield "lora", lora.path, lora.expert


def length_warnings(spec: ModelSpec, resolved: Resolved[Any]) -> tuple[PlanWarning, ...]:
    """A warning of a clip that is much longer than those that the model was trained on, or none."""
    trained, frames = _trained(spec.name), resolved.settings.video.num_frames
    if TASKS[spec.tasks[0]].segmented or not trained or frames <= _MUCH * trained.num_frames:
        return ()
    made = trained.num_frames
    text = f"{spec.name} was made for {made} video frames: {frames} may repeat, flicker or drift."
    hint = f"`num_frames {made}`; longer ones: wancli rollout, by a causal model"
    return (PlanWarning(text, hint),)


def size_warnings(spec: ModelSpec, resolved: Resolved[Any]) -> tuple[PlanWarning, ...]:
    """A warning of a video that is much larger than those the model was trained on, or none.

    The preset of a model has the largest size that its authors list.
    """
    trained, video = _trained(spec.name), resolved.settings.video
    if not trained or video.width * video.height <= _MUCH_AREA * trained.width * trained.height:
        return ()
    upright = video.width < video.height
    width, height = sorted((trained.width, trained.height), reverse=not upright)
    text = (
        f"{spec.name} was made for {width}x{height}: at {video.width}x{video.height} things may "
        "repeat or break."
    )
    return (PlanWarning(text, f"`size {width}x{height}`"),)


@cache
def _trained(name: str) -> VideoShape | None:
    """Shape of the videos in a model's own preset; None for a model without one."""
    path = PACKAGED / f"{name}.toml"
    if name not in SPECS or not path.is_file():
        return None
    return resolve(layers(read_file(path)), Settings).settings.video


def missing_preset_warnings(spec: ModelSpec, resolved: Resolved[Any]) -> tuple[PlanWarning, ...]:
    """A warning that a folder is used with the declared defaults, or none."""
    if spec.folder is None or spec.name in SPECS or resolved.sources[_SIGN] != "default":
        return ()
    kin = [known.name for known in SPECS.values() if _is_kin(known, spec)]
    if not kin:
        return ()
    text = (
        f"{spec.folder.name} has no preset: shift, guidance and negative prompt are general "
        f"defaults. It is built as {' and '.join(kin)}."
    )
    return (PlanWarning(text, " or ".join(f"`preset {name}`" for name in kin)),)


def _is_kin(known: ModelSpec, spec: ModelSpec) -> bool:
    """Whether a known model is built like another, and not distilled or made for rollouts."""
    original = known.clips and not known.causal and known.checkpoint is None
    return (
        original
        and known.architecture == spec.architecture
        and (known.tasks[0], known.experts, known.boundary_ratio, known.per_token_time)
        == (spec.tasks[0], spec.experts, spec.boundary_ratio, spec.per_token_time)
    )
