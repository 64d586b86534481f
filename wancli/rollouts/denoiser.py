"""A Wan transformer as a causal denoiser with a rolling KV cache."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from diffusers.utils.torch_utils import get_module_execution_device
from torch import Tensor

from wancli.caching.prompt_kv import PromptKVCache, prompt_kv
from wancli.caching.rolling_attention import RolloutState, use_kv_cache
from wancli.caching.rolling_kv import RollingKV
from wancli.catalog.geometry import Span, WindowConfig
from wancli.config.settings import RopePolicy
from wancli.generation.flow import guide
from wancli.models.attention import DEFAULT_KERNEL, AttentionKernel
from wancli.models.optimize import enough_graphs


@dataclass(frozen=True)
class PromptPair:
    """Text embeddings [1, text, D] of a chunk; `uncond` is None without guidance."""

    cond: Tensor
    uncond: Tensor | None = None


@dataclass(frozen=True)
class Expert:
    """A transformer, its rollout state, and a KV cache per branch: cond, then uncond."""

    transformer: Any
    state: RolloutState
    branches: Sequence[RollingKV]
    scale: float  # of the guidance
    min_timestep: float  # from which it denoises
    dtype: torch.dtype  # of the transformer, whose own property looks through all its modules


@dataclass
class ContextBuffer:
    """Committed chunks within the window, kept to be recomputed under another prompt."""

    window: WindowConfig
    chunks: list[tuple[Span, Tensor, float]] = field(default_factory=list)

    def add(self, span: Span, latents: Tensor, timestep: float) -> None:
        """Append a chunk and drop those that the next one cannot attend to."""
        self.chunks.append((span, latents, timestep))
        sink = self.window.sink
        evicted = span.end - (self.window.window - sink)  # frames before it, but for the sink
        self.chunks = [
            entry for entry in self.chunks if entry[0].first_frame < sink or entry[0].end > evicted
        ]

    def before(self, span: Span) -> tuple[Tensor, float] | None:
        """The clean frames [1, C, F, H, W] that a chunk attends to, and their timestep, if any.

        In a full window the first `sink` are the video's first.
        """
        if not self.chunks:
            return None
        frames = torch.cat([latents for _, latents, _ in self.chunks], 2)
        sink = self.window.sink
        room = min(self.window.window - span.frames, span.first_frame)
        start = frames.shape[2] - room + sink if span.first_frame > room else sink
        return torch.cat([frames[:, :, :sink], frames[:, :, start:]], 2), self.chunks[-1][2]


class CausalDenoiser:
    """Velocity of a chunk, conditioned on the chunks before it. Each branch has its own KV cache.

    Of two experts (Wan 2.2) the timestep selects the one that denoises; both cache every chunk.
    `encode_first`, if set, is called where a chunk's context is computed anew and does not begin
    with the video: with the number of latent frames that follow the first of the context, for that
    frame as a picture [1, C, 1, H, W].
    """

    encode_first: Callable[[int], Tensor] | None = None

    def __init__(
        self, experts: Sequence[Expert], window: WindowConfig, *,
        moves_sink: bool = False, kernel: AttentionKernel = DEFAULT_KERNEL,
    ) -> None:  # fmt: skip
        self._experts, self._window, self._moves_sink = experts, window, moves_sink
        self.kernel = kernel
        self._prompts: PromptPair | None = None
        self._embeddings: list[Tensor] = []  # of each branch
        self._span = Span(0, 0, 0)  # the current chunk
        self._buffer = ContextBuffer(window)
        self._stale = False  # the caches are to be recomputed before the next forward
        self._compiled = False  # the blocks, by `warm_up`

    @property
    def device(self) -> torch.device:
        """Execution device."""
        return _device_of(self._experts[0].transformer)

    @property
    def nbytes(self) -> int:
        """Bytes of the rolling KV caches of all branches."""
        return sum(kv.nbytes for kv in self._caches())

    @property
    def visible(self) -> int:
        """Tokens that the next forward attends to."""
        return self._experts[0].branches[0].visible

    def set_prompt(self, prompts: PromptPair) -> None:
        """Condition on these prompts from now on."""
        if prompts is self._prompts:  # the same tensors: comparing new ones makes CUDA wait
            return
        self._prompts = prompts
        dtype, pair = self._experts[0].dtype, (prompts.cond, prompts.uncond)
        self._embeddings = [embeddings.to(dtype) for embeddings in pair if embeddings is not None]

    def warm_up(self, spans: Sequence[Span], latents: Tensor) -> None:
        """Run each kind of forward that these chunks take once, which compiles its graph.

        Kinds differ in the chunk's length, in whether it is the first, in whether rows are hidden
        and in whether it fills the sink. `latents` [1, C, F, H, W] are of the longest chunk. The
        prompt is set; the caches are empty, before and after.
        """
        kinds, caches, capacity = set(), self._caches(), self._window.capacity
        self._compiled = True
        for span in spans:
            self._open(span)
            for _ in range(2):  # the first forward of a chunk, and later ones
                if self._kind() not in kinds:
                    kinds.add(self._kind())
                    self._forward_all(latents[:, :, : span.frames], 0.0)
                for kv in caches:
                    kv.end_forward()
            for kv in caches:
                kv.commit()
            if caches[0].stored + span.frames * self._window.tokens_per_frame > capacity:
                break  # full: nothing changes any more
        for kv in caches:
            kv.reset()

    def _kind(self) -> tuple[object, ...]:
        """What the graph of the next forward depends on."""
        kv = self._caches()[0]
        fills_sink = kv.stored < kv.blocks[0].raw_sink.shape[1]
        return self._span.frames, self._span.clean_frames, kv.stored > 0, kv.hidden > 0, fills_sink

    def begin(self, span: Span) -> None:
        """Make room for a chunk. Beginning it again discards its uncommitted forwards."""
        if self._window.recompute:
            self._span, self._stale = span, True
        else:
            self._open(span)

    def _open(self, span: Span) -> None:
        self._place(span)
        for kv in self._caches():
            kv.begin(span.frames * self._window.tokens_per_frame)

    def _place(self, span: Span) -> None:
        self._span = span
        for expert in self._experts:
            expert.state.first_frame = span.first_frame + span.offset

    def velocity(self, latents: Tensor, timestep: float) -> Tensor:
        """Guided velocity of the chunk's latents [1, C, F, H, W]: noisy, after any clean frames."""
        if self._stale:
            self._recompute()
        expert = next(e for e in self._experts if timestep >= e.min_timestep)
        cond, *uncond = self._forward(expert, latents, timestep)
        return guide(cond, uncond[0], expert.scale) if uncond else cond

    def commit(self, clean: Tensor, timestep: float) -> None:
        """Run the clean pass: later chunks attend to the clean latents, not to noisy ones."""
        if self._window.recompute:
            self._buffer.add(self._span, clean, timestep)
            return
        self._clean_pass(clean, timestep)
        self._buffer.add(self._span, clean, timestep)
        if self._span.begins_shot:
            for kv in self._caches():
                kv.keep(self._span.frames * self._window.tokens_per_frame)

    def recache(self) -> None:
        """Recompute the KV caches under a new prompt: keys of the old one would pull back to it.

        KV recache of LongLive (arXiv:2509.22622), chunk by chunk or as its code does it.
        """
        if self._window.recompute:
            return  # they are before every chunk
        if self._window.recache_by == "window":
            self._recache_window()
            return
        for kv in self._caches():
            kv.reset()
        for span, clean, timestep in self._recached():
            self.begin(span)
            self._clean_pass(clean, timestep)

    def _recache_window(self) -> None:
        """Recompute the window in one forward, in which all of its frames attend to each other.

        A sink further back keeps its keys and values: those of the prompt that it was made with.
        """
        if not self._buffer.chunks:
            return
        span, _, timestep = self._buffer.chunks[-1]
        window, sink = self._window.window, self._window.sink
        kept = sink if span.end > window else 0
        count = min(window, span.end) - kept
        latents = torch.cat([clean for _, clean, _ in self._buffer.chunks], 2)[:, :, -count:]
        self._place(replace(span, first_frame=span.end - count, frames=count, clean_frames=0))
        per_frame = self._window.tokens_per_frame
        for kv in self._caches():
            kv.refill(count * per_frame, kept=kept * per_frame)
        self._clean_pass(latents, timestep)

    def _recompute(self) -> None:
        """Compute the caches of the frames that the chunk attends to anew, as a video of their own.

        KV cache recomputation of Krea Realtime: nothing in the window remembers older frames.
        """
        span, chunk = self._span, self._window.chunk
        for kv in self._caches():
            kv.reset()
        if context := self._buffer.before(span):
            latents, timestep = context
            first = span.first_frame - latents.shape[2]
            if self.encode_first and first > 0:
                picture = self.encode_first(latents.shape[2] - 1)
                latents = torch.cat([picture.to(latents), latents[:, :, 1:]], 2)
            for start in range(0, latents.shape[2], chunk):
                part = latents[:, :, start : start + chunk]
                self._open(replace(span, first_frame=first + start, frames=part.shape[2]))
                self._clean_pass(part, timestep)
        self._open(span)
        self._stale = False

    def _recached(self) -> list[tuple[Span, Tensor, float]]:
        """Chunks within the window; a sink that moves is just before the others from the start."""
        chunks = self._buffer.chunks
        if not self._moves_sink:
            return chunks
        moved, following = [], chunks[-1][0].end if chunks else 0
        for span, clean, timestep in reversed(chunks):
            following -= span.frames
            moved.append((replace(span, first_frame=following), clean, timestep))
        return moved[::-1]

    def _clean_pass(self, clean: Tensor, timestep: float) -> None:
        self._forward_all(clean, timestep)
        for kv in self._caches():
            kv.commit()

    def _forward_all(self, latents: Tensor, timestep: float) -> None:
        """One forward of each expert, which may be of a kind that no forward was before."""
        with enough_graphs(compiled=self._compiled):
            for expert in self._experts:
                self._forward(expert, latents, timestep)

    def _caches(self) -> list[RollingKV]:
        return [kv for expert in self._experts for kv in expert.branches]

    @torch.no_grad()  # here, since callers run between the chunks of a rollout
    def _forward(self, expert: Expert, latents: Tensor, timestep: float) -> list[Tensor]:
        """Velocities of all branches, in the latents' dtype."""
        if len(self._embeddings) < len(expert.branches):
            raise RuntimeError("call set_prompt first; guidance needs an uncond prompt")
        transformer, state, dtype = expert.transformer, expert.state, expert.dtype
        state.timestep = None if self._span.clean_frames else timestep
        timesteps = self._timesteps(latents, timestep, wide=dtype == torch.float64)
        velocities = []
        for kv, text in zip(expert.branches, self._embeddings, strict=False):
            state.use(kv)
            with self.kernel.preferred():
                velocity = transformer(latents.to(dtype), timesteps, text, return_dict=False)[0]
            kv.end_forward()
            velocities.append(velocity.to(latents.dtype))
        return velocities

    def _timesteps(self, latents: Tensor, timestep: float, *, wide: bool) -> Tensor:
        """[B]; where frames are clean, which have timestep 0, one for each token, [B, L]."""
        batch, clean, tokens = len(latents), self._span.clean_frames, self._window.tokens_per_frame
        shape = (batch, latents.shape[2], tokens) if clean else (batch,)
        exact = torch.float64 if wide else torch.float32
        timesteps = torch.full(shape, timestep, device=latents.device, dtype=exact)
        if not clean:
            return timesteps
        timesteps[:, :clean] = 0
        return timesteps.flatten(1)


