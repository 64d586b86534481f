"""What files of weights are for, by the names in their headers: a thousand files in seconds."""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from wancli.catalog.file_names import expert_by_name, task_by_name
from wancli.catalog.specs import SPECS
from wancli.catalog.tasks import IMAGE
from wancli.catalog.tiny_decoder import DECODER as TINY_DECODER
from wancli.catalog.tiny_decoder import TinyDecoderShape, tiny_decoder_shape
from wancli.catalog.wan import Architecture
from wancli.catalog.wan_layers import Shape
from wancli.errors import first_line
from wancli.planning.lora_keys import PICKLES, PREFIX, has_header, refused_kind
from wancli.utils.gguf import read_gguf_header
from wancli.utils.pickles import read_pickle_header
from wancli.utils.reading import DTYPE_NAMES, Header, Stored, check_tensors, skim_header

READ = (".safetensors", ".gguf")  # suffixes
UNPICKLED = ("lora", TINY_DECODER)  # settings that take pickles, too
SIZE = r"(?<![\d.])(\d+(?:\.\d+)?)b"  # in the name of a model
# Patterns of names of tensors.
_FACTOR = r"[._]lora(?:_linear_layer)?[._](?:A|B|down|up)[._].*$|\.diff(?:_b)?$"
_DOWN = r"lora(?:_linear_layer)?[._](?:A|down)[._].*weight$"
_UP = r"(?:B|up)[._].*weight$|diff$"
_BLOCK = rf"^{PREFIX}*blocks[._]\d+[._]"
_LAYER = rf"{_BLOCK}(?:self_attn|cross_attn|attn[12]|ffn|norm[123]|modulation)[._]"
_ATTENTION = r"blocks[._]\d+[._](?:self_attn|attn1)[._].*"
_IMAGE = ("_img.", "img_emb", "add_k_proj", "add_v_proj", "image_embedder")  # words
_INPUT = r"(?:^|\.)patch_embedding\.weight$"
_DECODER = r"(?:^|\.)decoder\.(?:conv1|conv_in)\.weight$"
_GAMMA = r"(?:^|\.)decoder\..*\.gamma$"  # only VAEs of Wan's kind have it
_MEMORY_BLOCK = r"^decoder\.\d+\.conv\.4\.weight$"  # of a tiny decoder
_WORDS = r"(?:^|\.)(?:token_embedding|token_embd|shared)\.weight$"
_MATRIX = {  # of each block of a transformer and a text encoder
    "transformer": r"(?:^|\.)blocks\.\d+\.(?:self_attn\.q|attn1\.to_q)\.weight$",
    "vae": _DECODER,
    TINY_DECODER: r"^decoder\.1\.weight$",
    "text_encoder": r"(?:^|\.)(?:blocks\.\d+\.attn\.q|enc\.blk\.\d+\.attn_q|"
    r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.q)\.weight$",
}
_ADDED = (  # words that the names of only some transformers have, in the order of `_kinds_of`
    ("img_emb.", "image_embedder."),
    ("img_emb.emb_pos", "image_embedder.pos_embed"),
    ("vace_patch_embedding.",),
    ("face_adapter.",),
)


@dataclass(frozen=True)
class WeightSummary:
    """What a file of weights is for, as far as its header and its name tell."""

    path: Path
    bytes: int
    parts: tuple[str, ...] = ()  # settings that take it; empty if it is not of a Wan
    dtype: str = ""  # torch's name for that of its first matrix
    models: tuple[str, ...] = ()  # known models whose part it can be; of a LoRA, of its size
    size: str = ""  # 1.3B, 5B or 14B
    task: str = ""
    expert: str = ""  # high or low, by its name
    rank: int = 0  # of a LoRA
    problem: str = ""  # why it cannot be used

    @property
    def description(self) -> str:
        """In one line."""
        rank = f"rank {self.rank}" if self.rank else ""
        noise = self.expert and f"{self.expert} noise"
        return self.problem or ", ".join(filter(None, (rank, self.size, self.task, noise)))

    def as_json(self) -> dict[str, Any]:
        """All fields, and its format."""
        form = self.path.suffix.removeprefix(".")
        return asdict(self) | {"path": str(self.path), "form": form}


class _TensorNames:
    """Search in the names of all tensors of a file, which are one text for speed."""

    def __init__(self, header: Header) -> None:
        self._tensors = header.tensors
        self._text = "\n".join(header.tensors)

    def has(self, pattern: str) -> bool:
        return bool(_compiled(pattern).search(self._text))

    def contain(self, words: Iterable[str]) -> bool:
        return any(word in self._text for word in words)

    def count(self, pattern: str) -> int:
        return len(_compiled(pattern).findall(self._text))

    def shape(self, pattern: str, *, axes: int) -> Shape:
        """Shape of the first tensor whose name matches; zeros if it has fewer axes."""
        shape = stored.shape if (stored := self._first(pattern)) else ()
        return shape if len(shape) >= axes else (0,) * axes

    def dtype(self, pattern: str) -> str:
        """torch's name for the dtype of the first tensor whose name matches."""
        stored = self._first(pattern)
        return DTYPE_NAMES.get(stored.dtype, stored.dtype) if stored else ""

    def tiny_decoder(self) -> TinyDecoderShape | None:
        """Its sizes, if the file holds one."""
        if not self.has(_MEMORY_BLOCK):
            return None
        return tiny_decoder_shape({name: s.shape for name, s in self._tensors.items()})

    def refused(self) -> str:
        return refused_kind(self._text)

    def _first(self, pattern: str) -> Stored | None:
        match = _compiled(f"^.*(?:{pattern})").search(self._text)
        return self._tensors.get(match[0]) if match else None


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.MULTILINE)


