"""Model folders, read without torch: facts about a model, and whether its files are intact."""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from wancli.catalog.geometry import Strides
from wancli.catalog.hub_cache import (
    absent,
    cached_revision,
    check_reachable,
    converted_folder,
)
from wancli.catalog.hunyuan import TEXT_TOKENS, hunyuan_of
from wancli.catalog.part_schema import OF_OTHERS, OF_TRANSFORMER, OF_VAE, Kinds, wrong_value
from wancli.catalog.random import known_spec, random_spec
from wancli.catalog.specs import RANDOM, SPECS, TEXT_LENGTH, ModelSpec
from wancli.catalog.tasks import ANIMATE, ENDS, HUNYUAN_TEXT, IMAGE, TASKS, TEXT, VACE, VIDEO
from wancli.catalog.wan import architecture_of, autoencoder_of
from wancli.errors import ModelError, PlanError, closest
from wancli.utils.reading import (
    is_lfs_pointer,
    pointer_error,
    read_header,
    read_json,
    unreadable,
    user_path,
)


def find_spec(model: str, *, layers: int | None = None) -> ModelSpec:
    """Spec of a known name, a hub id, or a local folder. Raises ModelError for anything else.

    An unknown hub id (`owner/name`) gets the facts of Wan 2.1 and all tasks: its own facts are read
    when it loads. `layers` limits the blocks of `random:NAME`, and is a PlanError for others.
    """
    if model.startswith(RANDOM):
        return random_spec(model, layers=layers)
    spec = known_spec(model)
    if layers is not None:
        raise PlanError(
            f"`layers {layers}` drops blocks, which only random models allow.",
            hint=f"`model` {RANDOM}{spec.name}" if spec else "drop `layers`",
        )
    if spec:
        return _converted(spec)
    path = user_path(model)
    try:
        if path.is_dir():
            return spec_of_folder(path)
        there = path.exists()
    except OSError as error:
        raise unreadable(path, error, kind=ModelError, hint=f"chmod -R u+rX {path}") from None
    if there:
        raise ModelError(
            f"model '{model}' is a file, not a folder.",
            hint="give the folder with model_index.json",
        )
    return _hub_spec(model)


def _hub_spec(model: str) -> ModelSpec:
    """Spec of an unknown hub id. Raises ModelError for what is none, and for Wan's own format."""
    if twin := known_spec(f"{model}-Diffusers"):
        raise ModelError(
            f"model '{model}' is in Wan's own format, not in diffusers'.",
            hint=f"`model {twin.name}`, or wancli model convert for files that you have",
        )
    owner, _, name = model.partition("/")
    if owner and name and "/" not in name and not model.startswith((".", "~")):
        return ModelSpec(model, model, "A model of the hub.", tasks=tuple(TASKS))
    near = closest(model, SPECS)
    raise ModelError(
        f"model '{model}' not found.",
        hint=f"did you mean '{near}'? list: wancli model list" if near else "wancli model list",
    )


def _converted(spec: ModelSpec) -> ModelSpec:
    """The spec with its folder, if it is that of a checkpoint that has been converted."""
    if spec.checkpoint is None:
        return spec
    folder = converted_folder(spec.checkpoint.repo, spec.name)
    if not folder.is_dir():
        return spec
    read = spec_of_folder(folder, name=spec.name)
    return replace(
        read,
        description=spec.description,
        causal=spec.causal,
        clips=spec.clips,
        checkpoint=spec.checkpoint,
    )


def check_available(spec: ModelSpec) -> None:
    """Raise ModelError for a model that is not on this disk and cannot be downloaded as it loads.

    A checkpoint is pulled first, since it is converted then.
    """
    if spec.on_hub and spec.checkpoint:
        raise absent(spec.name)
    check_reachable(spec.repo)


PIPELINES = {task.pipeline for task in TASKS.values()} | {"WanCausalDMDPipeline"}  # FastVideo's
PARTS = ("transformer", "vae", "text_encoder")


