"""What `wancli.generate` and `wancli.plan` return."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wancli.api.keywords import with_keywords
from wancli.cost.capacity import CapacityCheck
from wancli.errors import CapacityError, PlanWarning

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, repr=False)
class Video:
    """A finished video: `frames` uint8 [T, H, W, 3], and the record of how it was made.

    `path` is None where no file was written. `latents` [1, C, F, H, W] are normalised, and those
    of the last segment where there are several; None for a video that was kept (`skip_existing`).
    """

    path: Path | None
    frames: "NDArray[np.uint8]"
    record: Mapping[str, Any]
    latents: "Tensor | None" = None

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        return f"Video({width}x{height}, {count} frames, path={self.path!r})"

    @property
    def seed(self) -> int:
        """The seed, which was drawn if none was set."""
        return int(self.record["request"]["seed"])

    @property
    def fps(self) -> int:
        """Video frames per second."""
        return int(self.record["request"]["video"]["fps"])


@dataclass(frozen=True)
class VideoPlan:
    """What a video needs, and whether this machine has it; see `plan`.

    Without a cost (a model of the hub whose shape is not known before it is downloaded) `fits` and
    `needed` are None.
    """

    model: str
    fits: bool | None
    needed: int | None  # bytes at once on the device
    available: int | None  # bytes of the device
    device: str
    offload: str  # the mode that would be used
    seconds: float | None  # None where the device was not measured: wancli doctor --measure
    hint: str  # what would make it fit; empty if it does
    plan: Mapping[str, Any] = field(repr=False)  # steps, tokens, forwards, duration ...
    cost: Mapping[str, Any] = field(repr=False)  # parameters, FLOPs and bytes in detail
    warnings: Sequence[str] = ()
    verdict: str = ""  # whether it fits, in words

    def __str__(self) -> str:
        return f"{self.model}: {self.verdict}"


def video_plan(
    capacity: CapacityCheck, plan: Mapping[str, Any], warned: Sequence[PlanWarning]
) -> VideoPlan:
    """The plan of a request from the check of its capacity."""
    estimate, name = capacity.estimate, capacity.spec.name
    warnings = [with_keywords(warning.text) for warning in warned]
    if estimate is None:
        return VideoPlan(
            name, None, None, None, "", "none", None, "", plan, {}, warnings, capacity.verdict
        )
    hint = ""
    try:
        replace(capacity, force=False).check()
    except CapacityError as error:
        hint = with_keywords(error.hint, hint=True)
    return VideoPlan(
        name,
        estimate.sufficient,
        estimate.needed,
        estimate.device.total,
        estimate.device.name,
        estimate.offload,
        estimate.total_s,
        hint,
        plan,
        estimate.as_json(),
        warnings,
        with_keywords(capacity.verdict),
    )
