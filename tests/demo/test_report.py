"""The evaluation of videos with known verdicts."""

from collections.abc import Sequence
from dataclasses import replace

from wancli.demo.judge import NONE, Verdict
from wancli.demo.report import LONG, EvaluationCase, UseResult, missed_goals
from wancli.demo.stability import Change
from wancli.demo.world import Combination

COMBINATION = Combination("red", "square", "spinning", "navy")
RIGHT = Verdict(**vars(COMBINATION), first="red", overlap=0.96)


def use(name: str, *verdicts: Verdict, changes: Sequence[Change] = ()) -> UseResult:
    cases = [EvaluationCase(COMBINATION, seed) for seed in range(len(verdicts))]
    return UseResult(name, "", cases, verdicts, [], seconds=1.0, changes=changes)


def test_correct_and_sharp_videos_miss_no_goal() -> None:
    assert missed_goals([use("generate", RIGHT), use("rollout", RIGHT)], [34.0]) == []


def test_a_missed_goal_names_the_use_and_the_attribute() -> None:
    lost = replace(RIGHT, shape=NONE)
    verdicts = [lost] + 24 * [RIGHT]  # 96 %: enough in rollouts
    uses = [use("generate", *verdicts), use("rollout", *verdicts)]
    assert missed_goals(uses, [34.0]) == ["generate: shape 96.0 %, goal 97 %"]


def test_rough_outlines_and_a_weak_vae_miss_their_goals() -> None:
    lumpy = use("rollout", replace(RIGHT, overlap=0.9))
    assert missed_goals([lumpy], [33.0]) == [
        "rollout: outline 0.900, goal 0.95", "VAE: 33.0 dB, goal 34 dB",
    ]  # fmt: skip


def test_a_rollout_that_drifts_misses_its_goal() -> None:
    long = use(LONG, RIGHT, changes=[Change(exposure=-6.0, area=2.0, speed=None)])
    assert missed_goals([long], [34.0]) == ["long rollout: exposure changes by 6.0 %, goal 5 %"]
