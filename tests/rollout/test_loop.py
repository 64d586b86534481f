"""The loop, with a model that only writes down what it is asked."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wancli.catalog.geometry import Span, lay_out
from wancli.rollout.denoiser import PromptEmbedding, PromptPair
from wancli.rollout.loop import (
    Chunk,
    ChunkPrompt,
    ContextBuffer,
    KVCommitted,
    RolloutInputs,
    StepDone,
    rollout,
)
from wancli.sampling.flow import Denoised, Velocity


@dataclass
class Noted:
    """A denoiser's diary."""

    diary: list[tuple[Any, ...]] = field(default_factory=list)

    def tell(self, prompts: PromptPair) -> None:
        self.diary.append(("tell", prompts.cond.embeddings.item()))

    def begin(self, span: Span) -> None:
        self.diary.append(("begin", span.index))

    def velocity(self, latents: Tensor, timestep: float) -> Tensor:
        return latents * timestep

    def remember(self, clean: Tensor, timestep: float) -> None:
        self.diary.append(("remember", clean.item(), timestep))

    def forget(self) -> None:
        self.diary.append(("forget",))


def filled(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1, 1), float(value))


def story(
    *, context: int = 0, chunks: int = 3, known: int = 0, again_at: int | None = None
) -> RolloutInputs:
    given, spans = lay_out(chunks, chunk_frames=1, context=context)
    prompts = {
        index: PromptPair(PromptEmbedding(filled(index))) for index in range(-context, chunks)
    }

    def denoise(span: Span, velocity: Velocity) -> Iterator[Denoised]:
        for i, timestep in enumerate((2.0, 3.0)):
            yield Denoised(i, timestep / 1000, velocity(filled(span.index + 1), timestep))

    return RolloutInputs(
        given=[(span, filled(100 + span.index)) for span in given],
        spans=spans,
        tell=lambda span: ChunkPrompt(prompts[span.index], again=span.index == again_at),
        known=lambda span: filled(-span.index) if span.index < known else None,
        denoise=denoise,
        context_timestep=5.0,
    )


def test_every_chunk_but_the_last_is_remembered_clean():
    model = Noted()
    events = list(rollout(model, story(), ContextBuffer(0, 9)))
    assert [type(event) for event in events] == [StepDone, StepDone, Chunk, KVCommitted] * 2 + [
        StepDone, StepDone, Chunk,
    ]  # fmt: skip
    assert [e.latents.item() for e in events if isinstance(e, Chunk)] == [3, 6, 9]
    assert model.diary == [
        ("tell", 0), ("begin", 0), ("remember", 3, 5.0),
        ("tell", 1), ("begin", 1), ("remember", 6, 5.0),
        ("tell", 2), ("begin", 2),
    ]  # fmt: skip


def test_known_chunks_are_only_remembered():
    model = Noted()
    events = list(rollout(model, story(known=2), ContextBuffer(0, 9)))
    assert [e.made for e in events if isinstance(e, Chunk)] == [False, False, True]
    assert [entry for entry in model.diary if entry[0] == "remember"] == [
        ("remember", 0, 5.0), ("remember", -1, 5.0),
    ]  # fmt: skip


def test_what_is_given_is_remembered_at_timestep_zero():
    model = Noted()
    events = list(rollout(model, story(context=2, chunks=1), ContextBuffer(0, 9)))
    assert [e.latents.item() for e in events if isinstance(e, Chunk)] == [98, 99, 3]
    assert model.diary[:3] == [("tell", -2), ("begin", -2), ("remember", 98, 0.0)]


def test_a_prompt_that_asks_for_it_has_the_remembered_chunks_read_again():
    model = Noted()
    list(rollout(model, story(chunks=5, again_at=4), ContextBuffer(sink=1, window=3)))
    start = model.diary.index(("forget",))
    assert model.diary[start - 1] == ("tell", 4)
    # the sink's chunk, and the two that the window still reaches
    assert model.diary[start + 1 :] == [
        ("begin", 0), ("remember", 3, 5.0),
        ("begin", 2), ("remember", 9, 5.0),
        ("begin", 3), ("remember", 12, 5.0),
        ("begin", 4),
    ]  # fmt: skip
