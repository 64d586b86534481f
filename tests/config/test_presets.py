import json
from pathlib import Path

import pytest

from tests.conftest import Wancli
from wancli.catalog.local import find_spec
from wancli.catalog.specs import SPECS
from wancli.config.presets import PACKAGED, find_preset, layers, list_presets, validate_file
from wancli.config.resolve import Layer, resolve
from wancli.config.settings import Settings
from wancli.errors import PresetError
from wancli.planning.inputs import NO_INPUTS, add_required_inputs
from wancli.planning.plan import make_plan


@pytest.mark.parametrize("path", sorted(PACKAGED.glob("*.toml")), ids=lambda p: p.stem)
def test_every_packaged_preset_is_plannable_and_cites_its_source(path: Path):
    preset = validate_file(path)
    nothing = Layer("test", {"machine": {"lora": []}})  # those of the hub are not here
    settings = resolve([*layers(preset), nothing], Settings).settings
    spec = find_spec(settings.model)
    assert make_plan(settings, spec, add_required_inputs(spec, NO_INPUTS)).tokens > 0
    assert preset.description.endswith(".")
    assert preset.source


def test_every_known_model_has_a_preset_of_its_name():
    for name in SPECS:
        assert resolve(layers(find_preset(name)), Settings).settings.model == name


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_preset_overrides_the_one_it_extends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANCLI_PRESET_PATH", str(tmp_path))
    write(tmp_path, "quick", 'extends = "demo"\n[sampling]\nsteps = 4\n')
    resolved = resolve(layers(find_preset("quick")), Settings)
    assert resolved.settings.sampling.steps == 4
    assert resolved.settings.video.num_frames == 33
    assert resolved.sources["video.num_frames"] == "preset demo"


def test_a_preset_may_extend_the_one_it_shadows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANCLI_PRESET_PATH", "~")
    write(tmp_path, "demo", 'extends = "demo"\n[sampling]\nsteps = 4\n')
    settings = resolve(layers(find_preset("demo")), Settings).settings
    assert (settings.sampling.steps, settings.video.width) == (4, 96)


def test_presets_that_extend_each_other_are_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANCLI_PRESET_PATH", str(tmp_path))
    write(tmp_path, "a", 'extends = "b"\n')
    write(tmp_path, "b", 'extends = "a"\n')
    with pytest.raises(PresetError, match="extends"):
        layers(find_preset("a"))


def test_a_folder_found_in_two_places_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "presets").symlink_to(PACKAGED)  # as in a clone of the repository
    monkeypatch.chdir(tmp_path)
    assert {entry.preset.place for entry in list_presets()} == {"./presets"}
    assert not any(entry.shadows for entry in list_presets())


def test_the_list_shows_where_presets_come_from_and_what_they_shadow(wancli: Wancli):
    write(Path("presets"), "demo", 'extends = "demo"\ndescription = "Mine."\n')
    lines = wancli("preset", "list", "--json").out.splitlines()
    presets = {preset["name"]: preset for preset in map(json.loads, lines)}
    assert presets["demo"]["from"] == "./presets"
    assert presets["demo"]["shadows"] == [str(PACKAGED / "demo.toml")]
    assert presets["wan2.2-ti2v-5b"]["model"] == "wan2.2-ti2v-5b"
    assert "Mine." in wancli("preset", "list").out


def test_a_broken_preset_does_not_hide_the_others(wancli: Wancli):
    write(Path("presets"), "broken", "[sampling\n")
    result = wancli("preset", "list")
    assert result.code == 0
    assert "broken:" in result.out
    assert "wan2.1-t2v-14b" in result.out


def test_generate_uses_a_preset_saved_from_flags(wancli: Wancli):
    saved = wancli("preset", "save", "quick", "--preset", "demo", "--steps", 4)
    assert saved.code == 0, saved.err
    assert Path(saved.out.strip()).read_text() == 'extends = "demo"\n\n[sampling]\nsteps = 4\n'
    assert wancli("preset", "path", "quick").out == saved.out
    result = wancli("generate", "x", "--preset", "quick", "--dry-run", "--json")
    assert json.loads(result.out)["request"]["sampling"]["steps"] == 4
    assert wancli("preset", "save", "quick", "--steps", 5).code == 2
    assert wancli("preset", "save", "quick", "--steps", 5, "--overwrite").code == 0
    assert wancli("preset", "save", "../quick", "--steps", 5).code == 2
    assert wancli("preset", "save", "none").code == 2


def test_show_prints_every_value_and_its_source(wancli: Wancli):
    shown = json.loads(wancli("preset", "show", "wan2.2-t2v-a14b", "--json").out)
    assert shown["settings"]["sampling"]["guidance_scale_2"] == 3.0
    assert shown["sources"]["sampling.steps"] == "preset wan2.2-t2v-a14b"
    assert "guidance_scale_2" in wancli("preset", "show", "wan2.2-t2v-a14b").out


def test_a_model_chosen_by_flag_brings_its_defaults(wancli: Wancli):
    result = wancli("generate", "x", "-m", "wan2.2-ti2v-5b", "--dry-run", "--json", "--seed", 1)
    request = json.loads(result.out)["request"]
    assert request["video"]["num_frames"] == 121
    assert request["sources"]["video.num_frames"] == "model default"


def test_precedence_is_flag_environment_preset_user_config_model_default(
    wancli: Wancli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    write(tmp_path / "wancli", "config", "[sampling]\nsteps = 11\nflow_shift = 9.0\n")
    write(Path("presets"), "p", "[sampling]\nsteps = 12\n")
    monkeypatch.setenv("WANCLI_MODEL", "wan2.1-t2v-14b")
    for flags, steps in (((), 11), (("--preset", "p"), 12), (("--preset", "p", "--steps", 13), 13)):
        request = json.loads(wancli("generate", "x", *flags, "--dry-run", "--json").out)["request"]
        assert request["sampling"]["steps"] == steps
        assert request["sampling"]["flow_shift"] == 9.0
        assert request["model"] == "wan2.1-t2v-14b"
