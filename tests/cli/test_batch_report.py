"""`wancli batch report`: one page with all jobs of a ledger."""

import json
import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.cli.test_preview import gray_video
from tests.conftest import Wancli
from tests.records.test_ledger import claim
from wancli.errors import RunError
from wancli.records.ledger import create_ledger
from wancli.records.ledger_file import LedgerJob, LedgerSettings
from wancli.records.ledger_worker import LedgerWorker

PROMPT = 'a "cat" </script><b>&'


@pytest.fixture
def folder(wancli: Wancli, tmp_path: Path) -> Path:
    """A folder with the ledger of four jobs: done, deleted since, failed, and waiting."""
    place = tmp_path / "v #1"
    place.mkdir()
    jobs = [LedgerJob(n, 0, PROMPT, n, str(place / f"{n} %.mp4")) for n in range(1, 5)]
    settings = [LedgerSettings(0, "generate", {"model": "demo", "steps": 1})]
    with create_ledger(place / "b.ledger", "d", settings, jobs, version="1") as ledger:
        worker = LedgerWorker(ledger)
        for _ in range(2):
            job = claim(worker)
            gray_video(job.output, [50, 100, 150])
            worker.done(job, {"note": PROMPT, "steps_ms": [1.0] * 100})
        job.output.unlink()
        worker.failed(claim(worker), RunError("no memory.", hint="a smaller `size`"))
        worker.close()
    return place


def cards(page: str) -> list[str]:
    return page.split('<div class="card ')[1:]


def test_a_page_has_a_picture_of_each_video_and_the_reason_of_each_failure(
    wancli: Wancli, folder: Path
):
    result = wancli("batch", "report", folder, "-o", "page.html")
    assert (result.code, result.out) == (0, "page.html\n"), result.err
    page = Path("page.html").read_text()
    states = [card.partition('"')[0] for card in cards(page)]
    assert states == ["done", "missing", "failed", "pending"]
    made, gone, failed, _ = cards(page)
    assert "data:image/webp;base64," in made
    source = re.search(r'data-source="([^"]*)"', made)
    assert source
    assert Path(unquote(source[1])).resolve() == (folder / "1 %.mp4").resolve()
    assert "retry" in gone
    assert "no memory." in failed
    assert "a smaller --size" in failed


def test_records_on_the_page_cannot_end_its_script(wancli: Wancli, folder: Path):
    wancli("batch", "report", folder)
    page = (folder / "b.html").read_text()
    assert page.count("<b>") == 0
    data = page.partition('id="jobs">')[2].partition("</script>")[0]
    assert json.loads(data)[0]["record"] == {"note": PROMPT, "steps_ms": "100 values"}


def test_small_videos_can_be_embedded(wancli: Wancli, folder: Path):
    wancli("batch", "report", folder, "--embed")
    assert "data:video/mp4;base64," in cards((folder / "b.html").read_text())[0]


def test_only_an_earlier_report_is_replaced(wancli: Wancli, folder: Path):
    assert wancli("batch", "report", folder).code == 0
    assert wancli("batch", "report", folder).code == 0
    (folder / "b.html").write_text("mine")
    assert wancli("batch", "report", folder).code == 2
    assert (folder / "b.html").read_text() == "mine"


def test_more_jobs_than_a_browser_shows_are_refused(
    wancli: Wancli, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("wancli.video.batch_report.MOST_JOBS", 3)
    result = wancli("batch", "report", folder)
    assert result.code == 2
    assert "a page of 4 jobs is too large" in result.err
