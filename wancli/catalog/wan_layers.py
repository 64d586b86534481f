"""Parameters of Wan transformers: their names in the original code and in diffusers, their shapes.

Original names: wan/modules/model.py of https://github.com/Wan-Video/Wan2.1 (9737cba) and
vace/models/wan/wan_vace.py of https://github.com/ali-vilab/VACE. Their names in diffusers:
scripts/convert_wan_to_diffusers.py of https://github.com/huggingface/diffusers (58eb52c).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from wancli.catalog.hf_configs import vace_layers
from wancli.catalog.local import broken_weights
from wancli.catalog.specs import ModelSpec
from wancli.catalog.wan import Architecture, FaceEncoder, Transformer
from wancli.errors import ModelError, some
from wancli.utils.reading import read_header

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

EMBEDDER = "condition_embedder"
IMAGE = f"{EMBEDDER}.image_embedder"
_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
# The original applies its norms in the order 1, 3, 2; diffusers in the order 1, 2, 3.
_IN_BLOCK = {
    "modulation": "scale_shift_table",
    **{f"self_attn.{old}": f"attn1.{new}" for old, new in _ATTENTION.items()},
    **{f"cross_attn.{old}": f"attn2.{new}" for old, new in _ATTENTION.items()},
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "before_proj": "proj_in",  # of VACE's blocks
    "after_proj": "proj_out",
}
_OUTSIDE = {
    "patch_embedding": "patch_embedding",
    "vace_patch_embedding": "vace_patch_embedding",
    "time_embedding.0": f"{EMBEDDER}.time_embedder.linear_1",
    "time_embedding.2": f"{EMBEDDER}.time_embedder.linear_2",
    "text_embedding.0": f"{EMBEDDER}.text_embedder.linear_1",
    "text_embedding.2": f"{EMBEDDER}.text_embedder.linear_2",
    "time_projection.1": f"{EMBEDDER}.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    "img_emb.proj.0": f"{IMAGE}.norm1",
    "img_emb.proj.1": f"{IMAGE}.ff.net.0.proj",
    "img_emb.proj.3": f"{IMAGE}.ff.net.2",
    "img_emb.proj.4": f"{IMAGE}.norm2",
    "img_emb.emb_pos": f"{IMAGE}.pos_embed",
}
_WRAPPER = re.compile(r"_(?:fsdp_wrapped_module|checkpoint_wrapped_module|orig_mod)\.")
_BLOCK = re.compile(r"((?:vace_)?blocks)[._](\d{1,4})[._](.+)")


def _in_any_naming(table: Mapping[str, str]) -> dict[str, str]:
    """Both namings of each layer, with underscores for dots."""
    names = {**{new: new for new in table.values()}, **table}
    return {old.replace(".", "_"): new for old, new in names.items()}


_ANY_IN_BLOCK, _ANY_OUTSIDE = _in_any_naming(_IN_BLOCK), _in_any_naming(_OUTSIDE)


def strip_wrappers(key: str) -> str:
    """A key without what FSDP, checkpointing and compilation put into it."""
    return _WRAPPER.sub("", key)


def from_original(name: str) -> str:
    """diffusers' name of a parameter of the original code; another name as it is."""
    layer, dot, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        layer, dot, kind = name, "", ""
    block = _BLOCK.fullmatch(layer)
    if block:
        new = _IN_BLOCK.get(block[3])
        return f"{block[1]}.{block[2]}.{new}{dot}{kind}" if new else name
    return f"{_OUTSIDE.get(layer, layer)}{dot}{kind}"


def parameter_names(names: Iterable[str], source: Path) -> dict[str, str]:
    """diffusers' name of each parameter, all of them in its naming or in the original.

    Raises ModelError for two names of one parameter.
    """
    listed = list(names)
    ours = any(".attn1." in name for name in listed)
    renamed = {name: name if ours else from_original(name) for name in listed}
    counts = Counter(renamed[name] for name in listed)
    if duplicates := sorted(name for name, times in counts.items() if times > 1):
        raise ModelError(
            f"{source} has duplicate keys, under different prefixes: {some(duplicates)}.",
            hint="save the state dict of one model alone",
        )
    return renamed


def layer_name(name: str) -> str:
    """diffusers' name of a layer in either naming, its dots perhaps underscores (kohya's).

    The name of an unknown layer is returned as it is.
    """
    block = _BLOCK.fullmatch(name)
    if block:
        new = _ANY_IN_BLOCK.get(block[3].replace(".", "_"))
        return f"{block[1]}.{int(block[2])}.{new}" if new else name
    return _ANY_OUTSIDE.get(name.replace(".", "_"), name)


