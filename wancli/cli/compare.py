"""`wancli compare`: quality of a video, or of latents, against another."""

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wancli.cli.options import OutputOptions, takes_output_options
from wancli.cli.screen import Screen
from wancli.errors import InputError, QualityError, SettingsError, UsageError, missing

if TYPE_CHECKING:
    from wancli.video.compare import LatentQuality, Measured, Quality

SCHEMA = "wancli.compare/1"
LATENTS = ".safetensors"
NONE = "\N{EN DASH}"


@takes_output_options
def compare(
    *,
    one: Annotated[
        Path, typer.Argument(metavar="A", help="Reference: a video, or latents from wancli.")
    ],
    other: Annotated[Path, typer.Argument(metavar="B", help="Video or latents to compare with A.")],
    output_options: OutputOptions,
    fail_under_ssim: Annotated[
        float | None,
        typer.Option(help="Exit 7 if the SSIM of any video frame is below this."),
    ] = None,
) -> None:
    """Compare two videos, or two latents: SSIM, PSNR, temporal difference.

    Prints the mean and the worst video frame of each.

    wancli compare baseline.mp4 cached.mp4 --fail-under-ssim 0.95
    """
    latents = _check(one, other, fail_under_ssim=fail_under_ssim)
    screen, header = Screen(output_options), {"schema": SCHEMA, "a": str(one), "b": str(other)}
    if latents:
        _compare_latents(one, other, screen, header)
        return
    from wancli.video.compare import VARIANT, compare_files

    quality = compare_files(one, other)
    if not quality.equal and (compressed := [p for p in (one, other) if not _lossless(p)]):
        screen.warn(
            f"{' and '.join(map(str, compressed))} {'is' if len(compressed) == 1 else 'are'} "
            "compressed: the result includes codec loss.",
            hint="generate them with `lossless`, or compare latents (`save_latents`)",
        )
    if output_options.json:
        screen.json({**header, "kind": "video", "variant": VARIANT, **quality.as_json()})
    else:
        columns = ("mean", "worst", "video frame")
        screen.table("metric", *columns, rows=_rows(quality, variant=VARIANT), right=columns)
    if fail_under_ssim is not None and quality.ssim.worst < fail_under_ssim:
        raise QualityError(
            f"SSIM {quality.ssim.worst:.6f} of video frame {quality.ssim.frame} is less than "
            f"`fail_under_ssim {fail_under_ssim:g}`.",
            hint="generate B with a lower `cachedit_residual_threshold`",
        )


def _compare_latents(one: Path, other: Path, screen: Screen, header: dict[str, str]) -> None:
    from wancli.video.compare import compare_latents
    from wancli.video.latents import read_latents

    quality = compare_latents(read_latents(one)[0], read_latents(other)[0])
    if screen.options.json:
        screen.json({**header, "kind": "latents", **quality.as_json()})
    else:
        screen.table("metric", "value", rows=_latent_rows(quality), right=("value",))


def _check(one: Path, other: Path, *, fail_under_ssim: float | None) -> bool:
    """Whether A and B are latents. Raises UsageError or InputError for what cannot be compared."""
    kinds = {path.suffix.lower() == LATENTS for path in (one, other)}
    if len(kinds) > 1:
        raise UsageError(
            f"{one} and {other}: a video cannot be compared with latents.",
            hint="wancli decode FILE.safetensors -o FILE.mp4",
        )
    (latents,) = kinds
    if fail_under_ssim is not None and not 0 <= fail_under_ssim <= 1:
        raise SettingsError(
            f"`fail_under_ssim {fail_under_ssim:g}` is not an SSIM.", hint="0 to 1, such as 0.95"
        )
    if fail_under_ssim is not None and latents:
        raise UsageError(
            "`fail_under_ssim` needs videos; latents have no SSIM.",
            hint="wancli decode FILE.safetensors -o FILE.mp4",
        )
    for path in (one, other):
        if not path.exists():
            raise missing("latents" if latents else "video", path)
    return latents


def _lossless(path: Path) -> bool:
    """Whether a video's record says that it was encoded losslessly."""
    from wancli.records.record import parse_record
    from wancli.video.read import read_comment

    with suppress(InputError):
        record = parse_record(read_comment(path) or "", origin=str(path))
        return bool(record["request"].get("output", {}).get("lossless"))
    return False


def _rows(quality: "Quality", *, variant: str) -> list[tuple[str, ...]]:
    mse, temporal = quality.as_json()["psnr_db"], quality.temporal_levels
    decibels = (
        ("identical", "", "")
        if quality.equal
        else (f"{mse['mean']:.2f}", f"{mse['worst']:.2f}", str(mse["frame"]))
    )
    return [
        (variant, *_three(quality.ssim, 6)),
        ("PSNR, dB", *decibels),
        ("temporal difference, levels", *(_three(temporal, 3) if temporal else (NONE, "", ""))),
        ("largest difference, levels", "", str(quality.max_levels), ""),
    ]


def _three(metric: "Measured", decimals: int) -> tuple[str, str, str]:
    return f"{metric.mean:.{decimals}f}", f"{metric.worst:.{decimals}f}", str(metric.frame)


def _latent_rows(quality: "LatentQuality") -> list[tuple[str, ...]]:
    decibels = (
        "identical"
        if quality.equal
        else NONE
        if quality.psnr_db is None
        else f"{quality.psnr_db:.2f}"
    )
    relative = NONE if quality.relative is None else f"{quality.relative:.3g}"
    return [
        ("equal", "yes" if quality.equal else "no"),
        ("largest difference", f"{quality.max_abs:.3g}"),
        ("relative error", relative),
        ("PSNR over their range, dB", decibels),
    ]
