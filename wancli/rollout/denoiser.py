"""A Wan transformer that remembers the chunks it has been shown."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor

from wancli.caching.prompt_kv import PromptKVCache, prompt_kv
from wancli.caching.rolling_attention import RolloutState, use_kv_cache
from wancli.caching.rolling_kv import RollingKV, Trim, WindowConfig
from wancli.catalog.geometry import Span
from wancli.config.settings import RopePolicy
from wancli.sampling.flow import guide


@dataclass(frozen=True)
class Window:
    """How far a chunk attends, in latent frames; its own count."""

    frames: int
    sink: int
    chunk: int  # most latent frames of a chunk
    tokens_per_frame: int
    trim: Trim = "before"


@dataclass(frozen=True)
class PromptEmbedding:
    """One text's embeddings [1, text, D]."""

    embeddings: Tensor


@dataclass(frozen=True)
class PromptPair:
    """What a chunk is told; `uncond` is None without guidance."""

    cond: PromptEmbedding
    uncond: PromptEmbedding | None = None


@dataclass(frozen=True)
class Expert:
    """A transformer, its memory, and its rolling keys and values: of cond, and of uncond."""

    transformer: Any
    memory: RolloutState
    branches: Sequence[RollingKV]
    scale: float  # of the guidance
    least: float  # timestep from which on it denoises


class CausalDenoiser:
    """Velocity of one chunk after the ones before it. Each branch has a memory of its own.

    Of two experts (Wan 2.2) the timestep decides which one denoises, and both remember.
    """

    def __init__(self, experts: Sequence[Expert], *, tokens_per_frame: int) -> None:
        self._experts, self._tokens_per_frame = experts, tokens_per_frame
        self._texts: list[Tensor] = []

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return _device_of(self._experts[0].transformer)

    @property
    def bytes(self) -> int:
        """Rolling keys and values of all branches."""
        return sum(kv.bytes for kv in self._caches())

    @property
    def seen(self) -> int:
        """Tokens that the next forward attends to."""
        return self._experts[0].branches[0].seen

    def tell(self, prompts: PromptPair) -> None:
        """Prompts from now on."""
        dtype, texts = self._experts[0].transformer.dtype, (prompts.cond, prompts.uncond)
        self._texts = [text.embeddings.to(dtype) for text in texts if text is not None]

    def begin(self, span: Span) -> None:
        """Make room for a chunk. Beginning it again forgets what was computed of it."""
        for expert in self._experts:
            expert.memory.first_frame = span.first_frame
        for kv in self._caches():
            kv.begin(span.frames * self._tokens_per_frame)

    def velocity(self, latents: Tensor, timestep: float) -> Tensor:
        """Of the chunk's noisy latents [1, C, F, H, W], guided."""
        number = next(n for n, e in enumerate(self._experts) if timestep >= e.least)
        cond, *uncond = self._forward(number, latents, timestep)
        return guide(cond, uncond[0], self._experts[number].scale) if uncond else cond

    def remember(self, clean: Tensor, timestep: float) -> None:
        """The clean pass: later chunks attend to the clean latents, not to noisy ones."""
        for number in range(len(self._experts)):
            self._forward(number, clean, timestep)
        for kv in self._caches():
            kv.commit()

    def forget(self) -> None:
        """Remember no chunk at all; to be shown them again under another prompt."""
        for kv in self._caches():
            kv.reset()

    def _caches(self) -> list[RollingKV]:
        return [kv for expert in self._experts for kv in expert.branches]

    def _forward(self, number: int, latents: Tensor, timestep: float) -> list[Tensor]:
        expert = self._experts[number]
        if len(self._texts) < len(expert.branches):
            raise RuntimeError("tell it the prompts first; guidance needs an uncond prompt")
        transformer, memory = expert.transformer, expert.memory
        dtype, memory.timestep = transformer.dtype, timestep
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        told = torch.full((len(latents),), timestep, device=latents.device, dtype=exact)
        flows = []
        for kv, text in zip(expert.branches, self._texts, strict=False):
            memory.kv = kv
            flow = transformer(latents.to(dtype), told, text, return_dict=False)[0]
            kv.end_forward()
            flows.append(flow.to(latents.dtype))
        return flows


@contextmanager
def causal(
    transformers: Any,
    window: Window,
    *,
    rope: RopePolicy = "absolute",
    guidance_scale: float | Sequence[float] = 1.0,
    boundary: float = 0.0,
) -> Iterator[CausalDenoiser]:
    """One transformer, or two experts, as a causal denoiser; left, they are as they were.

    `boundary` is the timestep under which the second expert denoises; `guidance_scale` may be one
    for each.
    """
    models = list(transformers) if isinstance(transformers, (list, tuple)) else [transformers]
    scales = [guidance_scale] if isinstance(guidance_scale, (int, float)) else [*guidance_scale]
    scales += scales[-1:] * (len(models) - len(scales))
    tokens = window.tokens_per_frame
    reach = WindowConfig(
        window.frames * tokens, window.sink * tokens, window.chunk * tokens, window.trim
    )
    branches = 2 if max(scales) > 1 else 1
    told = PromptKVCache(keep=branches)
    with ExitStack() as stack:
        experts = []
        for number, (model, scale) in enumerate(zip(models, scales, strict=True)):
            last = number == len(models) - 1
            memory = stack.enter_context(use_kv_cache(model, RolloutState(rope)))
            stack.enter_context(prompt_kv(model, told))
            caches = [_cache(model, reach) for _ in range(branches)]
            experts.append(Expert(model, memory, caches, scale, 0.0 if last else boundary))
        stack.enter_context(torch.no_grad())
        yield CausalDenoiser(experts, tokens_per_frame=tokens)


def _cache(transformer: Any, reach: WindowConfig) -> RollingKV:
    config = transformer.config
    return RollingKV(
        reach,
        blocks=config.num_layers,
        batch=1,
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        dtype=transformer.dtype,
        device=_device_of(transformer),
    )


def _device_of(transformer: Any) -> torch.device:
    """Where it computes; its weights may wait elsewhere."""
    device: torch.device = get_module_execution_device(transformer)
    return device
