"""Numeric precision of the transformer and of the VAE."""

from wancli.config.settings import Machine


def transformer_dtype(machine: Machine, kind: str) -> str:
    """Precision of weights and activations on a `kind` of device, by torch's name."""
    if machine.dtype == "auto":
        return "float32" if kind == "cpu" else "bfloat16"
    return machine.dtype


def vae_dtype(machine: Machine) -> str:
    """Precision of the VAE, by torch's name."""
    return "float32" if machine.vae_dtype == "auto" else machine.vae_dtype
