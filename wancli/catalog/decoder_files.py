"""The tiny decoder that a model is decoded with: where it is, and whether it fits.

Published for Wan's VAEs by https://github.com/madebyollin/taehv, whose README says which is for
which: `taew2_1` for Wan 2.1 and for Wan 2.2 14B, `taew2_2` for Wan 2.2 5B. Both are on the hub in
https://huggingface.co/Kijai/WanVideo_comfy, as ComfyUI-WanVideoWrapper downloads them.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wancli.catalog.hub_cache import absent, hub_file
from wancli.catalog.local import find_spec
from wancli.catalog.model_folders import find_file, find_named, find_on_hub
from wancli.catalog.specs import DEMO_FOLDER, RANDOM, ModelSpec, WeightFile
from wancli.catalog.tiny_decoder import (
    DECODER,
    DEMO_SHAPE,
    EXACT,
    PREFIX,
    TINY,
    TinyDecoderShape,
    tiny_decoder_shape,
)
from wancli.catalog.wan import Architecture
from wancli.errors import InputError, ModelError, PlanError, WancliError, missing, some
from wancli.utils.pickles import read_pickle_header
from wancli.utils.reading import Header, open_file, read_header, unreadable

# The demo's, beside its model's folder, which has a revision of its own.
DEMO_DECODER = Path("decoders", "demo-tiny.safetensors")
_REPO = "Kijai/WanVideo_comfy"
_HINT = "`vae_decoder tiny`, or exact"
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class PublishedDecoder:
    """The tiny decoder that goes with a VAE."""

    name: str  # REPO:FILE, or the path of the demo's
    shape: TinyDecoderShape


PUBLISHED = (
    PublishedDecoder(f"{_REPO}:taew2_1.safetensors", TinyDecoderShape(16)),
    PublishedDecoder(f"{_REPO}:taew2_2.safetensors", TinyDecoderShape(48, patch=2)),
)


def add_vae_decoder(spec: ModelSpec, name: str) -> ModelSpec:
    """The spec with the decoder that `vae_decoder` names: exact, tiny, FILE or REPO:FILE.

    A published `tiny` may not be on this machine yet: see `check_decoder`. Raises PlanError for a
    model without one, InputError for a missing or broken file, ModelError for a file of another.
    """
    if name == EXACT:
        return spec
    published = _published(spec)
    if not _has_wan_vae(spec) or (name == TINY and published is None):
        raise PlanError(
            f"`vae_decoder {name}`: there is no tiny decoder for {spec.name}'s VAE.",
            hint="`vae_decoder exact`",
        )
    if published and name == TINY and (spec.random or _path(published.name) is None):
        return replace(spec, tiny_decoder=published.shape)
    wanted = published.name if published and name == TINY else name
    path = _path(wanted)
    if path is None:
        raise absent(wanted, kind="tiny decoder")
    file, shape = _read_decoder(path, spec)
    return replace(spec, tiny_decoder=shape, files=(*spec.files, file))


def check_decoder(spec: ModelSpec) -> None:
    """Raise ModelError for a tiny decoder that does not fit, or is not on this machine."""
    if spec.tiny_decoder is None:
        return
    _check_fit(spec.tiny_decoder, spec, "the tiny decoder")
    published = _published(spec)
    if published and not spec.random and not spec.file_of(DECODER):
        raise absent(published.name, kind="tiny decoder")


def find_tiny_decoder(spec: ModelSpec) -> ModelSpec | None:
    """The spec with the model's own tiny decoder, if that is on this machine."""
    try:
        tiny = add_vae_decoder(spec, TINY)
    except WancliError:
        return None
    return tiny if tiny.file_of(DECODER) else None


