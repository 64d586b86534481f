"""Which of diffusers' attention backends run here: each attends to a tiny tensor."""

import warnings
from collections.abc import Iterator

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from wancli.doctor.checks import Finding

TOLERANCE = 0.05  # absolute, of values around 1; 8-bit kernels are this far off


def attention_backends(device: torch.device) -> Iterator[Finding]:
    """Compare every backend with plain attention; those that do not run are one note."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 128, 4, 64, generator=generator).to(device, dtype) for _ in range(3)
    )
    expected = _plain(query, key, value)
    absent = []
    for backend in AttentionBackendName:
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                output = dispatch_attention_fn(query, key, value, backend=backend).float()
        except Exception:  # noqa: BLE001 - each missing kernel raises something else
            absent.append(backend.value)
            continue
        error = float((output - expected).abs().max())
        if error <= TOLERANCE:
            deviation = f"within {error:.0e}" if error else "exactly"
            yield Finding("attention", backend.value, f"runs, {deviation}")
        else:
            yield Finding("attention", backend.value, f"is {error:.1g} off", "broken", "do not use")
    if absent:
        yield Finding("attention", "unavailable", ", ".join(absent), "note")


def _plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention [B, S, H, D] in float32, by definition."""
    q, k, v = (x.float().transpose(1, 2) for x in (query, key, value))
    scores = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, dim=-1)
    return (scores @ v).transpose(1, 2)
