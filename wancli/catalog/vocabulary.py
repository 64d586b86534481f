"""Words outside the vocabulary of a model with a word-level tokenizer."""

import re
from collections.abc import Iterable

from wancli.catalog.specs import ModelSpec
from wancli.errors import PlanWarning
from wancli.utils.reading import parse_json, read_text

HINT = "its words: wancli model info demo; or `model wan2.1-t2v-1.3b`"
_SHOWN = 8  # words
_TOKENS = re.compile(r"\w+|[^\w\s]+")  # as tokenizers' Whitespace splits


def unknown_words(spec: ModelSpec, prompts: Iterable[str]) -> list[str]:
    """Words of the prompts that are not in the model's vocabulary, each once."""
    vocabulary = _vocabulary(spec)
    if not vocabulary:
        return []
    tokens = (token for prompt in prompts for token in _TOKENS.findall(prompt.lower()))
    words = dict.fromkeys(token for token in tokens if any(map(str.isalnum, token)))
    return [word for word in words if word not in vocabulary]


def vocabulary_warnings(spec: ModelSpec, prompts: Iterable[str]) -> tuple[PlanWarning, ...]:
    """A warning about words that the model does not know, or none."""
    words = unknown_words(spec, prompts)
    if not words:
        return ()
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    quoted = ", ".join(f"'{word}'" for word in words[:_SHOWN])
    small = " It is the demo model, and draws moving shapes." if spec.draws else ""
    text = f"{spec.name} does not know {quoted}{more}.{small}"
    return (PlanWarning(text, HINT, of_prompt=True),)


def _vocabulary(spec: ModelSpec) -> set[str]:
    """All words of a lower-case word-level tokenizer; empty for any other."""
    if spec.folder is None:
        return set()
    try:
        tokenizer = parse_json(read_text(spec.folder / "tokenizer" / "tokenizer.json"))
        kinds = [tokenizer[part]["type"] for part in ("model", "normalizer", "pre_tokenizer")]
        words = tokenizer["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return set(words) if kinds == ["WordLevel", "Lowercase", "Whitespace"] else set()
