"""Settings, each declared once.

A field's name gives its flag (`flow_shift` is `--flow-shift`), its preset key and its record key;
its description is its help, its bounds are validated, and its group is a table of presets and a
panel of `--help`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from wancli.catalog.tiny_decoder import EXACT

MAX_SEED = 2**53  # the largest integer that every JSON reader keeps
RopePolicy = Literal["absolute", "relative", "sink"]
FEW_STEPS = "1000,750,500,250"  # Self-Forcing's, and those of most distilled models
STEPS_LIST = r"^\d+(\.\d+)?(, ?\d+(\.\d+)?)*$"
WITHOUT_SPACES = AfterValidator(lambda text: text.replace(" ", ""))  # one text for one list


WEIGHTS = ("transformer", "vae", "text_encoder")  # settings that name files of weights
# Other names that flags and keys of jobs have in the field.
ALIASES = {"num_inference_steps": "steps", "frames": "num_frames", "sampler": "scheduler"}


@dataclass(frozen=True)
class WhenUnset:
    """Marks a setting that is unset by default: what then applies, for its help."""

    words: str


class Group(BaseModel):
    """One table of a preset, one panel of `--help`, one object of the record."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


Scheduler = Annotated[
    Literal["unipc", "dpm++", "euler", "few-step"],
    Field(
        description="Solver: unipc, dpm++, euler, or few-step, which renoises after each step of "
        "`steps_list`, for models distilled by DMD; it runs without guidance."
    ),
]


class Sampling(Group):
    """Steps, guidance, solver, timesteps."""

    steps: int = Field(50, ge=1, le=1000, description="Denoising steps.")
    guidance_scale: float = Field(
        5.0, ge=0, le=100, description="Guidance scale; 1 or less turns guidance off."
    )
    guidance_scale_2: Annotated[float | None, WhenUnset("`guidance_scale`")] = Field(
        None, ge=0, le=100, description="Guidance scale of the low-noise expert (Wan 2.2 A14B)."
    )
    boundary_ratio: Annotated[float | None, WhenUnset("the model's")] = Field(
        None, gt=0, lt=1, description="Noise level below which the low-noise expert runs."
    )
    true_cfg_scale: float = Field(
        1.0,
        ge=0,
        le=100,
        description="Classifier-free guidance scale of HunyuanVideo, whose `guidance_scale` is "
        "embedded guidance; 1 or less turns it off.",
    )
    strength: float = Field(
        0.8, gt=0, le=1, description="Fraction of the steps run in video-to-video; 1 runs all."
    )
    flow_shift: float = Field(
        5.0,
        gt=0,
        le=100,
        description="Shift of the noise schedule; higher spends more steps at high noise.",
    )
    scheduler: Scheduler = "unipc"
    steps_list: Annotated[
        str, WhenUnset(f"few-step: {FEW_STEPS}; euler: `steps` of them"), WITHOUT_SPACES
    ] = Field(
        "",
        pattern=f"{STEPS_LIST}|^$",
        description="Timesteps for few-step and euler, separated by commas, as a distilled model "
        "was trained (denoising_step_list).",
    )
    warp_steps: bool = Field(
        default=True, description="Apply `flow_shift` to the listed timesteps."
    )
    negative_prompt: str = Field("", description="What to avoid in the video.")


class RolloutSampling(Sampling):
    """Steps, guidance, solver, timesteps."""  # help shows it: the group's own text

    scheduler: Scheduler = "few-step"  # rollouts' models are distilled unless a preset says not


class VideoShape(Group):
    """Size, length and frame rate."""

    num_frames: int = Field(81, ge=1, le=100_000, description="Video frames: 4k + 1.")
    width: int = Field(832, ge=16, le=16_384, description="Width in pixels.")
    height: int = Field(480, ge=16, le=16_384, description="Height in pixels.")
    fps: int = Field(16, ge=1, le=240, description="Video frames per second.")
    segment_frames: int = Field(
        77,
        ge=5,
        le=100_000,
        description="Wan-Animate: video frames per segment; each continues the one before.",
    )