@contextmanager
def causal(
    transformers: Any,
    window: WindowConfig,
    *,
    rope: RopePolicy = "absolute",
    guidance_scale: float | Sequence[float] = 1.0,
    boundary: float = 0.0,
    kernel: AttentionKernel = DEFAULT_KERNEL,
) -> Iterator[CausalDenoiser]:
    """Use one transformer, or two experts, as a causal denoiser; restored on exit.

    Below timestep `boundary` the second expert denoises; `guidance_scale` may be one per expert.
    The policies "relative" and "sink" are the same: without a sink they are "absolute", too.
    `kernel` is the one that `choose_kernel` has set.
    """
    models = list(transformers) if isinstance(transformers, (list, tuple)) else [transformers]
    scales = [guidance_scale] if isinstance(guidance_scale, (int, float)) else [*guidance_scale]
    scales += scales[-1:] * (len(models) - len(scales))
    branches = 2 if max(scales) > 1 else 1
    moves_sink = rope != "absolute" and window.sink > 0
    prompt_cache = PromptKVCache(size=branches)
    with ExitStack() as stack:
        experts = []
        for number, (model, scale) in enumerate(zip(models, scales, strict=True)):
            last = number == len(models) - 1
            state = stack.enter_context(use_kv_cache(model, backend=kernel.backend))
            stack.enter_context(prompt_kv(model, prompt_cache))
            caches = [_cache(model, window, moves_sink=moves_sink) for _ in range(branches)]
            experts.append(
                Expert(model, state, caches, scale, 0.0 if last else boundary, model.dtype)
            )
        yield CausalDenoiser(experts, window, moves_sink=moves_sink, kernel=kernel)


def _cache(transformer: Any, window: WindowConfig, *, moves_sink: bool) -> RollingKV:
    config = transformer.config
    return RollingKV(
        window,
        blocks=config.num_layers,
        batch=1,
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        dtype=transformer.dtype,
        device=_device_of(transformer),
        moves_sink=moves_sink,
    )


def _device_of(transformer: Any) -> torch.device:
    """Execution device; offloaded weights may be elsewhere."""
    device: torch.device = get_module_execution_device(transformer)
    return device
