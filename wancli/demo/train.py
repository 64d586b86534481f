"""Train the demo model and write its folder: `python -m wancli.demo.train`.

An interrupted run resumes from the last checkpoint of its stage. SIGTERM and the end of --seconds
write one and exit with 0.
"""

import argparse
import copy
import logging
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

from wancli.catalog.specs import DEMO_FOLDER
from wancli.demo.autoencoder import STAGES, make_autoencoder, train_autoencoder
from wancli.demo.dataset import Dataset, encode_clips
from wancli.demo.distill import distill, write_lora
from wancli.demo.parts import TEXT_LENGTH, make_tokenizer
from wancli.demo.training import Log, stop
from wancli.demo.transformer import SHIFT, DemoModel, train_transformer

CLIPS = 4000
TRANSFORMER_STEPS = 16000
DISTILL_STEPS = 800

logger = logging.getLogger("wancli.demo")


def train(
    work: Path,
    out: Path,
    *,
    device: str,
    compile_blocks: bool,
    transformer_steps: int,
    distill_steps: int,
) -> None:
    """Train all parts and write the model folder; `work` holds checkpoints, latents and curves."""
    began = time.monotonic()

    def log_stage(stage: str) -> None:
        minutes = (time.monotonic() - began) / 60
        logger.info("%5.1f min  %s", minutes, stage)
        Log(work / "stages.jsonl").write(minutes=minutes)

    log_stage(f"autoencoder, {' and '.join(f'{s.steps} steps ({s.name}.jsonl)' for s in STAGES)}")
    vae = train_autoencoder(work, device=device)
    log_stage(f"latents of {CLIPS} clips")
    data = encode_clips(vae, work, clips=CLIPS, device=device)
    log_stage(f"transformer, {transformer_steps} steps; curve: {work}/transformer.jsonl")
    model = train_transformer(
        work, data, steps=transformer_steps, device=device, compile_blocks=compile_blocks
    )
    export(model, vae, data, out)
    log_stage(f"written: {out}; distillation, {distill_steps} steps; curve: {work}/distill.jsonl")
    lora = distill(work, model, data, steps=distill_steps, device=device)
    write_lora(lora, out.parent / "loras" / "demo-4step.safetensors")
    log_stage(f"written: {out.parent / 'loras'}")


def export(model: DemoModel, vae: AutoencoderKLWan, data: Dataset, out: Path) -> None:
    """Write a copy for WanPipeline.from_pretrained; half precision, 10 MB."""
    packed = make_autoencoder(latents_mean=data.mean, latents_std=data.std)
    packed.load_state_dict(vae.state_dict())
    transformer, text_encoder = copy.deepcopy((model.transformer, model.text_encoder))
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = TEXT_LENGTH
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )
    WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.cpu(),  # float32: transformers keeps the stored dtype
        transformer=transformer.cpu().half(),
        vae=packed.half(),
        scheduler=scheduler,
    ).save_pretrained(out)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m wancli.demo.train", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("demo-work"), help="checkpoints, curves")
    parser.add_argument("--out", type=Path, default=DEMO_FOLDER, help="model folder to write")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=TRANSFORMER_STEPS, help="transformer steps")
    parser.add_argument("--distill-steps", type=int, default=DISTILL_STEPS, help="of the LoRA")
    parser.add_argument("--no-compile", action="store_true", help="without a C++ compiler")
    parser.add_argument("--seconds", type=float, help="save and exit after this time")
    options = parser.parse_args()
    stop.install(options.seconds)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.work.mkdir(parents=True, exist_ok=True)
    train(
        options.work,
        options.out,
        device=options.device,
        compile_blocks=not options.no_compile,
        transformer_steps=options.steps,
        distill_steps=options.distill_steps,
    )


if __name__ == "__main__":
    main()
