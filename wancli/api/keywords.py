"""Keyword arguments of `wancli.generate` and the others, typed; and errors that name them."""

import re
from collections.abc import Mapping, Sequence
from contextlib import ContextDecorator
from pathlib import Path
from types import TracebackType
from typing import TypedDict

from wancli.config.keywords import ChunkSettings, ClipSettings, MachineSettings, SharedSettings
from wancli.errors import SETTING, WancliError

AnyPath = str | Path


class CommonOptions(TypedDict, total=False):
    """Options of clips and rollouts."""

    image: AnyPath  # first frame
    save_latents: AnyPath  # a safetensors file
    overwrite: bool  # replace existing files
    force: bool  # run even if it does not fit in memory, or the model was not trained for it


class ClipOptions(TypedDict, total=False):
    """Options of clips alone. The task follows from the pictures and videos."""

    last_image: AnyPath
    video: AnyPath
    mask: AnyPath
    ref_image: AnyPath | Sequence[AnyPath]
    pose_video: AnyPath
    face_video: AnyPath
    background_video: AnyPath
    task: str
    skip_existing: bool  # keep an `output` that holds this video already
    preview_every: int  # denoising steps from one PreviewEvent to the next


class ChunkOptions(TypedDict, total=False):
    """Options of rollouts alone."""

    at: Mapping[int, str]  # the prompt from a chunk on, by its number
    script: AnyPath  # TOML or JSONL file of prompt changes
    extend: AnyPath  # MP4 to continue
    only_new: bool  # leave the frames of `image` or `extend` out
    initial_latents: AnyPath
    noise_file: AnyPath
    prompt_embeds: AnyPath
    resume: bool  # continue the interrupted rollout of `output`, or extend it
    rerender: int  # render this chunk and all that follow again
    report: AnyPath  # HTML file about drift


class PresetOptions(TypedDict, total=False):
    """Settings by name."""

    preset: str  # to start from: name or file
    cachedit_preset: str  # of which only the step cache is used


class ClipKeywords(SharedSettings, ClipSettings, CommonOptions, ClipOptions, total=False):
    """Keyword arguments of `Model.generate`."""


class ChunkKeywords(SharedSettings, ChunkSettings, CommonOptions, ChunkOptions, total=False):
    """Keyword arguments of `Model.rollout`."""


class GenerateKeywords(ClipKeywords, MachineSettings, PresetOptions, total=False):
    """Keyword arguments of `generate`."""


class RolloutKeywords(ChunkKeywords, MachineSettings, PresetOptions, total=False):
    """Keyword arguments of `rollout`."""


class LoadKeywords(
    SharedSettings, ClipSettings, ChunkSettings, MachineSettings, PresetOptions, total=False
):
    """Keyword arguments of `load`."""

    task: str
    force: bool  # load even if it does not fit in memory


class PlanKeywords(
    SharedSettings, ClipSettings, ChunkSettings, MachineSettings, PresetOptions, CommonOptions,
    ClipOptions, ChunkOptions, total=False,
):  # fmt: skip
    """Keyword arguments of `plan`."""


_SWITCHES = {name for name, kind in PlanKeywords.__annotations__.items() if kind is bool}
_BARE = re.compile(r"-?\d+(\.\d+)?|[A-Z]|'.*'|\".*\"")  # numbers, N, and text in quotes
_OFF = ("drop", "without")  # words before a switch that should not be turned on


def with_keywords(text: str, *, hint: bool = False) -> str:
    """A message with the settings that it names in backticks as keyword arguments.

    `cfg_gate 0.6` is `cfg_gate=0.6`, `no_compile` is `compile=False`; in a hint, `overwrite` alone
    is `overwrite=True`.
    """

    def keyword(match: re.Match[str]) -> str:
        name, value = match[1], match[2].strip()
        if name.removeprefix("no_") in _SWITCHES - {name}:
            return f"`{name.removeprefix('no_')}=False`"
        if value:
            return f"`{name}={value}`" if _BARE.fullmatch(value) else f'`{name}="{value}"`'
        on = hint and name in _SWITCHES and not text[: match.start()].rstrip().endswith(_OFF)
        return f"`{name}=True`" if on else match[0]

    return SETTING.sub(keyword, text)


class errors_name_keywords(ContextDecorator):  # noqa: N801 - used as a decorator
    """Lets errors of the function name settings as keyword arguments."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, WancliError):
            error.args = (with_keywords(str(error)),)
            error.hint = with_keywords(error.hint, hint=True)
