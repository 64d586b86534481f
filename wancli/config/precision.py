"""Numeric precision of the transformer and of the VAE."""

from wancli.config.settings import Machine


def transformer_dtype(machine: Machine, kind: str) -> str:
    """Precision of weights and activations on a `kind` of device, by torch's name."""
    if machine.dtype == "auto":
        return "float32" if kind == "cpu" else "bfloat16"
    return machine.dtype


LATENTS_PER_CALL = 3  # of the fast VAE decoder, after the first: as a chunk of a rollout has


def decodes_fast(machine: Machine, kind: str) -> bool:
    """Whether the VAE decodes faster than diffusers, but for rounding, on a `kind` of device."""
    return kind == "cuda" if machine.vae_exact is None else not machine.vae_exact


def decoder_dtype(machine: Machine, kind: str) -> str:
    """Precision of the VAE's decoder on a `kind` of device, by torch's name."""
    narrow = machine.vae_dtype == "auto" and kind == "cuda" and decodes_fast(machine, kind)
    return "bfloat16" if narrow else vae_dtype(machine)


def vae_dtype(machine: Machine) -> str:
    """Precision of the VAE but for its decoder, by torch's name."""
    return "float32" if machine.vae_dtype == "auto" else machine.vae_dtype
