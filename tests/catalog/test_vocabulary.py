"""Warnings about prompt words that a model with a small vocabulary does not know."""

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.conftest import Wancli
from wancli.catalog.local import find_spec
from wancli.catalog.specs import SPECS, ModelSpec
from wancli.catalog.vocabulary import HINT, prompt_warnings, unknown_words
from wancli.config.settings import Settings
from wancli.demo import world
from wancli.records.record import Request
from wancli.records.write import start_record

DEMO = SPECS["demo"]


def test_unknown_words_are_listed_and_info_has_those_that_are_known(wancli: Wancli):
    (warning,) = prompt_warnings(DEMO, ["A cat walks on the grass, a red circle and a cat."])
    assert warning.text.startswith(
        "demo does not know 'cat', 'walks', 'grass'. It is the demo model"
    )
    assert "wancli model info demo" in HINT
    out = wancli("model", "info", "demo").out
    assert DEMO.draws in " ".join(out.split())


def test_every_word_of_the_training_prompts_is_known():
    prompts = [
        template.format(color=color, shape=shape, motion=motion, background=background)
        for template in world.TEMPLATES
        for color in world.COLORS
        for shape in world.SHAPES
        for motion in world.MOTIONS
        for background in world.BACKGROUNDS
    ]
    prompts += [text for texts in world.SYNONYMS.values() for text in texts]
    assert unknown_words(DEMO, prompts) == []
    axes = [*world.COLORS, *world.SHAPES, *world.BACKGROUNDS]
    axes += [motion.split()[-1] for motion in world.MOTIONS]
    assert [word for word in axes if word not in DEMO.draws] == []


@pytest.mark.parametrize("prompt", ["", "red. circle!?", "RED Circle"])
def test_punctuation_and_case_are_ignored(prompt: str):
    assert prompt_warnings(DEMO, [prompt]) == ()


def test_a_long_list_of_words_is_shortened():
    (warning,) = prompt_warnings(DEMO, [" ".join(f"word{n}" for n in range(20))])
    assert "'word7' and 12 more." in warning.text


def test_the_end_of_a_long_prompt_is_said_to_be_cut_off():
    prompts = ["a red circle " * 30, "a red circle " * 21, "a red circle"]
    (warning,) = prompt_warnings(DEMO, prompts)
    assert warning.text == "a prompt has 91 tokens, and demo reads 64: the rest is cut off."
    assert prompt_warnings(DEMO, prompts[1:]) == ()
    assert prompt_warnings(DEMO, prompts, text_length=91) == ()


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "random:wan2.1-t2v-1.3b"])
def test_a_model_with_a_full_tokenizer_gives_no_warning(name: str):
    assert prompt_warnings(find_spec(name), ["xyzzy", "a cat " * 600]) == ()


@pytest.mark.parametrize("tokenizer", ["", "{", "[]", '{"model": 1}', '{"model": {"type": "BPE"}}'])
def test_an_unreadable_tokenizer_gives_no_warning(tmp_path: Path, tokenizer: str):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(tokenizer)
    assert unknown_words(ModelSpec("x", "", "", folder=tmp_path), ["xyzzy"]) == []


@pytest.mark.parametrize("command", ["generate", "rollout"])
def test_unknown_words_are_warned_about_before_generation_and_recorded(
    wancli: Wancli, command: str
):
    result = wancli(command, "a cat and a red circle", "--dry-run", "--seed", 1)
    assert (result.code, result.err.count("warn:")) == (0, 1)
    assert "demo does not know 'cat'." in result.err
    assert "know" not in wancli(command, "a red circle", "--dry-run", "--seed", 1).err
    texts = [warning.text for warning in prompt_warnings(DEMO, ["a cat"])]
    request = Request("a cat", 1, Settings(), {}, warnings=texts)
    record = start_record(request, command=command, created=datetime.now(UTC))
    assert "'cat'" in json.loads(record.embedded())["warnings"][0]