class Machine(Group):
    """Device, precision, memory and compilation."""

    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
        description="Device: auto, cpu, cuda, cuda:N or mps.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of weights and activations: auto, float32, bfloat16 or float16.",
    )
    layers: Annotated[int | None, WhenUnset("all")] = Field(
        None, ge=1, le=1000, description="Limit a random: model to N blocks."
    )
    attention_backend: str = Field(
        "auto",
        pattern=r"^[a-z0-9_]+$",
        description="Attention kernel, by diffusers' name (native, flash, sage, ...), or auto: of "
        "those that wancli doctor --measure found right, the fastest.",
    )
    quantize: Literal["none", "int8", "fp8", "fp8-dynamic"] = Field(
        "none",
        description="Quantize the blocks to 8 bits (lossy): none, int8 or fp8 (smaller weights), "
        "fp8-dynamic (faster products too, with `compile`).",
    )
    fuse_qkv: bool = Field(
        default=False,
        description="Compute query, key and value in one matmul (exact but for rounding).",
    )
    compile: bool = Field(
        default=False, description="Compile the blocks with torch.compile (exact but for rounding)."
    )
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = Field(
        "default",
        description="Mode of torch.compile: default, reduce-overhead (CUDA graphs) or "
        "max-autotune (no CUDA graphs).",
    )
    offload: Literal["auto", "none", "model", "group", "sequential"] = Field(
        "auto",
        description="Keep weights in RAM until needed: none, model (by component), group (by "
        "block), sequential (by layer) or auto, the fastest that fits.",
    )
    vae_tiling: bool = Field(
        default=False, description="Run the VAE in tiles of 256 pixels, to save memory (lossy)."
    )
    vae_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of the VAE: auto (float32; bfloat16 for fast decoding on CUDA), "
        "float32, bfloat16 or float16 (lossy).",
    )
    vae_exact: Annotated[bool | None, WhenUnset("off on CUDA, else on")] = Field(
        None,
        description="Decode as diffusers does, bit for bit; `no_vae_exact` is faster, and the same "
        "but for rounding.",
    )
    vae_decoder: str = Field(
        EXACT,
        min_length=1,
        description="Decoder of the VAE: exact; tiny, the small one for its latents (TAEHV; "
        "lossy); or one in FILE or REPO:FILE of the hub.",
    )
    transformer: tuple[str, ...] = Field(
        (),
        description="Transformer's weights in one .safetensors or .gguf file, instead of the "
        "model's: FILE; FILE@high and FILE@low for two experts.",
    )
    vae: Annotated[str, WhenUnset("the model's")] = Field(
        "", description="VAE's weights in one .safetensors or .gguf file."
    )
    text_encoder: Annotated[str, WhenUnset("the model's")] = Field(
        "", description="Text encoder's weights (UMT5) in one .safetensors or .gguf file."
    )
    lora: tuple[str, ...] = Field(
        (),
        description="LoRA to merge: PATH or PATH=SCALE; PATH@high or PATH@low for one of two "
        "experts; PATH may be REPO:FILE of the hub (wancli model pull); repeatable.",
    )


class Output(Group):
    """Files and their encoding."""

    crf: int = Field(
        18, ge=0, le=51, description="H.264 quality; lower is better, and a larger file."
    )
    lossless: bool = Field(default=False, description="Encode losslessly (RGB H.264).")
    encoder: Literal["x264", "nvenc", "auto"] = Field(
        "x264",
        description="H.264 encoder: x264 (the same file on every machine), nvenc (NVIDIA's "
        "hardware, which H100 and A100 lack) or auto (nvenc where it works).",
    )
    encoder_preset: Literal[
        "auto", "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower",
        "veryslow",
    ] = Field(
        "auto",
        description="Preset of x264, from ultrafast to veryslow (a smaller file), or auto (medium; "
        "rollouts: veryfast, which keeps up with a GPU).",
    )  # fmt: skip
    metadata: bool = Field(default=True, description="Embed the record in the MP4.")


class StepCache(Group):
    """Reuse of work between denoising steps (lossy)."""

    step_cache: Literal["none", "cachedit", "first-block", "magcache", "seacache"] = Field(
        "none",
        description="Step cache, which reuses block outputs between steps (lossy): none, cachedit, "
        "first-block, magcache or seacache.",
    )
    cachedit_fn: int = Field(
        8, ge=1, le=1000, description="DBCache Fn: number of first blocks, always computed."
    )
    cachedit_bn: int = Field(
        0, ge=0, le=1000, description="DBCache Bn: number of last blocks, always computed."
    )
    cachedit_residual_threshold: float = Field(
        0.08,
        gt=0,
        le=1,
        description="Reuse a step while its relative residual change is below this.",
    )
    cachedit_max_warmup_steps: int = Field(
        8, ge=1, le=1000, description="Number of first steps, always computed."
    )
    cachedit_max_continuous: int = Field(
        3,
        ge=0,
        le=1000,
        description="Maximum number of reused steps in a row; 0 is no limit.",
    )
    taylorseer: bool = Field(
        default=False, description="Extrapolate reused outputs (TaylorSeer, arXiv:2503.06923)."
    )
    taylorseer_order: int = Field(1, ge=1, le=4, description="Order of TaylorSeer's expansion.")
    step_cache_threshold: Annotated[float | None, WhenUnset("diffusers'")] = Field(
        None, gt=0, le=10, description="Threshold of first-block, magcache and seacache."
    )
    cfg_gate: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="Step (2 or more) or fraction of the steps (below 1) from which "
        "cond - uncond is reused (lossy).",
    )


