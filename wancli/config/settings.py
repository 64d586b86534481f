"""Settings, each declared once.

A field's name is its flag (`flow_shift` is `--flow-shift`), its preset key and its record key; its
description is its help; its bounds are its check; its group is a preset's table and a help panel.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_SEED = 2**53  # the largest integer that every JSON reader keeps
RopePolicy = Literal["absolute", "relative", "sink"]
STEPS_LIST = r"^\d+(,\d+)*$"


class Group(BaseModel):
    """One table of a preset, one panel of `--help`, one object of the record."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class Sampling(Group):
    """How the latents are denoised."""

    steps: int = Field(50, ge=1, le=1000, description="Denoising steps.")
    guidance_scale: float = Field(
        5.0, ge=0, le=100, description="Guidance scale; 1 or less turns guidance off."
    )
    guidance_scale_2: float | None = Field(
        None, ge=0, le=100, description="Guidance scale of the low-noise expert (Wan 2.2 A14B)."
    )
    boundary_ratio: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Noise, of 1, under which the low-noise expert takes over; else the model's.",
    )
    true_cfg_scale: float = Field(
        1.0,
        ge=0,
        le=100,
        description="Guidance by --negative-prompt, of HunyuanVideo, whose --guidance-scale is a "
        "number the model is told; 1 or less turns it off.",
    )
    strength: float = Field(
        0.8, gt=0, le=1, description="Part of the steps that video-to-video makes; 1 is all."
    )
    flow_shift: float = Field(
        5.0, gt=0, le=100, description="Shift of the sigmas; more spends more steps at high noise."
    )
    scheduler: Literal["unipc", "dpm++", "euler"] = Field(
        "unipc", description="Solver: unipc, dpm++ or euler."
    )
    negative_prompt: str = Field("", description="What the video must not show.")


class Video(Group):
    """What the video measures."""

    num_frames: int = Field(81, ge=1, le=100_000, description="Video frames.")
    width: int = Field(832, ge=16, le=16_384, description="Width in pixels.")
    height: int = Field(480, ge=16, le=16_384, description="Height in pixels.")
    fps: int = Field(16, ge=1, le=240, description="Video frames per second.")
    segment_frames: int = Field(
        77,
        ge=5,
        le=100_000,
        description="Most video frames that Wan-Animate makes at once; it goes on from the last.",
    )


class Machine(Group):
    """What it is computed on."""

    device: str = Field(
        "auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$", description="auto, cpu, cuda, cuda:N, mps."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights and activations: auto, float32, bfloat16 or float16."
    )
    layers: int | None = Field(
        None, ge=1, le=1000, description="Most blocks of a random model; else all of them."
    )
    attention_backend: str = Field(
        "auto",
        pattern=r"^[a-z0-9_]+$",
        description="Attention kernel, by diffusers' name (native, flash, sage, ...), or auto.",
    )
    quantize: Literal["none", "int8", "fp8"] = Field(
        "none", description="Weights of the blocks in 8 bits (lossy): none, int8 or fp8."
    )
    fuse_qkv: bool = Field(
        default=False,
        description="Project query, key and value in one product (exact but for rounding).",
    )
    compile: bool = Field(
        default=False, description="Compile the blocks with torch.compile (exact but for rounding)."
    )
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = Field(
        "default",
        description="default; reduce-overhead, with CUDA graphs; max-autotune, without them.",
    )
    offload: Literal["auto", "none", "model", "group", "sequential"] = Field(
        "auto",
        description="What waits in RAM until it is needed: none, model (parts), group (blocks), "
        "sequential (layers), or auto, the fastest that fits.",
    )
    vae_tiling: bool = Field(
        default=False, description="Let the VAE work in tiles of 256 pixels: less memory (lossy)."
    )
    vae_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="The VAE's numbers: auto is float32; bfloat16 and float16 (lossy)."
    )
    lora: tuple[str, ...] = Field(
        (),
        description="LoRA to merge, PATH or PATH=SCALE; PATH@high or PATH@low where there are two "
        "experts; repeatable.",
    )


class Output(Group):
    """How the MP4 is written."""

    crf: int = Field(18, ge=0, le=51, description="H.264 quality; lower is better and larger.")
    lossless: bool = Field(default=False, description="Keep every pixel exactly (RGB H.264).")
    metadata: bool = Field(default=True, description="Put the record inside the MP4.")


