"""What a model may be asked to do, and how diffusers' pipeline for it is called: facts."""

from collections.abc import Mapping
from dataclasses import dataclass, field


def _same(*names: str) -> Mapping[str, str]:
    return {name: name for name in names}


@dataclass(frozen=True)
class Family:
    """What the pipelines of a family of models have in common."""

    name: str
    vae: str  # diffusers' class
    guidance: str = "guidance_scale"  # setting: over 1, a step makes an uncond forward, too
    schedulers: tuple[str, ...] = ("unipc", "dpm++", "euler")
    second_text_encoder: bool = False
    prompt_kv: bool = True  # the prompt's keys and values are the same in every step
    faster: bool = True  # its blocks are known to quantize, to fuse and to compile


WAN = Family("wan", "AutoencoderKLWan")
# Its blocks change the text as they do the video. It is told the guidance scale as a number, and
# its pipeline tells the solver the sigmas, which diffusers' DPM++ does not take.
HUNYUAN_VIDEO = Family(
    "hunyuan-video",
    "AutoencoderKLHunyuanVideo",
    guidance="true_cfg_scale",
    schedulers=("euler", "unipc"),
    second_text_encoder=True,
    prompt_kv=False,
    faster=False,
)


@dataclass(frozen=True)
class Task:
    """One pipeline of diffusers, and its words for ours: inputs by flag, settings by field."""

    name: str
    pipeline: str  # diffusers' class
    transformer: str = "WanTransformer3DModel"
    family: Family = WAN
    needs: Mapping[str, str] = field(default_factory=dict)  # inputs it cannot do without
    takes: Mapping[str, str] = field(default_factory=dict)  # inputs it may be given, too
    settings: Mapping[str, str] = field(
        default_factory=lambda: _same("num_frames", "guidance_scale_2")
    )
    tells_branches: bool = True  # says "cond" or "uncond" to the transformer, which caches hear
    tells_steps: bool = False  # and which step it is at
    expands_timesteps: bool = False  # may tell every token its timestep, the same for all
    segmented: bool = False  # makes segment after segment, and decodes each by itself

    @property
    def inputs(self) -> Mapping[str, str]:
        """All of them."""
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


EXPERTS = {"high": "transformer", "low": "transformer_2"}  # of noise; diffusers' names
