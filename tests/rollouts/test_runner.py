"""What a rollout says when it is interrupted."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from wancli.rollouts.runner import RolloutJob


@pytest.mark.parametrize(
    ("files", "flags"),
    [
        ({"video": Path("a.mp4")}, "-o a.mp4"),
        ({"video": Path("my {a}.mp4")}, "-o 'my {{a}}.mp4'"),
        ({"latents": Path("a b.st")}, "--no-video --save-latents 'a b.st'"),
    ],
)
def test_the_command_that_resumes_can_be_typed(files: dict[str, Path], flags: str):
    job: Any = SimpleNamespace(**{"video": None, "latents": None, **files})
    resume: Any = RolloutJob.resume
    assert resume.fget(job) == f"wancli rollout --resume {flags}"
