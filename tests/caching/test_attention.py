"""Attention by backend, eager and compiled."""

import torch
from torch import Tensor

from wancli.caching.attention import attend


def draw(tokens: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, tokens, 2, 8, generator=generator)


def test_another_backend_attends_as_torch_does():
    query, key, value = draw(5, 0), draw(7, 1), draw(7, 2)
    ours, theirs = attend(query, key, value, "_native_math"), attend(query, key, value)
    assert ours.shape == query.shape
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_torch_attends_where_a_mask_hides_padding():
    query, key, value = draw(5, 0), draw(7, 1), draw(7, 2)
    mask = (torch.arange(7) < 4)[None, None, None]
    assert torch.equal(
        attend(query, key, value, "sage", mask=mask), attend(query, key, value, mask=mask)
    )


def test_another_backend_is_one_operator_of_a_graph():
    torch._dynamo.reset()
    operators: list[object] = []

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        operators.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(attend, backend=count, fullgraph=True)
    query, key, value = draw(5, 0), draw(7, 1), draw(7, 2)
    mixed = compiled(query, key, value, "_native_math")
    assert torch.equal(mixed, attend(query, key, value, "_native_math"))
    assert operators == [torch.ops.wancli.attend]


def test_the_operator_describes_its_output():
    query = draw(10, 0)[:, ::2]
    arguments = (query, draw(7, 1), draw(7, 2), "_native_math")
    torch.library.opcheck(torch.ops.wancli.attend.default, arguments)
