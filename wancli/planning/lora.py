"""LoRA files with their scale, which expert they are for, and what their keys do to a model."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import isfinite, prod
from pathlib import Path, PurePath

from wancli.catalog.hub_cache import absent, cached_file, hub_file
from wancli.catalog.local import revision
from wancli.catalog.model_folders import find_file, find_named, find_on_hub
from wancli.catalog.specs import ModelSpec
from wancli.catalog.tasks import EXPERTS, of_expert
from wancli.catalog.wan_layers import parameter_shapes
from wancli.catalog.weight_files import block_of, check_expert, read_weight_keys
from wancli.errors import (
    InputError,
    ModelError,
    SettingsError,
    SetupError,
    missing,
)
from wancli.planning.lora_keys import (
    PICKLES,
    LoraFile,
    LoraFit,
    check_fit,
    check_packed_layers,
    fit_lora,
    has_header,
    read_lora_file,
    weight_name,
)
from wancli.records.progress import Observer
from wancli.utils.reading import check_tensors, open_file, unreadable, user_path

_DEMO = Path(__file__).parents[1] / "demo" / "loras"
PACKAGED = {path.stem: path for path in _DEMO.glob("*.safetensors")}  # LoRAs known by name


@dataclass(frozen=True)
class Lora:
    """A LoRA file, its scale, and the expert it applies to."""

    path: Path
    scale: float = 1.0
    expert: str = ""  # high or low; "" for a single expert


@dataclass(frozen=True)
class LoraUse:
    """How many keys of a LoRA are applied to a model and how many not, by reason."""

    name: str  # of its file, with its expert
    scale: float
    keys: int | None = None  # None: not known before it loads
    applied: int | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def counts(self) -> str:
        """How many keys are applied."""
        if self.keys is None:
            return "keys are counted when it loads"
        return f"{self.applied:,} of {self.keys:,} keys applied"

    @property
    def drops(self) -> str:
        """How many keys are dropped, and why; empty if none."""
        return ", ".join(f"{count:,} dropped ({why})" for why, count in self.dropped.items())


def find_lora(text: str) -> Lora:
    """Parse `PATH` or `PATH=SCALE`, with `@high` or `@low` after PATH for one of two experts.

    PATH may be REPO:FILE in the hub's cache or, by the name of FILE, in WANCLI_MODEL_PATH, the name
    of a packaged LoRA, or of a file in WANCLI_MODEL_PATH, in this order, unless a file has that
    name.

    Raises InputError for a missing file, ModelError for one of the hub that is not downloaded,
    SettingsError for a bad scale.
    """
    name, expert, scale = _split(text)
    try:
        lora = Lora(_place(name), float(scale), expert)
        if not isfinite(lora.scale):
            raise ValueError
    except ValueError:
        raise SettingsError(
            f"`lora {text}`: {scale!r} is not a scale.", hint=f"{text.rpartition('=')[0]}=0.8"
        ) from None
    if not lora.path.is_file():
        raise missing("LoRA", lora.path)
    return lora


def _split(text: str) -> tuple[str, str, str]:
    """The name, the expert and the scale in the text of a LoRA."""
    path, scale = text, "1"
    if "=" in text and not Path(of_expert(text)[0]).exists():
        path, _, scale = text.rpartition("=")
    return (*of_expert(path), scale)


def is_lora(name: str) -> bool:
    """Whether a name is that of a LoRA and not of a model: a file, packaged, or REPO:FILE."""
    path = user_path(name)
    is_file = path.suffix in (".safetensors", *PICKLES) and (
        path.is_file() or bool(find_named("lora", name))
    )
    return is_file or name in PACKAGED or hub_file(name) is not None


def _place(name: str) -> Path:
    path = user_path(name)
    if path.exists():
        return path
    if on_hub := hub_file(name):
        return find_on_hub("lora", *on_hub) or cached_lora(*on_hub)
    return PACKAGED.get(name) or find_file("lora", name, kind="LoRA")


def cached_lora(repo: str, file: str) -> Path:
    """The file in the hub's cache. Raises ModelError if it is not there."""
    path = cached_file(repo, file)
    if path is None:
        raise absent(f"{repo}:{file}", kind="LoRA")
    return path


def check_loras(texts: Sequence[str], spec: ModelSpec) -> tuple[LoraUse, ...]:
    """What the keys of each LoRA do to a model, from the headers of its files.

    Raises InputError for a file that is missing or broken, PlanError for a wrong expert, ModelError
    for a LoRA of another model.
    """
    return tuple(_check_lora(find_lora(text), spec) for text in texts)


def _check_lora(lora: Lora, spec: ModelSpec) -> LoraUse:
    check_expert(spec, "lora", lora.path, lora.expert)
    check_lora_file(lora.path)
    part = EXPERTS[lora.expert or "high"]
    name = f"{lora.path.name}@{lora.expert}" if lora.expert else lora.path.name
    read = _fit_of(lora, spec)
    if read is None:
        return LoraUse(name, lora.scale)
    file, fit = read
    check_packed_layers(file, fit, _packed_names(spec, part))
    return LoraUse(name, lora.scale, len(file.shapes), fit.applied, fit.dropped)