def spec_of_folder(folder: Path, *, name: str = "", repo: str = "") -> ModelSpec:
    """Read a spec from a diffusers folder's JSON files. Raises ModelError for any other folder.

    A folder with only a transformer is valid, too: a rollout of latents needs no more.
    """
    whole = (folder / "model_index.json").exists() or not (folder / "transformer").is_dir()
    index: dict[str, Any] = read_config(folder, "model_index.json") if whole else {}
    if whole and index.get("_class_name") not in PIPELINES:
        raise ModelError(
            f"{folder} holds a {index.get('_class_name')}, not a WanPipeline.",
            hint="give a Wan model or HunyuanVideo in diffusers' format",
        )
    if index.get("_class_name") == TASKS[HUNYUAN_TEXT].pipeline:
        return _hunyuan_spec(folder, name or str(folder), repo)
    transformer = read_config(folder, "transformer/config.json", OF_TRANSFORMER)
    vae = read_config(folder, "vae/config.json", OF_VAE) if whole else {}
    tokenizer = read_config(folder, "tokenizer/tokenizer_config.json") if whole else {}
    text, image = (
        read_config(folder, f"{part}/config.json", OF_OTHERS) if _has(index, part) else {}
        for part in ("text_encoder", "image_encoder")
    )
    _check_together(folder, transformer, vae, text)
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
        tasks=_tasks(index, transformer, vae),
        latent_channels=transformer.get("out_channels") or transformer.get("in_channels", 16),
        text_length=min(TEXT_LENGTH, int(tokenizer.get("model_max_length", TEXT_LENGTH))),
        architecture=architecture_of(transformer, vae, text, image),
        per_token_time=bool(index.get("expand_timesteps")),
        experts=2 if _has(index, "transformer_2") else 1,
        boundary_ratio=index.get("boundary_ratio"),
        image_encoder=_has(index, "image_encoder"),
        folder=folder,
    )


def _check_together(
    folder: Path, transformer: Mapping[str, Any], vae: Mapping[str, Any], text: Mapping[str, Any]
) -> None:
    """Raise ModelError if the parts of a Wan do not fit each other.

    16 is diffusers' default number of latent channels.
    """
    channels, shape = vae.get("z_dim"), autoencoder_of(vae)
    patches = ("3 per pixel of patch_size", 3 * shape.patch**2)
    strides = "the stride of its other values"
    distance = text.get("relative_attention_max_distance", 128)
    least = text.get("relative_attention_num_buckets", 32) // 4 + 1
    pairs = {
        "transformer has text_dim": (transformer.get("text_dim"), "d_model", text.get("d_model")),
        "transformer has out_channels": (transformer.get("out_channels"), "z_dim", channels),
        "vae has latents_mean of": (_length(vae, "latents_mean", or_else=16), "z_dim", channels),
        "vae has latents_std of": (_length(vae, "latents_std", or_else=16), "z_dim", channels),
        "vae has dim_mult of": (
            _length(vae, "dim_mult"),
            "one more than the length of temperal_downsample",
            _length(vae, "temperal_downsample", more=1),
        ),
        "vae has in_channels": (vae.get("in_channels", 3), *patches),
        "vae has out_channels": (shape.pixel_channels, *patches),
        "vae has scale_factor_spatial": (
            vae.get("scale_factor_spatial", 8), strides, shape.spatial,
        ),
        "vae has scale_factor_temporal": (
            vae.get("scale_factor_temporal", 4), strides, 2 ** sum(shape.temporal),
        ),
        "text_encoder has relative_attention_max_distance": (
            distance, "the least for its buckets", max(distance, least),
        ),
    }  # fmt: skip
    for what, (number, other, wanted) in pairs.items():
        if None not in (number, wanted) and number != wanted:
            raise ModelError(
                f"{folder}: the {what} {number}, but {other} is {wanted}.",
                hint="copy the model folder again",
            )


def _length(
    config: Mapping[str, Any], key: str, *, more: int = 0, or_else: int | None = None
) -> int | None:
    return len(config[key]) + more if key in config else or_else


def _hunyuan_spec(folder: Path, name: str, repo: str) -> ModelSpec:
    transformer, vae, text, text_2 = (
        read_config(folder, f"{part}/config.json", OF_OTHERS)
        for part in ("transformer", "vae", "text_encoder", "text_encoder_2")
    )
    if kind := transformer.get("image_condition_type"):
        raise ModelError(
            f"{folder} is a HunyuanVideo with {kind}: it starts from an image.",
            hint="give a text-to-video HunyuanVideo",
        )
    return ModelSpec(
        name,
        repo,
        "A local folder.",
        tasks=(HUNYUAN_TEXT,),
        strides=Strides(
            temporal=vae.get("temporal_compression_ratio", 4),
            spatial=vae.get("spatial_compression_ratio", 8),
            patch=transformer.get("patch_size", 2),
        ),
        latent_channels=transformer.get("out_channels") or transformer.get("in_channels", 16),
        text_length=TEXT_TOKENS,
        architecture=hunyuan_of(transformer, vae, text, text_2),
        causal=False,
        folder=folder,
    )


