"""From keyword arguments to requests, as `wancli.cli` makes them from flags."""

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from wancli.api.keywords import AnyPath, with_keywords
from wancli.config.keywords import is_setting, keyword_layer
from wancli.config.layers import settings_layers
from wancli.config.resolve import Layer, resolve
from wancli.config.seeds import parse_seeds
from wancli.config.settings import Settings
from wancli.errors import UsageError
from wancli.generation.batch import GenerateRequest, OutputFiles, PlannedVideos, plan_videos
from wancli.planning.context import ContextFiles
from wancli.planning.inputs import InputFiles
from wancli.planning.prompts import PromptChange, check_prompt, read_script
from wancli.records.progress import Report
from wancli.records.record import Request, RunRecord
from wancli.rollouts.request import RolloutRequest

SOURCE = "argument"  # of settings, in records
log = logging.getLogger("wancli")
log.addHandler(logging.NullHandler())  # silent unless the application configures logging


class Listener:
    """Passes progress to a callback, and notes and warnings to the log."""

    def __init__(self, report: Report | None) -> None:
        self.report: Report = report or (lambda event: None)

    def with_report(self, report: Report | None) -> "Listener":
        """A listener for one request; without a callback of its own, this one."""
        return Listener(report) if report else self

    def note(self, text: str) -> None:
        """Log a note."""
        log.info(with_keywords(text))

    def warn(self, text: str, *, hint: str) -> None:
        """Log a warning and its hint."""
        log.warning("%s (%s)", with_keywords(text), with_keywords(hint, hint=True))

    def progress(self) -> AbstractContextManager[Report]:
        """The callback."""
        return nullcontext(self.report)

    def done(self, record: RunRecord) -> None:
        """The caller gets the record with the video."""

    def skipped(self, request: Request, path: Path) -> None:
        """The caller gets the video."""

    def failed(self, record: RunRecord) -> None:
        """The caller gets the error."""


def split(keywords: Mapping[str, Any]) -> tuple[Layer, dict[str, Any]]:
    """The settings among keyword arguments, and the other options that are set."""
    settings = {name: value for name, value in keywords.items() if is_setting(name)}
    options = {name: value for name, value in keywords.items() if name not in settings}
    return keyword_layer(SOURCE, settings), {n: v for n, v in options.items() if v is not None}


def all_layers(
    keywords: Mapping[str, Any], listener: Listener
) -> tuple[list[Layer], dict[str, Any]]:
    """All layers of settings under keyword arguments, and the other options."""
    layer, options = split(keywords)
    preset, cachedit_preset = options.pop("preset", None), options.pop("cachedit_preset", None)
    return settings_layers(listener.warn, layer, preset, cachedit_preset), options


def plan_clip(
    prompt: str, layers: list[Layer], options: dict[str, Any], *, seed: int | None,
    output: AnyPath | None,
) -> PlannedVideos:  # fmt: skip
    """Check and plan one video. Raises WancliError."""
    files = OutputFiles(
        output=_text(output),
        folder=Path(),
        overwrite=options.get("overwrite", False),
        skip_existing=options.get("skip_existing", False),
        latents=_text(options.get("save_latents")),
        preview_every=options.get("preview_every"),
        video=output is not None,
    )
    return plan_videos(clip_request(prompt, layers, options, seed=seed), files)


def clip_request(
    prompt: str, layers: list[Layer], options: Mapping[str, Any], *, seed: int | None = None
) -> GenerateRequest:
    """The request of one video. Raises WancliError."""
    return GenerateRequest(
        "generate",
        check_prompt(prompt),
        parse_seeds(_text(seed), None),
        resolve(layers, Settings),
        options.get("force", False),
        _input_files(options),
        options.get("task"),
    )


def _input_files(options: Mapping[str, Any]) -> InputFiles:
    names = [f.name for f in fields(InputFiles) if f.name in options and f.name != "ref_image"]
    pictures = options.get("ref_image", ())
    pictures = [pictures] if isinstance(pictures, AnyPath) else pictures
    files = {name: Path(options[name]) for name in names}
    return InputFiles(**files, ref_image=tuple(map(Path, pictures)))


def rollout_request(
    prompt: str | None, options: Mapping[str, Any], *, seed: int | None = None,
    output: AnyPath | None = None,
) -> RolloutRequest:  # fmt: skip
    """The request of a rollout. Raises UsageError."""
    rerender = options.get("rerender")
    continues = options.get("resume", False) or rerender is not None
    for name, wanted in (("resume", continues), ("save_latents", "save_latents" in options)):
        if wanted and output is None:
            raise UsageError(f"`{name}` needs the name of a video.", hint="`output NAME.mp4`")
    if prompt is not None or not (continues or "prompt_embeds" in options):
        prompt = check_prompt(prompt or "")
    at = options.get("at", {}).items()
    changes = [PromptChange(int(chunk), text.strip()) for chunk, text in at]  # text in JSON
    changes += read_script(Path(options["script"])) if "script" in options else []
    files = {f.name: Path(options[f.name]) for f in fields(ContextFiles) if f.name in options}
    return RolloutRequest(
        prompt=prompt,
        seed=_text(seed),
        starts=ContextFiles(**files),
        output=_text(output),
        folder=Path(),
        changes=changes,
        latents=_text(options.get("save_latents")),
        files=output is not None,
        only_new=options.get("only_new", False),
        overwrite=options.get("overwrite", False),
        skip_existing=options.get("skip_existing", False),
        resume=options.get("resume", False),
        rerender=rerender,
        report=_text(options.get("report")),
        force=options.get("force", False),
    )


def ignore_bytes(_bytes: int) -> None:
    """Take the bytes of a download, of which huggingface_hub would draw bars otherwise."""


def _text(value: object) -> str | None:
    return None if value is None else str(value)
