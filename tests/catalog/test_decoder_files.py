"""A tiny decoder's file is checked by its header alone, and refused in one line."""

import json
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wancli.catalog.decoder_files import (
    add_vae_decoder,
    check_decoder,
    decoder_digest,
    find_recorded_decoder,
    find_tiny_decoder,
)
from wancli.catalog.local import find_spec, revision
from wancli.catalog.specs import SPECS
from wancli.catalog.tiny_decoder import DECODER, DEMO_SHAPE, TinyDecoderShape
from wancli.errors import InputError, ModelError, PlanError, WancliError
from wancli.models.weight_summary import summarize_weights

DEMO = SPECS["demo"]
Write = Callable[[dict[str, Tensor]], Path]


def tensors_of(shape: TinyDecoderShape = DEMO_SHAPE) -> dict[str, Tensor]:
    return {key: torch.zeros(size, dtype=torch.float16) for key, size in shape.parameters.items()}


@pytest.fixture(params=["safetensors", "pth"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Write:
    """Writes tensors in a format; the path."""
    path = tmp_path / f"decoder.{request.param}"

    def write(tensors: dict[str, Tensor]) -> Path:
        if path.suffix == ".pth":
            torch.save(tensors, path)
        else:
            save_file(tensors, path)
        return path

    return write


def test_a_decoder_with_its_encoder_beside_it_fits(write: Write):
    path = write(tensors_of() | {"encoder.0.weight": torch.zeros(3)})
    spec = add_vae_decoder(DEMO, str(path))
    file = spec.file_of(DECODER)
    assert file
    assert spec.tiny_decoder == DEMO_SHAPE
    assert (file.path, file.dtypes) == (path, ("F16",))
    assert file.bytes == 2 * file.parameters == 2 * sum(t.numel() for t in tensors_of().values())


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: t.pop("decoder.1.bias"), "keys missing: decoder.1.bias"),
        (lambda t: t.update({"decoder.3.skip": torch.zeros(1)}), "keys unexpected: decoder.3.skip"),
        (lambda t: t.update({"decoder.3.conv.2.bias": torch.zeros(1)}), "keys of another shape"),
        (lambda t: t.update({"decoder.1.bias": torch.zeros(44).int()}), "dtype that is not read"),
        (dict.clear, "no keys of TAEHV's decoder"),
        (
            lambda t: t.update(tensors_of(replace(DEMO_SHAPE, latent_channels=16))),
            "of another VAE than demo's: 16 latent channels, not 8",
        ),
    ],
)
def test_another_file_is_refused_with_the_reason(
    write: Write, change: Callable[[dict[str, Tensor]], object], error: str
):
    tensors = tensors_of()
    change(tensors)
    if not tensors:
        tensors["blocks.0.attn.weight"] = torch.zeros(1)
    with pytest.raises(ModelError, match=error) as caught:
        add_vae_decoder(DEMO, str(write(tensors)))
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(write: Write):
    path = write(tensors_of())
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="cannot read"):
        add_vae_decoder(DEMO, str(path))


class _Code:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return print, ("run",)


