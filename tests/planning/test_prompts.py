"""The prompt of each chunk of a rollout."""

import json
from pathlib import Path

import pytest

from wancli.errors import InputError, PlanError, UsageError
from wancli.planning.prompts import (
    BlendedPrompt,
    PromptChange,
    PromptSchedule,
    make_prompt_schedule,
    parse_change,
    read_script,
)


def test_a_prompt_holds_until_the_next_one():
    schedule = make_prompt_schedule("a", [PromptChange(5, "c"), PromptChange(2, "b")], chunks=6)
    prompts = [schedule.at(chunk) for chunk in range(-1, 6)]
    assert [prompt.new for prompt in prompts] == ["a", "a", "a", "b", "b", "b", "c"]
    assert [prompt.changes for prompt in prompts] == [False] * 3 + [True, False, False, True]


def test_a_new_prompt_is_blended_in_over_several_chunks():
    schedule = PromptSchedule("a", (PromptChange(2, "b"),), blend=4)
    assert [schedule.at(chunk).share for chunk in range(7)] == [1, 1, 0.25, 0.5, 0.75, 1, 1]
    assert schedule.at(3) == BlendedPrompt("a", "b", 0.5)


def test_the_first_chunk_of_a_shot_has_a_prefix():
    schedule = make_prompt_schedule("a", [PromptChange(2, "b")], chunks=4, prefix="Cut.")
    assert [schedule.at(chunk).new for chunk in range(4)] == ["a", "a", "Cut. b", "b"]
    assert schedule.prompts == ["a", "Cut. b", "b"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ([PromptChange(6, "b")], PlanError),
        ([PromptChange(0, "b")], PlanError),
        ([PromptChange(2, "b"), PromptChange(2, "c")], PlanError),
        ([PromptChange(2, " ")], UsageError),
    ],
)
def test_impossible_prompt_changes_are_rejected(
    changes: list[PromptChange], error: type[Exception]
):
    with pytest.raises(error):
        make_prompt_schedule("a", changes, chunks=6)


@pytest.mark.parametrize("text", ["5 a blue circle", "5: a blue circle", " 5  a blue circle "])
def test_a_prompt_change_is_a_chunk_and_a_prompt(text: str):
    assert parse_change(text) == PromptChange(5, "a blue circle")


@pytest.mark.parametrize("text", ["blue", "5", "x y", "-1 blue", ""])
def test_a_malformed_prompt_change_is_rejected(text: str):
    with pytest.raises(UsageError):
        parse_change(text)


def test_a_script_is_toml_or_json_lines(tmp_path: Path):
    toml, lines = tmp_path / "s.toml", tmp_path / "s.jsonl"
    toml.write_text('[[at]]\nchunk = 3\nprompt = "b"\n[[at]]\nchunk = 4\nprompt = "c"\n')
    lines.write_text('{"chunk": 3, "prompt": "b"}\n\n{"chunk": 4, "prompt": "c"}\n')
    assert read_script(toml) == read_script(lines) == [PromptChange(3, "b"), PromptChange(4, "c")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_line_of_a_script_ends_at_no_separator_inside_a_prompt(tmp_path: Path, end: str):
    path, prompt = tmp_path / "s.jsonl", "a cat\u2028sleeps\x85\u2029"
    rows = [json.dumps({"chunk": n, "prompt": prompt}, ensure_ascii=False) for n in (3, 4)]
    path.write_text(end.join(rows), "utf-8", newline="")
    assert read_script(path) == [PromptChange(3, prompt), PromptChange(4, prompt)]


@pytest.mark.parametrize("text", ['{"chunk": 3}', '{"chunk": "3", "prompt": "b"}', "3", "{"])
def test_a_broken_script_is_named(tmp_path: Path, text: str):
    path = tmp_path / "s.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=r"s\.jsonl"):
        read_script(path)
