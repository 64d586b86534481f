"""Texts that a pipeline has encoded, so that requests with the same prompt share the work."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MOST_BYTES = 64 * 2**20  # 16 texts of Wan: [1, 512, 4096] in bfloat16; no plan counts them
Embeddings = Mapping[str, "Tensor"]


class EncodedTexts:
    """The embeddings of the texts that were used last, by the pipeline's names of arguments."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._known: OrderedDict[str, Embeddings] = OrderedDict()
        self._most = most_bytes

    def get(self, text: str, encode: Callable[[str], Embeddings]) -> Embeddings:
        """The embeddings of a text, which `encode` makes unless they are known."""
        if text not in self._known:
            self._known[text] = encode(text)
            while len(self._known) > 1 and sum(map(_nbytes, self._known.values())) > self._most:
                self._known.popitem(last=False)
        self._known.move_to_end(text)
        return self._known[text]

    def capacity(self, like: Embeddings) -> int:
        """The number of texts with embeddings of that size that are kept."""
        return self._most // _nbytes(like)

    def __contains__(self, text: str) -> bool:
        return text in self._known

    def clear(self) -> None:
        """Give the memory back."""
        self._known.clear()


def _nbytes(embeddings: Embeddings) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in embeddings.values())
