"""Train the demo model and write its folder: `python -m wancli.demo.train`.

An interrupted run resumes from the last checkpoint of its stage. SIGTERM and the end of --seconds
write one and exit with 0.
"""

import argparse
import copy
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

from wancli.catalog.decoder_files import DEMO_DECODER
from wancli.catalog.specs import DEMO_FOLDER
from wancli.demo.autoencoder import STAGES, Stage, make_autoencoder, train_autoencoder
from wancli.demo.dataset import Dataset, encode_clips
from wancli.demo.distill import distill, write_lora
from wancli.demo.parts import TEXT_LENGTH, make_tokenizer
from wancli.demo.tiny_decoder import TinyBudget, train_tiny_decoder, write_tiny_decoder
from wancli.demo.training import Log, stop
from wancli.demo.transformer import SHIFT, DemoModel, train_transformer


@dataclass(frozen=True)
class Budget:
    """Sizes of the stages of a training."""

    vae: Sequence[Stage]
    clips: int  # of the data set
    batch: int  # clips of a step
    steps: int  # of the transformer
    distill_steps: int
    tiny: TinyBudget


# Hours on two cores, and minutes on an H100, whose steps take hardly longer with more clips.
CPU = Budget(
    STAGES, clips=4000, batch=16, steps=16000, distill_steps=400, tiny=TinyBudget(250, 2, 1000)
)
GPU = Budget(
    [replace(s, steps=3 * s.steps, frames=2 * s.frames) for s in STAGES],
    clips=8000, batch=48, steps=16000, distill_steps=1500, tiny=TinyBudget(500, 8, 6000),
)  # fmt: skip

logger = logging.getLogger("wancli.demo")


def train(
    work: Path,
    out: Path,
    *,
    budget: Budget,
    device: str,
    compile_blocks: bool,
) -> None:
    """Train all parts and write the model folder; `work` holds checkpoints, latents and curves."""
    began = time.monotonic()
    torch.backends.cudnn.benchmark = True  # the shapes of a stage stay the same

    def log_stage(stage: str) -> None:
        minutes = (time.monotonic() - began) / 60
        logger.info("%5.1f min  %s", minutes, stage)
        Log(work / "stages.jsonl").write(minutes=minutes)

    stages = " and ".join(f"{stage.steps} steps ({stage.name}.jsonl)" for stage in budget.vae)
    log_stage(f"autoencoder, {stages}")
    vae = train_autoencoder(work, device=device, stages=budget.vae)
    log_stage(f"latents of {budget.clips} clips")
    data = encode_clips(vae, work, clips=budget.clips, device=device)
    log_stage(f"transformer, {budget.steps} steps; curve: {work}/transformer.jsonl")
    model = train_transformer(
        work, data, steps=budget.steps, clips=budget.batch, device=device,
        compile_blocks=compile_blocks,
    )  # fmt: skip
    export(model, vae, data, out)
    log_stage(
        f"written: {out}; distillation, {budget.distill_steps} steps; curve: {work}/distill.jsonl"
    )
    lora = distill(work, model, data, steps=budget.distill_steps, clips=budget.batch, device=device)
    write_lora(lora, out.parent / "loras" / "demo-4step.safetensors")
    log_stage(
        f"written: {out.parent / 'loras'}; tiny decoder, {budget.tiny.steps} steps; curve: "
        f"{work}/tiny-decoder.jsonl"
    )
    train_decoder(work, out, budget=budget.tiny, device=device)
    log_stage(f"written: {out.parent / DEMO_DECODER}")


def train_decoder(work: Path, out: Path, *, budget: TinyBudget, device: str) -> None:
    """Distil the tiny decoder from the VAE in the model folder, and write it beside that."""
    vae = AutoencoderKLWan.from_pretrained(out / "vae", torch_dtype=torch.float32)
    decoder = train_tiny_decoder(work, vae.eval(), budget=budget, device=device)
    write_tiny_decoder(decoder, out.parent / DEMO_DECODER)


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
    parser.add_argument("--steps", type=int, help="transformer steps, if not those of the device")
    parser.add_argument("--distill-steps", type=int, help="of the LoRA, likewise")
    parser.add_argument("--only-tiny", action="store_true", help="the tiny decoder of --out's VAE")
    parser.add_argument("--no-compile", action="store_true", help="without a C++ compiler")
    parser.add_argument("--seconds", type=float, help="save and exit after this time")
    options = parser.parse_args()
    stop.install(options.seconds)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options.work.mkdir(parents=True, exist_ok=True)
    budget = CPU if options.device == "cpu" else GPU
    budget = replace(
        budget,
        steps=options.steps or budget.steps,
        distill_steps=options.distill_steps or budget.distill_steps,
    )
    if options.only_tiny:
        train_decoder(options.work, options.out, budget=budget.tiny, device=options.device)
        return
    train(
        options.work,
        options.out,
        budget=budget,
        device=options.device,
        compile_blocks=not options.no_compile,
    )


if __name__ == "__main__":
    main()
