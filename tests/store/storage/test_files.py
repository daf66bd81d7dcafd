"""Files: seen by their owner alone, hidden when deleted, their bytes kept while a job needs them."""

from __future__ import annotations

import pytest

from store.errors import InvalidRequest, NotFound
from store.jobs import endings, jobs
from store.storage import files

OWNER = "team"


def test_a_file_is_its_owners(bench) -> None:
    file_id = bench.file()
    row = bench.do(files.get, owner_id=OWNER, file_id=file_id)
    assert (row.filename, row.bytes, row.purpose) == ("rows.jsonl", 12, "fine-tune")
    for call in (files.get, files.delete, files.for_job):
        with pytest.raises(NotFound):
            bench.do(call, owner_id="others", file_id=file_id)
        with pytest.raises(NotFound):
            bench.do(call, owner_id=OWNER, file_id="file-unknown")


def test_a_deleted_file_is_hidden_at_once(bench) -> None:
    visible, gone = bench.file(), bench.file()
    bench.do(files.delete, owner_id=OWNER, file_id=gone)
    for call in (files.get, files.delete):
        with pytest.raises(NotFound):
            bench.do(call, owner_id=OWNER, file_id=gone)
    assert [file.id for file in bench.do(files.list_page, owner_id=OWNER).items] == [visible]


def test_the_bytes_of_a_deleted_file_stay_while_a_job_needs_them(bench) -> None:
    file_id = bench.file()
    spec = bench.spec.model_copy(update={"test_file": file_id})
    claim = bench.claim(bench.do(jobs.create, owner_id=OWNER, spec=spec).id)
    bench.do(files.delete, owner_id=OWNER, file_id=file_id)
    assert bench.do(files.purgeable) == []
    assert bench.do(files.for_job, owner_id=OWNER, file_id=file_id).storage_key == f"files/{file_id}"
    bench.do(endings.finish_failed, claim, error={"code": "x", "message": "m", "param": None})
    assert [file.id for file in bench.do(files.purgeable)] == [file_id]


def test_pages_go_both_ways_and_past_deleted_files(bench) -> None:
    file_ids = [bench.file() for _ in range(4)]
    result = bench.file(purpose=files.RESULTS_PURPOSE)
    newest = bench.do(files.list_page, owner_id=OWNER, limit=2)
    assert [file.id for file in newest.items] == [result, file_ids[3]]
    assert newest.has_more
    bench.do(files.delete, owner_id=OWNER, file_id=file_ids[3])  # the place in the list is not lost with it
    rest = bench.do(files.list_page, owner_id=OWNER, after=file_ids[3])
    assert [file.id for file in rest.items] == [file_ids[2], file_ids[1], file_ids[0]]
    oldest = bench.do(files.list_page, owner_id=OWNER, order="asc", after=file_ids[0], purpose="fine-tune")
    assert [file.id for file in oldest.items] == [file_ids[1], file_ids[2]]
    with pytest.raises(InvalidRequest) as refused:
        bench.do(files.list_page, owner_id="others", after=file_ids[0])
    assert refused.value.param == "after"
