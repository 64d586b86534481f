"""Files of a rollout: their names, and which existing ones it may replace."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from wancli.errors import UsageError
from wancli.planning.existing import is_video_of
from wancli.planning.output_files import (
    is_latents_of,
    is_of_rollout,
    rollout_files,
    sidecar_files,
)
from wancli.records.naming import name_output
from wancli.records.record import Request
from wancli.rollouts.request import RolloutRequest
from wancli.utils.outputs import Ours, OutputFile, OutputSet, not_ours


@dataclass(frozen=True)
class RolloutFiles:
    """The files that a rollout writes, None where it writes none; `store` is a folder of chunks."""

    video: Path | None = None
    latents: Path | None = None
    store: Path | None = None
    report: Path | None = None


def name_files(
    options: RolloutRequest, fields: Mapping[str, Any], *, base: Path | None = None
) -> RolloutFiles:
    """The files of a rollout whose names may have `fields`. Raises UsageError.

    `base` is the folder of the rollout that it continues.
    """

    name = partial(name_output, fields=fields, several=False)
    report = name(options.report, folder=Path()) if options.report else None
    latents = name(options.latents, folder=Path()) if options.latents else None
    if not options.files:
        return RolloutFiles(report=report)
    if options.video:
        output = base.with_suffix(".mp4") if base else name(options.output, folder=options.folder)
        return RolloutFiles(output, latents, output.with_suffix(".rollout"), report)
    if latents is None:
        raise UsageError("`no_video` needs `save_latents`.", hint="`save_latents x.safetensors`")
    return RolloutFiles(None, latents, latents.with_suffix(".rollout"), report)


def output_set(
    files: RolloutFiles, options: RolloutRequest, *, reads: Collection[Path],
    request: Callable[[], Request], before: Mapping[str, Any],
) -> OutputSet:  # fmt: skip
    """All files to write. Raises UsageError for an unusable name, and for two that are the same.

    `before` is the request of the rollout that it continues.
    """
    from wancli.video.write import check_name

    video, latents, store, report = files.video, files.latents, files.store, files.report
    if video:
        check_name(video)
    if report and report.suffix.lower() != ".html":
        raise UsageError(f"`report {report}` is not an .html file.", hint="`report drift.html`")
    outputs = OutputSet(overwrite=options.overwrite, reads=reads)
    our_video, our_latents, our_report = _ours(options, request, before)
    if video:
        outputs.add(OutputFile(video, "`output`", our_video))
    if latents:
        outputs.add(OutputFile(latents, "`save_latents`", our_latents))
    if store:
        outputs.add(*sidecar_files(video or latents or store), *rollout_files(store, video))
    if report:
        outputs.add(OutputFile(report, "`report`", our_report))
    return outputs


def _ours(
    options: RolloutRequest, request: Callable[[], Request], before: Mapping[str, Any]
) -> tuple[Ours, Ours, Ours]:
    """What says whether an existing video, latents and report may be replaced."""
    if not (options.skip_existing or options.continues):
        return not_ours, not_ours, not_ours
    from wancli.video.drift_report import is_report

    if options.skip_existing:
        own = request()
        return partial(is_video_of, request=own), partial(is_latents_of, request=own), is_report
    ours = partial(is_of_rollout, before=before)
    return ours, ours, is_report


def check_no_other(files: RolloutFiles, options: RolloutRequest) -> None:
    """Raise UsageError if the chunks of another rollout would be lost."""
    free = options.overwrite or options.continues
    if files.store and not free and any(files.store.glob("chunk-*.safetensors")):
        raise UsageError(
            f"{files.store} already holds a rollout.", hint="`resume`, `overwrite` or other names"
        )