def test_a_pickle_with_code_is_refused_and_the_code_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "decoder.pth"
    torch.save({"decoder.1.weight": _Code()}, path)
    with pytest.raises(InputError, match=r"loading it would run \w+\.print"):
        add_vae_decoder(DEMO, str(path))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "tensor", [{"dtype": "F16", "shape": [0, 0], "data_offsets": [0, 0]}, 7, "x"]
)
def test_hostile_headers_are_refused(tmp_path: Path, tensor: object):
    header = json.dumps({"decoder.1.weight": tensor, "decoder.3.conv.weight": tensor}).encode()
    path = tmp_path / "decoder.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(WancliError):
        add_vae_decoder(DEMO, str(path))


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("wan2.1-t2v-1.3b", "taew2_1"),
        ("wan2.2-i2v-a14b", "taew2_1"),
        ("self-forcing", "taew2_1"),
        ("wan2.2-ti2v-5b", "taew2_2"),
    ],
)
def test_a_published_one_is_planned_before_it_is_here_and_then_named(
    model: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    spec = add_vae_decoder(SPECS[model], "tiny")
    assert spec.tiny_decoder
    assert not spec.files
    with pytest.raises(ModelError, match=f"{file}.safetensors' is not on this machine") as caught:
        check_decoder(spec)
    assert caught.value.hint == f"wancli model pull Kijai/WanVideo_comfy:{file}.safetensors"
    assert find_tiny_decoder(SPECS[model]) is None
    cached = tmp_path / "models--Kijai--WanVideo_comfy"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    save_file(tensors_of(spec.tiny_decoder), cached / "snapshots" / "abc" / f"{file}.safetensors")
    there = add_vae_decoder(SPECS[model], "tiny")
    check_decoder(there)
    assert there == find_tiny_decoder(SPECS[model])
    assert there.file_of(DECODER)


def test_one_in_comfyuis_folder_is_found_by_its_name_and_as_the_published_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec, path = SPECS["wan2.1-t2v-1.3b"], tmp_path / "models/vae_approx/taew2_1.safetensors"
    path.parent.mkdir(parents=True)
    save_file(tensors_of(TinyDecoderShape(16)), path)
    monkeypatch.setenv("WANCLI_MODEL_PATH", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in (path.name, "tiny"):
        file = add_vae_decoder(spec, name).file_of(DECODER)
        assert file
        assert file.path == path
    entry = {"name": path.name, "digest": decoder_digest(path)}
    assert find_recorded_decoder(entry, tmp_path / "video.mp4", path.name, spec.name) == str(path)
    summary = summarize_weights(path)
    assert (summary.parts, summary.dtype) == ((DECODER,), "float16")
    assert {"wan2.1-t2v-14b", "wan2.2-t2v-a14b"} < {*summary.models}
    assert "wan2.2-ti2v-5b" not in summary.models


def test_a_random_model_has_a_random_one():
    spec = add_vae_decoder(find_spec("random:wan2.1-t2v-1.3b"), "tiny")
    assert spec.tiny_decoder == TinyDecoderShape(16)
    check_decoder(spec)


@pytest.mark.parametrize("name", ["tiny", "some.safetensors"])
def test_hunyuanvideo_has_none(name: str):
    with pytest.raises(PlanError, match="no tiny decoder for hunyuanvideo's VAE"):
        add_vae_decoder(SPECS["hunyuanvideo"], name)


def test_a_recorded_decoder_is_found_by_its_digest_or_refused(tmp_path: Path):
    path, moved = tmp_path / "a.safetensors", tmp_path / "b" / "a.safetensors"
    save_file(tensors_of(), path)
    file = add_vae_decoder(DEMO, str(path)).file_of(DECODER)
    assert file
    entry = {"name": path.name, "path": str(path), "digest": file.digest}
    moved.parent.mkdir()
    record = moved.parent / "video.mp4"
    assert find_recorded_decoder(entry, record, str(path), "demo") == str(path)
    path.rename(moved)
    assert find_recorded_decoder(entry, record, str(path), "demo") == str(moved)
    moved.write_bytes(b"changed")
    with pytest.raises(InputError, match="missing or has changed"):
        find_recorded_decoder(entry, record, str(path), "demo")
    with pytest.raises(InputError, match="missing or has changed"):
        find_recorded_decoder(entry, record, "tiny", "demo")  # the demo's is another


def test_the_demo_has_one_in_the_package_that_is_no_part_of_its_revision():
    spec = add_vae_decoder(DEMO, "tiny")
    file = spec.file_of(DECODER)
    assert file
    assert spec == find_tiny_decoder(DEMO)
    assert spec.tiny_decoder == DEMO_SHAPE
    assert file.path.stat().st_size < 500_000
    assert revision(spec) == revision(DEMO)
