"""The journal of a run, without a server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vitdet.files import writer
from vitdet.tracking.journal import PENDING, Journal, find, journals


def filled(folder: Path, steps: int) -> Journal:
    journal = find(folder, None)
    for step in range(steps):
        journal.append({"points": {"loss": step / 2, "lr": 0.1}, "step": step})
    return journal


def test_a_run_is_found_by_its_pending_and_its_final_id(tmp_path: Path) -> None:
    journal, _ = filled(tmp_path, 1), filled(tmp_path, 1)
    assert find(tmp_path, journal.run_id).key == journal.key
    pending = journal.run_id
    journal.move("abc", 0)
    assert journal.run_id == "abc" and pending == PENDING + journal.key
    assert find(tmp_path, "abc").key == find(tmp_path, pending).key == journal.key
    assert find(tmp_path, "unknown").key != journal.key and len(journals(tmp_path)) == 2


def test_points_are_batched_and_other_records_are_not(tmp_path: Path) -> None:
    journal = filled(tmp_path, 5)
    journal.append({"tags": {"image": "a"}})
    journal.append({"points": {"loss": 1.0}, "step": 5})
    journal.append({"end": "FINISHED"})
    sizes = [len(records) for records, _ in journal.batches(4)]
    # 5 records of 2 points in batches of 4 points; the tags; the last point; the end
    assert sizes == [2, 2, 1, 1, 1, 1]
    offsets = [offset for _, offset in journal.batches(4)]
    journal.move("abc", offsets[3])
    assert [record for records, _ in journal.batches(4) for record in records][0]["step"] == 5
    journal.move("abc", offsets[-1])
    assert not journal.waiting()


def test_a_record_larger_than_a_batch_is_sent_alone(tmp_path: Path) -> None:
    journal = filled(tmp_path, 1)
    journal.append({"points": {f"class {i}": 0.0 for i in range(9)}, "step": 1})
    assert [len(records) for records, _ in journal.batches(4)] == [1, 1]


def test_a_partial_line_is_skipped_and_the_next_line_is_read(tmp_path: Path) -> None:
    journal = filled(tmp_path, 2)
    with open(journal.path, "ab") as file:
        file.write(b'{"points": {"loss": 7.0}, "st')
    assert journal.last_points() == {"loss": (1, 0.5), "lr": (1, 0.1)}
    again = find(tmp_path, journal.run_id)
    again.append({"points": {"loss": 3.0}, "step": 7})
    assert [record["step"] for record, _ in again.records()] == [0, 1, 7]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_a_full_disk_loses_one_line_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = filled(tmp_path, 1)
    journal.path = Path("/dev/full")
    journal.append({"points": {"loss": 1.0}, "step": 1})
    assert "cannot write" in caplog.text


def test_a_missing_file_causes_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = filled(tmp_path, 1)
    journal.append_file(tmp_path / "absent.png", "")
    assert "absent.png was not logged" in caplog.text and len(list(journal.records())) == 1


def test_only_one_process_sends_a_journal(tmp_path: Path) -> None:
    journal = filled(tmp_path, 1)
    with journal.locked(), pytest.raises(BlockingIOError), Journal(tmp_path, journal.key).locked():
        pass
    with journal.locked():
        pass


@pytest.mark.parametrize("recorded", ["line", "cursor"])
def test_a_pending_file_of_an_earlier_version_is_kept(tmp_path: Path, recorded: str) -> None:
    journal = filled(tmp_path, 1)
    copy = journal.path.with_suffix("") / "1" / "a.png"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"a")
    record = {"file": str(copy.relative_to(journal.path.parent)), "folder": "pictures"}
    if recorded == "line":
        journal.adopt(record)
    else:
        cursor = {"run_id": "a1", "offset": journal.path.stat().st_size, "uploads": [record]}
        journal.path.with_suffix(".json").write_text(json.dumps(cursor))
    (entry,) = journal.entries()
    assert (entry / "pictures" / "a.png").read_bytes() == b"a" and not copy.exists()


def test_copying_a_file_removes_the_files_of_a_killed_process(tmp_path: Path) -> None:
    journal = filled(tmp_path, 1)
    machine, pid, started = writer().split("-")
    ended, alive = (
        journal.files / f".1.{machine}-{pid}-{start}.abc.tmp"
        for start in (int(started) - 1, started)
    )
    for folder in (ended, alive):
        (folder / "pictures").mkdir(parents=True)
    (tmp_path / "a.png").write_bytes(b"a")
    journal.append_file(tmp_path / "a.png", "pictures")
    (entry,) = journal.entries()
    assert set(journal.files.iterdir()) == {alive, entry}
