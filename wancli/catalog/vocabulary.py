"""What a model does not read of prompts: words that it does not know, and the end of long ones."""

import re
from collections.abc import Iterable, Sequence

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


def prompt_warnings(
    spec: ModelSpec, prompts: Iterable[str], *, text_length: int | None = None
) -> tuple[PlanWarning, ...]:
    """Warnings about words that the model does not know, and prompts of which it cuts the end.

    `text_length` is its number of tokens, where it is not the model's own.
    """
    prompts = list(prompts)
    cut = _length_warnings(spec, prompts, text_length or spec.text_length)
    return *_vocabulary_warnings(spec, prompts), *cut


def _length_warnings(
    spec: ModelSpec, prompts: Iterable[str], limit: int
) -> tuple[PlanWarning, ...]:
    # A token is a byte or more, but for the first space and the end.
    long = [prompt for prompt in prompts if len(prompt.encode()) + 2 > limit]
    most = max((len(tokens) for tokens in _tokenized(spec, long)), default=0)
    if most <= limit:
        return ()
    text = f"a prompt has {most} tokens, and {spec.name} reads {limit}: the rest is cut off."
    return (PlanWarning(text, "shorten the prompt", of_prompt=True),)


def _tokenized(spec: ModelSpec, prompts: Sequence[str]) -> list[list[int]]:
    """The tokens of each prompt; empty if the tokenizer is not here."""
    if spec.folder is None or not prompts:
        return []
    from tokenizers import Tokenizer  # of umt5 takes a second

    try:
        tokenizer = Tokenizer.from_file(str(spec.folder / "tokenizer" / "tokenizer.json"))
    except Exception:  # noqa: BLE001 - whatever is wrong with it is found when it is loaded
        return []
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [encoding.ids for encoding in tokenizer.encode_batch(prompts)]


def _vocabulary_warnings(spec: ModelSpec, prompts: Iterable[str]) -> tuple[PlanWarning, ...]:
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
