"""Help is short, whole at 80 columns, and true of the model that would run."""

import re

import pytest

from tests.conftest import Wancli
from wancli.cli.app import COMMANDS
from wancli.cli.help_text import LONGEST
from wancli.cli.reference import all_commands, man, markdown

GROUPS = {"preset", "model"}
LEAVES = {name: entry.load(name) for name, entry in COMMANDS.items() if name not in GROUPS} | {
    f"{name} {inner}": command
    for name in sorted(GROUPS)
    for inner, command in COMMANDS[name].load(name).commands.items()
}
COMPARE = """\
Compare two videos, or two latents: SSIM, PSNR, temporal difference.

Usage: wancli compare [OPTIONS] A B

Prints the mean and the worst video frame of each.

  wancli compare baseline.mp4 cached.mp4 --fail-under-ssim 0.95

Arguments:
  A                           Reference: a video, or latents from wancli.
  B                           Video or latents to compare with A.

Options:
      --fail-under-ssim X     Exit 7 if the SSIM of any video frame is below
                              this.

Global options:
      --json                  Print one JSON object per line on stdout.
  -q, --quiet                 Print only results, warnings and errors.
  -v, --verbose               Print what libraries log, and whole timing tables.
      --no-color              Print without color.
  -h, --help                  Print help.
"""


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def default_of(flag: str, text: str) -> str:
    """What a help says the flag's default to be."""
    entry = re.search(rf"{flag}[ ,].*?(?=\n {{2,8}}-|\n\n)", text, re.DOTALL)
    assert entry, text
    default = re.search(r"default: ([^)]*)", " ".join(entry[0].split()))
    return default[1] if default else ""


def test_help_is_laid_out_in_two_columns(wancli: Wancli):
    assert wancli("compare", "--help").out == COMPARE


@pytest.mark.parametrize("name", LEAVES)
def test_no_flag_is_cut_or_split(name: str, wancli: Wancli):
    text = wancli(*name.split(), "--help-all").out
    options = [param for param in LEAVES[name].params if param.param_type_name == "option"]
    for param in options:
        spellings = [f"--[no-]{param.opts[0][2:]}"] if param.secondary_opts else param.opts
        for spelling in spellings:
            assert re.search(rf"[ ,]{re.escape(spelling)}([ ,]|$)", text, re.MULTILINE), spelling
    lines = [line for line in text.splitlines() if not line.startswith("  wancli ")]
    assert [line for line in lines if len(line) > 80] == []
    assert "…" not in text
    assert "<" not in text


