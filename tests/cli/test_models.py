"""`wancli model list`, `pull`, `info`, `path` and `rm`, on a cache in the hub's own layout."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from tests.cli.test_bad_input import complaint
from tests.conftest import Result, Wancli
from tests.forked import Run
from tests.hub import COMMIT, Hub, put_in_cache, serving
from wancli.catalog.specs import DEMO_FOLDER, SPECS
from wancli.cli.completion import complete_models
from wancli.planning.lora import PACKAGED

KNOWN = "wan2.1-t2v-1.3b"
REPO = SPECS[KNOWN].repo


def listed(result: Result) -> dict[str, dict[str, object]]:
    rows = [json.loads(line) for line in result.out.splitlines()]
    return {row["name"]: row for row in rows}


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_list_shows_known_and_cached_models_with_their_sizes(
    wancli: Wancli, cache: Path, tiny_model: Path
):
    put_in_cache(tiny_model, repo=REPO, cache=cache)
    put_in_cache(tiny_model, repo="me/my-wan", cache=cache)
    other = cache / "llm"
    other.mkdir()
    (other / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    put_in_cache(other, repo="me/flux", cache=cache)
    rows = listed(wancli("model", "list", "--json"))
    assert set(rows) == {*SPECS, *PACKAGED, "me/my-wan"}
    states = {name: row["state"] for name, row in rows.items()}
    assert states["demo"] == "in the package"
    assert states[KNOWN] == "yes"
    assert rows[KNOWN]["bytes"] == bytes_of(tiny_model)
    assert {states[name] for name in SPECS if name not in ("demo", KNOWN)} == {"no"}
    table = wancli("model", "list").out
    assert [line.split()[0] for line in table.splitlines()[1:]][: len(SPECS)] == list(SPECS)


def test_an_interrupted_download_is_listed_as_partial_with_its_missing_files(
    wancli: Wancli, cache: Path, tiny_model: Path
):
    snapshot = put_in_cache(tiny_model, repo=REPO, cache=cache)
    plan = ("plan", "--model", KNOWN, "--json")
    assert not json.loads(wancli(*plan).out)["cost"]["downloads"]
    (weights,) = (snapshot / "vae").glob("*.safetensors")
    weights.unlink()
    assert json.loads(wancli(*plan).out)["cost"]["downloads"]
    assert listed(wancli("model", "list", "--json"))[KNOWN]["state"] == "partly"
    result = wancli("model", "path", KNOWN)
    assert result.code == 4
    error, hint = complaint(result)
    assert "vae/*.safetensors" in error
    assert hint == f"wancli model pull {KNOWN}"
    assert json.loads(wancli("model", "info", KNOWN, "--json").out)["missing"] == [
        "vae/*.safetensors"
    ]


def test_a_missing_shard_is_reported(wancli: Wancli, tiny_model: Path, tmp_path: Path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    index = {"weight_map": {"a": "diffusion_pytorch_model.safetensors", "b": "two.safetensors"}}
    name = "diffusion_pytorch_model.safetensors.index.json"
    (model / "transformer" / name).write_text(json.dumps(index))
    result = wancli("model", "info", model, "--json")
    assert json.loads(result.out)["missing"] == ["transformer/two.safetensors"]
    assert "lacks transformer/two.safetensors" in result.err


def test_info_counts_the_parameters_and_bytes_of_the_weights(
    wancli: Wancli, cache: Path, tiny_model: Path
):
    put_in_cache(tiny_model, repo=REPO, cache=cache)
    for name in (tiny_model, KNOWN, REPO):
        info = json.loads(wancli("model", "info", name, "--json").out)
        parts = {part["name"]: part for part in info["parts"]}
        for part in ("transformer", "vae", "text_encoder"):
            (file,) = (tiny_model / part).glob("*.safetensors")
            tensors = load_file(file).values()
            assert parts[part]["parameters"] == sum(tensor.numel() for tensor in tensors)
            assert parts[part]["bytes"] == file.stat().st_size
            assert parts[part]["dtypes"] == ["float32"]
        assert info["parameters"] == sum(part["parameters"] for part in info["parts"])
        assert parts["vae"]["config"]["z_dim"] == info["latent_channels"] == 4
        assert info["strides"] == {"temporal": 4, "spatial": 8, "patch": 2}
    assert "WanTransformer3DModel" in wancli("model", "info", KNOWN).out


def test_info_of_a_known_model_needs_no_download(wancli: Wancli, cache: Path):
    info = json.loads(wancli("model", "info", "wan2.2-ti2v-5b", "--json").out)
    assert (info["folder"], info["bytes"], info["strides"]["spatial"]) == (None, 0, 16)
    assert info["parameters"] == sum(part["parameters"] for part in info["parts"]) > 11e9
    result = wancli("model", "info", "some/model")
    assert result.code == 4
    assert complaint(result)[1] == "wancli model pull some/model"


@pytest.mark.parametrize("name", ["demo", "wan2.2-t2v-a14b"])
def test_info_says_whether_a_model_fits_here(wancli: Wancli, cache: Path, name: str):
    here = json.loads(wancli("model", "info", name, "--json").out)["here"]
    assert here["fits"] == (here["bytes"] <= here["device_bytes"])
    verdict = "fits" if here["fits"] else "does not fit"
    assert f"on this machine  {verdict}: " in wancli("model", "info", name).out


def test_broken_weights_are_named(wancli: Wancli, tiny_model: Path, tmp_path: Path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (weights,) = (model / "vae").glob("*.safetensors")
    weights.write_bytes(b"\0" * 100)
    result = wancli("model", "info", model)
    assert result.code == 4
    assert str(weights) in complaint(result)[0]


def test_path_prints_the_snapshot_folder(wancli: Wancli, cache: Path, tiny_model: Path):
    snapshot = put_in_cache(tiny_model, repo=REPO, cache=cache)
    for name in (KNOWN, REPO):
        assert wancli("model", "path", name).out == f"{snapshot}\n"
    assert wancli("model", "path", "demo").out == f"{DEMO_FOLDER}\n"
    assert wancli("model", "path", tiny_model).out == f"{tiny_model}\n"


def test_rm_deletes_only_the_named_model(wancli: Wancli, cache: Path, tiny_model: Path):
    put_in_cache(tiny_model, repo=REPO, cache=cache)
    copies = [put_in_cache(tiny_model, repo=f"me/copy{i}", cache=cache) for i in range(8)]
    result = wancli("model", "rm", KNOWN, "--yes", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out)
    assert (report["repo"], report["freed_bytes"]) == (REPO, bytes_of(tiny_model))
    assert not (cache / f"models--{REPO.replace('/', '--')}").exists()
    assert all((copy / "model_index.json").exists() for copy in copies)  # of the same commit
    result = wancli("model", "rm", KNOWN, "--yes")
    assert result.code == 4
    assert complaint(result)[1] == "wancli model list"


def test_rm_without_yes_deletes_nothing(wancli: Wancli, cache: Path, tiny_model: Path):
    snapshot = put_in_cache(tiny_model, repo=REPO, cache=cache)
    result = wancli("model", "rm", KNOWN)
    assert result.code == 2
    assert complaint(result)[1] == f"wancli model rm {KNOWN} --yes"
    assert snapshot.exists()


@pytest.mark.parametrize(("answer", "exists"), [("n\n", True), ("\n", True), ("y\n", False)])
def test_rm_asks_for_confirmation_on_a_terminal(
    cache: Path, tiny_model: Path, answer: str, exists: bool
):
    snapshot = put_in_cache(tiny_model, repo=REPO, cache=cache)
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    command = [sys.executable, "-m", "wancli", "model", "rm", KNOWN]
    done = subprocess.run(command, stdin=theirs, capture_output=True, text=True, check=False)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0, done.stderr
    assert f"delete {REPO}" in done.stderr
    assert snapshot.exists() == exists


@pytest.mark.parametrize("name", ["demo", "folder"])
def test_rm_rejects_models_outside_the_cache(wancli: Wancli, tiny_model: Path, name: str):
    model = DEMO_FOLDER if name == "demo" else tiny_model
    result = wancli("model", "rm", name if name == "demo" else model, "--yes")
    assert result.code == 2
    assert "only models in the hub's cache" in complaint(result)[0]
    assert (model / "model_index.json").exists()


def test_pull_of_a_local_model_downloads_nothing(wancli: Wancli, cache: Path, tiny_model: Path):
    snapshot = put_in_cache(tiny_model, repo=REPO, cache=cache)
    assert wancli("model", "pull", KNOWN, "-q").out == f"{snapshot}\n"
    result = wancli("model", "pull", "demo")
    assert result.code == 2
    assert "nothing to download" in complaint(result)[0]


def test_pull_offline_is_an_error(wancli: Wancli, cache: Path):
    result = wancli("model", "pull", KNOWN, "-q")
    assert result.code == 4
    error, hint = complaint(result)
    assert "HF_HUB_OFFLINE" in error
    assert "unset HF_HUB_OFFLINE" in hint


def test_pull_of_a_file_offline_is_an_error_about_the_file(wancli: Wancli, cache: Path):
    error, hint = complaint(wancli("model", "pull", "some/loras:my circle.safetensors", "-q"))
    assert "file 'my circle.safetensors' of 'some/loras' is not cached" in error
    assert hint.endswith("wancli model pull 'some/loras:my circle.safetensors'")


def test_pull_downloads_only_missing_files(
    forked: Run, tiny_model: Path, tmp_path: Path, cache: Path
):
    snapshot = put_in_cache(tiny_model, repo="me/wan", cache=cache)
    (weights,) = (snapshot / "vae").glob("*.safetensors")
    weights.resolve().unlink()
    weights.unlink()
    with serving(Hub(repos={"me/wan": tiny_model})) as hub:
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        code, _, out, err = forked("model", "pull", "me/wan", "--json", folder=tmp_path, **online)
    assert code == 0, err
    assert Path(json.loads(out)["path"]) == snapshot
    fetched = {path for path in hub.requests if "/resolve/" in path}
    assert fetched == {f"/me/wan/resolve/{COMMIT}/vae/{weights.name}"}
    files = [path.relative_to(tiny_model) for path in tiny_model.rglob("*") if path.is_file()]
    assert all((snapshot / file).read_bytes() == (tiny_model / file).read_bytes() for file in files)
    (whole,) = (tiny_model / "vae").glob("*.safetensors")
    assert f"me/wan: {whole.stat().st_size / 2**10:,.1f} KiB to download" in err


@pytest.mark.slow
def test_pull_converts_a_checkpoint_and_takes_the_rest_from_its_base(
    wancli: Wancli, forked: Run, tiny_model: Path, tmp_path: Path, cache: Path
):
    known = SPECS["longlive"]
    assert known.checkpoint
    result = wancli("rollout", "x", "-m", "longlive", "--size", "32x32", "--force", "-o", "a.mp4")
    assert complaint(result) == (
        "model 'longlive' is not on this machine.",
        "wancli model pull longlive",
    )
    sizes = json.loads((tiny_model / "transformer" / "config.json").read_text())
    wide = {"num_attention_heads": 8, "attention_head_dim": 128, "num_layers": 1}  # as released
    with torch.device("meta"):
        shapes = WanTransformer3DModel.from_config({**sizes, **wide}).state_dict()
    file = tmp_path / "weights" / known.checkpoint.file
    file.parent.mkdir(parents=True)
    state = {
        f"model.{name}": torch.tensor(float(number)).expand(like.shape).bfloat16()
        for number, (name, like) in enumerate(shapes.items())
    }
    torch.save({known.checkpoint.entry: state}, file)
    lora = {"blocks.0.ffn.0.lora_A.weight": torch.ones(1, 1024)}  # as peft writes it
    lora["blocks.0.ffn.0.lora_B.weight"] = torch.ones(sizes["ffn_dim"], 1)
    lora = {f"base_model.model.{name}": tensor for name, tensor in lora.items()}
    torch.save({"generator_lora": lora}, file.parent / Path(known.checkpoint.lora).name)
    repos = {known.checkpoint.repo: tmp_path / "weights", REPO: tiny_model}
    with serving(Hub(repos=repos)) as hub:
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        code, _, out, err = forked("model", "pull", "longlive", folder=tmp_path, **online)
    assert code == 0, err
    fetched = [path for path in hub.requests if f"/{REPO}/resolve/{COMMIT}/transformer/" in path]
    assert {Path(path).name for path in fetched} == {"config.json"}
    folder = Path(out.strip())
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    state["model.blocks.0.ffn.net.0.proj.weight"] += 1
    assert all(torch.equal(weights[name.removeprefix("model.")], t) for name, t in state.items())
    assert wancli("model", "pull", "longlive").out == out  # offline: it is here
    assert wancli("model", "path", "longlive").out == out
    rows = listed(wancli("model", "list", "--json"))
    assert (rows["longlive"]["state"], rows["longlive"]["bytes"]) == ("yes", bytes_of(folder))
    info = json.loads(wancli("model", "info", "longlive", "--json").out)
    assert (info["causal"], info["latent_channels"]) == (True, sizes["out_channels"])
    assert not complete_models(known.checkpoint.repo)  # which is no model by itself
    size = bytes_of(folder)
    result = wancli("model", "rm", "longlive", "--yes", "--json")
    assert json.loads(result.out)["freed_bytes"] > size  # with the checkpoint
    assert not folder.exists()


@pytest.mark.slow
def test_weights_that_a_file_stands_for_are_not_downloaded(
    forked: Run, tiny_model: Path, tmp_path: Path, cache: Path
):
    (weights,) = (tiny_model / "transformer").glob("*.safetensors")
    flags = ("--model", "me/wan", "--transformer", weights, "--seed", "1", "-o", "a.mp4")
    size = ("--steps", "1", "--frames", "5", "--size", "32x32")
    with serving(Hub(repos={"me/wan": tiny_model})) as hub:
        online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
        run = ("generate", "a red circle", *flags, *size)
        code, _, _, err = forked(*map(str, run), folder=tmp_path, **online)
    assert code == 0, err
    fetched = {path.partition(COMMIT)[2] for path in hub.requests if "/resolve/" in path}
    assert "/transformer/config.json" in fetched
    assert f"/vae/{weights.name}" in fetched
    assert f"/transformer/{weights.name}" not in fetched
    again = [*map(str, run), "--overwrite"]
    code, _, _, err = forked(*again, folder=tmp_path, HF_HUB_OFFLINE="1")
    assert code == 0, err


def test_pull_distinguishes_gated_missing_and_foreign_repositories(
    forked: Run, tmp_path: Path, cache: Path
):
    other = tmp_path / "llm"
    other.mkdir()
    (other / "config.json").write_text("{}")
    with serving(Hub(repos={"me/llm": other}, gated={"me/gated"})) as hub:
        for name, error in [
            ("me/gated", "is gated"),
            ("me/none", "is not on the hub"),
            ("me/llm", "no model_index.json"),
        ]:
            online = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"}
            code, _, out, err = forked("model", "pull", name, folder=tmp_path, **online)
            assert (code, out) == (4, ""), err
            assert error in err
            assert len(err.splitlines()) == 2, err


@pytest.mark.slow
def test_ctrl_c_stops_a_download_soon(tiny_model: Path, tmp_path: Path, cache: Path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    with (model / "vae" / "more.safetensors").open("wb") as file:
        file.truncate(100 * 2**20)  # huggingface_hub reads 10 MiB at a time
    with serving(Hub(repos={"me/wan": model}, wait_s=0.15)) as hub:  # 15 s for all of it
        process = subprocess.Popen(
            [sys.executable, "-m", "wancli", "model", "pull", "me/wan"],
            env=os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0"},
            stderr=subprocess.PIPE,
            text=True,
        )
        while not hub.sending:
            assert process.poll() is None
            time.sleep(0.05)
        since = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted by SIGINT" in err
    assert "Traceback" not in err
    assert time.monotonic() - since < 10
