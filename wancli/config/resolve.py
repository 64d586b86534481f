"""Layers of values merged into checked settings, with the source of each value."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from wancli.config.settings import ALIASES, Group, RolloutSettings, Settings, WhenUnset
from wancli.errors import SettingsError, closest, must_be, shortened
from wancli.utils.units import bounds_in_words

TUNED_FOR = "tuned_for"  # table of a preset file that is not settings; see Layer
EXPLICIT = ("flag", "argument")  # sources of settings of this request alone: shell, Python
ADAPTED = "adapt"  # source of settings that a job of a batch went on with when memory ran out
SettingsT = TypeVar("SettingsT", bound=Settings)


@dataclass(frozen=True)
class Layer:
    """Values from one source, by table; later layers override earlier ones.

    `tuned_for` has the settings, by dotted key, that its step cache was tuned for.
    """

    source: str
    tables: Mapping[str, Any]
    tuned_for: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolved(Generic[SettingsT]):
    """Settings, and the source of each value by dotted key."""

    settings: SettingsT
    sources: Mapping[str, str]
    tuned_for: Mapping[str, Any] = field(default_factory=dict)  # by dotted key; see check_tuned

    def is_explicit(self, key: str) -> bool:
        """Whether a setting is of this request alone, and of no preset or default."""
        return self.sources.get(key) in EXPLICIT


def fields_of(settings: type[Settings]) -> Iterator[tuple[str | None, str, FieldInfo]]:
    """Yield (table, name, field) of every setting in declaration order; table None is the top."""
    for name, info in settings.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Group):
            for inner, inner_info in info.annotation.model_fields.items():
                yield name, inner, inner_info
        else:
            yield None, name, info


def panel(table: str | None) -> str:
    """Heading of a table in `--help`."""
    return {"prompt_kv": "Prompt K/V"}.get(
        table or "", (table or "sampling").capitalize().replace("_", " ")
    )


def dotted(table: str | None, name: str) -> str:
    """Key of a setting in sources and messages: `sampling.steps`."""
    return f"{table}.{name}" if table else name


def resolve(layers: Sequence[Layer], settings: type[SettingsT]) -> Resolved[SettingsT]:
    """Overlay `layers` on the declared defaults and validate every value.

    Tables of another command, which a preset may have, are checked by name and ignored.
    Raises SettingsError for the first invalid value, under the name that the user set it by.
    """
    merged, sources = overlay(layers, settings)
    tuned_for: dict[str, Any] = {}
    used = {source for key, source in sources.items() if key.startswith("step_cache.")}
    for layer in layers:
        tuned_for |= layer.tuned_for if layer.source in used else {}
    try:
        resolved = Resolved(settings.model_validate(merged), sources, tuned_for)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        mismatch = first["type"] == "string_pattern_mismatch"  # whose regex the hint puts in words
        message = "not of this form" if mismatch else must_be(first["msg"])
        raise SettingsError(
            f"{_spelling(where, sources.get(where, 'settings'))} {shortened(first['input'])}: "
            f"{message}.",
            hint=_range_hint(settings, where),
        ) from None
    check_tuned(tuned_for, resolved.settings)
    return resolved


def overlay(
    layers: Sequence[Layer], settings: type[Settings]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Values by table, not validated, and the source of every setting by dotted key."""
    merged: dict[str, Any] = {}
    sources = {dotted(table, name): "default" for table, name, _ in fields_of(settings)}
    for layer in layers:
        check_names(layer)
        for table, values in layer.tables.items():
            if table not in settings.model_fields:
                continue
            for name, value in values.items() if isinstance(values, Mapping) else [(None, values)]:
                if name is None:
                    merged[table] = value
                else:
                    merged.setdefault(table, {})[name] = value
                sources[f"{table}.{name}" if name else table] = layer.source
    return merged, sources


def check_tuned(tuned_for: Mapping[str, Any], settings: Settings) -> None:
    """Raise SettingsError if a step cache is used with settings that it was not tuned for.

    Thresholds do not transfer. Values of "auto" are checked again when the device is known.
    """
    values = settings.model_dump()
    for key, wanted in tuned_for.items():
        table, _, name = key.rpartition(".")
        value = toml_value((values.get(table, {}) if table else values).get(name))
        if key == "machine.device":
            value = str(value).partition(":")[0]
        if value not in (wanted, "auto"):
            raise SettingsError(
                f"this step cache was tuned for {key} {wanted}, not {value}.",
                hint="wancli bench --tune under these settings, or drop the preset",
            )


def toml_value(value: Any) -> Any:
    """A setting as TOML can store it: None as "none", a list joined by commas."""
    if isinstance(value, list | tuple):
        return ",".join(value) or "none"
    return "none" if value is None else value


def check_names(layer: Layer) -> None:
    """Raise SettingsError for an unknown table or key, with the closest one as hint."""
    known: dict[str | None, list[str]] = {}
    for table, name, _ in fields_of(RolloutSettings):
        known.setdefault(table, []).append(name)
    for table, values in layer.tables.items():
        if table not in known and table not in known[None]:
            hint = _table_hint(table, known)
            raise SettingsError(f"{layer.source}: unknown key '{table}'.", hint=hint)
        if table in known[None] and not isinstance(values, str):
            raise SettingsError(f"{layer.source}: '{table}' must be text.", hint=f'{table} = "..."')
        if table in known:
            _check_table(layer.source, table, values, known[table])


def _check_table(source: str, table: str, values: Any, known: Sequence[str]) -> None:
    if not isinstance(values, Mapping):
        raise SettingsError(f"{source}: '{table}' is a table, not a value.", hint=f"[{table}]")
    for name in values:
        if name not in known:
            raise SettingsError(
                f"{source}: [{table}] unknown key '{name}'.", hint=_closest_hint(name, known)
            )


def _table_hint(name: str, known: Mapping[str | None, list[str]]) -> str:
    """Hint for an unknown top-level key."""
    homes = [table for table, names in known.items() if table and name in names]
    if homes:
        return f"put it under [{homes[0]}]"
    return _closest_hint(name, [*known[None], *filter(None, known)])


def closest_setting(name: str, known: Collection[str]) -> str | None:
    """The known setting that a name stands for in the field or, failing that, resembles."""
    other = ALIASES.get(name)
    return other if other in known else closest(name, known)


def _closest_hint(name: str, known: Sequence[str]) -> str:
    match = closest_setting(name, known)
    return f"did you mean '{match}'?" if match else f"known: {', '.join(known)}"


def _spelling(where: str, source: str) -> str:
    return f"`{where.split('.')[-1]}`" if source in EXPLICIT else f"{source}: {where}"


def _range_hint(settings: type[Settings], where: str) -> str:
    for table, name, info in fields_of(settings):
        if dotted(table, name) == where:
            bounds = f" ({limits(info)})" if limits(info) else ""
            return f"`{name}`: {info.description}{bounds}"
    return "wancli generate --help"


def limits(field: FieldInfo) -> str:
    """Bounds of a setting in words: "1 to 1000"; "" without any."""
    rules = {
        name: value
        for rule in field.metadata
        for name in ("ge", "gt", "lt", "le")
        if (value := getattr(rule, name, None)) is not None
    }
    return bounds_in_words(**rules)


def when_unset(field: FieldInfo) -> str:
    """What applies where a setting is unset: "the model's"; "" if nothing is said."""
    return next((rule.words for rule in field.metadata if isinstance(rule, WhenUnset)), "")
