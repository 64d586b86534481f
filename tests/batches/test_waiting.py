"""A worker waits for the jobs of others, who may die."""

import pytest

from tests.batches.fakes import FakeWorker, fake_ledger
from wancli.batches import worker as worker_module
from wancli.records.ledger_worker import LedgerWorker


@pytest.mark.parametrize("gives_back", [True, False])
def test_a_worker_takes_the_last_job_of_another_who_does_not_make_it(
    tmp_path, monkeypatch, gives_back
):
    with fake_ledger(tmp_path, ["a"]) as ledger:
        other = LedgerWorker(ledger)
        claimed = other.claim()
        assert claimed

        def meanwhile(_seconds: float) -> None:
            if gives_back:
                other.close()
            else:
                claimed.output.touch()
                other.done(claimed, {})

        monkeypatch.setattr(worker_module, "sleep", meanwhile)
        made = [outcome.job.attempt for outcome in FakeWorker(ledger).run()]
        assert made == ([2] if gives_back else [])
        assert ledger.counts()["done"] == 1
