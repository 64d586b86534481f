"""The list of commands, and messages that name settings by their flags."""

import pytest

from wancli.cli.app import COMMANDS
from wancli.cli.messages import with_flags


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_list_shows_the_first_line_of_each_help(name: str):
    entry = COMMANDS[name]
    lines = (entry.load(name).help or "").strip().splitlines()
    assert lines[0] == entry.help


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("`cfg_gate` 1 is not a step.", "--cfg-gate 1 is not a step."),
        ("`offload model`, or `vae_tiling`", "--offload model, or --vae-tiling"),
        ("--steps 8", "--steps 8"),
        ("a ` b ` c", "a ` b ` c"),
    ],
)
def test_settings_in_backticks_are_printed_as_flags(message: str, printed: str):
    assert with_flags(message) == printed
