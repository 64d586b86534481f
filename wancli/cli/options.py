"""Typer options: one for every setting, and those that several commands share."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from wancli.catalog.tasks import TASKS
from wancli.cli.completion import (
    complete_files,
    complete_from,
    complete_models,
    complete_presets,
)
from wancli.cli.help import GLOBAL, INPUTS, FromSettings
from wancli.cli.messages import flag, with_flags
from wancli.config.keywords import keyword_layer
from wancli.config.resolve import fields_of, limits, panel, when_unset
from wancli.config.settings import ALIASES, WEIGHTS, Settings
from wancli.errors import UsageError
from wancli.records.naming import DEFAULT
from wancli.utils.reading import user_path

Command = Callable[..., Any]  # a function of keyword arguments, one per flag

# Placeholders of values, where the type does not name one.
METAVARS = {
    "model": "MODEL",
    "device": "DEVICE",
    "attention_backend": "NAME",
    "transformer": "FILE",
    "vae": "FILE",
    "text_encoder": "FILE",
    "lora": "PATH",
    "steps_list": "LIST",
    "first_chunk_steps": "LIST",
    "kv_align": "N",
}
# Aliases that are common in the field.
SPELLINGS = {
    "model": ("-m",),
    "negative_prompt": ("-n",),
    **{name: (f"--{alias.replace('_', '-')}",) for alias, name in ALIASES.items()},
}

COMPLETIONS = {
    "model": complete_models,
    "device": complete_from("auto", "cpu", "cuda", "mps"),
    **{name: complete_files(name) for name in (*WEIGHTS, "lora")},
}
OF_TASKS = ("strength", "true_cfg_scale", "segment_frames")  # settings that only some tasks have


@dataclass(frozen=True)
class OutputOptions:
    """Verbosity and output format."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    color: bool = True  # where the terminal supports it
    brief: bool = False  # of a plan: its cost, without every setting


def _global(*flags: str, help_: str) -> Any:
    return Annotated[bool, typer.Option(*flags, help=help_, rich_help_panel=GLOBAL)]


_OUTPUT_OPTIONS: dict[str, Any] = {
    "json_lines": _global("--json", help_="Print one JSON object per line on stdout."),
    "quiet": _global("--quiet", "-q", help_="Print only results, warnings and errors."),
    "verbose": _global(
        "--verbose", "-v", help_="Print what libraries log, and whole timing tables."
    ),
    "no_color": _global("--no-color", help_="Print without color."),
}


def takes_settings(
    settings: type[Settings],
    *,
    without: Collection[str] = (),
    only: Collection[str] = (),
    show_defaults: bool = True,
) -> Callable[[Command], Command]:
    """Add a flag for every setting; the command gets those that are set as Layer `overrides`.

    `only` limits the settings, and drops the shorthands. `show_defaults` shows in the help what
    presets make of the settings, for commands that use presets.
    """
    offered = [field for field in fields_of(settings) if field[1] not in without]
    offered = [field for field in offered if not only or field[1] in only]
    shorthands = [] if only else _shorthands(show_default=show_defaults)
    options = [_option(*field, show_default=show_defaults) for field in offered]

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**values: Any) -> Any:
            names = [*(name for _, name, _ in offered), *(option.name for option in shorthands)]
            overrides = keyword_layer("flag", {name: values.pop(name) for name in names})
            return command(overrides=overrides, **values)

        return with_parameters(run, command, without=("overrides",), extra=[*shorthands, *options])

    return decorate


def takes_output_options(command: Command) -> Command:
    """Add the flags of every command; it gets them as the OutputOptions `output_options`."""

    @functools.wraps(command)
    def run(**values: Any) -> None:
        json, quiet, verbose, no_color = (values.pop(name) for name in _OUTPUT_OPTIONS)
        options = OutputOptions(json=json, quiet=quiet, verbose=verbose, color=not no_color)
        command(output_options=options, **values)

    extra = _keywords(_OUTPUT_OPTIONS, default=False)
    return with_parameters(run, command, without=("output_options",), extra=extra)


def takes_options_of(*builders: Command) -> Callable[[Command], Command]:
    """Add the options of functions that plan requests, all but what they need besides flags."""
    options: dict[str, inspect.Parameter] = {}
    for builder in builders:
        options |= options_of(builder)

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def run(**values: Any) -> None:
            command(**values)

        return with_parameters(run, command, first=list(options.values()))

    return decorate


def options_of(builder: Command) -> dict[str, inspect.Parameter]:
    """Options of a function that plans a request, by name."""
    parameters = inspect.signature(builder).parameters
    return {n: option for n, option in parameters.items() if n not in ("screen", "gpu")}


def _shorthands(*, show_default: bool) -> list[inspect.Parameter]:
    """Flags that stand for settings."""
    size = typer.Option(
        "--size", metavar="WxH", show_default=show_default, rich_help_panel="Video",
        help="Width and height in pixels.",
    )  # fmt: skip
    cachedit = typer.Option(
        "--use-cachedit/--no-use-cachedit", show_default=False, rich_help_panel="Step cache",
        help="Same as --step-cache cachedit: DBCache, by cache-dit (lossy).",
    )  # fmt: skip
    annotations = {
        "size": Annotated[str | None, size, FromSettings()],
        "use_cachedit": Annotated[bool | None, cachedit],
    }
    return _keywords(annotations)


def _keywords(annotations: Mapping[str, Any], default: Any = None) -> list[inspect.Parameter]:
    only = inspect.Parameter.KEYWORD_ONLY
    return [
        inspect.Parameter(name, only, default=default, annotation=annotation)
        for name, annotation in annotations.items()
    ]


