"""`wancli preview`: contact sheets, sheets of sweeps, GIFs and WebPs of videos."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wancli.cli.options import OutputOptions, Overwrite, takes_output_options
from wancli.cli.screen import Screen
from wancli.errors import InputError, UsageError, missing
from wancli.utils.outputs import OutputFile, OutputSet
from wancli.video.signature import is_signed

if TYPE_CHECKING:
    from wancli.video.sheet import Picture

SCHEMA = "wancli.preview/1"
LEDGER = ".ledger"
KINDS = {".png": "sheet", ".gif": "gif", ".webp": "webp"}  # settings of outputs by suffix
SHEET, ANIMATION = "Contact sheet", "GIF and WebP"
Files = Annotated[
    list[Path], typer.Argument(metavar="FILE...", help="Videos, or the ledger of a batch.")
]
Grid = Annotated[
    bool,
    typer.Option(
        "--grid",
        rich_help_panel=SHEET,
        help="A frame of each video: prompts down, the settings that differ across.",
    ),
]
Sheet = Annotated[
    Path | None,
    typer.Option(
        "--sheet", "--output", "-o", rich_help_panel=SHEET,
        show_default="NAME.png beside each video",
        help="PNG with frames of all videos.",
    ),
]  # fmt: skip
Rows = Annotated[
    int | None,
    typer.Option(min=1, max=100, rich_help_panel=SHEET, show_default="3", help="Rows of frames."),
]
Columns = Annotated[
    int | None,
    typer.Option(min=1, max=100, rich_help_panel=SHEET, show_default="4", help="Frames per row."),
]
Gif = Annotated[
    Path | None, typer.Option(rich_help_panel=ANIMATION, help="Write the video as a GIF.")
]
Webp = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=ANIMATION,
        help="Write the video as an animated WebP: smaller than a GIF, in true color.",
    ),
]
Fps = Annotated[
    float | None,
    typer.Option(rich_help_panel=ANIMATION, show_default="the video's", help="Frames per second."),
]
Width = Annotated[
    int | None,
    typer.Option(
        min=8,
        max=4096,
        show_default="240 on a sheet, else the video's",
        help="Width of each frame in pixels.",
    ),
]


@takes_output_options
def preview(  # noqa: PLR0913 - one parameter per flag
    *,
    files: Files,
    output_options: OutputOptions,
    sheet: Sheet = None,
    rows: Rows = None,
    columns: Columns = None,
    grid: Grid = False,
    gif: Gif = None,
    webp: Webp = None,
    fps: Fps = None,
    width: Width = None,
    overwrite: Overwrite = False,
) -> None:
    """Make contact sheets, GIFs and WebPs of videos, or a labelled sheet of a sweep.

    Replaces a picture that it made of the same videos before, unless it was changed since.

    wancli preview red.mp4 --gif red.gif
    wancli preview out/sweep.ledger --grid --sheet sweep.png
    """
    files = list(_videos(files))
    animations = [path for path in (gif, webp) if path]
    if grid and (animations or not sheet):
        raise UsageError("`grid` makes a sheet.", hint="`grid` with `sheet NAME.png` alone")
    _check_videos(files, animations=bool(animations))
    sheets = _sheets(files, sheet, animations=bool(animations))
    if fps is not None and not animations:
        raise UsageError("`fps` is for animations only.", hint="`gif NAME.gif` or `webp NAME.webp`")
    if (rows or columns) and (grid or not sheets):
        hint = "drop them, or `sheet NAME.png` without `grid`"
        raise UsageError("`rows` and `columns` are for contact sheets.", hint=hint)
    outputs = OutputSet(overwrite=overwrite, reads=files, another="another name")
    outputs.add(*(_output(path, "--sheet", ".png", videos) for path, videos in sheets.items()))
    moving = (("gif", gif), ("webp", webp))
    outputs.add(*(_output(p, f"--{name}", f".{name}", files) for name, p in moving if p))
    with outputs.locked():
        from wancli.video.sheet import SheetLayout, draw_animation, draw_sheet

        layout = SheetLayout(rows or 3, columns or 4, width or 240)
        sweep = partial(_draw_sweep, width=layout.width)
        draw = sweep if grid else partial(draw_sheet, grid=layout)
        # Draw all before writing any: a video may be damaged at its end.
        drawn = [(target, videos, draw(videos)) for target, videos in sheets.items()]
        for target in animations:
            animation = draw_animation(files[0], gif=target == gif, width=width, fps=fps)
            drawn.append((target, files, animation))
        for target, videos, picture in drawn:
            picture.write(target, overwrite=target in outputs.replaced)
            _say(Screen(output_options), picture, target, videos)


def _videos(files: Sequence[Path]) -> Iterator[Path]:
    """The videos, and those that a ledger calls done. Raises InputError, UsageError."""
    for file in files:
        if not (file.is_dir() or file.suffix == LEDGER):
            yield file
            continue
        from wancli.records.ledger import DONE, SKIPPED, open_ledger
        from wancli.records.ledger_file import batch_command

        with open_ledger(file) as ledger:
            videos = [Path(row["output"]) for row in ledger.rows(DONE, SKIPPED)]
        if not videos:
            hint = batch_command("status", file)
            raise InputError(f"{file} has no finished videos.", hint=hint)
        yield from videos


def _draw_sweep(videos: Sequence[Path], *, width: int) -> "Picture":
    from wancli.planning.existing import record_of
    from wancli.video.sweep import arrange, draw_sweep

    records = {video: record_of(video) for video in videos}
    return draw_sweep(arrange(records), width=width)


def _sheets(
    files: Sequence[Path], sheet: Path | None, *, animations: bool
) -> dict[Path, Sequence[Path]]:
    """The videos of each sheet; no sheets where only animations are requested."""
    if sheet:
        return {sheet: files}
    if animations:
        return {}
    sheets: dict[Path, Sequence[Path]] = {file.with_suffix(".png"): [file] for file in files}
    if len(sheets) < len(files):
        raise UsageError(
            "two videos of the same name would share a sheet.", hint="`sheet NAME.png` for both"
        )
    return sheets


def _check_videos(files: Sequence[Path], *, animations: bool) -> None:
    """Raise UsageError or InputError for missing files and impossible combinations."""
    for file in files:
        if not file.exists():
            raise missing("video", file)
        if not file.is_file():
            raise InputError(f"'{file}' is not a file.", hint="give a video")
    if animations and len(files) > 1:
        raise UsageError(
            f"{len(files)} videos cannot share an animation.",
            hint="one FILE, or a contact sheet: `sheet NAME.png`",
        )


def _output(path: Path, role: str, suffix: str, videos: Sequence[Path]) -> OutputFile:
    if path.suffix.lower() != suffix:
        hint = f"use {path.with_suffix(suffix)}" if path.name else f"use a name such as x{suffix}"
        if other := KINDS.get(path.suffix.lower()):
            hint = f"`{other} {path}`"
        raise UsageError(f"output {str(path)!r} does not end in {suffix}.", hint=hint)
    return OutputFile(path, role, ours=partial(is_signed, videos=videos))


def _say(screen: Screen, picture: "Picture", target: Path, videos: Sequence[Path]) -> None:
    kind = "sheet" if target.suffix.lower() == ".png" else target.suffix[1:].lower()
    if kind == "sheet" and not screen.options.json:
        screen.picture(picture.content)
    size = {"width": picture.width, "height": picture.height, "frames": picture.frames}
    files = {"path": str(target), "kind": kind, "videos": [str(video) for video in videos]}
    value = {"schema": SCHEMA, **files, **size, "bytes": len(picture.content)}
    screen.answer(str(target), value)
