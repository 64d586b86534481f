"""Text-to-video through diffusers' own pipeline: encode, denoise, decode."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from numpy.typing import NDArray
from torch import Tensor

from wancli.caching.prompt_kv import PromptMemory
from wancli.errors import RunError
from wancli.models.decode import denormalize, to_pixels
from wancli.models.load import Loaded
from wancli.pipeline.caches import caches
from wancli.plan import Plan
from wancli.records import Use
from wancli.settings import Sampling, Settings


@dataclass(frozen=True)
class Prompt:
    """Text embeddings, each [1, text, D], and what they come to inside the transformers.

    `negative` is None without guidance.
    """

    positive: Tensor
    negative: Tensor | None
    memory: PromptMemory = field(default_factory=PromptMemory)


@dataclass(frozen=True)
class Denoised:
    """Latents [1, C, F, H, W] in float32, normalised, and what every forward computed of them."""

    latents: Tensor
    uses: list[Use]
    prompt_kv_bytes: int  # that are kept for the prompt
    freed_bytes: int  # of weights that were off the device meanwhile


@dataclass(frozen=True)
class Stepped:
    """A denoising step, done: from `sigma` to `after`, which gave `latents` [1, C, F, H, W]."""

    index: int
    sigma: float
    after: float
    latents: Tensor


def encode_prompt(loaded: Loaded, prompt: str, sampling: Sampling) -> Prompt:
    """Embed the prompt, and the negative one where there is guidance."""
    with torch.no_grad():
        positive, negative = loaded.pipeline.encode_prompt(
            prompt,
            sampling.negative_prompt,
            do_classifier_free_guidance=sampling.guidance_scale > 1,
            max_sequence_length=loaded.spec.text_length,
        )
    return Prompt(positive, negative)


def denoise(
    loaded: Loaded,
    prompt: Prompt,
    settings: Settings,
    plan: Plan,
    *,
    seed: int,
    on_step: Callable[[Stepped], None],
) -> Denoised:
    """Denoise with the caches of the settings; `on_step` hears of each step.

    Noise is drawn on the CPU, so that a seed means the same on every device.
    Raises RunError when the latents are not finite.
    """
    sampling, video = settings.sampling, settings.video
    pipeline = loaded.pipeline
    pipeline.scheduler = make_scheduler(pipeline.scheduler.config, sampling)
    pipeline.scheduler.set_timesteps(sampling.steps)
    timesteps = pipeline.scheduler.timesteps.tolist()

    def after_step(
        _pipeline: Any, index: int, _timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        sigma, after = pipeline.scheduler.sigmas[index : index + 2].tolist()
        on_step(Stepped(index, sigma, after, tensors["latents"]))
        return tensors

    with caches(loaded, prompt.memory, settings, plan, timesteps) as cached:
        latents: Tensor = pipeline(
            prompt_embeds=prompt.positive,
            negative_prompt_embeds=prompt.negative,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            guidance_scale_2=sampling.guidance_scale_2,
            num_frames=video.num_frames,
            width=video.width,
            height=video.height,
            generator=torch.Generator().manual_seed(seed),
            max_sequence_length=loaded.spec.text_length,
            output_type="latent",
            callback_on_step_end=after_step,
        ).frames
        freed = cached.freed_bytes
    if not torch.isfinite(latents).all():
        raise RunError(
            "the latents are not finite: the denoising went wrong.",
            hint="--dtype float32, or a lower --guidance-scale",
        )
    return Denoised(latents, cached.uses(), prompt.memory.bytes, freed)


def make_scheduler(config: Any, sampling: Sampling) -> Any:
    """The solver that the settings name, for Wan's flow matching."""
    if sampling.scheduler == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=sampling.flow_shift)
    solvers = {"unipc": UniPCMultistepScheduler, "dpm++": DPMSolverMultistepScheduler}
    return solvers[sampling.scheduler].from_config(
        config,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=sampling.flow_shift,
    )


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents: Tensor) -> NDArray[np.uint8]:
    """Latents [1, C, F, H, W], normalised, to video frames uint8 [T, H, W, 3]."""
    video = vae.decode(denormalize(vae, latents), return_dict=False)[0]
    frames: NDArray[np.uint8] = to_pixels(video)[0].numpy()
    return frames
