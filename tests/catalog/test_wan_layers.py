"""Names and shapes of a Wan transformer's parameters are those of diffusers' classes."""

from dataclasses import replace

import pytest

from tests.shapes import transformer
from wancli.catalog.specs import SPECS
from wancli.catalog.wan import Architecture
from wancli.catalog.wan_layers import from_original, layer_name, wan_parameters

SHAPES = {
    spec.architecture.transformer: name
    for name, spec in SPECS.items()
    if isinstance(spec.architecture, Architecture)
}


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPES.values())
def test_shapes_are_those_of_diffusers(shape):
    shape = replace(shape, layers=6, vace_blocks=min(3, shape.vace_blocks))  # building all is slow
    ours = wan_parameters(shape)
    theirs = {name: tuple(p.shape) for name, p in transformer(shape).named_parameters()}
    encoders = {name for name in theirs if name.startswith(("motion_encoder", "face_encoder"))}
    assert ours == {name: shape for name, shape in theirs.items() if name not in encoders}


def test_a_layer_is_known_by_either_name_with_dots_or_underscores():
    names = {
        "vace_blocks.11.cross_attn.o": "vace_blocks.11.attn2.to_out.0",
        "blocks.7.norm3": "blocks.7.norm2",
        "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    }
    for original, name in names.items():
        forms = (original, name, original.replace(".", "_"), name.replace(".", "_"))
        assert {layer_name(form) for form in forms} == {name}
        assert from_original(f"{original}.weight") == f"{name}.weight"
    assert layer_name("blocks.1.other") == from_original("blocks.1.other") == "blocks.1.other"
    assert layer_name("blocks_1_norm_out") == "blocks_1_norm_out"