def with_parameters(
    run: Command,
    command: Command,
    *,
    without: Collection[str] = (),
    first: Sequence[inspect.Parameter] = (),
    extra: Sequence[inspect.Parameter] = (),
) -> Command:
    """Give `run` the parameters `first`, those of `command` but `without`, and `extra`."""
    signature = inspect.signature(command)
    own = [
        parameter
        for name, parameter in signature.parameters.items()
        if name not in without and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    only = inspect.Parameter.KEYWORD_ONLY
    parameters = [parameter.replace(kind=only) for parameter in [*first, *own, *extra]]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _option(
    table: str | None, name: str, field: FieldInfo, *, show_default: bool
) -> inspect.Parameter:
    kind: Any = field.annotation
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    plain = kind if kind in (bool, bool | None, int, float, int | None, float | None) else str
    plain = list[str] if kind == tuple[str, ...] else plain
    spelling = f"{flag(name)}/{flag('no_' + name)}" if kind in (bool, bool | None) else flag(name)
    option = typer.Option(
        spelling,
        *SPELLINGS.get(name, ()),
        help=with_flags(field.description or ""),
        metavar=METAVARS.get(name, "NAME" if choices else None),
        show_default=show_default,
        autocompletion=COMPLETIONS.get(name, complete_from(*choices) if choices else None),
        rich_help_panel=panel(table),
    )
    mark = FromSettings(limits(field), with_flags(when_unset(field)))
    return _keywords({name: Annotated[plain | None, option, mark]})[0]


OUTPUT = "Output"
Prompt = Annotated[
    str | None, typer.Argument(help="Description of the video; - reads standard input.")
]
PromptFlag = Annotated[str | None, typer.Option("--prompt", "-p", help="Same as PROMPT.")]
ModelName = Annotated[
    str,
    typer.Argument(
        autocompletion=complete_models, help="Model: a name (wancli model list), hub id or folder."
    ),
]
PresetName = Annotated[
    str | None,
    typer.Option(
        metavar="PRESET",
        autocompletion=complete_presets,
        help="Preset to start from: a name (wancli preset list) or a TOML file.",
    ),
]
CachePreset = Annotated[
    str | None,
    typer.Option(
        "--cachedit-preset",
        metavar="PRESET",
        autocompletion=complete_presets,
        rich_help_panel="Step cache",
        help="Preset whose step cache is used, and nothing else.",
    ),
]
Seed = Annotated[
    str | None,
    typer.Option(
        "--seed", "-s", metavar="SEEDS", show_default="random",
        help="Seed, or seeds: 1,2,5 or 0-9.",
    ),
]  # fmt: skip
Output = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="FILE", rich_help_panel=OUTPUT, show_default=DEFAULT,
        help="MP4 to write; fields such as {model} are filled in.",
    ),
]  # fmt: skip
Folder = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", rich_help_panel=OUTPUT, show_default="$WANCLI_OUTPUT_DIR, or here",
        help="Directory for outputs given without a path.",
    ),
]  # fmt: skip
Overwrite = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=OUTPUT, help="Replace existing files.")
]
Force = Annotated[bool, typer.Option("--force", help="Run even if it does not fit in memory.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and load nothing.")]


def read_prompt(*sources: str | None) -> str:
    """Read the prompt from the argument, the flag or standard input. Raises UsageError."""
    from wancli.planning.prompts import check_prompt

    texts = [text for text in sources if text is not None]
    if len(texts) > 1:
        raise UsageError("the prompt is set twice.", hint="drop `prompt`")
    text = texts[0] if texts else ""
    if text == "-":
        try:
            text = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError:
            raise UsageError("standard input is not UTF-8 text.", hint="iconv -t UTF-8") from None
        except OSError as error:
            raise UsageError(
                f"cannot read standard input: {error.strerror}.", hint="echo PROMPT | wancli …"
            ) from None
    return check_prompt(text)


def folder(output_dir: Path | None) -> Path:
    """Directory for outputs without a path."""
    return output_dir or user_path(os.environ.get("WANCLI_OUTPUT_DIR") or ".")


def _file(help_: str, *flags: str, kind: Any = Path) -> Any:
    option = typer.Option(*flags, metavar="FILE", rich_help_panel=INPUTS, help=help_)
    return Annotated[kind | None, option]


INPUT_OPTIONS: dict[str, Any] = {
    "image": _file("Picture to start from: the first frame.", "--image", "-i"),
    "last_image": _file("Picture to end with: the last frame."),
    "video": _file("Video to transform; VACE: video to be guided by."),
    "mask": _file("Mask video; white areas are generated."),
    "ref_image": _file("Reference picture of a subject; VACE: repeatable.", kind=list[Path]),
    "pose_video": _file("Wan-Animate: pose video to follow."),
    "face_video": _file("Wan-Animate: square face video to follow."),
    "background_video": _file("Wan-Animate: video whose --mask is replaced by --ref-image."),
    "task": Annotated[
        str | None,
        typer.Option(
            metavar="TASK", rich_help_panel=INPUTS, show_default="from the files",
            autocompletion=complete_from(*TASKS), help=f"Task: {', '.join(TASKS)}.",
        ),
    ],
}  # fmt: skip


def takes_inputs(command: Command) -> Command:
    """Add the flags of input pictures and videos; the command gets `inputs` and `task`."""

    @functools.wraps(command)
    def run(**values: Any) -> Any:
        from wancli.planning.inputs import InputFiles

        files = {name: values.pop(name) for name in INPUT_OPTIONS}
        task, references = files.pop("task"), tuple(files.pop("ref_image") or ())
        return command(inputs=InputFiles(**files, ref_image=references), task=task, **values)

    extra = _keywords(INPUT_OPTIONS)
    return with_parameters(run, command, without=("inputs", "task"), extra=extra)
