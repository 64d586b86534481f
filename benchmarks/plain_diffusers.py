"""Generate a video as in diffusers' examples: the reference of `benchmarks/generate.py`.

python benchmarks/plain_diffusers.py REQUEST.json LATENTS.safetensors VIDEO.mp4
"""

import json
import sys
from pathlib import Path
from time import perf_counter

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from diffusers.utils import export_to_video
from safetensors.torch import save_file

request = json.loads(Path(sys.argv[1]).read_text())
sampling, video = request["sampling"], request["video"]
guided = sampling["guidance_scale"] > 1

pipe = WanPipeline.from_pretrained(request["model"], dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
pipe.scheduler = UniPCMultistepScheduler.from_config(
    pipe.scheduler.config, flow_shift=sampling["flow_shift"]
)
with torch.no_grad():
    # Outside the call below, so that only denoising is timed.
    positive, negative = pipe.encode_prompt(
        request["prompt"],
        sampling["negative_prompt"],
        do_classifier_free_guidance=guided,
        max_sequence_length=request["text_length"],
    )
    started = perf_counter()
    latents = pipe(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        num_inference_steps=sampling["steps"],
        guidance_scale=sampling["guidance_scale"],
        num_frames=video["num_frames"],
        width=video["width"],
        height=video["height"],
        generator=torch.Generator().manual_seed(request["seed"]),
        output_type="latent",
    ).frames
    denoise_s = perf_counter() - started

    # As in the pipeline.
    shape = (1, -1, 1, 1, 1)
    mean, std = (
        torch.tensor(values).view(shape)
        for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    decoded = pipe.vae.decode(latents * std + mean, return_dict=False)[0]
frames = pipe.video_processor.postprocess_video(decoded, output_type="np")[0]
export_to_video(list(frames), sys.argv[3], fps=video["fps"])
save_file({"latents": latents[0].transpose(0, 1).contiguous()}, sys.argv[2])
sys.stdout.write(json.dumps({"denoise_s": denoise_s}) + "\n")
