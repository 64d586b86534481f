"""Hostile tensors: latents, LoRAs, noise, embeddings, checkpoints."""

import random

from tests.fuzz.campaign import Case
from tests.fuzz.mutations import damage, hostile_json, hostile_tensors
from tests.fuzz.spoiling import LATENTS, ROLL, TINY, Lines, good, put

RAN = "ran"  # a file that exists if the code of a pickle was run
PICKLED = b"cos\nsystem\n(S'touch " + RAN.encode() + b"'\ntR."


def latents(case: Case, rng: random.Random) -> Lines:
    """Latents."""
    put(case, "x.safetensors", hostile_tensors(good(case, "latents.safetensors"), rng))
    case.place.copy_in("latents.safetensors")
    return [("decode", "x.safetensors", "-o", "new.mp4", "-q"),
            ("compare", "x.safetensors", "latents.safetensors"),
            (*ROLL, "--initial-latents", "x.safetensors", *LATENTS)]  # fmt: skip


def lora(case: Case, rng: random.Random) -> Lines:
    """A LoRA."""
    name = rng.choice(("x.safetensors", "x.safetensors", "x.pt"))
    if name == "x.pt":
        put(case, name, damage(good(case, "lora.pt"), rng))
    else:
        put(case, name, hostile_tensors(good(case, "lora.safetensors"), rng))
    generate = ("generate", "a", *TINY, "-o", "new.mp4", "--lora")
    return [
        (*generate, name),
        (*generate, f"{name}=0.5", "--dry-run"),
        (*generate, name, "--dry-run"),
    ]


def weights(case: Case, rng: random.Random) -> Lines:
    """Weights of a transformer in one file."""
    if rng.random() < 0.6:
        name, content = "x.gguf", good(case, "weights.gguf")
        cut = rng.choice((2000, len(content)))  # its header, or all of it
        put(case, name, damage(content[:cut], rng) + content[cut:])
    else:
        (stored,) = case.materials.glob("tiny/transformer/*.safetensors")
        name = "x.safetensors"
        put(case, name, hostile_tensors(stored.read_bytes(), rng))
    generate = ("generate", "a", *TINY, "-o", "new.mp4", "--transformer", name)
    return [generate, (*generate, "--dry-run"), ("model", "info", name)]


def noise(case: Case, rng: random.Random) -> Lines:
    """Noise and prompt embeddings."""
    put(case, "x.safetensors", hostile_tensors(good(case, "noise.safetensors"), rng))
    put(case, "y.safetensors", hostile_tensors(good(case, "embeds.safetensors"), rng))
    dry = ("--dry-run",) if rng.random() < 0.4 else ()
    return [(*ROLL, "--noise-file", "x.safetensors", *LATENTS, *dry),
            (*ROLL, "--prompt-embeds", "y.safetensors", *LATENTS, *dry)]  # fmt: skip


def checkpoint(case: Case, rng: random.Random) -> Lines:
    """A checkpoint to convert, or its config."""
    config = ("--config", "heads.json")
    case.place.copy_in("heads.json")
    if rng.random() < 0.25:
        case.place.copy_in("checkpoint.safetensors")
        put(case, "heads.json", hostile_json({"num_heads": 4}, rng))
        return [("model", "convert", "checkpoint.safetensors", "new-3", *config)]
    if rng.random() < 0.3:
        content = damage(good(case, "lora.pt"), rng) if rng.random() < 0.7 else PICKLED
        put(case, "x.pt", content)
        return [("model", "convert", "x.pt", "new-3", *config)]
    put(case, "x.safetensors", hostile_tensors(good(case, "checkpoint.safetensors"), rng))
    return [("model", "convert", "x.safetensors", "new-3", *config)]
