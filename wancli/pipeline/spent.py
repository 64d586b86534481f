"""Where a rollout's time went, chunk by chunk."""

from dataclasses import dataclass, field
from typing import Any

from wancli.geometry import Span
from wancli.pipeline.clock import Clock
from wancli.pipeline.film import Shown


@dataclass
class Row:
    """The times of one chunk, in milliseconds."""

    span: Span
    clock: Clock
    made: bool = True
    tokens: int = 0  # that its forwards attend to
    sigmas: list[float] = field(default_factory=list)
    shown: Shown = field(default_factory=Shown)

    def as_json(self) -> dict[str, Any]:
        """For the record."""
        return {
            "chunk": self.span.index,
            "made": self.made,
            "latent_frames": self.span.frames,
            "video_frames": self.shown.frames,
            "sigmas": self.sigmas,
            "steps_ms": self.clock.ms("step"),
            "clean_ms": sum(self.clock.ms("clean")),
            "decode_ms": 1000 * self.shown.decode_s,
            "write_ms": 1000 * self.shown.write_s,
            "kv_tokens": self.tokens,
        }


def summed(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of all chunks, by what they were spent on."""
    return {
        "denoise_s": sum(sum(row["steps_ms"]) for row in rows) / 1000,
        "clean_s": sum(row["clean_ms"] for row in rows) / 1000,
        "decode_s": sum(row["decode_ms"] for row in rows) / 1000,
        "save_s": sum(row["write_ms"] for row in rows) / 1000,
    }


def rates(rows: list[dict[str, Any]], wall_s: float) -> dict[str, float]:
    """Video frames a second of the chunks that were made: the transformer alone, with the VAE,
    and by the wall clock of the whole loop."""
    made = [row for row in rows if row["made"]]
    frames = sum(row["video_frames"] for row in made)
    spent = summed(made)
    transformer = spent["denoise_s"] + spent["clean_s"]
    named = {
        "transformer": transformer, "with_vae": transformer + spent["decode_s"], "wall": wall_s
    }  # fmt: skip
    return {name: frames / seconds for name, seconds in named.items() if seconds and frames}
