"""Each text is encoded once, and the next ones with it where the text encoder moves."""

from typing import Any

import torch

from tests.generation.test_offload import loaded_for, settings_of
from wancli.catalog.tasks import TEXT
from wancli.generation.prompts import encode_prompt
from wancli.models.encoded_texts import EncodedTexts


def test_texts_are_encoded_once_and_ahead_as_they_are_alone():
    loaded, sampling = loaded_for(TEXT, None), settings_of(TEXT).sampling
    forwards: list[Any] = []
    loaded.pipeline.text_encoder.register_forward_hook(lambda *_: forwards.append(_))
    alone = {text: encode_prompt(loaded, text, sampling).embeddings for text in ("a", "b")}
    assert len(forwards) == 4  # and the negative prompt, each time
    known = EncodedTexts()
    forwards.clear()
    encode_prompt(loaded, "c", sampling, known=known, ahead=["a", "b"])
    assert len(forwards) == 4
    for text, embeddings in alone.items():
        again = encode_prompt(loaded, text, sampling, known=known, ahead=["d"]).embeddings
        assert again.keys() == embeddings.keys()
        assert all(torch.equal(again[name], embeddings[name]) for name in embeddings)
    assert len(forwards) == 4


def test_no_more_texts_are_encoded_ahead_than_are_kept():
    loaded, sampling = loaded_for(TEXT, None), settings_of(TEXT).sampling
    embeddings = encode_prompt(loaded, "c", sampling).embeddings
    known = EncodedTexts(4 * embeddings["prompt_embeds"].nbytes)
    encode_prompt(loaded, "c", sampling, known=known, ahead=["a", "b", "d"])
    assert [text in known for text in ("c", "a", "b", "d")] == [True, True, True, False]


def test_the_texts_used_last_are_kept():
    texts = EncodedTexts(12)

    def encode(text: str) -> dict[str, torch.Tensor]:
        return {"prompt_embeds": torch.zeros(1)}

    for number in range(3):
        texts.get(str(number), encode)
    texts.get("0", encode)
    texts.get("new", encode)
    assert ("0" in texts, "1" in texts, "2" in texts) == (True, False, True)
