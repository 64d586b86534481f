"""`wancli compare`: how far two videos, or two latents, are apart."""

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
    one: Annotated[Path, typer.Argument(metavar="A", help="A video, or latents of wancli's.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="The same, to measure against A.")],
    talk: OutputOptions,
    fail_under_ssim: Annotated[
        float | None,
        typer.Option(help="Exit 7 if the SSIM of the worst video frame is less."),
    ] = None,
) -> None:
    """Measure how far a video, or latents, are from another.

    SSIM, PSNR and temporal difference of all video frames and of the worst one.

    wancli compare baseline.mp4 cached.mp4 --fail-under-ssim 0.95
    """
    latents = _check(one, other, fail_under_ssim=fail_under_ssim)
    screen, told = Screen(talk), {"schema": SCHEMA, "a": str(one), "b": str(other)}
    if latents:
        from wancli.video.compare import compare_latents
        from wancli.video.latents import read_latents

        found = compare_latents(read_latents(one)[0], read_latents(other)[0])
        if talk.json:
            screen.json({**told, "kind": "latents", **found.as_json()})
        else:
            screen.table("metric", "value", rows=_latent_rows(found), right=("value",))
        return
    from wancli.video.compare import VARIANT, compare_files

    quality = compare_files(one, other)
    if not quality.equal and (compressed := [p for p in (one, other) if not _lossless(p)]):
        screen.warn(
            f"{' and '.join(map(str, compressed))} {'is' if len(compressed) == 1 else 'are'} "
            "compressed: the codec is measured too.",
            hint="make them with --lossless, or compare latents (--save-latents)",
        )
    if talk.json:
        screen.json({**told, "kind": "video", "variant": VARIANT, **quality.as_json()})
    else:
        columns = ("mean", "worst", "video frame")
        screen.table("metric", *columns, rows=_rows(quality, variant=VARIANT), right=columns)
    if fail_under_ssim is not None and quality.ssim.worst < fail_under_ssim:
        raise QualityError(
            f"SSIM {quality.ssim.worst:.6f} of video frame {quality.ssim.frame} is less than "
            f"--fail-under-ssim {fail_under_ssim:g}.",
            hint="make B again with a lower --cachedit-residual-threshold",
        )


def _check(one: Path, other: Path, *, fail_under_ssim: float | None) -> bool:
    """Whether latents are compared. Raises UsageError or InputError for what cannot be."""
    kinds = {path.suffix.lower() == LATENTS for path in (one, other)}
    if len(kinds) > 1:
        raise UsageError(
            f"{one} and {other}: a video cannot be compared with latents.",
            hint="wancli decode FILE.safetensors -o FILE.mp4",
        )
    (latents,) = kinds
    if fail_under_ssim is not None and not 0 <= fail_under_ssim <= 1:
        raise SettingsError(
            f"--fail-under-ssim {fail_under_ssim:g} is no SSIM.", hint="0 to 1, such as 0.95"
        )
    if fail_under_ssim is not None and latents:
        raise UsageError(
            "--fail-under-ssim is of video frames; latents have no SSIM.",
            hint="wancli decode FILE.safetensors -o FILE.mp4",
        )
    for path in (one, other):
        if not path.exists():
            raise missing("latents" if latents else "video", path)
    return latents


def _lossless(path: Path) -> bool:
    """Whether a video says of itself that every pixel was kept."""
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


def _three(found: "Measured", decimals: int) -> tuple[str, str, str]:
    return f"{found.mean:.{decimals}f}", f"{found.worst:.{decimals}f}", str(found.frame)


def _latent_rows(found: "LatentQuality") -> list[tuple[str, ...]]:
    decibels = (
        "identical" if found.equal else NONE if found.psnr_db is None else f"{found.psnr_db:.2f}"
    )
    relative = NONE if found.relative is None else f"{found.relative:.3g}"
    return [
        ("equal", "yes" if found.equal else "no"),
        ("largest difference", f"{found.max_abs:.3g}"),
        ("relative error", relative),
        ("PSNR over their range, dB", decibels),
    ]
