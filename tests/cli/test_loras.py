"""LoRAs of the hub and in files: `wancli model list`, `pull`, `info` and `path`, and `--lora`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.test_bad_input import complaint
from tests.cli.test_models import listed
from tests.conftest import Wancli
from tests.forked import Run
from tests.hub import COMMIT, Hub, put_in_cache, serving
from tests.models.test_lora import pair, random_lora
from wancli.catalog.specs import SPECS
from wancli.planning.lora import PACKAGED

FILE = "v1/x_high_noise.safetensors"
NAME = f"me/loras:{FILE}"


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with a LoRA in a folder, and weights that are no LoRA."""
    folder = tmp_path / "repo"
    (folder / "v1").mkdir(parents=True)
    save_file(random_lora()[0], folder / FILE)
    save_file({"a": torch.zeros(1)}, folder / "other.safetensors")
    return folder


def test_a_cached_lora_is_used_listed_and_described_by_its_name(
    wancli: Wancli,
    cache: Path,
    repo: Path,
    tiny_model: Path,
):
    snapshot = put_in_cache(repo, repo="me/loras", cache=cache)
    rows = listed(wancli("model", "list", "--json"))
    assert set(rows) == {*SPECS, *PACKAGED, NAME}
    entry = {name: rows[NAME][name] for name in ("task", "state", "bytes", "description")}
    assert entry == {"task": "LoRA", "state": "yes", "bytes": (repo / FILE).stat().st_size,
                     "description": "rank 4, high noise"}  # fmt: skip
    assert NAME in wancli("model", "list").out
    assert wancli("model", "path", NAME).out == f"{snapshot / FILE}\n"
    run = ("generate", "a", "--model", tiny_model, "--dry-run", "--json")
    plan = json.loads(wancli(*run, "--lora", f"{NAME}=0.8").out)["plan"]
    assert plan["lora"] == [{"name": "x_high_noise.safetensors", "scale": 0.8, "keys": 4,
                             "applied": 4, "dropped": {}}]  # fmt: skip
    result = wancli(*run, "--lora", f"{NAME}@high=0.8")
    assert (result.code, "has one expert" in result.err) == (2, True)
    result = wancli(*run, "--lora", "me/loras:none.safetensors=2")
    assert result.code == 4
    assert complaint(result)[1] == "wancli model pull me/loras:none.safetensors"


def test_pull_downloads_one_file_of_a_repository(
    forked: Run,
    cache: Path,
    repo: Path,
    tmp_path: Path,
):
    with serving(Hub(repos={"me/loras": repo})) as hub:
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        code, _, out, err = forked("model", "pull", NAME, "--json", folder=tmp_path, **online)
        absent = forked("model", "pull", "me/loras:none.safetensors", folder=tmp_path, **online)
    assert code == 0, err
    path = Path(json.loads(out)["path"])
    assert path == cache / "models--me--loras" / "snapshots" / COMMIT / FILE
    assert path.read_bytes() == (repo / FILE).read_bytes()
    assert {path for path in hub.requests if "/resolve/" in path} == {
        f"/me/loras/resolve/{COMMIT}/{FILE}"
    }
    assert (absent[0], "'me/loras' has no file 'none.safetensors'" in absent[3]) == (4, True)


@pytest.mark.parametrize(
    ("name", "tensors", "expected"),
    [
        (
            "wan22_i2v_lownoise",
            pair("blocks.39.self_attn.q", 5120, 5120),
            {"size": "14B", "task": "image-to-video", "expert": "low", "dim": 5120, "blocks": 40},
        ),
        (
            "slow",
            pair("blocks.0.cross_attn.v_img", 5120, 5120),
            {"size": "14B", "task": "image-to-video", "expert": "", "blocks": 1},
        ),
        ("x", pair("blocks.29.ffn.0", 14_336, 3072), {"size": "5B", "task": "", "dim": 0}),
        ("T2V-1.3B", pair("blocks.0.ffn.0", 8960, 1536), {"size": "1.3B", "task": "text-to-video"}),
        (
            "norms",
            {"diffusion_model.blocks.0.norm3.diff_b": torch.ones(7)},
            {"size": "", "models": [], "ranks": {}, "form": "ComfyUI names; diff_b"},
        ),
    ],
)
def test_info_says_what_a_lora_is_for(
    wancli: Wancli, name: str, tensors: dict[str, torch.Tensor], expected: dict[str, object]
):
    save_file(tensors, f"{name}.safetensors")
    info = json.loads(wancli("model", "info", f"{name}.safetensors", "--json").out)
    assert {key: info[key] for key in expected} == expected
    assert (not info["first_keys"]) == bool(info["models"])
    if info["models"]:
        assert (info["ranks"], info["form"]) == ({"2": 1}, "ComfyUI names; factors")
        table = " ".join(wancli("model", "info", f"{name}.safetensors").out.split())
        assert f"fits {info['models'][0]}" in table


def test_a_pickle_is_counted_and_described_by_its_index(wancli: Wancli, tiny_model: Path):
    tensors = random_lora()[0]
    save_file(tensors, "x.safetensors")
    torch.save({"generator_lora": tensors, "step": 3}, "x.pt")
    torch.save({name: torch.nn.Parameter(tensor) for name, tensor in tensors.items()}, "y.pth")
    torch.save(tensors, "old.pt", _use_new_zipfile_serialization=False)
    torch.save({**tensors, "config": {1, 2}, "path": Path()}, "code.pt")
    plan = ("generate", "a", "--model", tiny_model, "--dry-run", "--json", "--lora")
    uses, facts = {}, {}
    for name in ("x.safetensors", "x.pt", "y.pth", "old.pt"):
        (use,) = json.loads(wancli(*plan, name).out)["plan"]["lora"]
        info = wancli("model", "info", name, "--json")
        uses[use.pop("name")] = use
        facts[name] = info.code or {**json.loads(info.out), "path": "", "bytes": 0}
    assert uses["x.pt"] == uses["y.pth"] == uses["x.safetensors"]
    assert facts["x.pt"] == facts["y.pth"] == facts["x.safetensors"]
    assert (uses["old.pt"]["keys"], facts["old.pt"]) == (None, 4)
    result = wancli(*plan, "code.pt")
    assert (result.code, "loading it would run" in result.err) == (4, True)


def test_info_of_another_file_is_an_error_of_one_line(
    wancli: Wancli, forked: Run, tiny_model: Path, tmp_path: Path
):
    (weights,) = (tiny_model / "vae").glob("*.safetensors")
    Path("cut.safetensors").write_bytes(weights.read_bytes()[:-1])
    Path("x.pt").write_bytes(b"PK")
    save_file({"a": torch.zeros(1)}, "other.safetensors")
    for name in ("other.safetensors", "cut.safetensors", "x.pt"):
        result = wancli("model", "info", name)
        assert (result.code, name in complaint(result)[0]) == (4, True)
    number = {"diffusion_model.blocks.0.self_attn.k.diff": torch.ones(())}  # fits nothing
    save_file(random_lora()[0] | number, "x.safetensors")
    code, heavy, _, err = forked("model", "info", "x.safetensors", folder=tmp_path)
    assert (code, heavy) == (0, []), err
