"""Rows that are kept or measured anew; side by side as one by one, in time, not on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hybrid_sleep
from hybrid_sleep.support import provenance, resume
from hybrid_sleep.support.resume import Budget, collect, finished_rows

ROOT = Path(hybrid_sleep.__file__).resolve().parent.parent


def square(names):
    return {"square": names["n"] ** 2, "process": os.getpid()}


def failing(names):
    raise ValueError(f"n={names['n']}")


def header():
    return {"benchmark": "squares", "provenance": {"commit": "c"}, "rows": []}


def test_rows_are_kept_only_where_nothing_has_changed_that_counts(tmp_path):
    now = provenance.provenance("cpu")
    rows = [{"op": "ssd"}]

    def kept(**changes):
        before = {"benchmark": "b", "rows": rows, "provenance": {**now, **changes}}
        (tmp_path / "results.json").write_text(json.dumps(before))
        return finished_rows(tmp_path, "b", now)

    assert kept() == rows
    assert kept(date="yesterday", commit="another") == rows
    for name in now.keys() - {"date", "commit"}:
        with pytest.warns(UserWarning, match=rf"its 1 rows were .* another {name}; all rows are"):
            assert kept(**{name: "another"}) == []
    # As versions before this wrote it, and one to come may.
    with pytest.warns(UserWarning, match=r"another seen; all rows are measured anew"):
        assert kept(seen=1) == []


def test_rows_of_another_machine_are_kept_where_answers_count_and_say_whose_they_are(tmp_path):
    """A file goes from one machine to a second one, and back."""
    first = {"device": "cpu A", "threads": 1, "source": "s"}
    second = {**first, "device": "cpu B", "threads": 4}
    measured = []

    def on(now, *wanted, anywhere=True):
        result = {"benchmark": "b", "provenance": now, "rows": []}
        done = collect(
            result, [{"n": n} for n in wanted], lambda key: measured.append(key["n"]) or {},
            out=tmp_path, anywhere=anywhere,
        )  # fmt: skip
        return {row["n"]: row.get("machine") for row in done["rows"]}

    assert on(first, 1) == {1: None}
    assert on(second, 1, 2) == {1: "cpu A, 1 threads", 2: None}
    assert on(first, 1, 2, 3) == {1: None, 2: "cpu B, 4 threads", 3: None}
    assert measured == [1, 2, 3]
    with pytest.warns(UserWarning, match="measured with another source"):
        assert on({**second, "source": "t"}, 1) == {1: None}
    with pytest.warns(UserWarning, match="measured with another device, threads"):
        on({**first, "source": "t"}, 1, anywhere=False)
    assert measured == [1, 2, 3, 1, 1]


def test_what_is_no_file_of_this_benchmark_keeps_nothing(tmp_path):
    assert finished_rows(None, "b", {}) == []
    assert finished_rows(tmp_path, "b", {}) == []
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"benchmark": "a", "rows": [{}], "provenance": {}}))
    assert finished_rows(tmp_path, "b", {}) == []
    for text in ("{", "[]", '{"benchmark": "b"}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="results.json is damaged: "):
            finished_rows(tmp_path, "b", {})


def test_a_budget_ends_before_the_next_row_would_not_fit(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(resume.time, "monotonic", lambda: clock[0])
    budget, endless = Budget(1), Budget(None)
    clock[0] = 25
    assert not budget.over()
    clock[0] = 36
    assert budget.over() and not endless.over()


def test_rows_side_by_side_are_those_of_one_after_the_other(tmp_path):
    wanted = [{"n": n} for n in range(5)]
    steps, results = [], []
    for jobs in (1, 2):
        result = collect(
            header(), wanted, square, jobs=jobs, out=tmp_path / str(jobs),
            finish=lambda result: result.update(total=sum(row["square"] for row in result["rows"])),
            progress=lambda done, total: steps.append((done, total)),
        )  # fmt: skip
        assert result["complete"] and result["total"] == 0 + 1 + 4 + 9 + 16
        assert [row["n"] for row in result["rows"]] == [0, 1, 2, 3, 4]
        file = json.loads((tmp_path / str(jobs) / "results.json").read_text())
        assert file["rows"] == result["rows"]
        results.append({row["process"] for row in result["rows"]})
    assert results[0] == {os.getpid()} and os.getpid() not in results[1]
    assert steps == [(done, 5) for done in range(1, 6)] * 2
    # What is there is not measured again.
    again = collect(header(), wanted, failing, jobs=2, out=tmp_path / "2", finish=lambda _: None)
    assert {row["process"] for row in again["rows"]} == results[1]


def test_an_error_in_a_process_is_the_error_of_the_call(tmp_path):
    with pytest.raises(ValueError, match="n=7"):
        collect(header(), [{"n": 7}], failing, jobs=2, finish=lambda _: None)


def test_without_time_nothing_is_begun(tmp_path):
    result = collect(header(), [{"n": 1}], failing, jobs=2, minutes=1e-9, finish=lambda _: None)
    assert (result["ended"], result["rows"]) == ("time is up", [])


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path):
    (tmp_path / "work.py").write_text(
        "import os, pathlib, time\n"
        "from hybrid_sleep.support.resume import collect\n"
        "def wait(names):\n"
        "    pathlib.Path(names['file']).write_text(str(os.getpid()))\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    files = [{'file': f'{n}.pid'} for n in range(2)]\n"
        "    collect({'benchmark': 'b', 'provenance': {}, 'rows': []}, files, wait, jobs=2,\n"
        "            finish=lambda _: None)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    parent = subprocess.Popen([sys.executable, "work.py"], cwd=tmp_path, env=environment)
    files = [tmp_path / f"{n}.pid" for n in range(2)]
    deadline = time.monotonic() + 120
    while not all(file.exists() and file.read_text() for file in files):
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    numbers = [int(file.read_text()) for file in files]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(_runs(number) for number in numbers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _runs(number: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        status = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"
