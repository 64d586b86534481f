"""A job of a batch as a request: its keys, its files, its plan."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from wancli.api.keywords import (
    ChunkOptions,
    ClipOptions,
    CommonOptions,
    GenerateKeywords,
    RolloutKeywords,
)
from wancli.api.requests import Listener, all_layers, plan_clip, rollout_request
from wancli.catalog.random import known_spec
from wancli.catalog.tasks import of_expert
from wancli.config.keywords import MachineSettings, keyword_layer
from wancli.config.resolve import ADAPTED, Layer
from wancli.config.settings import WEIGHTS
from wancli.errors import OVERWRITE_HINT, SettingsError, WancliError, must_be, shortened
from wancli.generation.batch import PlannedVideos
from wancli.records.naming import literal
from wancli.rollouts.session import RolloutSession, open_session
from wancli.utils.reading import user_path

# The batch itself says whether and where a job is done.
_NOT_IN_A_BATCH = {"resume", "rerender", "skip_existing", "preview_every"}
JOB_KEYS = {
    "generate": {*GenerateKeywords.__optional_keys__, "model"} - _NOT_IN_A_BATCH,
    "rollout": {*RolloutKeywords.__optional_keys__, "model"} - _NOT_IN_A_BATCH,
}
JOB_KEYS["repro"] = {"file", *JOB_KEYS["generate"], *JOB_KEYS["rollout"]}
# What a model is loaded with.
LOADED_WITH = {
    *MachineSettings.__optional_keys__, "model", "preset", "cachedit_preset", "task", ADAPTED
}  # fmt: skip
OUTPUTS = ("save_latents", "report")  # besides the video
REPLACES = "the key overwrite of a job in JSON, CSV or TOML replaces it"
_OPTIONS: dict[str, Any] = {
    **CommonOptions.__annotations__, **ClipOptions.__annotations__, **ChunkOptions.__annotations__
}  # fmt: skip
_INPUTS = {name for name, kind in _OPTIONS.items() if Path in get_args(kind)} - {*OUTPUTS}
_PRESETS = ("preset", "cachedit_preset")  # each a name, or a file
_TYPES = {**_OPTIONS, **dict.fromkeys(("model", *_PRESETS), str)}
_WEIGHTS = ("model", "lora", *WEIGHTS)


def loaded_with(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the model of a job is loaded with."""
    return {name: value for name, value in values.items() if name in LOADED_WITH}


def job_layers(values: Mapping[str, Any], listener: Listener) -> tuple[list[Layer], dict[str, Any]]:
    """All layers of settings of a job, on top those it adapted; and its other options."""
    layers, options = all_layers(values, listener)
    return [*layers, keyword_layer(ADAPTED, options.pop(ADAPTED, {}))], options


def adapted(values: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a job that goes on with other settings: its own stay beside them."""
    return {**values, ADAPTED: {**values.get(ADAPTED, {}), **change}}


def plan_job(
    command: str, prompt: str | None, values: Mapping[str, Any], listener: Listener, *,
    seed: int | None = 0, output: str | Path | None = None,
) -> PlannedVideos | RolloutSession:  # fmt: skip
    """Plan a job; without an `output`, which is final, all but its files. Raises WancliError."""
    layers, options = job_layers(values, listener)
    name = None if output is None else literal(output)
    if command == "rollout":
        request = rollout_request(prompt, options, seed=seed, output=name or "x.mp4")
        return open_session(request, lambda: layers, list)
    return plan_clip(prompt or "", layers, options, seed=seed, output=name)


def for_a_job(error: WancliError) -> WancliError:
    """An error whose hint has the key of a job, where that of a single command has a flag."""
    instead = f"{REPLACES}; or another output"
    error.hint = error.hint.replace(OVERWRITE_HINT, instead)
    return error


def with_files(values: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """The values of a job with the final names of its files besides the video."""
    return {**values, **{name: literal(path) for name, path in files.items()}}


def typed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a job with its options as their types (in CSV all are text) and `~` expanded.

    Raises SettingsError.
    """
    options = {}
    for name in _TYPES.keys() & values.keys():
        if "\0" in str(values[name]):
            raise SettingsError(f"`{name}` has a NUL character.", hint="check the path")
        try:
            options[name] = TypeAdapter(_TYPES[name]).validate_python(values[name])
        except ValidationError as error:
            message = must_be(error.errors()[0]["msg"])
            raise SettingsError(
                f"`{name}` {shortened(values[name])}: {message}.", hint=f"drop `{name}`, or fix it"
            ) from None
    named = (_INPUTS | {*_PRESETS}) & options.keys()
    files = {name: _each(options[name], _expanded) for name in named}
    return {**values, **options, **files}


def input_files(values: Mapping[str, Any]) -> Iterator[Path]:
    """The input files among the values of a job."""
    for name in _INPUTS & values.keys():
        value = values[name]
        yield from map(user_path, value if isinstance(value, list | tuple) else [value])


def absolute_files(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a job with absolute paths: relative ones are from the working folder."""
    changed = {name: _each(values[name], _absolute) for name in _INPUTS & values.keys()}
    weights = {name: _each(values[name], _absolute_weights) for name in _WEIGHTS if name in values}
    for name in _PRESETS:
        if str(values.get(name, "")).endswith(".toml"):  # else it is a name
            changed[name] = _absolute(values[name])
    return {**values, **changed, **weights}


def _each(value: Any, change: Callable[[str], str]) -> Any:
    return [change(one) for one in value] if isinstance(value, list | tuple) else change(value)


def _expanded(path: str) -> str:
    return str(user_path(path))


def _absolute(path: str) -> str:
    return str(Path(path).absolute())


def _absolute_weights(text: str) -> str:
    """`FILE`, `FILE@high` or `FILE=0.8` with an absolute FILE, unless it names something else."""
    unscaled = text.rpartition("=")[0]
    files = {text, unscaled, of_expert(text)[0], of_expert(unscaled)[0]} - {""}
    here = any(user_path(file).exists() for file in files)
    return str(user_path(text).absolute()) if here and known_spec(text) is None else text
