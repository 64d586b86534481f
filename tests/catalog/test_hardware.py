"""Tokens are padded as requested, or where padding was measured to help."""

import pytest

from wancli.catalog import hardware
from wancli.catalog.hardware import HELPED, TILES, tokens_to_align


@pytest.mark.parametrize(("choice", "tokens"), [("off", 1), ("1", 1), ("128", 128)])
def test_an_explicit_alignment_applies_to_any_hardware(choice, tokens):
    assert {tokens_to_align(choice, name) for name in [*TILES, "abacus"]} == {tokens}


def test_auto_pads_only_where_it_was_measured_to_help(monkeypatch):
    assert {tokens_to_align("auto", name) for name in [*TILES, "abacus"]} == {1}
    assert set(TILES) >= HELPED
    monkeypatch.setattr(hardware, "HELPED", frozenset({"tpu v6e"}))
    assert tokens_to_align("auto", "tpu v6e") == 256
    assert tokens_to_align("auto", "tpu v5p") == 1
