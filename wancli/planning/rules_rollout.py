"""Rules about a rollout's window: sinks, positions, shots, and how its cache is computed."""

from wancli.config.resolve import Resolved
from wancli.config.settings import Rollout, RolloutSettings, RopePolicy
from wancli.errors import PlanError

OF_CHANGES = ("recache", "blend", "shot_prefix", "shot_offset", "shot_sink")


def rope_policy(chosen: Rollout) -> RopePolicy:
    """The positions of a rollout; `auto` is relative with a sink, which stays beside the window."""
    if chosen.rope != "auto":
        return chosen.rope
    return "relative" if chosen.sink_frames else "absolute"


def check_window(chosen: Rollout) -> None:
    """Raise PlanError for a window, start or shots whose settings do not go together."""
    least = chosen.sink_frames + chosen.chunk_frames
    if chosen.rolling_window and chosen.rolling_window < least:
        raise PlanError(
            f"`rolling_window {chosen.rolling_window}` is too small for `sink_frames` "
            f"{chosen.sink_frames} and `chunk_frames {chosen.chunk_frames}`.",
            hint=f"`rolling_window {least}` or more",
        )
    if chosen.trim == "after" and chosen.sink_frames:
        raise PlanError(
            "`trim after` has no sinks; `sink_frames` needs `trim before`.",
            hint="drop `sink_frames`, or `trim before`",
        )
    if chosen.rope == "sink" and not chosen.sink_frames:
        raise PlanError("`rope sink` needs `sink_frames`.", hint="`sink_frames 3`")
    if chosen.image_start == "first-frame":
        _check_first_frame(chosen)
    _check_shots(chosen)
    if chosen.kv_recompute:
        _check_recompute(chosen)
    elif chosen.reencode_first:
        raise PlanError(
            "`reencode_first` needs a cache that is computed before every chunk.",
            hint="`kv_recompute`, or `no_reencode_first`",
        )


def check_rollout_flags(resolved: Resolved[RolloutSettings], *, changes: bool) -> None:
    """Raise PlanError for an explicit flag that has no effect, also as the prompt never changes."""
    chosen = resolved.settings.rollout
    for name in OF_CHANGES:
        if resolved.is_explicit(f"rollout.{name}") and getattr(chosen, name) and not changes:
            raise PlanError(
                f"`{name}` does nothing without a change of the prompt.",
                hint=f'`at` 1 "a blue circle", or drop `{name}`',
            )
    if resolved.is_explicit("rollout.recache_by") and not chosen.recache:
        raise PlanError("`recache_by` does nothing without `recache`.", hint="`recache`")


def _check_recompute(chosen: Rollout) -> None:
    """Raise PlanError for what a cache computed before every chunk rules out."""
    if chosen.sink_frames and rope_policy(chosen) == "absolute":
        raise PlanError(
            "`kv_recompute` moves the sink next to the other frames: `rope absolute` does not.",
            hint="`rope relative`",
        )
    if chosen.sink_frames and chosen.reencode_first:
        raise PlanError(
            f"`sink_frames {chosen.sink_frames}` keeps the frame that `reencode_first` replaces.",
            hint="`sink_frames 0`, or `no_reencode_first`",
        )
    others = {
        "recache": (chosen.recache, "recomputes it when the prompt changes"),
        "shot_sink": (chosen.shot_sink, "keeps what it recomputes"),
        f"shot_offset {chosen.shot_offset}": (chosen.shot_offset, "parts the window"),
    }
    for name, (on, why) in others.items():
        if on:
            raise PlanError(
                f"`kv_recompute` computes the cache before every chunk; `{name}` {why}.",
                hint=f"drop `{name.split()[0]}`",
            )


def _check_first_frame(chosen: Rollout) -> None:
    """Raise PlanError where nothing but the picture would be in the first chunk."""
    if chosen.independent_first_frame or chosen.chunk_frames == 1:
        of = "independent_first_frame" if chosen.independent_first_frame else "chunk_frames 1"
        raise PlanError(
            f"`image_start first-frame` leaves nothing to generate in the first chunk with `{of}`.",
            hint="`image_start context`",
        )


def _check_shots(chosen: Rollout) -> None:
    """Raise PlanError for shots that the other settings contradict."""
    if (chosen.shot_offset or chosen.shot_sink) and rope_policy(chosen) != "absolute":
        name = f"shot_offset {chosen.shot_offset}" if chosen.shot_offset else "shot_sink"
        raise PlanError(f"`{name}` needs absolute positions.", hint="`rope absolute`")
    if chosen.shot_offset and chosen.recache and chosen.recache_by == "window":
        raise PlanError(
            f"`shot_offset {chosen.shot_offset}` parts the window, which `recache_by window` "
            "computes at once.",
            hint="`recache_by chunk`",
        )
    if chosen.shot_prefix and chosen.blend:
        raise PlanError(
            f"`shot_prefix` cuts to a new prompt, which `blend {chosen.blend}` fades in.",
            hint="drop one of them",
        )
    if not chosen.shot_sink:
        return
    if not chosen.sink_frames:
        raise PlanError("`shot_sink` needs `sink_frames`.", hint="`sink_frames 3`")
    if chosen.recache:
        raise PlanError(
            "`shot_sink` keeps what was seen under the old prompt, which `recache` replaces.",
            hint="drop `recache`",
        )
    least = 2 * chosen.sink_frames + chosen.chunk_frames
    if 0 < chosen.rolling_window < least:
        raise PlanError(
            f"`rolling_window {chosen.rolling_window}` is too small for two sinks of "
            f"`sink_frames {chosen.sink_frames}` and `chunk_frames {chosen.chunk_frames}`.",
            hint=f"`rolling_window {least}` or more, or `no_shot_sink`",
        )