def _tasks(
    index: Mapping[str, Any], transformer: Mapping[str, Any], vae: Mapping[str, Any]
) -> tuple[str, ...]:
    """Tasks that diffusers' pipelines support with a folder's model."""
    pipeline = index.get("_class_name", "WanPipeline")
    by_token = bool(index.get("expand_timesteps"))
    if pipeline == "WanImageToVideoPipeline":
        if transformer.get("pos_embed_seq_len"):  # positions for tokens of two pictures
            return (ENDS,)
        return (IMAGE,) if by_token or transformer.get("image_dim") else (IMAGE, ENDS)
    fixed = {VACE: "WanVACEPipeline", ANIMATE: "WanAnimatePipeline"}
    for task, kind in fixed.items():
        if pipeline == kind:
            return (task,)
    if by_token:
        return (TEXT, IMAGE)
    # WanVideoToVideoPipeline takes one expert, and counts a VAE's strides by its stages.
    stages, stride = len(vae.get("temperal_downsample", ())), vae.get("scale_factor_spatial", 8)
    return (TEXT,) if _has(index, "transformer_2") or 2**stages != stride else (TEXT, VIDEO)


def check_files(spec: ModelSpec, parts: Collection[str] = PARTS) -> None:
    """Raise ModelError, before anything loads, if weights of a local folder are missing or broken.

    `parts` are those needed.
    """
    if spec.folder is None:
        return
    more = ["transformer_2"] if spec.experts > 1 else []
    if spec.family.second_text_encoder and "text_encoder" in parts:
        more.append("text_encoder_2")
    if spec.image_encoder and "text_encoder" in parts:
        more.append("image_encoder")
    for part in (*parts, *more):
        if spec.file_of(part):
            continue  # its header has been checked
        _check_part(spec.folder / part)
    for path in sorted(spec.folder.glob("tokenizer*/*")) if "text_encoder" in parts else ():
        if is_lfs_pointer(path):
            raise pointer_error(path, ModelError)


def _check_part(part: Path) -> None:
    files = sorted(part.glob("*.safetensors"))
    if not files:
        raise ModelError(
            f"{part} has no weights (*.safetensors).", hint="copy the whole model folder again"
        )
    for index in part.glob("*.safetensors.index.json"):
        shards = indexed_shards(index)
        missing = [path for path in shards if not path.exists()]
        # Else the index is that of another variant, or beside weights that were made one file.
        whole = index.with_suffix("").with_suffix("")
        if 0 < len(missing) < len(shards) and not whole.exists():
            raise ModelError(f"weights {missing[0]} are missing.", hint="copy that file, too")
    for path in files:
        _check_weights(path)


def indexed_shards(index: Path) -> list[Path]:
    """The files of weights that an index names, including missing ones. Raises ModelError."""
    try:
        names = set(map(str, dict(read_json(index)["weight_map"]).values()))
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(f"cannot read {index}.", hint="copy that file again") from None
    return [index.with_name(name) for name in sorted(names)]


def _check_weights(path: Path) -> None:
    """Raise ModelError if a safetensors file does not have the length its header implies."""
    try:
        read_header(path)
    except (OSError, ValueError):
        raise broken_weights(path) from None


def broken_weights(path: Path) -> ModelError:
    """The error for a truncated or broken weights file."""
    if is_lfs_pointer(path):
        return pointer_error(path, ModelError)
    return ModelError(f"weights {path} are truncated or broken.", hint="copy that file again")


def revision(spec: ModelSpec) -> str:
    """Identify the model: the hub's commit, or a digest of a local folder; "" if unknown.

    `spec.files` have digests of their own. A folder's covers the JSON files, and the size and
    first MiB of each weights file. Random weights are determined by name and number of layers, on
    one kind of device in one dtype.
    """
    if spec.random:
        return f"{spec.name} layers={spec.layers}"
    if spec.folder is None:
        return cached_revision(spec.repo)
    digest = hashlib.sha256()
    for path in sorted(p for p in spec.folder.rglob("*") if p.suffix in (".json", ".safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(spec.folder)} {path.stat().st_size}".encode())
            digest.update(file.read(2**20))
    return digest.hexdigest()[:16]


def read_config(folder: Path, name: str, kinds: Kinds | None = None) -> dict[str, Any]:
    """Read and validate a JSON file of a model folder. Raises ModelError."""
    path = folder / name
    try:
        config = read_json(path)
        if wrong := wrong_value(config, kinds):
            raise ValueError(wrong)
        return config
    except FileNotFoundError:
        raise ModelError(
            f"{folder} is not a model folder: it has no {name}.",
            hint="give a folder that diffusers' save_pretrained wrote",
        ) from None
    except (OSError, ValueError) as error:
        hint = "copy the model folder again"
        raise unreadable(path, error, kind=ModelError, hint=hint) from None


def _has(index: Mapping[str, Any], part: str) -> bool:
    return bool((index.get(part) or [None])[0])
