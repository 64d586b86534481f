"""`wancli generate`: from flags to what is asked."""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import platformdirs
import typer

from wancli.cli.costing import carry_out
from wancli.cli.execute import Asked, Files, plan_videos
from wancli.cli.given import takes_inputs
from wancli.cli.options import Talk, takes_settings, takes_talk
from wancli.cli.screen import Screen
from wancli.errors import UsageError, Warn
from wancli.inputs import Inputs
from wancli.presets import (
    find_preset,
    layers,
    read_file,
    step_cache_layer,
    unreadable_places,
)
from wancli.random_models import known_spec
from wancli.records import parse_seeds
from wancli.resolve import Layer, resolve
from wancli.settings import Settings

OUTPUT = "Output"
Prompt = Annotated[str | None, typer.Argument(help="What the video shows; - reads standard input.")]
PromptFlag = Annotated[str | None, typer.Option("--prompt", "-p", help="The same, as a flag.")]
PresetName = Annotated[str | None, typer.Option(help="Preset to start from: a name or a file.")]
CachePreset = Annotated[
    str | None,
    typer.Option(
        "--cachedit-preset", rich_help_panel="Step cache", help="Preset to take only this from."
    ),
]
Seed = Annotated[
    str | None, typer.Option("--seed", "-s", help="7, 1,2,5, 0-9 or random. (default: random)")
]
Count = Annotated[
    int | None,
    typer.Option("--num-videos", "-N", min=1, max=10_000, help="Videos, from --seed on."),
]
Output = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", rich_help_panel=OUTPUT,
        help="File, or template such as {prompt:40}-{seed}.mp4.",
    ),
]  # fmt: skip
Folder = Annotated[Path | None, typer.Option(rich_help_panel=OUTPUT, help="Folder of bare names.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=OUTPUT, help="Replace files.")
]
Skip = Annotated[
    bool,
    typer.Option("--skip-existing", rich_help_panel=OUTPUT, help="Keep files of the same request."),
]
Latents = Annotated[
    str | None,
    typer.Option(rich_help_panel=OUTPUT, help="Also write the latents, as safetensors."),
]
Perf = Annotated[Path | None, typer.Option(rich_help_panel=OUTPUT, help="Write timings as JSON.")]
PreviewEvery = Annotated[
    int | None,
    typer.Option(
        min=1, max=1000, rich_help_panel=OUTPUT,
        help="Show a picture of it every so many steps: in NAME.preview.png until it is done, "
        "and in terminals that show any.",
    ),
]  # fmt: skip
Force = Annotated[bool, typer.Option("--force", help="Try what does not fit in memory.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; load nothing.")]


@takes_talk
@takes_settings(Settings)
@takes_inputs
def generate(  # noqa: PLR0913 - one parameter per flag that is not a setting
    *,
    given: Layer,
    inputs: Inputs,
    task: str | None,
    talk: Talk,
    prompt: Prompt = None,
    prompt_flag: PromptFlag = None,
    preset: PresetName = None,
    cachedit_preset: CachePreset = None,
    seed: Seed = None,
    num_videos: Count = None,
    output: Output = None,
    output_dir: Folder = None,
    overwrite: Overwrite = False,
    skip_existing: Skip = False,
    save_latents: Latents = None,
    perf_json: Perf = None,
    preview_every: PreviewEvery = None,
    dry_run: DryRun = False,
    force: Force = False,
) -> None:
    """Make a video of a prompt.

    And of pictures and videos, where the model takes them.

    wancli generate "a red circle moving right on a black background" --seed 1
    """
    text, screen = read_prompt(prompt, prompt_flag), Screen(talk)
    resolved = resolve(settings_layers(screen.warn, given, preset, cachedit_preset), Settings)
    files = Files(
        output=output,
        folder=folder(output_dir),
        overwrite=overwrite,
        skip_existing=skip_existing,
        latents=save_latents,
        perf=perf_json,
        preview_every=preview_every,
    )
    seeds = parse_seeds(seed, num_videos)
    asked = Asked("generate", text, seeds, resolved, force, inputs, task)
    carry_out(plan_videos(asked, files, assume_inputs=talk.brief), screen, dry_run=dry_run)


def settings_layers(
    warn: Warn, given: Layer, preset: str | None, cache_preset: str | None = None
) -> list[Layer]:
    """Every layer over the declared defaults: model default, user, preset, environment, flags."""
    warn_of_unreadable_presets(warn)
    named = preset or os.environ.get("WANCLI_PRESET") or None
    from_preset = layers(find_preset(named)) if named else []
    if cache_preset:
        from_preset.append(step_cache_layer(find_preset(cache_preset)))
    environment = {"model": os.environ["WANCLI_MODEL"]} if os.environ.get("WANCLI_MODEL") else {}
    chosen = [*user_layers(warn), *from_preset, Layer("WANCLI_MODEL", environment), given]
    model = next((la.tables["model"] for la in reversed(chosen) if "model" in la.tables), "demo")
    spec = known_spec(model)
    defaults = layers(find_preset(spec.name)) if spec else []
    return [*(replace(layer, source="model default") for layer in defaults), *chosen]


def user_layers(warn: Warn) -> list[Layer]:
    """The user's own config.toml, where there is one; none where there may not be looked."""
    path = platformdirs.user_config_path("wancli") / "config.toml"
    try:
        if not path.is_file():
            return []
    except OSError as error:
        warn(
            f"no settings are taken from {path}: {error.strerror}.",
            hint=f"chmod u+rx {path.parent}",
        )
        return []
    return [Layer(str(path), read_file(path).tables)]


def warn_of_unreadable_presets(warn: Warn) -> None:
    """Warn of folders of presets that are left out."""
    for folder, reason in unreadable_places():
        warn(f"no presets are taken from {folder}: {reason}.", hint=f"chmod u+rx {folder}")


def read_prompt(*given: str | None) -> str:
    """The prompt, from the argument, the flag or standard input. Raises UsageError."""
    texts = [text for text in given if text is not None]
    if len(texts) > 1:
        raise UsageError("the prompt is given twice.", hint='wancli generate "a red circle"')
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
    if not text.strip():
        raise UsageError("the prompt is empty.", hint='wancli generate "a red circle moving right"')
    return text.strip()


def folder(given: Path | None) -> Path:
    """Where bare names go."""
    return given or Path(os.environ.get("WANCLI_OUTPUT_DIR") or ".")
