"""What a rollout keeps is what it gives back, or it gives nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wancli.errors import OutputError
from wancli.rollout.store import RolloutStore


def latents(value: float) -> Tensor:
    return torch.full((1, 4, 2, 3, 3), value)


@pytest.fixture
def store(tmp_path: Path) -> RolloutStore:
    """Three chunks."""
    store = RolloutStore(tmp_path)
    for number in range(3):
        store.save(f"chunk-{number:06}", latents(number))
    return store


def test_chunks_are_as_they_were_saved_whoever_asks(store: RolloutStore):
    for asked in (store, RolloutStore(store.folder)):
        for number in range(3):
            kept = asked.load(f"chunk-{number:06}")
            assert kept is not None
            assert torch.equal(kept, latents(number))
        assert asked.sound_chunks() == 3


@pytest.mark.parametrize("damage", ["exchanged", "another dtype", "saved by nobody"])
def test_a_chunk_that_is_valid_and_not_as_it_was_saved_is_none(store: RolloutStore, damage: str):
    chunk = store.folder / "chunk-000001.safetensors"
    if damage == "exchanged":
        shutil.copy(store.folder / "chunk-000002.safetensors", chunk)
    elif damage == "another dtype":
        save_file({"latents": load_file(chunk)["latents"].half()}, chunk)
    else:
        save_file({"latents": torch.full((2, 4, 3, 3), 9.0)}, chunk)
    for asked in (store, RolloutStore(store.folder)):
        assert asked.load("chunk-000001") is None
        assert asked.sound_chunks() == 1


def test_a_chunk_that_is_saved_again_is_the_last_that_was(store: RolloutStore):
    store.save("chunk-000001", latents(7))
    again = RolloutStore(store.folder).load("chunk-000001")
    assert again is not None
    assert again.unique().tolist() == [7]


def test_a_line_that_a_kill_has_cut_loses_its_chunk_at_most(store: RolloutStore):
    digests = store.folder / "chunks.jsonl"
    digests.write_bytes(digests.read_bytes()[:-20])
    assert RolloutStore(store.folder).sound_chunks() == 2
    store.save("chunk-000002", latents(2))
    assert RolloutStore(store.folder).sound_chunks() == 3


def test_chunks_of_an_earlier_version_are_taken_as_they_are_and_held_to_that(store: RolloutStore):
    digests = store.folder / "chunks.jsonl"
    told = sorted(filter(None, digests.read_text().splitlines()))
    digests.unlink()
    earlier = RolloutStore(store.folder)
    assert earlier.sound_chunks() == 3
    assert earlier.vouch(3)
    assert sorted(filter(None, digests.read_text().splitlines())) == told
    assert not earlier.vouch(3)
    assert json.loads(told[0])["name"] == "chunk-000000"


def test_nothing_is_written_where_the_folder_is_gone_or_the_list_is_no_file(
    store: RolloutStore, tmp_path: Path
):
    digests, others = store.folder / "chunks.jsonl", tmp_path / "others.txt"
    others.write_text("theirs")
    digests.unlink()
    digests.symlink_to(others)
    with pytest.raises(OutputError):
        store.save("chunk-000003", latents(3))
    assert others.read_text() == "theirs"
    shutil.rmtree(store.folder)
    with pytest.raises(OutputError):
        store.save("chunk-000003", latents(3))
    assert not store.folder.exists()
