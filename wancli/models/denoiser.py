"""A Wan transformer that remembers the chunks it has been shown."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from wancli.caching.attention import Memory, PromptKV, remembering
from wancli.caching.rolling import Reach, RollingKV, Trim
from wancli.geometry import Span
from wancli.sampling.flow import guide
from wancli.settings import RopePolicy


@dataclass(frozen=True)
class Window:
    """How far a chunk attends, in latent frames; its own count."""

    frames: int
    sink: int
    chunk: int  # most latent frames of a chunk
    tokens_per_frame: int
    trim: Trim = "before"


@dataclass
class Text:
    """One text's embeddings [1, text, D], and what they come to inside the transformer."""

    embeddings: Tensor
    kv: PromptKV = field(default_factory=PromptKV)


@dataclass(frozen=True)
class Prompts:
    """What a chunk is told; `uncond` is None without guidance."""

    cond: Text
    uncond: Text | None = None


class CausalDenoiser:
    """Velocity of one chunk after the ones before it. Each branch has a memory of its own."""

    def __init__(
        self, transformer: Any, memory: Memory, branches: Sequence[RollingKV],
        *, guidance_scale: float, tokens_per_frame: int,
    ) -> None:  # fmt: skip
        self._transformer, self._memory = transformer, memory
        self._branches, self._scale = branches, guidance_scale
        self._tokens_per_frame = tokens_per_frame
        self._prompts: Prompts | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self._transformer.device
        return device

    @property
    def bytes(self) -> int:
        """Rolling keys and values of all branches."""
        return sum(kv.bytes for kv in self._branches)

    @property
    def seen(self) -> int:
        """Tokens that the next forward attends to."""
        return self._branches[0].seen

    @property
    def forwards(self) -> int:
        """Transformer calls a step."""
        return len(self._branches)

    def tell(self, prompts: Prompts) -> None:
        """Prompts from now on."""
        self._prompts = prompts

    def begin(self, span: Span) -> None:
        """Make room for a chunk. Beginning it again forgets what was computed of it."""
        self._memory.first_frame = span.first_frame
        for kv in self._branches:
            kv.begin(span.frames * self._tokens_per_frame)

    def velocity(self, latents: Tensor, timestep: float) -> Tensor:
        """Of the chunk's noisy latents [1, C, F, H, W], guided."""
        cond, *uncond = self._forward(latents, timestep)
        return guide(cond, uncond[0], self._scale) if uncond else cond

    def remember(self, clean: Tensor, timestep: float) -> None:
        """The clean pass: later chunks attend to the clean latents, not to noisy ones."""
        self._forward(clean, timestep)
        for kv in self._branches:
            kv.commit()

    def forget(self) -> None:
        """Remember no chunk at all; to be shown them again under another prompt."""
        for kv in self._branches:
            kv.reset()

    def _forward(self, latents: Tensor, timestep: float) -> list[Tensor]:
        if self._prompts is None:
            raise RuntimeError("tell it the prompts first")
        memory, dtype = self._memory, self._transformer.dtype
        memory.timestep = timestep
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        told = torch.full((len(latents),), timestep, device=latents.device, dtype=exact)
        flows = []
        for kv, text in zip(
            self._branches, (self._prompts.cond, self._prompts.uncond), strict=False
        ):
            if text is None:
                raise RuntimeError("guidance needs an uncond prompt")
            memory.kv, memory.prompt = kv, text.kv
            flow = self._transformer(
                latents.to(dtype), told, text.embeddings.to(dtype), return_dict=False
            )[0]
            kv.end_forward()
            flows.append(flow.to(latents.dtype))
        return flows


@contextmanager
def causal(
    transformer: Any, window: Window, *, rope: RopePolicy = "absolute", guidance_scale: float = 1.0
) -> Iterator[CausalDenoiser]:
    """The transformer as a causal denoiser; on exit it is as it was, error or not."""
    config = transformer.config
    reach = Reach(
        window=window.frames * window.tokens_per_frame,
        sink=window.sink * window.tokens_per_frame,
        chunk=window.chunk * window.tokens_per_frame,
        trim=window.trim,
    )
    memory = Memory(rope)
    branches = [
        RollingKV(
            reach,
            blocks=config.num_layers,
            batch=1,
            heads=config.num_attention_heads,
            head_dim=config.attention_head_dim,
            dtype=transformer.dtype,
            device=transformer.device,
        )
        for _ in range(2 if guidance_scale > 1 else 1)
    ]
    with remembering(transformer, memory), torch.no_grad():
        yield CausalDenoiser(
            transformer, memory, branches, guidance_scale=guidance_scale,
            tokens_per_frame=window.tokens_per_frame,
        )  # fmt: skip
