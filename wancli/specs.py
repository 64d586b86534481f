"""Facts about models: what their authors fixed. Choices live in `presets/`.

Sources, for the released models: wan/configs/ of https://github.com/Wan-Video/Wan2.1 (9737cba) and
https://github.com/Wan-Video/Wan2.2 (42bf4cf), and scripts/convert_wan_to_diffusers.py of
https://github.com/huggingface/diffusers (58eb52c).
"""

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wancli.architectures import DEMO, WAN_1_3B, WAN_5B, WAN_14B, Architecture, architecture_of
from wancli.errors import ModelError, SettingsError, closest, missing
from wancli.geometry import Strides
from wancli.hub_cache import cached_revision

DEMO_FOLDER = Path(__file__).parent / "demo" / "model"
TEXT_LENGTH = 512  # tokens, in every released Wan


@dataclass(frozen=True)
class ModelSpec:
    """What one model is."""

    name: str
    repo: str  # hub id, or "" for a folder
    description: str
    task: str = "text-to-video"
    strides: Strides = field(default_factory=Strides)
    latent_channels: int = 16
    text_length: int = TEXT_LENGTH
    architecture: Architecture | None = None  # None is unknown
    per_token_time: bool = False  # every token is told its timestep
    experts: int = 1  # 2: one transformer for high noise, one for low
    causal: bool | None = None  # trained to go on from chunk to chunk; None is unknown
    folder: Path | None = None  # where its files are, when that is known before loading

    @property
    def layers(self) -> int:
        """Transformer blocks; 0 is unknown."""
        return self.architecture.transformer.layers if self.architecture else 0

    @property
    def dim(self) -> int:
        """Of a token inside the transformer; 0 is unknown."""
        return self.architecture.transformer.dim if self.architecture else 0


SPECS = {
    spec.name: spec
    for spec in (
        ModelSpec(
            "demo",
            "",
            "Tiny trained Wan that draws moving shapes; inside the package.",
            latent_channels=8,
            text_length=64,
            causal=True,
            folder=DEMO_FOLDER,
            architecture=DEMO,
        ),
        ModelSpec(
            "wan2.1-t2v-1.3b",
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
            "Wan 2.1 text-to-video, 1.3B parameters, 480p.",
            causal=False,
            architecture=WAN_1_3B,
        ),
        ModelSpec(
            "wan2.1-t2v-14b",
            "Wan-AI/Wan2.1-T2V-14B-Diffusers",
            "Wan 2.1 text-to-video, 14B parameters, 480p and 720p.",
            causal=False,
            architecture=WAN_14B,
        ),
        ModelSpec(
            "wan2.2-t2v-a14b",
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers",
            "Wan 2.2 text-to-video, two experts of 14B parameters, 480p and 720p.",
            experts=2,
            causal=False,
            architecture=WAN_14B,
        ),
        ModelSpec(
            "wan2.2-ti2v-5b",
            "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
            "Wan 2.2 text-to-video, 5B parameters, 720p at 24 frames per second.",
            strides=Strides(temporal=4, spatial=16, patch=2),
            latent_channels=48,
            per_token_time=True,
            causal=False,
            architecture=WAN_5B,
        ),
        ModelSpec(
            "self-forcing",
            "gueraf/Self-Forcing-diffusers",
            "Self-Forcing (arXiv:2506.08009) on Wan 2.1 1.3B: 4 steps a chunk, for rollouts.",
            causal=True,
            architecture=WAN_1_3B,
        ),
        ModelSpec(
            "self-forcing-a14b",
            "rand0nmr/SFWan2.2-T2V-A14B-Diffusers",
            "Self-Forcing on Wan 2.2 A14B, two experts: 8 steps a chunk, for rollouts.",
            experts=2,
            causal=True,
            architecture=WAN_14B,
        ),
    )
}


@dataclass(frozen=True)
class Lora:
    """A LoRA file, and how much of it."""

    path: Path
    scale: float = 1.0


def find_lora(text: str) -> Lora:
    """`PATH` or `PATH=SCALE`. Raises InputError where there is no such file, SettingsError."""
    path, equals, scale = text.rpartition("=")
    if not equals or Path(text).exists():
        path, scale = text, "1"
    try:
        lora = Lora(Path(path).expanduser(), float(scale))
    except ValueError:
        raise SettingsError(f"--lora {text}: {scale!r} is no scale.", hint=f"{path}=0.8") from None
    if not lora.path.is_file():
        raise missing("LoRA", lora.path)
    return lora


