"""What a command takes, as its help and the reference say it.

A long help is in groups of options, of which `--help` shows the first.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from wancli.cli.messages import with_flags
from wancli.errors import WancliError
from wancli.utils.units import bounds_in_words

ARGUMENTS, COMMANDS, OPTIONS = "Arguments", "Commands", "Options"
INPUTS, GLOBAL = "Pictures and videos", "Global options"
ORDER = (
    OPTIONS, INPUTS, "Rollout", "Sampling", "Video", "Output", "Machine", "Step cache", "Prompt K/V"
)  # fmt: skip
# Lifted from their groups to the first, in this order.
COMMON = (
    "prompt_flag", "variant", "model", "preset", "gpu", "models", "size", "num_frames", "chunks",
    "at", "script", "fps", "steps", "guidance_scale", "negative_prompt", "seed", "num_videos",
    "output",
)  # fmt: skip
ABOUT = {  # of groups that are not tables of settings
    "Research": "Tensors in and out, for comparison with other implementations",
    "Resuming": "Continue, extend or render again",
    "Goals": "Exit 7 where a variant misses them",
    "Tuning": "Find thresholds of step caches",
    GLOBAL: "JSON, verbosity, color, help",
}
METAVARS: Mapping[type, str] = {int: "N", float: "X", Path: "FILE"}
LONG = 30  # rows of a help in groups; characters of a default that is not shown


@dataclass(frozen=True)
class FromSettings:
    """Marks an option of a setting: its bounds in words, and what applies while it is unset."""

    limits: str = ""
    unset: str = ""


@dataclass(frozen=True)
class Defaults:
    """Values of settings by name, and a note on whose they are."""

    values: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class HelpRow:
    """An option, an argument or a command: `-m, --model NAME`, and its text."""

    names: str
    text: str


@dataclass(frozen=True)
class HelpGroup:
    """Rows under a heading, and those of the group that stand among the common ones instead."""

    title: str
    rows: Sequence[HelpRow]
    common: Sequence[HelpRow] = ()

    @property
    def key(self) -> str:
        """The group's name as one types it: `step-cache`."""
        return self.title.lower().removesuffix(" options").replace(" ", "-").replace("/", "")


@dataclass(frozen=True)
class CommandHelp:
    """All that there is to know about a command."""

    path: str
    usage: str
    summary: str
    paragraphs: Sequence[str]
    examples: Sequence[str]
    groups: Sequence[HelpGroup]
    note: str


@dataclass(frozen=True)
class _Parameter:
    """A parameter of Typer's, with the type in its function's signature."""

    param: Any
    kind: type
    mark: FromSettings | None
    defaults: Defaults

    def row(self) -> HelpRow:
        """Its names, and its help with bounds and default."""
        facts = [self._limits(), f"default: {self._default()}" if self._default() else ""]
        if self.param.required and not self.is_argument:
            facts.append("required")
        details = "; ".join(filter(None, facts))
        names = self.argument() if self.is_argument else self._option()
        return HelpRow(names, " ".join(filter(None, [self.param.help, details and f"({details})"])))

    @property
    def is_argument(self) -> bool:
        """Whether it has a place instead of a name."""
        return bool(self.param.param_type_name == "argument")

    def argument(self) -> str:
        """`FILE...`"""
        name = str(self.param.metavar or self.param.name.upper())
        return name if self.param.nargs == 1 or name.endswith("...") else f"{name}..."

    def _option(self) -> str:
        """`-m, --model NAME`, `    --[no-]compile`."""
        short = [name for name in self.param.opts if not name.startswith("--")]
        long = [name for name in self.param.opts if name.startswith("--")]
        if self.param.secondary_opts:
            long = [f"--[no-]{long[0].removeprefix('--')}"]
        names = ("" if short else "    ") + ", ".join([*short, *long])
        if self.param.is_flag:
            return names
        return f"{names} {self.param.metavar or METAVARS.get(self.kind, 'TEXT')}"

    def _limits(self) -> str:
        return (
            self.mark.limits if self.mark else bounds_in_words(ge=self.param.min, le=self.param.max)
        )

    def _default(self) -> str:
        """The default as it is typed, or on and off; "" for none."""
        show, name = self.param.show_default, self.param.name
        if isinstance(show, str) or not show:
            return show or ""
        if not self.mark:
            return "" if self.param.default is False else _shown(self.param.default)
        values = self.defaults.values
        return _shown(values[name]) or self.mark.unset if name in values else ""


def describe(command: Any, ctx: Any, defaults: Defaults) -> CommandHelp:
    """The help of a Typer command or group."""
    summary, *paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    parameters = _parameters(command, defaults)
    arguments = [it for it in parameters if it.is_argument]
    pieces = [it.argument() if it.param.required else f"[{it.argument()}]" for it in arguments]
    groups = [HelpGroup(ARGUMENTS, [it.row() for it in arguments])] if arguments else []
    if subcommands := getattr(command, "commands", None):
        pieces.append("COMMAND ...")
        rows = [HelpRow(n, (c.help or "").partition("\n")[0]) for n, c in subcommands.items()]
        groups.append(HelpGroup(COMMANDS, rows))
        defaults = Defaults(note=f"{ctx.command_path} COMMAND --help describes a command.")
    by_group = _by_group([it for it in parameters if not it.is_argument])
    for title, options in by_group.items():
        common = [it for it in by_group.get(OPTIONS, ()) if it.param.rich_help_panel == title]
        groups.append(HelpGroup(title, [it.row() for it in options], [it.row() for it in common]))
    return CommandHelp(
        path=ctx.command_path,
        usage=" ".join([ctx.command_path, "[OPTIONS]", *pieces]),
        summary=" ".join(summary.split()),
        paragraphs=[" ".join(t.split()) for t in paragraphs if not t.startswith("wancli ")],
        examples=[text for text in paragraphs if text.startswith("wancli ")],
        groups=_with_help_rows(groups),
        note=defaults.note,
    )


