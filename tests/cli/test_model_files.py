"""Files in ComfyUI's folders: listed by what they are for, used by name, found again by digest."""

import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.test_bad_input import complaint
from tests.conftest import Wancli
from tests.forked import Run
from tests.models.test_lora import random_lora
from wancli.catalog.model_folders import VARIABLE
from wancli.catalog.part_names import text_encoder_parameters
from wancli.catalog.wan import VACE_14B, WAN_1_3B, WAN_2_1_I2V, WAN_2_2_I2V, WAN_5B, WAN_14B
from wancli.catalog.wan_layers import Shape, wan_parameters
from wancli.models.weight_summary import summarize_weights

RUN = ("generate", "a red circle", "--steps", 1, "--frames", 5, "--size", "32x32", "--seed", 1)
BYTES = {"F16": 2, "F8_E4M3": 1}
Shapes = Mapping[str, Shape]


def write(path: Path, shapes: Shapes, *, dtype: str = "F16") -> None:
    """A file of these shapes, without the zeros that fill it on disk."""
    if path.suffix == ".gguf":
        write_gguf(path, shapes)
        return
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def write_gguf(path: Path, shapes: Shapes) -> None:
    """A GGUF file of half precision, whose type has the number 1."""
    end, infos = 0, b""
    for name, shape in shapes.items():
        infos += struct.pack("<Q", len(name)) + name.encode()
        infos += struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), 1, end)
        end += 2 * prod(shape)
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(shapes), 0) + infos)
        file.truncate(file.tell() + 32 + end)


def under(prefix: str, shapes: Shapes) -> dict[str, Shape]:
    return {f"{prefix}{name}": shape for name, shape in shapes.items()}


def lora(
    layer: str, *, dim: int, prefix: str = "diffusion_model.", rank: int = 4
) -> dict[str, Shape]:
    return {
        f"{prefix}{layer}.lora_down.weight": (rank, dim),
        f"{prefix}{layer}.lora_up.weight": (dim, rank),
    }


def vae(dim: int, channels: int) -> dict[str, Shape]:
    gamma = "decoder.middle.0.residual.0.gamma"
    return {"decoder.conv1.weight": (dim, channels, 3, 3, 3), gamma: (dim, 1, 1, 1)}


