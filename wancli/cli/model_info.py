"""`wancli model info`: a model, a LoRA or a file of weights, by what its files say."""

from pathlib import Path
from typing import TYPE_CHECKING

from wancli.catalog.hub_cache import absent, cached_file, hub_file
from wancli.catalog.model_folders import find_file, find_named
from wancli.catalog.specs import SPECS
from wancli.catalog.tiny_decoder import DECODER
from wancli.cli.messages import with_flags
from wancli.cli.options import ModelName, OutputOptions, takes_output_options
from wancli.cli.screen import Screen
from wancli.config.settings import WEIGHTS
from wancli.errors import missing, some
from wancli.planning.distilled import preset_of
from wancli.planning.lora import find_lora, is_lora
from wancli.utils.reading import user_path
from wancli.utils.units import gib

if TYPE_CHECKING:
    from wancli.models.inspect import ModelInfo


@takes_output_options
def info(name: ModelName, output_options: OutputOptions) -> None:
    """Describe a model (task, parts, parameters, whether it fits here), or a LoRA or GGUF file."""
    if weights := _weights_file(name):
        _show_weights(weights, Screen(output_options))
        return
    if is_lora(name):
        _show_lora(name, Screen(output_options))
        return
    from wancli.cli.plan_table import default_json
    from wancli.cost.capacity import check_default_capacity
    from wancli.models.inspect import inspect_model

    model, screen = inspect_model(name), Screen(output_options)
    if model.spec.on_hub and model.spec.name not in SPECS:
        raise absent(name)
    if model.missing:
        lacks = some(model.missing, most=3)
        screen.warn(f"{name} is incomplete: it lacks {lacks}.", hint=f"wancli model pull {name}")
    capacity = check_default_capacity(name, model.spec).capacity
    if output_options.json:
        screen.json(model.as_json() | default_json(capacity))
        return
    verdict = [("on this machine", with_flags(capacity.verdict))] if capacity.estimate else []
    screen.table("", "", rows=[*_facts(model), *verdict])
    if model.parts:
        rows = [
            (
                p.name,
                p.kind,
                f"{p.parameters:,}" if p.parameters else "",
                ", ".join(p.dtypes),
                gib(p.bytes) if p.bytes else "",
            )
            for p in model.parts
        ]
        columns = ("parameters", "size")
        screen.table("part", "class", "parameters", "dtype", "size", rows=rows, right=columns)


def _facts(model: "ModelInfo") -> list[tuple[str, ...]]:
    spec = model.spec
    strides = spec.strides
    causal = {True: "yes", False: "no", None: "unknown"}[spec.causal]
    facts = {
        "name": spec.name,
        "repo": spec.repo,
        "checkpoint": f"{spec.checkpoint.repo}:{spec.checkpoint.file}" if spec.checkpoint else "",
        "folder": "" if spec.random else str(spec.folder or "not on this machine"),
        "description": spec.description,
        "draws": spec.draws,
        "task": ", ".join(spec.tasks),
        "causal": causal,
        "strides": f"{strides.temporal} video frames, {strides.spatial} pixels a latent; "
        f"{strides.patch}x{strides.patch} latents a token",
        "latent channels": str(spec.latent_channels),
        "text tokens": str(spec.text_length),
        "blocks": f"{spec.layers} of dim {spec.dim}" if spec.layers else "",
        "experts": str(spec.experts),
        "parameters": f"{model.parameters:,}" if model.parts else "",
        "size": gib(model.bytes) if model.bytes else "",
    }
    return [(name, fact) for name, fact in facts.items() if fact]


def _show_lora(name: str, screen: Screen) -> None:
    """Describe a LoRA by the header of its file."""
    from wancli.models.inspect import inspect_lora

    lora = inspect_lora(find_lora(name).path)
    preset = preset_of(lora.path)
    if screen.options.json:
        screen.json(lora.as_json() | {"preset": preset})
        return
    facts = {
        "file": str(lora.path),
        "form": lora.form,
        "keys": f"{lora.keys:,}",
        "layers": f"{lora.layers:,}",
        "rank": ", ".join(map(str, lora.ranks)),
        "size": lora.size,
        "blocks": f"{lora.blocks} of dim {lora.dim}" if lora.dim else str(lora.blocks or ""),
        "task": lora.task,
        "expert": lora.expert and f"{lora.expert} noise, by its name",
        "fits": ", ".join(lora.models) or "no known model",
        "preset": preset and f"{preset}, with what it was distilled for",
        "first keys": ", ".join(lora.first_keys),
        "on disk": gib(lora.bytes),
    }
    screen.table("", "", rows=[(fact, value) for fact, value in facts.items() if value])


def _weights_file(name: str) -> Path | None:
    """The file of weights, and of no LoRA, that a name stands for; None for any other name.

    Raises ModelError or InputError for a GGUF file that is not there: no model or LoRA is one.
    """
    from wancli.models.weight_summary import READ, summarize_weights

    path = user_path(name)
    if not path.is_file():
        setting = next((part for part in (*WEIGHTS, DECODER) if find_named(part, name)), None)
        path = find_file(setting, name) if setting else path
    if on_hub := hub_file(name):
        path = cached_file(*on_hub) or path
    if path.suffix == ".gguf":
        if not path.exists():
            raise absent(name, kind="file") if on_hub else missing("file", path)
        return path
    if path.suffix not in READ or not path.is_file():
        return None
    summary = summarize_weights(path)
    broken = summary.problem and not summary.parts
    return path if broken or {*summary.parts} - {"lora"} else None


def _show_weights(path: Path, screen: Screen) -> None:
    """Describe a file of weights by its header."""
    from wancli.models.inspect import inspect_weights

    weights = inspect_weights(path)
    if screen.options.json:
        screen.json(weights.as_json())
        return
    facts = {
        "file": str(path),
        "architecture": weights.kind,
        "part": weights.part.replace("_", " ") or "none of a Wan",
        "keys": f"{weights.keys:,}",
        "parameters": f"{weights.parameters:,}",
        "types": ", ".join(f"{count:,} {dtype}" for dtype, count in weights.dtypes.items()),
        "size": weights.size,
        "blocks": f"{weights.blocks} of dim {weights.dim}" if weights.blocks else "",
        "task": weights.task,
        "expert": weights.expert and f"{weights.expert} noise, by its name",
        "fits": ", ".join(weights.models)
        or ("no known model" if weights.part == "transformer" else ""),
        "on disk": gib(weights.bytes),
    }
    screen.table("", "", rows=[(fact, value) for fact, value in facts.items() if value])
