import pytest

from wancli.config.resolve import Layer, fields_of, resolve
from wancli.config.settings import Settings
from wancli.errors import SettingsError


def test_a_later_layer_wins_and_is_named_as_the_source():
    low = Layer("preset x", {"sampling": {"steps": 7, "flow_shift": 2.0}})
    high = Layer("flag", {"sampling": {"steps": 9}})
    resolved = resolve([low, high], Settings)
    assert resolved.settings.sampling.steps == 9
    assert resolved.settings.sampling.flow_shift == 2.0
    assert resolved.sources["sampling.steps"] == "flag"
    assert resolved.sources["sampling.flow_shift"] == "preset x"
    assert resolved.sources["video.fps"] == "default"


def test_an_invalid_value_is_named_as_the_user_wrote_it():
    with pytest.raises(SettingsError, match=r"^`steps` 0: must be") as flagged:
        resolve([Layer("flag", {"sampling": {"steps": 0}})], Settings)
    assert "(1 to 1000)" in flagged.value.hint
    with pytest.raises(SettingsError, match=r"^preset x: sampling.steps 0"):
        resolve([Layer("preset x", {"sampling": {"steps": 0}})], Settings)


def test_every_setting_has_a_unique_name_and_a_sentence_of_help():
    names = [name for _, name, _ in fields_of(Settings)]
    assert len(names) == len(set(names))
    assert all(
        f.description and f.description.endswith((".", ")")) for _, _, f in fields_of(Settings)
    )


def test_settings_survive_a_round_trip_through_json():
    settings = resolve([Layer("flag", {"sampling": {"steps": 3}, "model": "x"})], Settings).settings
    assert Settings.model_validate_json(settings.model_dump_json()) == settings
