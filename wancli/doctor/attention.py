"""Which of diffusers' attention backends run here: each is given a tiny tensor."""

import warnings
from collections.abc import Iterator

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from wancli.doctor.checks import Finding

TOLERANCE = 0.05  # of numbers about 1; kernels of 8 bits are this far off


def attention_backends(device: torch.device) -> Iterator[Finding]:
    """Those that give what plain attention gives; and, as one note, those that do not run."""
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
                found = dispatch_attention_fn(query, key, value, backend=backend).float()
        except Exception:  # noqa: BLE001 - each kernel has its own way to say that it is not there
            absent.append(backend.value)
            continue
        error = float((found - expected).abs().max())
        told = f"runs, within {error:.0e}"
        if error <= TOLERANCE:
            yield Finding("attention", backend.value, told)
        else:
            yield Finding("attention", backend.value, f"is {error:.1g} off", "broken", "do not use")
    if absent:
        yield Finding("attention", "not here", ", ".join(absent), "note")


def _plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention [B, S, H, D] in float32, by its definition."""
    q, k, v = (x.float().transpose(1, 2) for x in (query, key, value))
    scores = torch.softmax(q @ k.transpose(2, 3) / q.shape[-1] ** 0.5, dim=-1)
    return (scores @ v).transpose(1, 2)
