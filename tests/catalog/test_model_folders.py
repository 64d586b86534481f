"""Files by name in the folders of WANCLI_MODEL_PATH, which are laid out as ComfyUI's."""

import os
from pathlib import Path

import pytest

from wancli.catalog.model_folders import VARIABLE, ModelFolder, find_file, folders_of
from wancli.errors import InputError, SettingsError


def put(*paths: str) -> None:
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a ComfyUI in `comfy` and a folder of files in `plain`."""
    monkeypatch.chdir(tmp_path)
    put("comfy/models/vae/a.safetensors", "comfy/models/loras/style/b.safetensors", "plain/c.gguf")
    monkeypatch.setenv(VARIABLE, f"comfy{os.pathsep}{os.pathsep}plain")
    return tmp_path


@pytest.mark.parametrize(
    ("setting", "name", "path"),
    [
        ("vae", "a.safetensors", "comfy/models/vae/a.safetensors"),
        ("lora", "b.safetensors", "comfy/models/loras/style/b.safetensors"),
        ("lora", "style/b.safetensors", "comfy/models/loras/style/b.safetensors"),
        ("transformer", "c.gguf", "plain/c.gguf"),
        ("vae", "c.gguf", "plain/c.gguf"),
    ],
)
def test_a_name_is_found_in_the_folders_for_its_setting(
    here: Path, setting: str, name: str, path: str
):
    assert find_file(setting, name) == Path(path)


def test_a_path_that_exists_comes_before_the_folders(here: Path):
    put("a.safetensors")
    assert find_file("vae", "a.safetensors") == Path("a.safetensors")


def test_a_name_of_several_files_is_an_error_that_lists_them(here: Path):
    put("plain/deep/a.safetensors")
    with pytest.raises(SettingsError, match="the name of 2 files: comfy.*, plain/deep") as raised:
        find_file("vae", "a.safetensors")
    assert raised.value.hint == "give the path of one, such as comfy/models/vae/a.safetensors"
    assert find_file("lora", "deep/a.safetensors") == Path("plain/deep/a.safetensors")


def test_links_to_one_file_are_one_file(here: Path):
    Path("plain/a.safetensors").symlink_to(here / "comfy/models/vae/a.safetensors")
    Path("plain/again").symlink_to(here / "plain")
    assert find_file("vae", "a.safetensors") == Path("comfy/models/vae/a.safetensors")
    assert [path.name for path in ModelFolder(Path("plain")).files()] == ["a.safetensors", "c.gguf"]


@pytest.mark.parametrize(
    ("setting", "name", "hint"),
    [
        ("lora", "a.safetensors", "wancli model list names those there"),  # a VAE
        ("lora", "bb.safetensors", "did you mean 'b.safetensors'?"),
        ("vae", "yle/b.safetensors", "wancli model list names those there"),
    ],
)
def test_a_name_that_is_not_there_says_where_it_was_looked_for(
    here: Path, setting: str, name: str, hint: str
):
    with pytest.raises(InputError, match=f"'{name}' not found, here or in comfy::plain") as raised:
        find_file(setting, name)
    assert raised.value.hint == hint


def test_without_folders_the_error_is_as_for_any_file(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE)
    for name in ("a.safetensors", str(here / "a.safetensors")):
        with pytest.raises(InputError, match=f"^LoRA '{name}' not found.$"):
            find_file("lora", name, kind="LoRA")


def test_comfyuis_list_names_more_folders(here: Path):
    put("other/Lora/d.safetensors", "other/LyCORIS/x", "comfy/own/e")
    Path("comfy/extra_model_paths.yaml").write_text(
        "a1111:\n  base_path: ../other\n  loras: |\n    Lora\n    LyCORIS\n    none\n"
        "  embeddings: x\n  is_default: true\nempty:\nown:\n  unet: own\n"
    )
    base = Path("comfy")
    assert folders_of(base) == [
        ModelFolder(base / "models/vae", "vae"),
        ModelFolder(base / "models/loras", "lora"),
        ModelFolder(base / "../other/Lora", "lora"),
        ModelFolder(base / "../other/LyCORIS", "lora"),
        ModelFolder(base / "own", "transformer"),
    ]
    assert find_file("lora", "d.safetensors") == base / "../other/Lora/d.safetensors"


@pytest.mark.parametrize(
    ("text", "reason"),
    [("a: [", "not YAML"), ("- a", "not a YAML mapping"), ("a: 2024-99-99", "not YAML"),
     ("[" * 3000, "not YAML|nested")],
)  # fmt: skip
def test_a_broken_list_is_named(here: Path, text: str, reason: str):
    Path("comfy/extra_model_paths.yaml").write_text(text)
    with pytest.raises(
        InputError, match=rf"cannot read comfy/extra_model_paths.yaml: .*({reason})"
    ):
        folders_of(Path("comfy"))
