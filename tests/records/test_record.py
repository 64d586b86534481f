import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wancli.config.resolve import Layer, resolve
from wancli.config.seeds import parse_seeds
from wancli.config.settings import Rollout, RolloutSettings, Settings
from wancli.errors import InputError, SettingsError, UsageError
from wancli.planning.earlier_rollout import find_rollout
from wancli.records.naming import NameTemplate, literal, name_fields, name_output
from wancli.records.record import EMBEDDED_LIMIT, Request, RunRecord, parse_record, settings_of


def request(prompt: str = "a", seed: int = 1, **tables: object) -> Request:
    resolved = resolve([Layer("flag", tables)], Settings)
    return Request(prompt, seed, resolved.settings, resolved.sources)


def test_the_hash_covers_what_determines_the_frames():
    same = request(output={"metadata": False})
    assert request().hash == same.hash
    others = [request("b"), request(seed=2), request(sampling={"steps": 3}), request(model="x")]
    assert len({r.hash for r in (request(), *others)}) == 5


@pytest.mark.parametrize(
    ("settings", "before"),  # as the version before `vae_decoder` and `image_start` had them
    [(Settings(), "4c0bf7a596a02eee"), (RolloutSettings(), "9e5c31c8825b857f")],
    ids=["generate", "rollout"],
)
def test_a_setting_added_later_changes_no_hash_while_it_is_at_its_default(
    settings: Settings, before: str
):
    assert Request("a red circle", 3, settings, {}).hash == before


def test_a_setting_added_later_is_in_the_hash_where_it_is_set():
    changes: list[dict[str, object]] = [{}, {"shot_offset": 8}, {"image_start": "first-frame"}]
    settings = [RolloutSettings(rollout=Rollout.model_validate(change)) for change in changes]
    assert len({Request("a", 1, each, {}).hash for each in settings}) == 3


def test_the_hash_covers_a_loras_expert_and_scale_and_not_where_it_is():
    hashes = [
        request(machine={"lora": [text]}).hash
        for text in ("x@high=0.5", "a/b=c@d/y.pt@high=0.5", "x@low=0.5", "x=0.5", "x")
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 4


@given(st.text(max_size=20_000))
def test_an_embedded_record_is_small_and_reads_back(prompt: str):
    requested = request(prompt.replace("\0", ""), model="/home/me/models/wan")
    record = RunRecord("id", "ok", "generate", "now", requested.as_json(), requested.hash)
    text = record.embedded()
    assert "/home" not in text
    assert parse_record(text, origin="x")["hash"] == requested.hash
    if len(prompt.encode(errors="replace")) < EMBEDDED_LIMIT // 8:
        assert len(text.encode(errors="surrogatepass")) <= EMBEDDED_LIMIT


def test_records_of_before_fast_decoding_decode_as_they_did():
    machine = Settings().machine.model_dump()
    now = settings_of({"request": {"machine": machine}})
    del machine["vae_exact"]
    then = settings_of({"request": {"machine": machine}})
    assert now["machine"]["vae_exact"] is None
    assert then["machine"]["vae_exact"] is True


def test_a_record_with_nonstandard_json_numbers_is_rejected():
    record = RunRecord("id", "ok", "generate", "now", request().as_json(), "x")
    good = json.dumps(record.as_json())
    assert parse_record(good, origin="x")["id"] == "id"
    for number in ("NaN", "-Infinity", "1e999"):
        bad = good.replace('"timings": {}', f'"timings": {{"x": {number}}}')
        assert bad != good
        with pytest.raises(InputError, match="no wancli record"):
            parse_record(bad, origin="x")


@pytest.mark.parametrize(
    ("text", "count", "seeds"),
    [
        ("7", None, [7]),
        ("1,2,5", None, [1, 2, 5]),
        ("0-3", None, [0, 1, 2, 3]),
        ("4", 3, [4, 5, 6]),
    ],
)
def test_seeds_can_be_single_lists_ranges_or_counts(text: str, count: int | None, seeds: list[int]):
    assert parse_seeds(text, count) == seeds


@pytest.mark.parametrize("text", ["", "x", "1,,2", "3-1", "1.5", "-2", "9" * 20])
def test_invalid_seeds_are_rejected(text: str):
    with pytest.raises(SettingsError):
        parse_seeds(text, None)


def test_unset_seeds_are_random_31_bit_numbers():
    drawn = {parse_seeds(None, None)[0] for _ in range(20)}
    assert len(drawn) > 15
    assert max(drawn) < 2**31


FIELDS = {"prompt": "A red ../circle: 50% 'off'", "seed": 3, "model": "demo"}


@pytest.mark.parametrize(
    ("template", "several", "path"),
    [
        (None, False, "out/A-red-circle-50-off-3.mp4"),
        ("{prompt:5}_{seed}.mp4", False, "out/A-red_3.mp4"),
        ("x.mp4", False, "out/x.mp4"),
        ("x.mp4", True, "out/x-3.mp4"),
        ("./x", True, "out/x-3"),
        ("out.d/x", True, "out.d/x-3"),
        ("sub/x.mp4", False, "sub/x.mp4"),
        ("/tmp/{seed}.mp4", True, "/tmp/3.mp4"),
    ],
)
def test_output_names_are_safe_and_distinguish_seeds(
    template: str | None, several: bool, path: str
):
    assert name_output(template, FIELDS, folder=Path("out"), several=several) == Path(path)


@pytest.mark.parametrize("spec", [":²", ":" + "9" * 5_000, ":05", ":.1f", ":{seed}"])
def test_a_width_that_is_no_number_is_rejected(spec: str):
    with pytest.raises(UsageError, match="is no width"):
        NameTemplate(f"{{prompt{spec}}}.mp4")


@pytest.mark.parametrize("name", ["a{b}.mp4", "{seed}/{{x}.mp4"])
def test_a_literal_name_is_a_template_of_itself_and_finds_its_rollout(name: str):
    assert NameTemplate(literal(name)).fill({}) == name
    found = find_rollout("a", literal(f"v/{name}"), None, Path())
    assert found == Path(f"v/{name}").with_suffix(".rollout")


def test_a_name_can_have_any_setting_of_its_command():
    layer = Layer("x", {"model": "demo", "sampling": {"guidance_scale": 2.5}})
    settings = resolve([layer], Settings).settings
    fields = name_fields(settings, prompt="a", seed=1, steps=4)
    name = NameTemplate("{model}-{steps}-{guidance_scale}-{width}.mp4").fill(fields)
    assert name == f"demo-4-2.5-{settings.video.width}.mp4"
    with pytest.raises(UsageError, match="unknown field '{rolling_window}'"):
        NameTemplate("{rolling_window}.mp4").fill(fields)
