"""The list of commands says of each what it says of itself."""

import pytest

from wancli.cli.app import COMMANDS


@pytest.mark.parametrize("name", COMMANDS)
def test_a_line_of_help_is_the_first_of_the_command(name: str):
    entry = COMMANDS[name]
    said = (entry.load(name).help or "").strip().splitlines()
    assert said[0] == entry.help
