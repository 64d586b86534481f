"""`wancli generate` and `wancli repro`: from flags to jobs, and from jobs to videos."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import platformdirs
import typer

from wancli.cli.naming import check_sidecar, name_output, same_request
from wancli.cli.options import Talk, takes_settings, takes_talk
from wancli.cli.screen import Screen
from wancli.errors import InputError, UsageError, WancliError
from wancli.plan import Plan, make_plan
from wancli.presets import find_preset, layers, read_file
from wancli.records import Request, parse_record, parse_seeds, settings_of
from wancli.settings import Layer, Resolved, resolve
from wancli.specs import SPECS, ModelSpec, check_files, find_spec, revision

if TYPE_CHECKING:
    from wancli.pipeline.run import Job

OUTPUT = "Output"
Prompt = Annotated[str | None, typer.Argument(help="What the video shows; - reads standard input.")]
PromptFlag = Annotated[str | None, typer.Option("--prompt", "-p", help="The same, as a flag.")]
PresetName = Annotated[str | None, typer.Option(help="Preset to start from: a name or a file.")]
Seed = Annotated[
    str | None, typer.Option("--seed", "-s", help="7, 1,2,5, 0-9 or random. (default: random)")
]
Count = Annotated[
    int | None, typer.Option("--num-videos", "-N", min=1, max=10_000, help="Videos, from --seed on.")
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", rich_help_panel=OUTPUT,
        help="File, or template such as {prompt:40}-{seed}.mp4.",
    ),
]  # fmt: skip
Folder = Annotated[Path | None, typer.Option(rich_help_panel=OUTPUT, help="Folder of bare names.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", rich_help_panel=OUTPUT, help="Replace files.")]
Skip = Annotated[
    bool,
    typer.Option("--skip-existing", rich_help_panel=OUTPUT, help="Keep files of the same request."),
]
Latents = Annotated[
    str | None,
    typer.Option(rich_help_panel=OUTPUT, help="Also write the latents, as safetensors."),
]
Perf = Annotated[Path | None, typer.Option(rich_help_panel=OUTPUT, help="Write timings as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; load nothing.")]


@dataclass(frozen=True)
class Files:
    """Where results go, and what may be replaced."""

    output: str | None
    folder: Path
    overwrite: bool
    skip_existing: bool
    latents: str | None
    perf: Path | None


@takes_talk
@takes_settings
def generate(  # noqa: PLR0913 - one parameter per flag that is not a setting
    given: Layer,
    talk: Talk,
    prompt: Prompt = None,
    prompt_flag: PromptFlag = None,
    preset: PresetName = None,
    seed: Seed = None,
    num_videos: Count = None,
    output: Output = None,
    output_dir: Folder = None,
    overwrite: Overwrite = False,
    skip_existing: Skip = False,
    save_latents: Latents = None,
    perf_json: Perf = None,
    dry_run: DryRun = False,
) -> None:
    """Make a video of a prompt.

    wancli generate "a red circle moving right on a black background" --seed 1
    """
    text = read_prompt(prompt, prompt_flag)
    resolved = resolve(settings_layers(given, preset))
    seeds = parse_seeds(seed, num_videos)
    files = Files(output, folder(output_dir), overwrite, skip_existing, save_latents, perf_json)
    execute(text, seeds, resolved, files=files, screen=Screen(talk), dry_run=dry_run, command="generate")


@takes_talk
@takes_settings
def repro(  # noqa: PLR0913
    given: Layer,
    talk: Talk,
    file: Annotated[Path, typer.Argument(help="A video of wancli's, or its JSON.")],
    prompt_flag: PromptFlag = None,
    seed: Seed = None,
    output: Output = None,
    output_dir: Folder = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
) -> None:
    """Make a video again from its own record; any flag overrides it.

    On the same machine the frames are identical, and wancli says whether they are.
    """
    record = read_record(file)
    told = settings_of(record)
    resolved = resolve([Layer(f"record of {file.name}", told), given])
    text = prompt_flag if prompt_flag is not None else record["request"]["prompt"]
    seeds = parse_seeds(seed, None) if seed else [record["request"]["seed"]]
    screen = Screen(talk)
    files = Files(
        output or f"{file.stem}-repro.mp4", folder(output_dir), overwrite, False, None, None
    )
    made = execute(text, seeds, resolved, files=files, screen=screen, dry_run=dry_run, command="repro")
    if made and file.suffix == ".mp4" and made[0]["hash"] == record["hash"]:
        from wancli.video.write import framemd5

        if framemd5(file) == made[0]["output"]["framemd5"]:
            screen.say("identical: every frame equals the original's")
        else:
            screen.warn(
                "the frames differ from the original's.",
                hint="another machine or other versions; compare: wancli show FILE",
            )


def settings_layers(given: Layer, preset: str | None) -> list[Layer]:
    """Every layer over the declared defaults: model default, user, preset, environment, flags."""
    named = preset or os.environ.get("WANCLI_PRESET") or None
    from_preset = layers(find_preset(named)) if named else []
    environment = {"model": os.environ["WANCLI_MODEL"]} if os.environ.get("WANCLI_MODEL") else {}
    chosen = [*user_layers(), *from_preset, Layer("WANCLI_MODEL", environment), given]
    model = next((la.tables["model"] for la in reversed(chosen) if "model" in la.tables), "demo")
    spec = next((s for s in SPECS.values() if model in (s.name, s.repo)), None)
    defaults = [replace(la, source="model default") for la in layers(find_preset(spec.name))] if spec else []
    return [*defaults, *chosen]


def user_layers() -> list[Layer]:
    """The user's own config.toml, where there is one."""
    path = platformdirs.user_config_path("wancli") / "config.toml"
    return [Layer(str(path), read_file(path).tables)] if path.is_file() else []


