"""Whether a rollout can be resumed, and from which chunk."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wancli.catalog.tiny_decoder import DECODER
from wancli.config.resolve import dotted, fields_of
from wancli.config.settings import WEIGHTS, RolloutSettings
from wancli.errors import PlanError, UsageError, shortened, some
from wancli.records.record import digests
from wancli.rollouts.store import RolloutStore

# May differ from the first run: it changes no latent, or a rollout does not read it.
UNREAD = ("sampling.strength", "sampling.true_cfg_scale", "video.segment_frames")
# The weights have the digests of files, wherever they are.
FREE = (
    "output", "sources", "schema", "machine.offload", *UNREAD,
    *(f"machine.{name}" for name in WEIGHTS),
)  # fmt: skip
LONGER = ("rollout.chunks", "video.num_frames")  # may grow
# All chunks are decoded again, so these may change; see `may_redecode` for the last.
DECODERS = ("machine.vae_exact", f"machine.{DECODER}", f"weights.{DECODER}")
DECODING = ("machine.vae_dtype",)
ENCODED_STARTS = ("image", "extend")  # inputs that the VAE encodes


@dataclass(frozen=True)
class ResumePoint:
    """State of an earlier run."""

    chunks: int  # finished, without a gap from the first
    damaged: Path | None  # where damaged chunks and those after them were moved
    no_digests: bool = False  # written by an earlier version: used unchecked


def start_rollout(store: RolloutStore, request: Mapping[str, Any]) -> None:
    """Start a rollout's folder. One that it holds is deleted: call it once little else can fail."""
    store.clear()
    store.write_request(request)


def resume_rollout(
    store: RolloutStore,
    before: Mapping[str, Any],
    request: Mapping[str, Any],
    *,
    rerender: int | None = None,
) -> ResumePoint:
    """Check that the request matches the earlier one, and set aside the chunks to be redone.

    Raises UsageError that names the changes, PlanError for fewer chunks than are finished.
    """
    sound = store.sound_chunks()
    keep = sound if rerender is None else rerender
    chunks = request["rollout"]["chunks"]
    if rerender is not None:
        check_rerender(rerender, chunks=chunks, finished=sound)
    check_same(before, request, keep=keep)
    if rerender is None:
        check_chunks(chunks, finished=sound)
    aside = store.set_aside(keep)
    no_digests = store.add_digests(keep)
    store.write_request(request)
    return ResumePoint(keep, None if rerender is not None else aside, no_digests)


def check_rerender(first: int, *, chunks: int, finished: int) -> None:
    """Raise PlanError for a first chunk to render again that does not follow finished ones."""
    if first > finished:
        raise PlanError(
            f"`rerender {first}`: only {finished} chunks are finished.", hint="`resume` first"
        )
    if first >= chunks:
        raise PlanError(
            f"`rerender {first}`: the last chunk is {chunks - 1}.", hint=f"`rerender {chunks - 1}`"
        )


def check_chunks(chunks: int, *, finished: int) -> None:
    """Raise PlanError for fewer chunks than are finished."""
    if chunks < finished:
        raise PlanError(
            f"`chunks {chunks}`: {finished} are already finished.",
            hint=f"`chunks {finished}` or more, or `rerender {chunks - 1}`",
        )


def may_redecode(request: Mapping[str, Any]) -> bool:
    """Whether its finished chunks may be decoded with other settings: no latents are the VAE's."""
    starts = any(name in request.get("inputs", {}) for name in ENCODED_STARTS)
    return not starts and not _feeds_back(request)


def _feeds_back(request: Mapping[str, Any]) -> bool:
    """Whether chunks depend on the decoded frames of earlier ones."""
    return bool(request["rollout"].get("reencode_first"))


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], *, keep: int) -> None:
    """Raise UsageError if the first `keep` chunks would come out differently.

    A setting that an earlier version did not have was at its default then.
    """
    old, new = dict(_flat(before, keep)), dict(_flat(now, keep))
    settings = {dotted(table, name): info for table, name, info in fields_of(RolloutSettings)}
    old |= {key: settings[key].default for key in new.keys() & settings.keys() - old.keys()}
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    indexed = now["rollout"]["noise"] == "indexed"
    free = {
        *(LONGER if indexed else ()),
        *(DECODERS if not _feeds_back(before) else ()),
        *(DECODING if may_redecode(before) else ()),
    }
    changes = [
        f"{key} was {shortened(old.get(key))}, is {shortened(new.get(key))}"
        for key in changed
        if key not in free
    ]
    if changes:
        raise UsageError(
            f"the rollout was started with other settings: {some(changes, most=3, by='; ')}.",
            hint="drop the flags or the preset that set them, or use another `output`",
        )


def _flat(value: Mapping[str, Any], keep: int, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values that determine the first `keep` chunks."""
    for key, inner in value.items():
        name = f"{path}{key}"
        if name in FREE:
            continue
        if name in ("inputs.changes", "inputs.seeds"):  # [chunk, value] in order
            yield name, [entry for entry in inner if entry[0] < max(keep, 1)]
        elif name == "weights":
            yield from ((f"{name}.{part}", digest) for part, digest in digests(inner).items())
        elif isinstance(inner, Mapping):
            yield from _flat(inner, keep, f"{name}.")
        else:
            yield name, inner
