"""What a rollout is to be made from, besides its settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wancli.planning.context import NO_FILES, ContextFiles
from wancli.planning.prompts import PromptChange


@dataclass(frozen=True)
class RolloutRequest:
    """Options of a rollout besides the settings."""

    prompt: str | None
    seed: str | None
    output: str | None
    folder: Path
    starts: ContextFiles = NO_FILES
    changes: Sequence[PromptChange] = ()
    latents: str | None = None  # a name or template, as `output` and `report` are
    video: bool = True  # False: latents only, without a VAE
    files: bool = True  # False: the chunks stay in memory
    only_new: bool = False
    overwrite: bool = False
    skip_existing: bool = False  # go on with what there is of this very request
    resume: bool = False
    rerender: int | None = None
    report: str | None = None
    force: bool = False

    @property
    def continues(self) -> bool:
        """Whether it continues an earlier rollout."""
        return self.resume or self.rerender is not None