class PromptKV(Group):
    """Reuse of the prompt's keys and values (exact)."""

    prompt_kv: bool = Field(
        default=True, description="Compute the prompt's K/V once, not in every step (exact)."
    )
    kv_align: str = Field(
        "auto",
        pattern=r"^(auto|off|[1-9]\d{0,3})$",
        description="Pad the prompt's K/V to a multiple of N tokens (exact but for rounding): "
        "auto (where wancli doctor --measure found that faster), off or a number.",
    )
    free_kv_weights: bool = Field(
        default=False, description="Move the prompt's K/V weights off the GPU between prompts."
    )


class Rollout(Group):
    """Chunks and the attention window."""

    chunks: int = Field(7, ge=1, le=100_000, description="Number of chunks.")
    chunk_frames: int = Field(
        3, ge=1, le=1000, description="Latent frames per chunk (num_frame_per_block)."
    )
    rolling_window: int = Field(
        0,
        ge=0,
        description="Latent frames a chunk attends to, itself included; 0 is all (Self-Forcing: "
        "local_attn_size).",
    )
    sink_frames: int = Field(
        0, ge=0, description="First latent frames that stay in the window (sink_size)."
    )
    trim: Literal["before", "after"] = Field(
        "before",
        description="When frames leave the window: before attention (Self-Forcing, diffusers "
        "#13681) or after it (diffusers #13569).",
    )
    rope: Literal["auto", "absolute", "relative", "sink"] = Field(
        "auto",
        description="Positions of cached keys: absolute, relative, sink, or auto (absolute without "
        "sinks, relative with them).",
    )
    first_chunk_steps: Annotated[str, WhenUnset("`steps_list`"), WITHOUT_SPACES] = Field(
        "",
        pattern=f"{STEPS_LIST}|^$",
        description="Timesteps of the first chunk, separated by commas.",
    )
    context_noise: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="Timestep at which finished chunks are committed to the K/V cache.",
    )
    independent_first_frame: bool = Field(
        default=False, description="Generate the first latent frame as a chunk of its own."
    )
    image_start: Literal["context", "first-frame"] = Field(
        "context",
        description="How a picture begins the video: context (a chunk before the generated ones) "
        "or first-frame (clean in the first of them: LongLive 2).",
    )
    noise: Literal["indexed", "compat"] = Field(
        "indexed",
        description="Order of the noise: indexed (the same for a chunk at any length) or compat "
        "(Self-Forcing's).",
    )
    recache: bool = Field(
        default=False, description="Recompute the K/V cache when the prompt changes."
    )
    recache_by: Literal["chunk", "window"] = Field(
        "chunk",
        description="How `recache` does it: chunk by chunk, or window, in one forward that leaves "
        "a sink further back as it was (LongLive, with global_sink).",
    )
    kv_recompute: bool = Field(
        default=False,
        description="Compute the K/V cache anew before every chunk, from the clean latents that it "
        "attends to, in place of clean passes (Krea).",
    )
    reencode_first: bool = Field(
        default=False,
        description="With `kv_recompute`: the first frame that a chunk attends to, unless it is "
        "the video's first, is encoded anew from the decoded video, as a picture (Krea).",
    )
    blend: int = Field(
        0, ge=0, description="Number of chunks over which a new prompt is blended in."
    )
    shot_prefix: str = Field(
        "",
        description="Text before a new prompt, in its first chunk: each begins a shot "
        "(scene_cut_prefix).",
    )
    shot_offset: int = Field(
        0,
        ge=0,
        le=100_000,
        description="Latent frames that positions jump by where a new prompt begins a shot "
        "(multi_shot_rope_offset).",
    )
    shot_sink: bool = Field(
        default=False,
        description="Keep the first frames of the last shot in the window, too, as many as "
        "`sink_frames` (multi_shot_sink).",
    )
    text_length: Annotated[int | None, WhenUnset("the model's")] = Field(
        None, ge=1, le=4096, description="Maximum number of text tokens."
    )


class Settings(BaseModel):
    """The settings of `wancli generate`: a model, and groups."""

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    model: str = Field(
        "demo",
        min_length=1,
        description="Model: a name (wancli model list), hub id, folder, or random:NAME.",
    )
    sampling: Sampling = Sampling()
    video: VideoShape = VideoShape()
    step_cache: StepCache = StepCache()
    prompt_kv: PromptKV = PromptKV()
    machine: Machine = Machine()
    output: Output = Output()


class RolloutSettings(Settings):
    """The settings of `wancli rollout`, and every table a preset may hold."""

    sampling: RolloutSampling = RolloutSampling()
    rollout: Rollout = Rollout()