def find_spec(model: str) -> ModelSpec:
    """Spec of a known name, a known hub id, or a local folder; ModelError for anything else.

    An unknown hub id (`owner/name`) gives the facts of Wan 2.1: its own are read when it loads.
    """
    for spec in SPECS.values():
        if model in (spec.name, spec.repo):
            return spec
    path = Path(model).expanduser()
    if path.is_dir():
        return spec_of_folder(path)
    if path.exists():
        raise ModelError(
            f"model '{model}' is a file, not a folder.",
            hint="give the folder with model_index.json",
        )
    owner, _, name = model.partition("/")
    if owner and name and "/" not in name and not model.startswith((".", "~")):
        return ModelSpec(model, model, "A model of the hub.")
    near = closest(model, SPECS)
    known = ", ".join(SPECS)
    raise ModelError(
        f"model '{model}' not found.",
        hint=f"did you mean '{near}'? known: {known}" if near else f"known: {known}",
    )


PIPELINES = ("WanPipeline", "WanCausalDMDPipeline")  # the second is FastVideo's, for rollouts
PARTS = ("transformer", "vae", "text_encoder")


def spec_of_folder(folder: Path, *, name: str = "", repo: str = "") -> ModelSpec:
    """Read the facts from a diffusers folder's JSON files; ModelError where it is not one.

    A folder with only a transformer is one, too: a rollout of latents needs no more.
    """
    whole = (folder / "model_index.json").exists() or not (folder / "transformer").is_dir()
    index = read_config(folder, "model_index.json") if whole else {"transformer": ["diffusers"]}
    if whole and index.get("_class_name") not in PIPELINES:
        raise ModelError(
            f"{folder} holds a {index.get('_class_name')}, not a WanPipeline.",
            hint="give a Wan text-to-video model in diffusers' format",
        )
    transformer = read_config(folder, "transformer/config.json")
    vae = read_config(folder, "vae/config.json") if whole else {}
    tokenizer = read_config(folder, "tokenizer/tokenizer_config.json") if whole else {}
    text = read_config(folder, "text_encoder/config.json") if _has(index, "text_encoder") else {}
    patch = transformer.get("patch_size", (1, 2, 2))
    return ModelSpec(
        name or str(folder),
        repo,
        "A local folder.",
        strides=Strides(
            temporal=vae.get("scale_factor_temporal", 4),
            spatial=vae.get("scale_factor_spatial", 8),
            patch=patch[1],
        ),
        latent_channels=transformer.get("in_channels", 16),
        text_length=min(TEXT_LENGTH, int(tokenizer.get("model_max_length", TEXT_LENGTH))),
        architecture=architecture_of(transformer, vae, text),
        per_token_time=bool(index.get("expand_timesteps")),
        experts=2 if _has(index, "transformer_2") else 1,
        folder=folder,
    )


def check_files(spec: ModelSpec, parts: Collection[str] = PARTS) -> None:
    """Raise ModelError, before anything loads, where a local folder lacks or has broken weights.

    `parts` are those that will be needed.
    """
    if spec.folder is None:
        return
    second = ("transformer_2",) if spec.experts > 1 else ()
    for part in (*parts, *second):
        files = sorted((spec.folder / part).glob("*.safetensors"))
        if not files:
            raise ModelError(
                f"{spec.folder / part} has no weights (*.safetensors).",
                hint="copy the whole model folder again",
            )
        for path in files:
            _check_weights(path)


def weights_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Length and content of a safetensors header, without torch. Raises OSError, ValueError."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return length, json.loads(file.read(min(length, path.stat().st_size)))


def _check_weights(path: Path) -> None:
    """A safetensors file says its own length: header size, header, then the bytes it promises."""
    size = path.stat().st_size
    try:
        length, header = weights_header(path)
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0) == size
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise ModelError(f"weights {path} are cut short or broken.", hint="copy that file again")


def revision(spec: ModelSpec) -> str:
    """What identifies the weights: the hub's commit, or a digest of a local folder; "" if unknown.

    The digest takes the JSON files whole, and of each weights file its size and first MiB.
    """
    if spec.folder is None:
        return cached_revision(spec.repo)
    digest = hashlib.sha256()
    for path in sorted(p for p in spec.folder.rglob("*") if p.suffix in (".json", ".safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(spec.folder)} {path.stat().st_size}".encode())
            digest.update(file.read(2**20))
    return digest.hexdigest()[:16]


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """One JSON file of a model folder."""
    path = folder / name
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"{folder} is not a model folder: it has no {name}.",
            hint="give a folder that diffusers' save_pretrained wrote",
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"cannot read {path}: {error}".splitlines()[0], hint="copy the model folder again"
        ) from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a configuration.", hint="copy the model folder again")
    return config


def _has(index: dict[str, Any], part: str) -> bool:
    return bool((index.get(part) or [None])[0])
