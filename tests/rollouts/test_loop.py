"""The rollout loop, with a model that only logs its calls."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wancli.catalog.geometry import Span, lay_out
from wancli.generation.flow import Denoised, Velocity
from wancli.rollouts.denoiser import PromptPair
from wancli.rollouts.loop import (
    Chunk,
    ChunkPrompt,
    KVCommitted,
    RolloutInputs,
    StepDone,
    rollout,
)


@dataclass
class LoggingDenoiser:
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def set_prompt(self, prompts: PromptPair) -> None:
        self.calls.append(("set_prompt", prompts.cond.item()))

    def begin(self, span: Span) -> None:
        self.calls.append(("begin", span.index))

    def velocity(self, latents: Tensor, timestep: float) -> Tensor:
        return latents * timestep

    def commit(self, clean: Tensor, timestep: float) -> None:
        self.calls.append(("commit", clean.item(), timestep))

    def recache(self) -> None:
        self.calls.append(("recache",))


def filled(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1, 1), float(value))


def inputs(
    *, context: int = 0, chunks: int = 3, finished: int = 0, recache_at: int | None = None
) -> RolloutInputs:
    context_spans, spans = lay_out(chunks, chunk_frames=1, context=context)
    prompts = {index: PromptPair(filled(index)) for index in range(-context, chunks)}

    def denoise(span: Span, velocity: Velocity) -> Iterator[Denoised]:
        for i, timestep in enumerate((2.0, 3.0)):
            yield Denoised(i, timestep / 1000, velocity(filled(span.index + 1), timestep))

    return RolloutInputs(
        context=[(span, filled(100 + span.index)) for span in context_spans],
        spans=spans,
        prompts=lambda span: ChunkPrompt(prompts[span.index], recache=span.index == recache_at),
        finished=lambda span: filled(-span.index) if span.index < finished else None,
        denoise=denoise,
        context_timestep=5.0,
    )


def test_every_chunk_but_the_last_is_committed_clean():
    model = LoggingDenoiser()
    events = list(rollout(model, inputs()))
    assert [type(event) for event in events] == [StepDone, StepDone, Chunk, KVCommitted] * 2 + [
        StepDone, StepDone, Chunk,
    ]  # fmt: skip
    assert [e.latents.item() for e in events if isinstance(e, Chunk)] == [3, 6, 9]
    assert model.calls == [
        ("set_prompt", 0), ("begin", 0), ("commit", 3, 5.0),
        ("set_prompt", 1), ("begin", 1), ("commit", 6, 5.0),
        ("set_prompt", 2), ("begin", 2),
    ]  # fmt: skip


def test_finished_chunks_are_only_committed():
    model = LoggingDenoiser()
    events = list(rollout(model, inputs(finished=2)))
    assert [e.generated for e in events if isinstance(e, Chunk)] == [False, False, True]
    assert [entry for entry in model.calls if entry[0] == "commit"] == [
        ("commit", 0, 5.0), ("commit", -1, 5.0),
    ]  # fmt: skip


def test_context_is_committed_at_timestep_zero():
    model = LoggingDenoiser()
    events = list(rollout(model, inputs(context=2, chunks=1)))
    assert [e.latents.item() for e in events if isinstance(e, Chunk)] == [98, 99, 3]
    assert model.calls[:3] == [("set_prompt", -2), ("begin", -2), ("commit", 98, 0.0)]


def test_a_prompt_can_have_the_cache_recomputed_before_its_first_chunk():
    model = LoggingDenoiser()
    list(rollout(model, inputs(recache_at=1)))
    assert model.calls[2:6] == [
        ("commit", 3, 5.0), ("set_prompt", 1), ("recache",), ("begin", 1),
    ]  # fmt: skip
    assert model.calls.count(("recache",)) == 1