class StepCache(Group):
    """What a denoising step takes over from the one before (lossy)."""

    step_cache: Literal["none", "cachedit", "first-block", "magcache", "seacache"] = Field(
        "none",
        description="Reuse of blocks between steps (lossy): none, cachedit, first-block, magcache "
        "or seacache.",
    )
    cachedit_fn: int = Field(8, ge=1, le=1000, description="First blocks, always computed.")
    cachedit_bn: int = Field(0, ge=0, le=1000, description="Last blocks, always computed.")
    cachedit_residual_threshold: float = Field(
        0.08,
        gt=0,
        le=1,
        description="Relative change up to which a step is reused.",
    )
    cachedit_max_warmup_steps: int = Field(
        8, ge=1, le=1000, description="First steps, always computed."
    )
    cachedit_max_continuous: int = Field(
        3,
        ge=0,
        le=1000,
        description="Most reused steps in a row; 0 is no limit.",
    )
    taylorseer: bool = Field(
        default=False, description="Extrapolate what is reused (TaylorSeer, arXiv:2503.06923)."
    )
    taylorseer_order: int = Field(1, ge=1, le=4, description="Order of the extrapolation.")
    step_cache_threshold: float | None = Field(
        None, gt=0, le=10, description="Threshold of first-block, magcache and seacache."
    )
    cfg_gate: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="Step (2 or more), or part of the steps (under 1), from which on "
        "cond - uncond is reused (lossy).",
    )


class PromptKV(Group):
    """What is computed once for a prompt, and not in every step (exact)."""

    prompt_kv: bool = Field(default=True, description="Compute the prompt's K/V once (exact).")
    kv_align: str = Field(
        "auto",
        pattern=r"^(auto|off|[1-9]\d{0,3})$",
        description="Pad the prompt's K/V to tiles of the hardware (exact but for rounding): "
        "auto, off or tokens.",
    )
    free_kv_weights: bool = Field(
        default=False, description="Keep the prompt's K/V weights off the GPU between prompts."
    )


class Rollout(Group):
    """How a rollout goes from chunk to chunk."""

    chunks: int = Field(7, ge=1, le=1_000_000, description="Chunks to make.")
    chunk_frames: int = Field(3, ge=1, le=1000, description="Latent frames of a chunk.")
    rolling_window: int = Field(
        0, ge=0, description="Latent frames a chunk attends to, its own included; 0 is all."
    )
    sink_frames: int = Field(
        0, ge=0, description="First latent frames that never leave the window."
    )
    trim: Literal["before", "after"] = Field(
        "before",
        description="When the window is cut: before attention (Self-Forcing, diffusers #13681), or "
        "after it (diffusers #13569).",
    )
    rope: Literal["auto", "absolute", "relative", "sink"] = Field(
        "auto", description="Positions: auto is absolute without sinks and relative with them."
    )
    sampler: Literal["few-step", "unipc"] = Field(
        "few-step", description="few-step (--steps-list) or unipc (--steps, --guidance-scale)."
    )
    steps_list: str = Field(
        "1000,750,500,250", pattern=STEPS_LIST, description="Timesteps of the few-step sampler."
    )
    first_chunk_steps: str = Field(
        "", pattern=f"{STEPS_LIST}|^$", description="The same for the first chunk, if others."
    )
    warp_steps: bool = Field(default=True, description="Move the listed timesteps by --flow-shift.")
    context_noise: float = Field(0.0, ge=0, le=1000, description="Timestep of the clean passes.")
    independent_first_frame: bool = Field(
        default=False, description="Make the first latent frame a chunk by itself."
    )
    noise: Literal["indexed", "compat"] = Field(
        "indexed", description="indexed (any length, any chunk again) or compat (original order)."
    )
    recache: bool = Field(
        default=False, description="Read the remembered chunks again when the prompt changes."
    )
    blend: int = Field(0, ge=0, description="Chunks over which a new prompt is faded in.")
    text_length: int | None = Field(
        None, ge=1, le=4096, description="Text tokens. (default: the model's)"
    )


class Settings(BaseModel):
    """The settings of `wancli generate`: a model, and groups."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    model: str = Field(
        "demo",
        min_length=1,
        description="Model: a known name, a hub id, a local folder, or random:NAME for random "
        "weights in that shape.",
    )
    sampling: Sampling = Sampling()
    video: Video = Video()
    step_cache: StepCache = StepCache()
    prompt_kv: PromptKV = PromptKV()
    machine: Machine = Machine()
    output: Output = Output()


class RolloutSettings(Settings):
    """The settings of `wancli rollout`, and every table a preset may hold."""

    rollout: Rollout = Rollout()