T2V = wan_parameters(WAN_14B.transformer)
SDXL = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
FILES: dict[str, tuple[Shapes, dict[str, object]]] = {
    "t2v.safetensors": (
        T2V,
        {"parts": ["transformer"], "size": "14B", "task": "text-to-video", "dtype": "float16",
         "models": ["wan2.1-t2v-14b", "wan2.2-t2v-a14b", "self-forcing-a14b"]},
    ),
    "wan2.2_i2v_high_noise.safetensors": (
        under("model.diffusion_model.", wan_parameters(WAN_2_2_I2V.transformer)),
        {"parts": ["transformer"], "expert": "high", "models": ["wan2.2-i2v-a14b"],
         "description": "14B, image-to-video, high noise"},
    ),
    "i2v.safetensors": (
        wan_parameters(WAN_2_1_I2V.transformer),
        {"models": ["wan2.1-i2v-14b-480p", "wan2.1-i2v-14b-720p"], "task": "image-to-video"},
    ),
    "vace.safetensors": (wan_parameters(VACE_14B.transformer), {"models": ["wan2.1-vace-14b"]}),
    "5b.safetensors": (
        wan_parameters(WAN_5B.transformer), {"models": ["wan2.2-ti2v-5b"], "size": "5B"},
    ),
    "control.safetensors": (
        wan_parameters(replace(WAN_1_3B.transformer, in_channels=52)),
        {"parts": ["transformer"], "models": [], "description": "1.3B"},
    ),
    "text.safetensors": (
        text_encoder_parameters(WAN_14B.text_encoder), {"parts": ["text_encoder"], "task": ""},
    ),
    "t2v_low_noise.gguf": (
        T2V, {"parts": ["transformer"], "models": ["wan2.2-t2v-a14b"], "form": "gguf",
              "expert": "low", "dtype": "float16"},
    ),
    "umt5.gguf": (
        {"token_embd.weight": (256384, 4096)}
        | {f"enc.blk.{n}.attn_q.weight": (4096, 4096) for n in range(24)},
        {"parts": ["text_encoder"], "models": ["wan2.1-t2v-1.3b"]},
    ),
    "vae22.safetensors": (vae(1024, 48), {"parts": ["vae"], "models": ["wan2.2-ti2v-5b"]}),
    "all.safetensors": (
        under("model.diffusion_model.", T2V) | under("vae.", vae(384, 16)),
        {"parts": ["transformer", "vae"], "task": "text-to-video"},
    ),
    "wan22_lownoise.safetensors": (
        lora("blocks.0.self_attn.q", dim=5120),
        {"parts": ["lora"], "description": "rank 4, 14B, low noise", "dtype": "float16"},
    ),
    "kohya.safetensors": (
        lora("blocks_3_cross_attn_k_img", dim=5120, prefix="lora_unet_")
        | lora("blocks_3_self_attn_o", dim=5120, prefix="lora_unet_", rank=8),
        {"parts": ["lora"], "description": "rank 4, 14B, image-to-video"},
    ),
    "diff.safetensors": (
        {"diffusion_model.blocks.0.self_attn.q.diff": (1536, 1536)}, {"description": "1.3B"},
    ),
    "dora.safetensors": (
        {**lora("blocks.0.self_attn.q", dim=9), "blocks.0.self_attn.q.dora_scale": (9,)},
        {"parts": ["lora"], "description": "DoRA, which is not supported"},
    ),
    "sdxl.safetensors": (lora(SDXL, dim=9, prefix="lora_unet_"), {"parts": []}),
    "flux_vae.safetensors": ({"decoder.conv_in.weight": (512, 16, 3, 3)}, {"parts": []}),
    "odd.safetensors": ({"blocks.0.attn1.to_q.weight": (3,)}, {"models": [], "size": ""}),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_a_header_tells_what_a_file_is_for(name: str, tmp_path: Path):
    shapes, expected = FILES[name]
    write(tmp_path / name, shapes)
    info = summarize_weights(tmp_path / name)
    known: object = expected.get("models")
    told = {**info.as_json(), "description": info.description, "parts": [*info.parts]}
    told["models"] = [*info.models][: len(known)] if isinstance(known, list) and known else []
    assert {key: told[key] for key in expected} == expected
    assert info.bytes == (tmp_path / name).stat().st_size


def comfyui(root: Path) -> Path:
    """A ComfyUI with a file of each part, one of another model, and a broken one."""
    models = root / "models"
    write(models / "diffusion_models" / "wan" / "fp8.safetensors", T2V, dtype="F8_E4M3")
    write(models / "unet" / "flux.safetensors", {"double_blocks.0.img_attn.qkv.weight": (3, 3)})
    write(models / "vae" / "wan_vae.safetensors", vae(384, 16))
    write(models / "loras" / "x.safetensors", lora("blocks.0.self_attn.q", dim=5120))
    (models / "loras" / "notes.txt").write_text("x")
    factors = {n: torch.zeros(s) for n, s in lora("blocks.0.self_attn.q", dim=9).items()}
    for folder in ("loras", "vae"):
        torch.save(factors, models / folder / "x.pt")
    torch.save(factors, models / "loras" / "old.pth", _use_new_zipfile_serialization=False)
    cut = models / "loras" / "cut.safetensors"
    write(cut, lora("blocks.0.self_attn.q", dim=9))
    cut.write_bytes(cut.read_bytes()[:-1])
    return root


def test_list_shows_the_files_of_a_comfyui(
    wancli: Wancli, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    root = comfyui(tmp_path / "comfy")
    result = wancli("model", "list", "--comfyui", root, "--json")
    rows = {row["name"]: row for row in map(json.loads, result.out.splitlines())}
    assert [*rows] == ["wan/fp8.safetensors", "wan_vae.safetensors", "cut.safetensors", "old.pth",
                       "x.pt", "x.safetensors"]  # fmt: skip
    assert (rows["x.pt"]["parts"], rows["x.pt"]["rank"]) == (["lora"], 4)
    assert "counted as it loads" in rows["old.pth"]["problem"]
    assert rows["wan/fp8.safetensors"]["path"].endswith("diffusion_models/wan/fp8.safetensors")
    assert "truncated" in rows["cut.safetensors"]["problem"]
    assert "not of a Wan model: 2 more" in result.err
    assert f"export {VARIABLE}={root}" in result.err
    monkeypatch.setenv(VARIABLE, str(root))
    result = wancli("model", "list")
    assert "wan2.1-t2v-1.3b  " in result.out
    words = [" ".join(line.split()) for line in result.out.splitlines()]
    assert "file part dtype size for" in words
    line = next(line for line in words if line.startswith("wan/fp8.safetensors"))
    assert "transformer float8_e4m3fn 13.3 GiB 14B, text-to-video: wan2.1-t2v-14b," in line
    assert any(line.startswith("x.safetensors lora float16") for line in words)
    assert VARIABLE not in result.err
    (tmp_path / "empty").mkdir()
    result = wancli("model", "list", "--comfyui", "empty")
    assert (result.code, result.err) == (0, "no weights of a Wan model in empty\n")
    result = wancli("model", "list", "--comfyui", "none")
    assert (result.code, complaint(result)[0]) == (4, "folder 'none' not found.")


def test_names_stand_for_files_and_are_found_by_digest_elsewhere(
    wancli: Wancli, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(tiny_model, "bare")
    place = {"transformer": "unet", "vae": "vae", "text_encoder": "clip"}
    typed = "a/models/loras/x.safetensors=0.5"
    flags: list[object] = ["--lora", typed]
    for part, folder in place.items():
        Path("a/models", folder).mkdir(parents=True)
        weights = next(Path("bare", part).glob("*.safetensors"))
        weights.rename(Path("a/models", folder, f"{part}.safetensors"))
        flags += [f"--{part.replace('_', '-')}", f"{part}.safetensors"]
    Path("a/models/loras").mkdir()
    save_file(random_lora()[0], "a/models/loras/x.safetensors")
    assert complaint(wancli("model", "info", "x.safetensors"))[0].startswith("model 'x.safet")
    monkeypatch.setenv(VARIABLE, f"none{os.pathsep}a")
    assert json.loads(wancli("model", "info", "x.safetensors", "--json").out)["keys"] == 4
    result = wancli(*RUN, "--json", "--model", "bare", *flags, "-o", "v.mp4")
    assert result.code == 0, result.err
    files = "transformer.safetensors, vae.safetensors, text_encoder.safetensors"
    assert f"files          {files}, {typed}\n" in wancli("show", "v.mp4").out

    Path("b").mkdir()
    shutil.move("a/models", "b/loose")  # another machine, with folders of its own
    monkeypatch.setenv(VARIABLE, "b/loose")
    again = wancli("repro", "v.mp4", "-o", "w.mp4")
    assert (again.code, "identical" in again.err) == (0, True), again.err
    changed, _ = random_lora()
    save_file({k: 2 * v for k, v in changed.items()}, "b/loose/loras/x.safetensors")
    refused = wancli("repro", "v.mp4", "-o", "x.mp4")
    assert refused.code == 4
    assert "made with the LoRA x.safetensors, which is missing or has changed" in refused.err
    assert wancli("repro", "v.mp4", "--lora", "x.safetensors", "--dry-run").code == 0
    (found := Path("b/loose/vae/vae.safetensors")).unlink()
    assert f"made with {found.name}, which is missing" in wancli("repro", "v.mp4").err


@pytest.mark.parametrize(
    ("flags", "error", "hint"),
    [
        (("--transformer", "lora"), "holds no transformer of a Wan", "wancli model info"),
        (("--text-encoder", "vae"), "holds no text encoder of a Wan", "wancli model info"),
        (("--vae", "transformer"), "holds no vae of a Wan", "wancli model info"),
        (("--transformer", "transformer"), "but of another model", "it fits wan2.1-t2v-14b,"),
        (("--transformer", "cut"), "its tensors do not fill it", "copy it again"),
        (("--lora", "cut"), "its tensors do not fill it", "copy it again"),
        (("--lora", "transformer"), "holds no LoRA", "give the file of a LoRA"),
        (("--lora", "lora"), "is not for wan2.1-t2v-1.3b", "it fits wan2.1-t2v-14b,"),
        (("--lora", "."), "LoRA '.' is a folder", "give the file in it"),
        (("--lora", "dead"), "LoRA 'dead.safetensors' not found", "check the path"),
        (("--vae", "."), "file '.' is a folder", "give the file in it"),
    ],
)
def test_what_a_file_is_not_is_one_line_before_anything_loads(
    forked: Run, tmp_path: Path, flags: tuple[str, str], error: str, hint: str
):
    write(tmp_path / "lora.safetensors", lora("blocks.0.self_attn.q", dim=5120))
    write(tmp_path / "vae.safetensors", vae(384, 16))
    write(tmp_path / "transformer.safetensors", T2V)
    write(tmp_path / "cut.safetensors", lora("blocks.0.self_attn.q", dim=9))
    with (tmp_path / "cut.safetensors").open("r+b") as file:
        file.truncate(1000)
    (tmp_path / "dead.safetensors").symlink_to("nowhere")
    flag, name = flags
    value = name if name == "." else f"{name}.safetensors"
    run = ("generate", "x", "--model", "wan2.1-t2v-1.3b", flag, value)
    code, heavy, out, err = forked(*run, folder=tmp_path)
    assert (code, heavy, out) == (4, [], ""), err
    message, help_ = err.splitlines()
    assert error in message
    assert len(message) < 300
    assert hint in help_


def test_info_describes_files_of_weights_that_are_no_lora(
    wancli: Wancli, monkeypatch: pytest.MonkeyPatch
):
    write(Path("a/models/unet/x.safetensors"), T2V)
    info = json.loads(wancli("model", "info", "a/models/unet/x.safetensors", "--json").out)
    assert (info["part"], info["keys"], info["dim"]) == ("transformer", len(T2V), 5120)
    monkeypatch.setenv(VARIABLE, "a")
    assert json.loads(wancli("model", "info", "x.safetensors", "--json").out) == info
    assert "fits wan2.1-t2v-14b" in " ".join(wancli("model", "info", "x.safetensors").out.split())
    assert json.loads(wancli("model", "info", "unet/x.safetensors", "--json").out) == info
    write(Path("a/models/diffusion_models/x.safetensors"), T2V)
    assert "is the name of 2 files" in complaint(wancli("model", "info", "x.safetensors"))[0]


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("vae/x.safetensors", "not safetensors"),
        ("unet/x.gguf", "not GGUF"),
        ("loras/x.pt", "neither .safetensors nor a pickle"),
    ],
)
def test_info_says_what_is_wrong_with_a_broken_file(
    wancli: Wancli, monkeypatch: pytest.MonkeyPatch, name: str, error: str
):
    path = Path("a/models", name)
    path.parent.mkdir(parents=True)
    path.write_text("<html>404</html>")
    monkeypatch.setenv(VARIABLE, "a")
    for stands_for_it in (path, path.name):
        result = wancli("model", "info", stands_for_it)
        assert (result.code, error in complaint(result)[0]) == (4, True), result.err


@pytest.mark.parametrize(
    ("name", "error", "hint"),
    [
        ("no.gguf", "file 'no.gguf' not found.", "check the path"),
        ("a/b:c.gguf", "file 'a/b:c.gguf' is not on this machine.", "wancli model pull a/b:c.gguf"),
    ],
)
def test_info_of_a_gguf_file_that_is_not_here_says_so(
    wancli: Wancli, cache: Path, name: str, error: str, hint: str
):
    result = wancli("model", "info", name)
    assert (result.code, *complaint(result)) == (4, error, hint)


def test_a_lora_of_the_hub_may_lie_in_the_folders(
    wancli: Wancli, tiny_model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    Path("a/models/loras").mkdir(parents=True)
    save_file(random_lora()[0], "a/models/loras/x.safetensors")
    run = ("plan", "--model", tiny_model, "--lora", "me/loras:v1/x.safetensors=0.5")
    assert "wancli model pull me/loras:v1/x.safetensors" in wancli(*run).err
    monkeypatch.setenv(VARIABLE, "a")
    assert "x.safetensors, 0.5" in wancli(*run).out


def test_a_folder_that_is_not_there_is_named(
    wancli: Wancli, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    from wancli.doctor.checks import list_folders

    monkeypatch.setenv(VARIABLE, "none")
    result = wancli("model", "list")
    assert (result.code, "wan2.1-t2v-1.3b" in result.out) == (0, True)
    assert result.err == f"warn:  folder 'none' not found.\nhint:  correct {VARIABLE}\n"
    (finding,) = (finding for finding in list_folders() if finding.name == "weights")
    assert (finding.state, finding.value) == ("missing", "none")
