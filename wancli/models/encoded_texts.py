"""Texts that a pipeline has encoded, so that requests with the same prompt share the work."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MOST_TEXTS = 32  # 4 MiB each for Wan: [1, 512, 4096] in bfloat16
Embeddings = Mapping[str, "Tensor"]


class EncodedTexts:
    """The embeddings of the texts that were used last, by the pipeline's names of arguments."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Embeddings] = OrderedDict()

    def get(self, text: str, encode: Callable[[str], Embeddings]) -> Embeddings:
        """The embeddings of a text, which `encode` makes unless they are known."""
        if text not in self._known:
            self._known[text] = encode(text)
            if len(self._known) > MOST_TEXTS:
                self._known.popitem(last=False)
        self._known.move_to_end(text)
        return self._known[text]

    def __contains__(self, text: str) -> bool:
        return text in self._known

    def clear(self) -> None:
        """Give the memory back."""
        self._known.clear()