def parameter_shapes(spec: ModelSpec, part: str) -> Shapes | None:
    """Shapes of a transformer's parameters; None where they are unknown before the download.

    A folder's are read from the headers of its weights. Raises ModelError for broken ones.
    """
    read: dict[str, Shape] = {}
    for path in sorted((spec.folder / part).glob("*.safetensors")) if spec.folder else ():
        try:
            tensors = read_header(path).tensors
        except (OSError, ValueError):
            raise broken_weights(path) from None
        read |= {name: stored.shape for name, stored in tensors.items()}
    if read:
        return read
    architecture = spec.architecture
    return (
        wan_parameters(architecture.transformer) if isinstance(architecture, Architecture) else None
    )


def wan_parameters(t: Transformer) -> dict[str, Shape]:
    """Shapes of all parameters but those of Wan-Animate's face and motion encoders."""
    d = t.dim
    shapes: dict[str, Shape] = {"scale_shift_table": (1, 2, d)}
    shapes |= affine("patch_embedding", d, t.in_channels, 1, 2, 2)
    for name, width in (("time", t.freq_dim), ("text", t.text_dim)):
        shapes |= affine(f"{EMBEDDER}.{name}_embedder.linear_1", d, width)
        shapes |= affine(f"{EMBEDDER}.{name}_embedder.linear_2", d, d)
    shapes |= affine(f"{EMBEDDER}.time_proj", 6 * d, d)
    shapes |= affine("proj_out", t.patch * t.out_channels, d)
    if t.image_dim:
        shapes |= _image_embedder(t)
    for index in range(t.layers):
        shapes |= _block(f"blocks.{index}", t)
    return shapes | (_vace(t) if t.vace_blocks else {}) | (_face(t, t.face) if t.face else {})


def _vace(t: Transformer) -> dict[str, Shape]:
    d = t.dim
    shapes = affine("vace_patch_embedding", d, t.vace_channels, 1, 2, 2)
    shapes |= affine("vace_blocks.0.proj_in", d, d)
    for index in range(len(vace_layers(t))):
        shapes |= _block(f"vace_blocks.{index}", t) | affine(f"vace_blocks.{index}.proj_out", d, d)
    return shapes


def _face(t: Transformer, face: FaceEncoder) -> dict[str, Shape]:
    d = t.dim
    shapes = affine("pose_patch_embedding", d, t.out_channels, 1, 2, 2)
    for name in (f"face_adapter.{index}" for index in range(t.layers // face.every)):
        for layer in ("to_q", "to_k", "to_v", "to_out"):
            shapes |= affine(f"{name}.{layer}", d, d)
        shapes |= {f"{name}.norm_{x}.weight": (t.head_dim,) for x in "qk"}
    return shapes


def affine(name: str, *shape: int) -> dict[str, Shape]:
    """A layer's weight of that shape, and its bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def _image_embedder(t: Transformer) -> dict[str, Shape]:
    width, d = t.image_dim, t.dim
    shapes = affine(f"{IMAGE}.norm1", width) | affine(f"{IMAGE}.ff.net.0.proj", width, width)
    shapes |= affine(f"{IMAGE}.ff.net.2", d, width) | affine(f"{IMAGE}.norm2", d)
    if t.image_positions:
        shapes[f"{IMAGE}.pos_embed"] = (1, t.image_positions, width)
    return shapes


def _block(name: str, t: Transformer) -> dict[str, Shape]:
    d = t.dim
    shapes: dict[str, Shape] = {f"{name}.scale_shift_table": (1, 6, d)}
    for attention in ("attn1", "attn2"):
        for layer in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= affine(f"{name}.{attention}.{layer}", d, d)
        for norm in ("norm_q", "norm_k"):
            shapes[f"{name}.{attention}.{norm}.weight"] = (d,)
    if t.added_kv and name.startswith("blocks"):
        shapes |= affine(f"{name}.attn2.add_k_proj", d, d)
        shapes |= affine(f"{name}.attn2.add_v_proj", d, d)
        shapes[f"{name}.attn2.norm_added_k.weight"] = (d,)
    shapes |= affine(f"{name}.norm2", d)
    shapes |= affine(f"{name}.ffn.net.0.proj", t.ffn, d)
    return shapes | affine(f"{name}.ffn.net.2", d, t.ffn)
