"""Prompts and variants of a bench, parsed from text."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import typer
from typer.exceptions import TyperException

from wancli.benchmark.session import BenchRequest, VariantFlags
from wancli.cli.messages import dashed, flag, similar_flags
from wancli.cli.options import CachePreset, PresetName, takes_settings
from wancli.config.presets import find_preset, step_cache_layer
from wancli.config.presets import layers as preset_layers
from wancli.config.resolve import Layer
from wancli.config.settings import Settings
from wancli.errors import InputError, UsageError, missing
from wancli.utils.reading import read_lines, read_toml, unreadable

_FORM = 'prompts = ["a red circle"], seeds = "0-2", and a table [variants] of names and flags'


def read_bench_request(
    prompts: Sequence[str], seeds: str | None, variants: Sequence[str], *, tune: bool = False
) -> BenchRequest:
    """Parse prompts, files with one prompt per line, or a TOML file with everything.

    With `tune`, the variant defaults to cachedit. Raises UsageError, InputError.
    """
    texts, named = [], [_named(text) for text in variants]
    for text in prompts:
        if text.endswith(".toml"):
            case = _read_toml(Path(text))
            texts += case.prompts
            seeds = seeds or case.seeds
            named = [*case.variants, *named]
        else:
            texts += _read_prompts(text)
    if not texts:
        raise UsageError("no prompt.", hint='wancli bench "a red circle" --variant …')
    names = [name for name, _ in named]
    for name in names:
        if names.count(name) > 1 or name == "baseline":
            raise UsageError(f"two variants are named '{name}'.", hint="rename one of them")
    if tune and not named:
        named = [("cachedit", "--use-cachedit")]
    chosen = [read_variant(name, text) for name, text in named]
    return BenchRequest(list(dict.fromkeys(texts)), seeds, chosen, flag)


def read_variant(name: str, flags: str) -> VariantFlags:
    """A variant and its settings, from its flags. Raises UsageError."""
    variants: list[VariantFlags] = []
    command = typer.Typer(add_completion=False)

    @command.command(add_help_option=False, context_settings={"token_normalize_func": dashed})
    @takes_settings(Settings)
    def _variant(
        *, overrides: Layer, preset: PresetName = None, cachedit_preset: CachePreset = None
    ) -> None:
        cache = [step_cache_layer(find_preset(cachedit_preset))] if cachedit_preset else []
        below = preset_layers(find_preset(preset)) if preset else []
        variants.append(VariantFlags(name, flags, [*cache, overrides], below))

    try:
        command(shlex.split(flags), standalone_mode=False, prog_name="variant")
    except TyperException as error:
        hint = similar_flags(error)
        message = error.message if hint else error.format_message()
        raise UsageError(
            f"variant '{name}': {message}", hint=hint or "wancli generate --help"
        ) from None
    except ValueError as error:
        raise UsageError(f"variant '{name}': {error}.", hint="check its quotes") from None
    if not variants:
        raise UsageError(f"variant '{name}': no settings.", hint="wancli generate --help")
    return variants[0]


def _named(text: str) -> tuple[str, str]:
    name, colon, flags = text.partition(":")
    if not colon or not name.strip() or name.strip().startswith("-"):
        raise UsageError(
            f"`variant` {text!r} has no name.", hint='`variant "fast: --use-cachedit"`'
        )
    if not flags.strip():
        raise UsageError(
            f"variant '{name.strip()}' has no flags.", hint=f'`variant "{name}: --use-cachedit"`'
        )
    return name.strip(), flags.strip()


def _read_prompts(text: str) -> list[str]:
    path = Path(text)
    if path.suffix not in (".txt", ".prompts"):
        return [text.strip()] if text.strip() else []
    try:
        return [line.strip() for line in read_lines(path)]
    except FileNotFoundError:
        raise missing("file of prompts", path) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error, hint="write one prompt per line") from None


class _File(NamedTuple):
    """Contents of a bench's TOML file."""

    prompts: list[str]
    seeds: str | None
    variants: list[tuple[str, str]]


def _read_toml(path: Path) -> _File:
    try:
        table = read_toml(path)
    except FileNotFoundError:
        raise missing("file", path) from None
    except (OSError, ValueError) as error:
        raise unreadable(path, error, hint=_FORM) from None
    prompts, seeds, variants = (table.pop(k, None) for k in ("prompts", "seeds", "variants"))
    variants = {} if variants is None else variants
    whole = isinstance(prompts, list) and isinstance(variants, dict) and not table
    if not whole or not all(isinstance(text, str) for text in [*prompts, *variants.values()]):
        raise InputError(f"{path} is not a bench.", hint=_FORM)
    return _File(list(prompts), None if seeds is None else str(seeds), list(variants.items()))