def find_recorded_decoder(entry: Mapping[str, Any], record: Path, name: str, model: str) -> str:
    """The value of `vae_decoder` for the decoder of a record, found by its digest.

    A `name` that is no path of a file keeps. Raises InputError for one that is missing or changed.
    """
    named = name == TINY or hub_file(name) is not None
    beside = record.parent / str(entry["name"])
    paths = [Path(entry.get("path") or beside), beside, *find_named(DECODER, beside.name)]
    if named:
        file = add_vae_decoder(find_spec(model), name).file_of(DECODER)
        paths = [file.path] if file else []
    for path in paths:
        with suppress(OSError):
            if decoder_digest(path) == entry["digest"]:
                return name if named else str(path)
    raise InputError(
        f"{record} was made with the decoder {entry['name']}, which is missing or has changed.",
        hint="`vae_decoder exact`, or put the original beside it",
    )


def decoder_digest(path: Path) -> str:
    """Identifies a decoder's file, all of it: the largest has 23 MB."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _published(spec: ModelSpec) -> PublishedDecoder | None:
    """The tiny decoder that goes with a model."""
    if spec.folder == DEMO_FOLDER or spec.name == f"{RANDOM}demo":
        return PublishedDecoder(str(DEMO_FOLDER.parent / DEMO_DECODER), DEMO_SHAPE)
    return next((one for one in PUBLISHED if not _misfit(one.shape, spec)), None)


def _has_wan_vae(spec: ModelSpec) -> bool:
    """Whether its VAE is one of Wan's, as far as is known before it is downloaded."""
    return isinstance(spec.architecture, Architecture | None)


def _path(name: str) -> Path | None:
    """A decoder's file; None for one of the hub that is not on this machine."""
    if on_hub := hub_file(name):
        return find_on_hub(DECODER, *on_hub)
    path = find_file(DECODER, name, kind="tiny decoder")
    if not path.is_file():
        raise missing("tiny decoder", path)
    return path


def _read_decoder(path: Path, spec: ModelSpec) -> tuple[WeightFile, TinyDecoderShape]:
    """A file that decodes the latents of a model, and its sizes. Raises InputError, ModelError."""
    try:
        header = read_header(path) if path.suffix == ".safetensors" else read_pickle_header(path)
        digest = decoder_digest(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error, hint=f"copy it again; {_HINT}") from None
    shape = tiny_decoder_shape({key: stored.shape for key, stored in header.tensors.items()})
    if shape is None:
        raise ModelError(f"{path} is not a tiny decoder: no keys of TAEHV's decoder.", hint=_HINT)
    _check_keys(path, header, shape)
    _check_fit(shape, spec, str(path))
    tensors = [header.tensors[key] for key in shape.parameters]
    count = len(header.tensors)
    return WeightFile.of(DECODER, path, digest=digest, keys=count, tensors=tensors), shape


def _check_keys(path: Path, header: Header, shape: TinyDecoderShape) -> None:
    """Raise ModelError unless the decoder's keys are exactly those; an encoder may lie beside."""
    stored, expected = header.tensors, shape.parameters
    own = {key for key in stored if key.startswith(PREFIX)}
    problems = {
        "missing": sorted(expected.keys() - own),
        "unexpected": sorted(own - expected.keys()),
        "of another shape": sorted(
            key for key in own & expected.keys() if stored[key].shape != expected[key]
        ),
        "of a dtype that is not read": sorted(k for k in own if stored[k].dtype not in _FLOATS),
    }
    if reasons := [f"{kind}: {some(keys)}" for kind, keys in problems.items() if keys]:
        raise ModelError(
            f"{path} is no decoder of TAEHV's base architecture; keys {'; '.join(reasons)}.",
            hint=_HINT,
        )


def _check_fit(shape: TinyDecoderShape, spec: ModelSpec, name: str) -> None:
    if misfit := _misfit(shape, spec):
        raise ModelError(f"{name} is of another VAE than {spec.name}'s: {misfit}.", hint=_HINT)


def _misfit(shape: TinyDecoderShape, spec: ModelSpec) -> str:
    """How a decoder's latents differ from a model's; empty if they do not."""
    numbers = {
        "latent channels": (shape.latent_channels, spec.latent_channels),
        "pixels per latent": (shape.spatial, spec.strides.spatial),
        "frames per latent": (shape.temporal, spec.strides.temporal),
    }
    return ", ".join(
        f"{own} {name}, not {wanted}" for name, (own, wanted) in numbers.items() if own != wanted
    )
