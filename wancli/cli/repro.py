"""`wancli repro`: a video reproduced from its own record."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wancli.cli.options import (
    DryRun,
    Folder,
    Force,
    OutputOptions,
    Overwrite,
    folder,
    read_prompt,
    takes_output_options,
    takes_settings,
)
from wancli.cli.screen import Screen
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Settings
from wancli.errors import InputError

if TYPE_CHECKING:
    from wancli.cli.plan_table import Planned

NewPrompt = Annotated[str | None, typer.Option("--prompt", "-p", help="Another prompt.")]
NewOutput = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="FILE", show_default="NAME-repro.mp4", help="MP4 to write."
    ),
]
NewSeed = Annotated[
    str | None,
    typer.Option("--seed", "-s", metavar="SEEDS", help="Another seed, or seeds: 1,2,5 or 0-9."),
]


@takes_output_options
@takes_settings(Settings, show_defaults=False)
def repro(  # noqa: PLR0913 - one parameter per flag that is not a setting
    *,
    overrides: Layer,
    output_options: OutputOptions,
    file: Annotated[Path, typer.Argument(help="A wancli video, or its JSON.")],
    prompt_flag: NewPrompt = None,
    seed: NewSeed = None,
    output: NewOutput = None,
    output_dir: Folder = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Reproduce a video from its own record; any flag overrides it.

    On the same machine the frames are identical, which wancli checks.
    """
    from wancli.api.repro import recorded_settings, refuse_files
    from wancli.cli.plan_table import carry_out
    from wancli.config.seeds import parse_seeds
    from wancli.generation.batch import GenerateRequest, OutputFiles, plan_videos
    from wancli.planning.existing import read_record
    from wancli.planning.input_files import find_recorded_files
    from wancli.records.naming import literal
    from wancli.rollouts.request import RolloutRequest
    from wancli.rollouts.session import RolloutSession
    from wancli.utils.heap import keep_heap
    from wancli.utils.threads import choose_pages

    record, screen = read_record(file), Screen(output_options)
    request, place = record["request"], folder(output_dir)
    before = None if dry_run else _frames(record, file)  # which --overwrite may replace
    text = request["prompt"] if prompt_flag is None else read_prompt(prompt_flag)
    tables = recorded_settings(record, file, overrides.tables.get("machine", {}))
    layers = [Layer(f"record of {file.name}", tables), overrides]
    name = output or literal(f"{file.stem}-repro.mp4")
    if record["command"] == "rollout":
        refuse_files(request, file)
        choose_pages()
        rollout = RolloutRequest(text, seed, name, place, overwrite=overwrite, force=force)
        planned: Planned = RolloutSession(rollout, layers, before=request)
    else:
        keep_heap()
        seeds = parse_seeds(seed, None) if seed else [request["seed"]]
        recorded = request.get("inputs", {})
        inputs, task = find_recorded_files(recorded, file), recorded.get("task")
        resolved = resolve(layers, Settings)
        videos = GenerateRequest("repro", text, seeds, resolved, force, inputs, task)
        planned = plan_videos(videos, OutputFiles(name, place, overwrite))
    output_record = next(iter(carry_out(planned, screen, dry_run=dry_run)), None)
    if output_record and output_record["hash"] == record["hash"]:
        _compare(before, file, output_record, screen)


def _frames(record: dict[str, Any], file: Path) -> str | None:
    """Digest of a video's frames, for a sidecar the recorded one; None where nothing decodes."""
    from wancli.video.write import framemd5

    if file.suffix == ".json":
        recorded = record["output"].get("framemd5")
        return str(recorded) if recorded else None
    try:
        return framemd5(file)
    except InputError:
        return None


def _compare(before: str | None, file: Path, record: dict[str, Any], screen: Screen) -> None:
    """Print whether the frames equal those with the digest `before`."""
    if before is None:
        screen.warn(f"the frames of {file} cannot be read.", hint="nothing to compare with")
    elif before == record["output"]["framemd5"]:
        screen.note(f"identical: every frame equals that of {file}")
    else:
        screen.warn(
            f"the frames differ from those of {file}.",
            hint="another machine or other versions; see env in its JSON",
        )
