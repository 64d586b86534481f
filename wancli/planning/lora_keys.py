"""Account for every key of a LoRA file (arXiv:2106.09685): applied, dropped, or why it is refused.

Files of the trainers and tools differ in three things: prefixes, names of layers, names of factors.
Keys that are not factors hold a difference of a whole parameter (`diff`, `w_norm`: weights;
`diff_b`, `b_norm`: biases; `diff_m`: a block's modulation).
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod, sqrt
from pathlib import Path
from typing import Any

from wancli.catalog.specs import SPECS
from wancli.catalog.wan import Architecture
from wancli.catalog.wan_layers import (
    IMAGE,
    Shape,
    Shapes,
    layer_name,
    strip_wrappers,
    wan_parameters,
)
from wancli.errors import ModelError, shortened, some
from wancli.utils.pickles import is_zip, read_pickle_header
from wancli.utils.reading import parse_json, read_header, read_json, unreadable

PICKLES = (".pt", ".pth", ".bin", ".ckpt")  # suffixes of what torch.save writes
HINT = "wancli model info FILE says which model a LoRA is for"
PREFIX = (  # of the keys of LoRAs
    r"(?:base_model\.model\.|diffusion_model\.|model\.|transformer\.|pipe\.dit\.|dit\.|unet\.|"
    r"lora_unet_+|lora_transformer_)"
)
_PREFIX = re.compile(f"^{PREFIX}+")
_OF_TEXT = re.compile(r"^(?:base_model\.model\.)?(?:lora_te\d?_|text_encoders?[._])")
_KEY = re.compile(
    r"(?P<layer>.+?)\."
    r"(?:lora(?:_linear_layer)?[._](?P<factor>A|B|down|up)(?:\.\w+)?\.(?P<of>weight|bias)|"
    r"(?P<other>alpha|diff|diff_b|diff_m|w_norm|b_norm))"
)
_FACTORS = {
    ("A", "weight"): "down",
    ("down", "weight"): "down",
    ("B", "weight"): "up",
    ("up", "weight"): "up",
    ("B", "bias"): "up_bias",
    ("up", "bias"): "up_bias",
}
_OTHERS = {"w_norm": "diff", "b_norm": "diff_b", "diff_m": "diff"}
# What is not merged as W + B A, by a word in its keys.
_REFUSED = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_mid": "LoCon with a middle factor",
    "reshape_weight": "LoRA that reshapes a layer",
    "set_weight": "patch that replaces weights",
}
# Layers that not every model has.
_OPTIONAL = {
    "image layers": re.compile(rf"{re.escape(IMAGE)}|.*\.attn2\.(?:add_[kv]_proj|norm_added_k)$"),
    "VACE layers": re.compile(r"vace_"),
    "face layers": re.compile(r"face_|motion_encoder|pose_patch_embedding"),
}
_TEXT_LAYERS, _INPUT_LAYER = "text encoder layers", "the input layer, of other channels"
_MORE_BLOCKS = "blocks beyond the model's last"
_BARE = ("scale_shift_table", "pos_embed")  # parameters that are not a layer's weight
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class LoraFile:
    """A parsed LoRA: its keys by layer (diffusers' name) and by what they hold.

    A layer's keys are `down`, `up` and `up_bias`, `alpha`, `diff` and `diff_b`.
    """

    path: Path
    shapes: Shapes  # of every key
    layers: Mapping[str, Mapping[str, str]]
    text_keys: int = 0  # keys of text encoders
    stated_alpha: float | None = None  # of all layers without a key of their own
    rank_stabilized: bool = False  # alpha / sqrt(rank), arXiv:2312.03732

    def scaling(self, layer: str, alpha: float | None) -> float:
        """The factor of a layer's product, for the value of its `alpha` key if it has one."""
        rank = self.shapes[self.layers[layer]["down"]][0]
        if alpha is None and self.stated_alpha is None:
            return 1.0
        if alpha is not None:
            return alpha / rank
        return (self.stated_alpha or 0.0) / (sqrt(rank) if self.rank_stabilized else rank)

    @cached_property
    def ranks(self) -> dict[int, int]:
        """Number of layers by rank, the most common first."""
        downs = [keys["down"] for keys in self.layers.values() if "down" in keys]
        return dict(Counter(self.shapes[key][0] for key in downs).most_common())


@dataclass(frozen=True)
class LoraFit:
    """What becomes of a LoRA's keys on one transformer."""

    layers: Mapping[str, Mapping[str, str]]  # applied
    dropped: Mapping[str, int] = field(default_factory=dict)  # keys by reason
    misfits: tuple[str, ...] = ()  # layers of another shape, or that no Wan has

    @property
    def applied(self) -> int:
        """Number of keys applied."""
        return sum(map(len, self.layers.values()))


def has_header(path: Path) -> bool:
    """Whether a file's keys can be read without its tensors: not in those of torch before 1.6."""
    return path.suffix == ".safetensors" or is_zip(path)


def read_lora_file(path: Path) -> LoraFile:
    """Parse the header of a LoRA, .safetensors or a pickle. Raises InputError or ModelError."""
    try:
        is_safe = path.suffix == ".safetensors"
        header = read_header(path) if is_safe else read_pickle_header(path)
        described = header.metadata.get("lora_adapter_metadata")  # of diffusers
        beside = path.with_name("adapter_config.json")  # of peft
        config: dict[str, Any] = parse_json(described) if described else {}
        if not config and path.stem == "adapter_model" and beside.is_file():
            config = read_json(beside)
    except (OSError, ValueError) as error:
        raise unreadable(path, error, hint="copy that file again") from None
    for key, stored in header.tensors.items():
        if stored.dtype not in (*_FLOATS, *(("I64", "I32") if key.endswith(".alpha") else ())):
            raise ModelError(
                f"LoRA {path}: {shortened(key)} is {stored.dtype}, which is not merged.",
                hint="give it in 32, 16 or 8 bit floats",
            )
    shapes = {name: stored.shape for name, stored in header.tensors.items()}
    return parse_lora(path, shapes, {k.removeprefix("transformer."): v for k, v in config.items()})


def parse_lora(path: Path, shapes: Shapes, config: Mapping[str, Any]) -> LoraFile:
    """Sort the keys of a LoRA; `config` is peft's, if known. Raises ModelError for other files."""
    _check_kind(path, shapes, config)
    of_text = {key for key in shapes if _OF_TEXT.match(key)}
    layers: dict[str, dict[str, str]] = {}
    others = []
    for key in sorted(shapes.keys() - of_text):
        layer, kind = _parse_key(key)
        if not kind or kind in layers.get(layer, {}):
            others.append(key)
        else:
            layers.setdefault(layer, {})[kind] = key
    if not any({"up", "diff", "diff_b"} & keys.keys() for keys in layers.values()):
        raise ModelError(f"{path} holds no LoRA.", hint="give the file of a LoRA")
    if others:
        raise ModelError(
            f"LoRA {path} has unknown keys: {some([*map(shortened, sorted(others))], most=3)}.",
            hint=HINT,
        )
    for layer, keys in layers.items():
        _check_factors(path, layer, keys, shapes)
    alpha = config.get("lora_alpha")
    stated = float(alpha) if isinstance(alpha, int | float) else None
    rank_stabilized = config.get("use_rslora") is True
    return LoraFile(path, shapes, layers, len(of_text), stated, rank_stabilized)


def _check_kind(path: Path, keys: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raise ModelError for a relative of LoRA that is not merged as W + B A."""
    kind = refused_kind("\n".join(keys)) or ("DoRA" if config.get("use_dora") else "")
    if config.get("alpha_pattern"):
        kind = "LoRA with an alpha_pattern"
    if kind:
        raise ModelError(
            f"{path} is a {kind}, which is not supported.",
            hint="give a plain LoRA, or merge it into the model's weights first",
        )


def refused_kind(keys: str) -> str:
    """Which relative of LoRA, not merged as W + B A, has keys such as these; "" for a LoRA."""
    return next((kind for word, kind in _REFUSED.items() if f".{word}" in keys), "")


def _parse_key(key: str) -> tuple[str, str]:
    """The layer of a key (diffusers' name), and what it holds; "" for a key of no LoRA."""
    match = _KEY.fullmatch(_PREFIX.sub("", strip_wrappers(key)))
    if match is None:
        return key, ""
    layer, other = match["layer"], match["other"]
    if other == "diff_m":
        layer += ".modulation"
    if other:
        return layer_name(layer), _OTHERS.get(other, other)
    return layer_name(layer), _FACTORS.get((match["factor"], match["of"]), "")


def _check_factors(path: Path, layer: str, keys: Mapping[str, str], shapes: Shapes) -> None:
    """Raise ModelError unless both factors are there and can be multiplied, and alpha is one."""
    if "img_attn_qkv" in layer:
        raise ModelError(
            f"LoRA {path} is in HunyuanVideo's original naming, with fused layers.",
            hint="give it in diffusers' naming",
        )
    down, up, alpha = (shapes[keys[n]] if n in keys else None for n in ("down", "up", "alpha"))
    if (down is None) != (up is None) or (up is None and {"alpha", "up_bias"} & keys.keys()):
        raise ModelError(f"LoRA {path} lacks a factor of {layer}.", hint=HINT)
    pair = not (down and up) or (len(down) > 1 and prod(up[1:]) == down[0] and 0 not in down)
    if not pair or (down == () or up == ()) or (alpha is not None and prod(alpha) != 1):
        raise ModelError(
            f"LoRA {path}: factors {[*(up or ())]} and {[*(down or ())]} of {layer} do not "
            "multiply.",
            hint="copy that file again",
        )


def fit_lora(lora: LoraFile, parameters: Shapes) -> LoraFit:
    """Match a LoRA to the parameters of a transformer, by diffusers' names."""
    applied: dict[str, Mapping[str, str]] = {}
    dropped: Counter[str] = Counter({_TEXT_LAYERS: lora.text_keys} if lora.text_keys else {})
    blocks = count_blocks(parameters)
    misfits = []
    for layer, keys in lora.layers.items():
        changes = changed_shapes(lora, layer)
        if all(parameters.get(name) == shape for name, shape in changes):
            applied[layer] = keys
        elif reason := _why_dropped(layer, parameters, blocks):
            dropped[reason] += len(keys)
        else:
            name, shape = next((n, s) for n, s in changes if parameters.get(n) != s)
            own = parameters.get(name)
            key = next(iter(keys.values()))
            lacks = f"the model has no layer '{name.removesuffix('.weight')}' ({key} in the file)"
            misfits.append(f"{name} {[*shape]}, not {[*own]}" if own else lacks)
    counts = sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    return LoraFit(applied, dict(counts), tuple(misfits))


def weight_name(layer: str) -> str:
    """The parameter that a layer's factors change; some parameters have no layer."""
    return layer if layer.rpartition(".")[2] in _BARE else f"{layer}.weight"


def changed_shapes(lora: LoraFile, layer: str) -> list[tuple[str, Shape]]:
    """Parameters that a layer's keys change, its weight or its bias, each with the shape added."""
    keys, shapes = lora.layers[layer], lora.shapes
    weight, bias = weight_name(layer), f"{layer}.bias"
    kinds = (("diff", weight), ("diff_b", bias), ("up_bias", bias))
    changes = [(name, shapes[keys[kind]]) for kind, name in kinds if kind in keys]
    if "up" in keys:
        changes.append((weight, (shapes[keys["up"]][0], *shapes[keys["down"]][1:])))
    return changes


def _why_dropped(layer: str, parameters: Shapes, blocks: int) -> str:
    """Why a layer that does not fit may be left out; "" if it may not."""
    has = any(f"{layer}{end}" in parameters for end in ("", ".weight", ".bias"))
    if has:
        return _INPUT_LAYER if layer == "patch_embedding" else ""
    for reason, pattern in _OPTIONAL.items():
        if pattern.match(layer):
            return reason
    block = re.match(r"blocks\.(\d+)\.", layer)
    return _MORE_BLOCKS if block and int(block[1]) >= blocks > 0 else ""


def count_blocks(names: Iterable[str]) -> int:
    """Number of the last block among names of parameters or layers, plus one."""
    matches = (re.match(r"blocks\.(\d+)\.", name) for name in names)
    return max((int(match[1]) + 1 for match in matches if match), default=0)


def check_fit(lora: LoraFile, fit: LoraFit, model: str) -> None:
    """Raise ModelError for a LoRA of another model."""
    if fit.layers and not fit.misfits:
        return
    known = fitting_models(lora)
    why = fit.misfits[0] if fit.misfits else f"none of its {len(lora.shapes)} keys has a layer"
    raise ModelError(
        f"LoRA {lora.path} is not for {model}: {why}.",
        hint=f"it fits {some(known, most=3)}" if known else HINT,
    )


def check_packed_layers(lora: LoraFile, fit: LoraFit, packed: Collection[str]) -> None:
    """Raise ModelError for a difference of a whole weight that is quantized in a GGUF file."""
    for layer, keys in fit.layers.items():
        if "diff" in keys and weight_name(layer) in packed:
            raise ModelError(
                f"LoRA {lora.path} changes the whole of {layer} ({keys['diff']}), a weight that is "
                "quantized.",
                hint="give a `transformer` that is not quantized",
            )


def fitting_models(lora: LoraFile) -> list[str]:
    """Known models that a LoRA fits, with the fewest keys dropped."""
    counts = {}
    for spec in SPECS.values():
        if isinstance(spec.architecture, Architecture):
            fit = fit_lora(lora, wan_parameters(spec.architecture.transformer))
            if fit.layers and not fit.misfits:
                counts[spec.name] = sum(fit.dropped.values())
    return [name for name, count in counts.items() if count == min(counts.values())]
