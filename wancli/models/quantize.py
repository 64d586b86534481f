"""Weights of a transformer's blocks in 8 bits (lossy): memory, at the price of some error."""

from typing import Any

from torch import nn


def quantize(transformer: Any, kind: str) -> None:
    """Keep the linear layers of the blocks as `int8` or `fp8` (e4m3), with a scale for each row.

    They are widened to the dtype of the activations as they are used, which every device can do.
    One layer is exchanged after the other, where it is: on the CPU, so that a GPU need never hold
    the model as it was. What is outside the blocks, biases and norms stay as they are.
    """
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    # Left to itself torchao sets options of torch.compile for the whole process.
    whole = {"set_inductor_config": False}
    config = Int8WeightOnlyConfig(**whole) if kind == "int8" else Float8WeightOnlyConfig(**whole)
    for name, blocks in transformer.named_children():
        if name in ("blocks", "vace_blocks"):
            quantize_(blocks, config, filter_fn=lambda module, _: isinstance(module, nn.Linear))