def _fit_of(lora: Lora, spec: ModelSpec) -> tuple[LoraFile, LoraFit] | None:
    """A LoRA's file, and what becomes of its keys; None where that is not known in a plan."""
    if not has_header(lora.path):
        return None
    state = lora.path.stat()
    part = EXPERTS[lora.expert or "high"]
    return _fit(lora.path, (state.st_mtime_ns, state.st_size), spec, part)


@lru_cache(maxsize=16)  # a request is planned several times
def _fit(
    path: Path, _state: tuple[int, int], spec: ModelSpec, part: str
) -> tuple[LoraFile, LoraFit] | None:
    lora, parameters = read_lora_file(path), parameter_shapes(spec, part)
    if parameters is None:
        return None
    fit = fit_lora(lora, parameters)
    check_fit(lora, fit, spec.name)
    return lora, fit


@lru_cache(maxsize=16)
def _packed_names(spec: ModelSpec, part: str) -> frozenset[str]:
    """Names of the weights of a part that stay quantized."""
    file = spec.file_of(part)
    packed = read_weight_keys(file.path, spec, part).packed() if file and file.packed else ()
    return frozenset(packed)


def count_beside(spec: ModelSpec, texts: Sequence[str]) -> ModelSpec:
    """The spec with the parameters of LoRAs beside its quantized weights."""
    loras = [find_lora(text) for text in texts] if any(f.packed for f in spec.files) else []
    files = []
    for file in spec.files:
        own = [lora for lora in loras if EXPERTS[lora.expert or "high"] == file.part]
        counts = sum((_beside(lora, spec, file.part) for lora in own), Counter[str]())
        packed = (replace(each, beside=counts[each.block]) for each in file.packed)
        files.append(replace(file, packed=tuple(packed)))
    return replace(spec, files=tuple(files))


def _beside(lora: Lora, spec: ModelSpec, part: str) -> Counter[str]:
    """Number of a LoRA's parameters that are not merged, by block."""
    read, packed = _fit_of(lora, spec), _packed_names(spec, part)
    counts: Counter[str] = Counter()
    if read is None:
        return counts
    file, fit = read
    for layer, keys in fit.layers.items():
        if weight_name(layer) in packed and "up" in keys:
            factors = (file.shapes[keys[kind]] for kind in ("up", "down"))
            counts[block_of(layer)] += sum(map(prod, factors))
    return counts


def merged_revision(spec: ModelSpec, texts: Sequence[str]) -> str:
    """Identify a model's weights with LoRAs merged: the model's revision, then each LoRA's digest.

    A digest covers the size and the first MiB of the file, which holds the header.
    """
    return "+".join([revision(spec), *(_digest(find_lora(text).path) for text in texts)])


def find_recorded_loras(texts: Sequence[str], revision: str, record: Path) -> tuple[str, ...]:
    """The LoRAs of a record where they are now, by their digests in its `revision`.

    Each is as it was typed, else beside the record or in WANCLI_MODEL_PATH. Raises InputError or
    ModelError for one that is missing or has changed.
    """
    _, *digests = revision.split("+")
    if len(digests) != len(texts):  # of an earlier version
        return tuple(texts)
    return tuple(_recorded(*pair, record) for pair in zip(texts, digests, strict=True))


def _recorded(text: str, digest: str, record: Path) -> str:
    typed, *_ = _split(text)
    name = PurePath(typed.rpartition(":")[2]).name
    error: SetupError = InputError(
        f"{record} was made with the LoRA {name}, which is missing or has changed.",
        hint=f"put the original {name} beside it, or give `lora` FILE",
    )
    try:
        if _digest(_place(typed)) == digest:
            return text
    except ModelError as not_pulled:
        error = not_pulled
    except (InputError, SettingsError, OSError):
        pass
    for path in (record.parent / name, *find_named("lora", name)):
        if path.is_file() and _digest(path) == digest:
            return f"{path}{text.removeprefix(typed)}"
    raise error


def _digest(path: Path) -> str:
    with open_file(path) as file:
        return hashlib.sha256(b"%d " % path.stat().st_size + file.read(2**20)).hexdigest()[:16]


def report_loras(uses: Sequence[LoraUse], observer: Observer) -> None:
    """Note what is not applied, of each LoRA of which anything is dropped."""
    for use in uses:
        if use.dropped:
            observer.note(f"LoRA {use.name}: {use.counts}, {use.drops}")


def check_lora_file(path: Path) -> None:
    """Raise InputError unless the file is safetensors or a torch pickle."""
    try:
        check_tensors(path)
    except (OSError, ValueError) as error:
        raise unreadable(
            path, error, hint="give a LoRA in a .safetensors or .pt file, or copy it again"
        ) from None
