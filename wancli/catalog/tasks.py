"""Tasks: facts about diffusers' pipelines and their arguments."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


def _same(*names: str) -> Mapping[str, str]:
    return {name: name for name in names}


@dataclass(frozen=True)
class Family:
    """Facts shared by the pipelines of a family of models."""

    name: str
    vae: str  # diffusers' class
    guidance: str = "guidance_scale"  # setting that enables the uncond forward when above 1
    schedulers: tuple[str, ...] = ("unipc", "dpm++", "euler", "few-step")
    listed_steps: bool = True  # its pipeline leaves the sigmas to the scheduler
    second_text_encoder: bool = False
    prompt_kv: bool = True  # the prompt's keys and values are the same in every step
    faster: bool = True  # supports quantization, fused QKV and compilation


WAN = Family("wan", "AutoencoderKLWan")
# Its blocks update the text tokens, too. The guidance scale is an embedding, and the pipeline
# passes sigmas to the scheduler, which diffusers' DPM++ does not accept.
HUNYUAN_VIDEO = Family(
    "hunyuan-video",
    "AutoencoderKLHunyuanVideo",
    guidance="true_cfg_scale",
    schedulers=("euler", "unipc"),
    listed_steps=False,
    second_text_encoder=True,
    prompt_kv=False,
    faster=False,
)


@dataclass(frozen=True)
class Task:
    """A pipeline of diffusers, with its argument names for our inputs and settings."""

    name: str
    pipeline: str  # diffusers' class
    transformer: str = "WanTransformer3DModel"
    family: Family = WAN
    needs: Mapping[str, str] = field(default_factory=dict)  # required inputs
    takes: Mapping[str, str] = field(default_factory=dict)  # optional inputs
    settings: Mapping[str, str] = field(
        default_factory=lambda: _same("num_frames", "guidance_scale_2")
    )
    tells_branches: bool = True  # enters cache_context("cond") or ("uncond") around forwards
    tells_steps: bool = False  # exposes the current step to caches
    expands_timesteps: bool = False  # may pass one timestep per token
    segmented: bool = False  # generates and decodes segment by segment

    @property
    def inputs(self) -> Mapping[str, str]:
        """Required and optional inputs."""
        return {**self.needs, **self.takes}


TEXT, IMAGE, VIDEO = "text-to-video", "image-to-video", "video-to-video"
ENDS, VACE, ANIMATE = "first-last-frame", "vace", "animate"
HUNYUAN_TEXT = "hunyuan-text-to-video"

TASKS = {
    task.name: task
    for task in (
        Task(TEXT, "WanPipeline", tells_steps=True, expands_timesteps=True),
        Task(IMAGE, "WanImageToVideoPipeline", needs=_same("image")),
        Task(ENDS, "WanImageToVideoPipeline", needs=_same("image", "last_image")),
        Task(
            VIDEO,
            "WanVideoToVideoPipeline",
            needs=_same("video"),
            settings=_same("strength"),
            tells_branches=False,
        ),
        Task(
            VACE,
            "WanVACEPipeline",
            "WanVACETransformer3DModel",
            takes={**_same("video", "mask"), "ref_image": "reference_images"},
        ),
        Task(
            ANIMATE,
            "WanAnimatePipeline",
            "WanAnimateTransformer3DModel",
            needs={**_same("pose_video", "face_video"), "ref_image": "image"},
            takes={**_same("background_video"), "mask": "mask_video"},
            settings={"segment_frames": "segment_frame_length"},
            segmented=True,
        ),
        Task(
            HUNYUAN_TEXT,
            "HunyuanVideoPipeline",
            "HunyuanVideoTransformer3DModel",
            HUNYUAN_VIDEO,
            settings=_same("num_frames", "true_cfg_scale"),
        ),
    )
}


EXPERTS = {"high": "transformer", "low": "transformer_2"}  # by noise level; diffusers' names


def setting_of(part: str) -> str:
    """The setting that names the file of a part."""
    return "transformer" if part in EXPERTS.values() else part


def of_expert(text: str) -> tuple[str, str]:
    """Split `@high` or `@low` off the name of a file, unless a file has that very name."""
    name, at, expert = text.rpartition("@")
    return (name, expert) if at and expert in EXPERTS and not Path(text).exists() else (text, "")
