"""A rollout store loads exactly what was saved, or nothing."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from wancli.errors import OutputError
from wancli.rollouts.store import RolloutStore


def latents(value: float) -> Tensor:
    return torch.full((1, 4, 2, 3, 3), value)


@pytest.fixture
def store(tmp_path: Path) -> RolloutStore:
    """Three chunks."""
    store = RolloutStore(tmp_path)
    for number in range(3):
        store.save(f"chunk-{number:06}", latents(number))
    return store


def test_chunks_load_as_they_were_saved(store: RolloutStore):
    for reader in (store, RolloutStore(store.folder)):
        for number in range(3):
            loaded = reader.load(f"chunk-{number:06}")
            assert loaded is not None
            assert torch.equal(loaded, latents(number))
        assert reader.sound_chunks() == 3


@pytest.mark.parametrize("damage", ["exchanged", "another dtype", "another value"])
def test_a_valid_file_other_than_the_saved_chunk_is_not_loaded(store: RolloutStore, damage: str):
    chunk = store.folder / "chunk-000001.safetensors"
    if damage == "exchanged":
        shutil.copy(store.folder / "chunk-000002.safetensors", chunk)
    elif damage == "another dtype":
        save_file({"latents": load_file(chunk)["latents"].half()}, chunk)
    else:
        save_file({"latents": torch.full((2, 4, 3, 3), 9.0)}, chunk)
    for reader in (store, RolloutStore(store.folder)):
        assert reader.load("chunk-000001") is None
        assert reader.sound_chunks() == 1


def test_saving_a_chunk_again_replaces_it(store: RolloutStore):
    store.save("chunk-000001", latents(7))
    saved = RolloutStore(store.folder).load("chunk-000001")
    assert saved is not None
    assert saved.unique().tolist() == [7]


def test_a_digest_cut_short_by_a_kill_loses_only_its_chunk(store: RolloutStore):
    digests = store.folder / "chunks.jsonl"
    digests.write_bytes(digests.read_bytes()[:-20])
    assert RolloutStore(store.folder).sound_chunks() == 2
    store.save("chunk-000002", latents(2))
    assert RolloutStore(store.folder).sound_chunks() == 3


def test_chunks_of_an_earlier_version_get_digests_once(store: RolloutStore):
    digests = store.folder / "chunks.jsonl"
    lines = sorted(filter(None, digests.read_text().splitlines()))
    digests.unlink()
    earlier = RolloutStore(store.folder)
    assert earlier.sound_chunks() == 3
    assert earlier.add_digests(3)
    assert sorted(filter(None, digests.read_text().splitlines())) == lines
    assert not earlier.add_digests(3)
    assert json.loads(lines[0])["name"] == "chunk-000000"


def test_nothing_is_written_without_a_folder_or_through_a_link(store: RolloutStore, tmp_path: Path):
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