def typed_defaults(command: Any, ctx: Any, words: Sequence[str]) -> Defaults:
    """The settings under the model and the preset in a command line; none where none are shown."""
    if not any(it.mark and it.param.show_default for it in _parameters(command, Defaults())):
        return Defaults()
    from wancli.config.layers import settings_layers, values_of
    from wancli.config.resolve import Layer

    typed, _, _ = command.make_parser(ctx).parse_args(list(words))
    model = {"model": typed["model"]} if typed.get("model") else {}
    try:
        layers = settings_layers(_ignore, Layer("flag", model), typed.get("preset"))
        _check_model(values_of(layers)["model"])
    except WancliError as error:
        return Defaults(note=f"The defaults are not shown: {with_flags(str(error))}")
    return defaults_under(layers, hint="" if model else "; for those of another, add --model NAME")


def _check_model(name: str) -> None:
    """Raise ModelError for a model that is neither known nor a folder."""
    from wancli.catalog.random import known_spec

    if not known_spec(name):
        from wancli.catalog.local import find_spec  # here, since a known one needs no folder

        find_spec(name)


def defaults_under(layers: Sequence[Any], *, hint: str = "") -> Defaults:
    """The settings as layers give them."""
    from wancli.config.layers import values_of

    values = values_of(layers)
    own = ("model default", "flag")
    others = [layer.source for layer in layers if layer.source not in own and layer.tables]
    also = f", with {', '.join(others)}" if others else ""
    size = f"{values['width']}x{values['height']}"
    note = f"Defaults are those of model {values['model']}{also}{hint}."
    return Defaults({**values, "size": size}, note)


def _ignore(text: str, *, hint: str) -> None:
    """Drop a warning, which the command itself repeats."""


def _parameters(command: Any, defaults: Defaults) -> list[_Parameter]:
    """The visible parameters, with what the signature of the command's function adds."""
    function = command.callback
    signature = inspect.signature(function).parameters if function else {}
    parameters = []
    for param in command.params:
        annotation = signature[param.name].annotation if param.name in signature else str
        metadata = getattr(annotation, "__metadata__", ())
        mark = next((data for data in metadata if isinstance(data, FromSettings)), None)
        kind = _plain(getattr(annotation, "__origin__", annotation))
        parameters.append(_Parameter(param, kind, mark, defaults))
    return [it for it in parameters if not it.param.hidden]


def _plain(annotation: Any) -> Any:
    """int of `list[int] | None`."""
    inner = [_plain(arg) for arg in get_args(annotation) if arg is not type(None)]
    return inner[0] if inner else annotation


def _by_group(options: Sequence[_Parameter]) -> Mapping[str, Sequence[_Parameter]]:
    """Options by heading: the common ones first, the global ones last."""
    common = [it for name in COMMON for it in options if it.param.name == name]
    groups: dict[str, list[_Parameter]] = {OPTIONS: common}
    for it in options:
        if it not in common:
            groups.setdefault(it.param.rich_help_panel or OPTIONS, []).append(it)
    last = {GLOBAL: groups.pop(GLOBAL)} if GLOBAL in groups else {}
    ordered = {title: groups[title] for title in ORDER if groups.get(title)}
    return ordered | {title: those for title, those in groups.items() if those} | last


def about(title: str) -> str:
    """A line about a group, without a period."""
    if title in ABOUT:
        return ABOUT[title]
    from wancli.config.resolve import panel
    from wancli.config.settings import RolloutSettings

    tables = {panel(name): info for name, info in RolloutSettings.model_fields.items()}
    return (getattr(tables[title].annotation, "__doc__", "") if title in tables else "").rstrip(".")


def _with_help_rows(groups: Sequence[HelpGroup]) -> Sequence[HelpGroup]:
    """The groups, with the help flags at the end of the last."""
    rows = [HelpRow("-h, --help", "Print help.")]
    if sum(len(group.rows) for group in groups) > LONG:
        rows = [
            HelpRow("-h, --help [GROUP]", "Print help, or that of one group."),
            HelpRow("    --help-all", "Print help of all groups."),
        ]
    if not groups or groups[-1].title in (ARGUMENTS, COMMANDS):
        return [*groups, HelpGroup(OPTIONS, rows)]
    last = groups[-1]
    return [*groups[:-1], replace(last, rows=[*last.rows, *rows])]


def _shown(value: Any) -> str:
    if value in (None, "", (), []):
        return ""
    from wancli.cli.settings_table import in_words

    return text if len(text := in_words(value)) <= LONG else "the preset's"