@pytest.mark.parametrize("columns", [40, 60, 132])
def test_every_flag_is_shown_whole_at_any_width(columns, wancli: Wancli, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert " --cachedit-residual-threshold X" in wancli("generate", "--help", "step-cache").out


def test_the_help_of_generate_starts_with_the_most_used_flags(wancli: Wancli):
    lines = wancli("generate", "--help").out.splitlines()
    assert len(lines) <= LONGEST
    text = "\n".join(lines)
    wanted = ("PROMPT", "--model", "--preset", "--size", "--num-frames", "--steps", "--seed")
    places = [text.index(word, text.index("Arguments:")) for word in (*wanted, "--output")]
    assert places == sorted(places)
    assert text.index("Pictures and videos:") < text.index("More (")
    assert "\n  step-cache  Reuse of work between denoising steps (lossy)\n" in text


def test_a_single_group_can_be_shown(wancli: Wancli):
    text = wancli("generate", "--help", "step-cache").out
    assert text.startswith("Step cache:\n")
    assert "--prompt" not in text
    assert "Sampling:" not in text
    text = wancli("generate", "--help", "Video").out
    assert text.startswith("Video:\n")
    assert "--fps N" in text  # though it is among the common ones, too


def test_an_unknown_group_is_an_error_that_names_the_groups_nearest_first(wancli: Wancli):
    result = wancli("generate", "--help", "samplng")
    assert (result.code, result.out) == (2, "")
    assert "no group 'samplng' in the help of wancli generate. hint: use sampling, " in " ".join(
        result.err.split()
    )
    assert "step-cache" in result.err
    assert wancli("generate", "--help", "--json").code == 0
    assert wancli("compare", "--help", "a.mp4").out == COMPARE  # has no groups to choose from


@pytest.mark.parametrize("name", ["generate", "rollout"])
def test_a_hidden_group_is_described_by_what_is_in_it(name: str, wancli: Wancli):
    rows = wancli(name, "--help").out.partition("More (")[2]
    texts = dict(re.findall(r"^  ([a-z0-9/-]+)  +(.*)", rows, re.MULTILINE))
    assert texts["sampling"] == "Steps, guidance, solver, timesteps"
    assert len(texts) > 4
    for text in texts.values():
        assert text
        assert not re.search("the same|rollouts|preset says", text, re.IGNORECASE), text


@pytest.mark.parametrize("name", ["generate", "rollout", "plan", "repro", "bench"])
def test_a_long_help_names_every_group_that_it_hides(name: str, wancli: Wancli):
    short, whole = (wancli(name, option).out for option in ("--help", "--help-all"))
    assert len(short.splitlines()) < len(whole.splitlines()) / 2
    named = re.findall(r"^  ([a-z-]+)  ", short.partition("More (")[2], re.MULTILINE)
    assert len(named) > 4
    for key in named:
        title, *rows = wancli(name, "--help", key).out.split("\n\n")[0].splitlines()
        assert f"\n{title}\n" in whole
        assert f"\n{title}\n" not in short
        assert set(rows) <= set(whole.splitlines())


@pytest.mark.parametrize(
    ("words", "size", "frames", "steps"),
    [
        ((), "96x96", "33", "20"),
        (("--model", "wan2.1-t2v-14b"), "1280x720", "81", "50"),
        (("-m", "wan2.2-ti2v-5b"), "1280x704", "121", "50"),
        (("--preset", "quick"), "96x96", "33", "7"),
    ],
)
def test_defaults_are_those_of_the_model_and_preset(words, size, frames, steps, wancli: Wancli):
    wancli("preset", "save", "quick", "--steps", 7)
    text = wancli("generate", *words, "--help").out
    shown = [default_of(flag, text) for flag in ("--size", "--num-frames", "--steps")]
    assert shown == [size, frames, steps]


def test_an_unknown_model_shows_no_defaults(wancli: Wancli):
    text = wancli("generate", "--model", "nosuch", "--help").out
    assert text.endswith("The defaults are not shown: model 'nosuch' not found.\n")
    assert default_of("--size", text) == ""


def test_the_default_of_an_unset_setting_is_described(wancli: Wancli):
    text = wancli("generate", "--help", "sampling").out
    assert default_of("--boundary-ratio", text) == "the model's"
    assert default_of("--boundary-ratio", wancli("repro", "--help", "sampling").out) == ""


def test_a_broken_preset_shows_no_defaults(wancli: Wancli):
    result = wancli("generate", "--preset", "nosuch", "--help")
    assert result.code == 0
    assert default_of("--steps", result.out) == ""
    assert "The defaults are not shown: preset 'nosuch' not found." in result.out


def test_help_is_bold_with_colors(wancli: Wancli, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[1mUsage:\x1b[0m" in wancli("compare", "--help").out
    assert "\x1b" not in wancli("compare", "--help", "--no-color").out


def test_without_a_command_wancli_prints_its_commands_and_fails(wancli: Wancli):
    alone, helped = wancli(), wancli("--help")
    assert (alone.code, helped.code) == (2, 0)
    assert alone.out == helped.out
    assert helped.out.endswith("\nwancli COMMAND --help describes a command.\n")
    assert all(f"\n  {name} " in helped.out for name in COMMANDS)


def test_versions_are_printed(wancli: Wancli):
    assert re.fullmatch(r"wancli \d+\.\d+\.\d+\S*\n", wancli("--version").out)
    lines = wancli("--version", "-v").out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["wancli", "torch", "diffusers"]
    assert wancli("-v").code == 2


def test_the_reference_has_every_command_and_flag(monkeypatch):
    monkeypatch.setenv("WANCLI_MODEL", "wan2.1-t2v-14b")  # a user's; the reference is the demo's
    text, page = markdown(), man()
    assert "| `--size WxH` | Width and height in pixels. (default: 96x96) |" in text
    for described in all_commands():
        assert f"\n## {described.path}\n" in text
        for group in described.groups:
            for row in group.rows:
                names = re.sub(r"--\[no-\](\S+)", r"--\1, --no-\1", row.names.strip())
                assert f"`{names}`" in text
                assert names.replace("-", "\\-") in page
    assert re.findall(r"^\| (\d+) \|", text, re.MULTILINE) == [
        "0", "1", "2", "3", "4", "5", "6", "7", "130", "143",
    ]  # fmt: skip
