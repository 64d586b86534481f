"""Whether a rollout may go on where it stopped, and from which chunk."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wancli.errors import PlanError, UsageError, shortened
from wancli.rollout.store import RolloutStore

# What may differ from the first run: it changes no pixel, or a rollout does not read it.
UNREAD = ("sampling.strength", "sampling.true_cfg_scale", "video.segment_frames")
FREE = ("output", "sources", "schema", "machine.offload", *UNREAD)
LONGER = ("rollout.chunks", "video.num_frames")  # may grow


@dataclass(frozen=True)
class ResumePoint:
    """What an earlier run left."""

    chunks: int  # finished ones, in a row from the first
    damaged: Path | None  # where damaged chunks, and those after them, were put
    no_digests: bool = False  # an earlier version made them: they are taken as they are


def begin(store: RolloutStore, told: Mapping[str, Any], *, overwrite: bool) -> None:
    """Start a rollout's folder. Raises UsageError where one is there already.

    With `overwrite` that one is deleted, so let nothing be left that is likely to fail.
    """
    if store.chunks() and not overwrite:
        raise UsageError(
            f"{store.folder} holds a rollout already.", hint="--resume, --overwrite or other names"
        )
    store.clear()
    store.write_request(told)


def go_on(
    store: RolloutStore,
    before: Mapping[str, Any],
    told: Mapping[str, Any],
    *,
    rerender: int | None = None,
) -> ResumePoint:
    """Check that the request is still what it was before, and drop what is to be made again.

    Raises UsageError that names what has changed, PlanError for fewer chunks than there are.
    """
    sound = store.sound_chunks()
    kept = sound if rerender is None else rerender
    if kept > sound:
        raise PlanError(
            f"--rerender {rerender}: only {sound} chunks are finished.", hint="--resume first"
        )
    check_same(before, told, kept=kept)
    if told["rollout"]["chunks"] < kept:
        raise PlanError(
            f"--chunks {told['rollout']['chunks']}: {sound} are finished already.",
            hint=f"--chunks {sound} or more, or --rerender",
        )
    aside = store.drop_from(kept)
    no_digests = store.vouch(kept)
    store.write_request(told)
    return ResumePoint(kept, None if rerender is not None else aside, no_digests)


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], *, kept: int) -> None:
    """Raise UsageError where the first `kept` chunks would come out differently."""
    old, new = dict(_flat(before, kept)), dict(_flat(now, kept))
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    free = LONGER if now["rollout"]["noise"] == "indexed" else ()
    changed = [key for key in changed if key not in free]
    if changed:
        said = "; ".join(
            f"{key} was {shortened(old.get(key))}, is {shortened(new.get(key))}"
            for key in changed[:3]
        )
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UsageError(
            f"the rollout was begun with other settings: {said}{more}.",
            hint="leave those flags away to go on with it, or use another --output",
        )


def _flat(value: Mapping[str, Any], kept: int, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of what decides the first `kept` chunks."""
    for key, inner in value.items():
        name = f"{path}{key}"
        if name in FREE:
            continue
        if name in ("inputs.changes", "inputs.seeds"):  # [chunk, what] in order
            yield name, [entry for entry in inner if entry[0] < max(kept, 1)]
        elif isinstance(inner, Mapping):
            yield from _flat(inner, kept, f"{name}.")
        else:
            yield name, inner
