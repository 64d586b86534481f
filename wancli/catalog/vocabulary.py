"""Words that a model knows, where its tokenizer is a list of them: any other is lost on it."""

import re
from collections.abc import Iterable

from wancli.catalog.specs import ModelSpec
from wancli.utils.reading import parse_json, read_text

HINT = "only words that it knows, or --model wan2.1-t2v-1.3b"
_SHOWN = 8  # words
_TOKENS = re.compile(r"\w+|[^\w\s]+")  # as tokenizers' Whitespace splits


def unknown_words(spec: ModelSpec, prompts: Iterable[str]) -> list[str]:
    """The words of the prompts that the model does not know, each once; none where it takes any."""
    known = _vocabulary(spec)
    tokens = (token for prompt in prompts for token in _TOKENS.findall(prompt.lower()))
    words = dict.fromkeys(token for token in tokens if any(map(str.isalnum, token)))
    return [word for word in words if word not in known] if known else []


def vocabulary_warnings(spec: ModelSpec, prompts: Iterable[str]) -> tuple[str, ...]:
    """What to say of words that the model does not know, and of what it can draw; or nothing."""
    words = unknown_words(spec, prompts)
    if not words:
        return ()
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    said = ", ".join(f"'{word}'" for word in words[:_SHOWN])
    return (f"{spec.name} does not know {said}{more}. {spec.draws}".strip(),)


def _vocabulary(spec: ModelSpec) -> set[str]:
    """All words of a tokenizer that splits text into lower-case words; empty for any other."""
    if spec.folder is None:
        return set()
    try:
        told = parse_json(read_text(spec.folder / "tokenizer" / "tokenizer.json"))
        kinds = [told[part]["type"] for part in ("model", "normalizer", "pre_tokenizer")]
        words = told["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return set(words) if kinds == ["WordLevel", "Lowercase", "Whitespace"] else set()
