"""Numeric precision of the transformer and of the VAE."""

from wancli.config.settings import Machine


def is_wide(machine: Machine, kind: str) -> bool:
    """Whether weights and activations are float32 on a `kind` of device."""
    return machine.dtype == "float32" or (machine.dtype == "auto" and kind == "cpu")


def vae_dtype(machine: Machine) -> str:
    """Precision of the VAE, by torch's name."""
    return "float32" if machine.vae_dtype == "auto" else machine.vae_dtype
