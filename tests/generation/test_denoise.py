from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module  # type: ignore[import-untyped]
from diffusers.video_processor import VideoProcessor

from tests.fakes import tiny_pipeline, tiny_vae
from tests.generation.test_offload import loaded_for, settings_of, videos_of
from wancli.catalog.tasks import TEXT
from wancli.config.settings import Sampling
from wancli.generation.denoise import decode
from wancli.generation.schedulers import make_scheduler
from wancli.models.fast_decoder import DecoderSpeedups, speed_up_decoder


def test_decoded_frames_equal_those_of_diffusers_rounded_to_uint8():
    vae = tiny_vae()
    latents = torch.randn(1, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    with torch.no_grad():
        video = vae.decode(latents * std + mean).sample
    plain = VideoProcessor().postprocess_video(video, output_type="np")[0]
    frames = decode(vae, latents)
    assert frames.shape == (5, 32, 32, 3)
    assert frames.dtype == np.uint8
    assert np.abs(frames / 255 - plain).max() <= 0.5 / 255 + 1e-6


class Onloads(ModelHook):  # type: ignore[misc]
    """Counts how often a component is brought to its device."""

    times = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.times += 1
        return args, kwargs


@pytest.mark.parametrize(("tiled", "width"), [(False, 4), (True, 40)])
def test_the_fast_decoder_decodes_the_same_frames_but_for_rounding(tiled: bool, width: int):
    latents = torch.randn(1, 4, 6, 4, width, generator=torch.Generator().manual_seed(0))
    frames = []
    for speedups in (None, DecoderSpeedups()):
        vae, hook = tiny_vae(), Onloads()
        if speedups:
            speed_up_decoder(vae, speedups)
        if tiled:
            vae.enable_tiling()
        add_hook_to_module(vae, hook)
        frames.append(decode(vae, latents).astype(int))
        assert hook.times == 1
    assert frames[0].shape == frames[1].shape == (21, 32, 8 * width, 3)
    assert np.abs(frames[0] - frames[1]).max() <= 1


def test_a_compiled_clip_may_need_more_graphs_than_torch_compiles_by_itself():
    loaded, few = loaded_for(TEXT, None), {"steps": 1, "guidance_scale": 1.0}
    loaded.pipeline.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=0):  # as after eight others
        settings = settings_of(TEXT, machine={"compile": True}, sampling=few)
        assert videos_of(loaded, settings, TEXT, count=1)
    torch._dynamo.reset()


@pytest.mark.parametrize("scheduler", ["unipc", "dpm++", "euler"])
def test_a_scheduler_applies_the_flow_shift(scheduler: str):
    config = tiny_pipeline().scheduler.config
    shifted = {}
    for shift in (1.0, 7.0):
        solver = make_scheduler(config, Sampling(scheduler=scheduler, flow_shift=shift))
        solver.set_timesteps(10)
        shifted[shift] = solver.sigmas
    middle = shifted[1.0][5]
    assert shifted[7.0][5] == pytest.approx(float(7 * middle / (1 + 6 * middle)), abs=0.02)