def summarize_weights(path: Path) -> WeightSummary:
    """Describe a file of weights by its header; `problem` says what is wrong with a broken one."""
    size = 0
    try:
        size = path.stat().st_size
        names = _TensorNames(_read_header(path))
        return _lora_info(path, size, names) if names.has(_FACTOR) else _info(path, size, names)
    except (OSError, ValueError) as error:
        reason = isinstance(error, OSError) and error.strerror
        return WeightSummary(path, size, problem=reason or first_line(error))


def _read_header(path: Path) -> Header:
    """The tensors of a file of weights. Raises OSError, ValueError."""
    if path.suffix not in PICKLES:
        return read_gguf_header(path) if path.suffix == ".gguf" else skim_header(path)
    check_tensors(path)
    if not has_header(path):
        raise ValueError("a pickle of an old format: its keys are counted as it loads")
    return read_pickle_header(path)


def _info(path: Path, size: int, names: _TensorNames) -> WeightSummary:
    kinds = _kinds(names)
    fitting = {part: _known().get(kind, ()) for part, kind in kinds.items()}
    dtype = next((names.dtype(_MATRIX[part]) for part in kinds), "")
    if "transformer" not in kinds:
        return WeightSummary(path, size, tuple(kinds), dtype, next(iter(fitting.values()), ()))
    expert, models = expert_by_name(path), fitting["transformer"]
    models = tuple(name for name in models if SPECS[name].experts > 1 or not expert) or models
    tasks = {SPECS[name].tasks[0] for name in models}
    return WeightSummary(
        path, size, tuple(kinds), dtype, models, _sizes().get(kinds["transformer"][0], ""),
        tasks.pop() if len(tasks) == 1 else "", expert,
    )  # fmt: skip


def _lora_info(path: Path, size: int, names: _TensorNames) -> WeightSummary:
    if not names.has(_LAYER):
        return WeightSummary(path, size)
    if kind := names.refused():
        return WeightSummary(path, size, ("lora",), problem=f"{kind}, which is not supported")
    dim = names.shape(_ATTENTION + _DOWN, axes=2)[1] or names.shape(_ATTENTION + _UP, axes=1)[0]
    return WeightSummary(
        path, size, ("lora",), names.dtype(_FACTOR),
        tuple(name for name, spec in SPECS.items() if dim and spec.dim == dim),
        _sizes().get(dim, ""),
        IMAGE if names.contain(_IMAGE) else task_by_name(path),
        expert_by_name(path),
        names.shape(_DOWN, axes=1)[0],
    )  # fmt: skip


def _kinds(names: _TensorNames) -> dict[str, tuple[int, ...]]:
    """Sizes by which models differ, of each part of a Wan that a file holds."""
    kinds = {}
    if layers := names.count(_MATRIX["transformer"]):
        added = (int(names.contain(words)) for words in _ADDED)
        kinds["transformer"] = (*names.shape(_INPUT, axes=5)[:2], layers, *added)
    if names.has(_GAMMA):
        kinds["vae"] = names.shape(_DECODER, axes=5)[:2]
    if tiny := names.tiny_decoder():
        kinds[TINY_DECODER] = (tiny.latent_channels, tiny.spatial, tiny.temporal)
    if layers := names.count(_MATRIX["text_encoder"]):
        kinds["text_encoder"] = (*names.shape(_WORDS, axes=2), layers)
    return kinds


@cache
def _known() -> dict[tuple[int, ...], tuple[str, ...]]:
    """Names of the known models by the sizes of each part; two parts never have the same."""
    known: dict[tuple[int, ...], tuple[str, ...]] = {}
    for spec in SPECS.values():
        if isinstance(spec.architecture, Architecture):
            for kind in _kinds_of(spec.architecture):
                known[kind] = (*known.get(kind, ()), spec.name)
    return known


def _kinds_of(architecture: Architecture) -> Iterable[tuple[int, ...]]:
    """The same sizes of each part of a model as `_kinds`."""
    t, vae, text = architecture.transformer, architecture.vae, architecture.text_encoder
    added = (t.image_dim, t.image_positions, t.vace_blocks, t.face)
    yield t.dim, t.in_channels, t.layers, *(int(bool(it)) for it in added)
    yield vae.decoder_dim * vae.multipliers[-1], vae.latent_channels
    yield vae.latent_channels, vae.spatial, int(2 ** sum(vae.temporal))
    yield text.vocabulary, text.dim, text.layers


@cache
def _sizes() -> dict[int, str]:
    """1.3B, 5B or 14B by hidden size, from the names of the known models."""
    named = ((spec.dim, re.search(SIZE, name)) for name, spec in SPECS.items())
    return {dim: f"{match[1]}B" for dim, match in named if match}
