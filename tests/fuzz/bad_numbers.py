"""Hostile tensors: latents, LoRAs, noise, embeddings, checkpoints."""

import random

from tests.fuzz.campaign import Case
from tests.fuzz.mutations import damage, hostile_json, hostile_tensors
from tests.fuzz.spoiling import LATENTS, ROLL, TINY, Lines, good, put

RAN = "ran"  # a file that is there where code of a pickle was run
PICKLED = b"cos\nsystem\n(S'touch " + RAN.encode() + b"'\ntR."


def latents(case: Case, chance: random.Random) -> Lines:
    """Latents."""
    put(case, "x.safetensors", hostile_tensors(good(case, "latents.safetensors"), chance))
    case.place.take("latents.safetensors")
    return [("decode", "x.safetensors", "-o", "new.mp4", "-q"),
            ("compare", "x.safetensors", "latents.safetensors"),
            (*ROLL, "--initial-latents", "x.safetensors", *LATENTS)]  # fmt: skip


def lora(case: Case, chance: random.Random) -> Lines:
    """A LoRA."""
    name = chance.choice(("x.safetensors", "x.safetensors", "x.pt"))
    if name == "x.pt":
        put(case, name, damage(good(case, "lora.pt"), chance))
    else:
        put(case, name, hostile_tensors(good(case, "lora.safetensors"), chance))
    made = ("generate", "a", *TINY, "-o", "new.mp4", "--lora")
    return [(*made, name), (*made, f"{name}=0.5", "--dry-run"), (*made, name, "--dry-run")]


def noise(case: Case, chance: random.Random) -> Lines:
    """What stands in for seeds and prompts."""
    put(case, "x.safetensors", hostile_tensors(good(case, "noise.safetensors"), chance))
    put(case, "y.safetensors", hostile_tensors(good(case, "embeds.safetensors"), chance))
    dry = ("--dry-run",) if chance.random() < 0.4 else ()
    return [(*ROLL, "--noise-file", "x.safetensors", *LATENTS, *dry),
            (*ROLL, "--prompt-embeds", "y.safetensors", *LATENTS, *dry)]  # fmt: skip


def checkpoint(case: Case, chance: random.Random) -> Lines:
    """A checkpoint to convert, or what is said of one."""
    config = ("--config", "heads.json")
    case.place.take("heads.json")
    if chance.random() < 0.25:
        case.place.take("checkpoint.safetensors")
        put(case, "heads.json", hostile_json({"num_heads": 4}, chance))
        return [("model", "convert", "checkpoint.safetensors", "new-3", *config)]
    if chance.random() < 0.3:
        content = damage(good(case, "lora.pt"), chance) if chance.random() < 0.7 else PICKLED
        put(case, "x.pt", content)
        return [("model", "convert", "x.pt", "new-3", *config)]
    put(case, "x.safetensors", hostile_tensors(good(case, "checkpoint.safetensors"), chance))
    return [("model", "convert", "x.safetensors", "new-3", *config)]