def read_prompt(*given: str | None) -> str:
    """The prompt, from the argument, the flag or standard input. Raises UsageError."""
    texts = [text for text in given if text is not None]
    if len(texts) > 1:
        raise UsageError("the prompt is given twice.", hint='wancli generate "a red circle"')
    text = texts[0] if texts else ""
    if text == "-":
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError:
            raise UsageError("standard input is not UTF-8 text.", hint="iconv -t UTF-8") from None
    text = text.strip()
    if not text:
        raise UsageError("the prompt is empty.", hint='wancli generate "a red circle moving right"')
    return text


def folder(given: Path | None) -> Path:
    """Where bare names go."""
    return given or Path(os.environ.get("WANCLI_OUTPUT_DIR") or ".")


def read_record(file: Path) -> dict[str, Any]:
    """The record of a video, a sidecar or a latents file. Raises InputError."""
    from wancli.video.read import read_comment

    if not file.is_file():
        raise InputError(f"'{file}' not found.", hint="give a file that wancli generate wrote")
    if file.suffix == ".json":
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            text = ""
    else:
        text = read_comment(file) or ""
    return parse_record(text, origin=str(file))


def execute(
    prompt: str, seeds: Sequence[int], resolved: Resolved, *, files: Files, screen: Screen,
    dry_run: bool, command: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Check everything, then make every video; returns the records of those made."""
    settings = resolved.settings
    spec = find_spec(settings.model)
    plan = make_plan(settings, spec)
    check_files(spec)
    requests = [Request(prompt, s, settings, resolved.sources, revision(spec)) for s in seeds]
    outputs = [
        name_output(files.output, _fields(r), folder=files.folder, several=len(seeds) > 1)
        for r in requests
    ]
    if dry_run:
        _show_plan(screen, plan, requests, outputs)
        return []
    todo = []
    for request, path in zip(requests, outputs, strict=True):
        if _wanted(request, path, files=files, screen=screen):
            todo.append((request, path))
    return _make(todo, spec, plan, files=files, screen=screen, command=command) if todo else []


def _make(
    todo: Sequence[tuple[Request, Path]], spec: ModelSpec, plan: Plan, *, files: Files,
    screen: Screen, command: str,
) -> list[dict[str, Any]]:  # fmt: skip
    from wancli.pipeline.run import Job, Runner, failed_record
    from wancli.pipeline.run import write_json

    runner = Runner(spec, todo[0][0].settings, plan, command=command)
    made: list[dict[str, Any]] = []
    for request, path in todo:
        job: Job = Job(request, path, _latents_path(files, request, several=len(todo) > 1))
        try:
            with screen.progress() as report:
                record = runner.make(job, report)
        except WancliError as error:
            if screen.talk.json:
                screen.json(failed_record(request, error, command=command).as_json())
            raise
        screen.done(record)
        made.append(record.as_json())
        if files.perf:
            timings = [{"path": m["output"]["path"], **m["timings"], **m["memory"]} for m in made]
            write_json({"videos": timings}, files.perf)
    return made


def _wanted(request: Request, path: Path, *, files: Files, screen: Screen) -> bool:
    """Whether to make the file; UsageError or OutputError where it cannot be."""
    from wancli.video.write import check_destination

    check_destination(path)
    if path.exists():
        if files.skip_existing and same_request(path, request.hash):
            screen.say(f"skipped: {path} is of the same request")
            screen.skipped(request, path)
            return False
        if not files.overwrite:
            same = " and is of another request" if files.skip_existing else ""
            raise UsageError(f"{path} exists{same}.", hint="--overwrite, or another --output")
    check_sidecar(path)
    return True


def _latents_path(files: Files, request: Request, *, several: bool) -> Path | None:
    if files.latents is None:
        return None
    return name_output(files.latents, _fields(request), folder=Path(), several=several)


def _fields(request: Request) -> Mapping[str, Any]:
    settings = request.settings
    return {
        "prompt": request.prompt,
        "seed": request.seed,
        "model": settings.model,
        "steps": settings.sampling.steps,
        "width": settings.video.width,
        "height": settings.video.height,
    }


def _show_plan(
    screen: Screen, plan: Plan, requests: Sequence[Request], outputs: Sequence[Path]
) -> None:
    if screen.talk.json:
        for request, path in zip(requests, outputs, strict=True):
            screen.json({"plan": asdict(plan), "request": request.as_json(), "output": str(path)})
        return
    told = requests[0].as_json()
    rows = [("plan", key, str(value), "") for key, value in asdict(plan).items() if key != "shape"]
    rows += [("plan", f"latent {key}", str(value), "") for key, value in asdict(plan.shape).items()]
    sources = requests[0].sources
    for key, source in sources.items():
        table, _, name = key.rpartition(".")
        value = told[table][name] if table else told[name]
        rows.append((table, name, str(value), source))
    rows += [("output", "path", str(path), "") for path in outputs]
    screen.table("", "", "value", "from", rows=rows)
