"""Rows that workers compute: all of them, once, whoever dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
from conftest import forkserver
from device_entries import model_folder, text_file

from sae_lora import corpora
from sae_lora.cluster import connected, engine, local_workers
from sae_lora.experiments import adapted_rows, sae_steps
from sae_lora.files import UsageError
from sae_lora.grid import rows_of
from sae_lora.results import Results, rows_path
from sae_lora.status import states

pytest.importorskip("distributed")
CLIENT = Path(__file__).parent / "grid_client.py"
PATIENCE = 120.0  # seconds that anything may take on a busy machine


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    "A cache and a folder for rows of one's own."
    monkeypatch.setenv("SAE_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SAE_LORA_RESULTS", str(tmp_path / "rows"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def read_docs(path: Path):
    "Write down how many docstrings of a package there are."
    with patch.object(corpora, "DOCS", ["peft"]):
        path.write_text(str(len(corpora._read_docs())))


def test_a_worker_reads_text_without_children(tmp_path):
    "Workers are daemonic processes, which may start no others."
    worker = forkserver([]).Process(target=read_docs, args=(tmp_path / "n",), daemon=True)
    worker.start()
    worker.join()
    assert worker.exitcode == 0 and int((tmp_path / "n").read_text()) > 10


def test_what_a_notebook_defines_is_read_by_one_process(monkeypatch):
    "Processes that are not forked could not find it."
    monkeypatch.setattr(corpora._package_docs, "__module__", "__main__")
    may = {}
    for way in ("fork", "spawn"):
        monkeypatch.setattr(corpora, "get_start_method", lambda way=way: way)
        may[way] = corpora._may_share()
    assert may == dict(fork=True, spawn=False)


def client(workers: int, n: int, seconds: float) -> subprocess.Popen:
    "A process that asks for `n` rows."
    command = [sys.executable, CLIENT, *map(str, (workers, n, seconds))]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def until(found, what: str):
    "What `found()` gives, once it gives anything."
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if result := found():
            return result
        time.sleep(0.05)
    raise AssertionError(f"{what}: not in {PATIENCE} s")


def rows() -> dict:
    return Results(rows_path("tiny")).rows()


def workers_of(process: subprocess.Popen) -> list[psutil.Process]:
    "The processes that a client's workers are, of which each has a scheduler to talk to."
    note = Path(os.environ["SAE_LORA_CACHE"]) / "running" / "tiny.json"
    address = json.loads(note.read_text())["cluster"]
    with connected(address) as seen:
        return [psutil.Process(number) for number in seen.run(os.getpid).values()]


def leftovers(folder: Path) -> list[Path]:
    "Files that should be gone once all is done."
    return [p for p in folder.rglob("*") if p.name.endswith((".part", ".lock"))]


def test_all_rows_are_there_once_whoever_dies(places):
    n = 12
    first = client(3, n, 0.7)
    until(lambda: len(rows()) >= 2, "two rows")
    killed, stopped, third = workers_of(first)
    killed.kill()
    stopped.suspend()
    until(lambda: len(rows()) >= 5, "five rows by the one that is left and the new one")
    stopped.resume()
    family = [third, stopped, *psutil.Process(first.pid).children(recursive=True)]
    first.kill()
    first.wait()
    until(lambda: not any(p.is_running() for p in family), "its workers end with it")
    assert len(rows()) < n
    before = rows()
    second = client(3, n, 0.05)
    said, told = second.communicate(timeout=PATIENCE)
    assert second.returncode == 0, told
    assert f"{n - len(before)} of {n} rows to compute" in told
    third = client(0, n, 0.0)
    again, told = third.communicate(timeout=PATIENCE)
    assert again == said and "to compute" not in told
    values = [(i // 3) ** 2 + i % 3 for i in range(n)]
    assert said.split()[1:] == [str(v) for v in values]
    assert len(rows()) == n and not leftovers(places / "rows")
    assert {k: row for k, row in rows().items() if k in before} == before


def test_what_several_rows_need_is_made_once(places):
    done = client(2, 6, 0.0)
    _, told = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0, told
    made = [p.name.partition("-")[0] for p in (places / "cache" / "shared").iterdir()]
    assert sorted(made) == ["0", "1"]


def test_two_clients_lose_no_row_of_one_file(places):
    clients = [client(0, 12, 0.0), client(0, 9, 0.01)]
    for each in clients:
        _, told = each.communicate(timeout=PATIENCE)
        assert each.returncode == 0, told
    assert len(rows()) == 12 and not leftovers(places)


def test_workers_compute_what_one_process_computes(places, monkeypatch):
    world = dict(model=str(model_folder()), text=str(text_file()), length=16)
    world |= dict(text_tokens=24 * 16, valid_tokens=256)
    spec = dict(layer=1, width=64, k=8, tokens=2048)
    run = world | dict(layers="after", tokens=128, recipe="fast", seed=0, sae=spec)
    asked = [run | dict(seed=s, rank=r) for s in (0, 1) for r in (1, 2)]

    def told(name: str) -> list[dict]:
        table = rows_of(name, asked, adapted_rows, sae_steps)
        return table.drop(columns=["train_seconds", "sae_seconds"]).to_dict("records")

    with local_workers(2) as address, monkeypatch.context() as patched:
        patched.setenv("SAE_LORA_CLUSTER", address)
        theirs = told("theirs")
    monkeypatch.setenv("SAE_LORA_CACHE", str(places / "another"))
    assert told("ours") == theirs
    made_with = [row["provenance"] for row in Results(rows_path("theirs")).rows().values()]
    assert all(p["host"] and p["device"] for p in made_with)


@pytest.mark.parametrize("workers", [None, 2])
def test_a_mistake_is_one_line_and_the_rest_is_kept(places, monkeypatch, workers):
    def odd_fails(group):
        for p in group:
            if p["rank"] == 3:
                raise UsageError("rank=3 diverged; lower the learning rate")
            yield dict(value=p["rank"])

    asked = [dict(k=k, rank=r) for k in (1, 2) for r in (2, 3, 4)]
    with engine(workers) as address:
        monkeypatch.setenv("SAE_LORA_CLUSTER", address)
        with pytest.raises(UsageError, match=r"rank=3 diverged; lower .* \(and 1 more\)"):
            rows_of("some", asked, odd_fails)
    kept = [row["metrics"]["value"] for row in Results(rows_path("some")).rows().values()]
    assert sorted(kept) == [2, 2, 4, 4]  # the ranks that could be computed


def test_what_is_wrong_with_the_first_is_not_tried_with_all(places):
    tried = []

    def fails(group):
        tried.append(group)
        raise UsageError("no such text; give another")
        yield

    with pytest.raises(UsageError, match="no such text"):
        rows_of("never", [dict(k=k, rank=1) for k in range(5)], fails)
    assert len(tried) == 1


def test_a_scheduler_that_is_not_there(places):
    with pytest.raises(UsageError, match="no scheduler answers at tcp://127.0.0.1:1"):
        with engine(address="tcp://127.0.0.1:1"):
            pass


def test_status_tells_how_far_it_is(places):
    running = client(0, 6, 0.5)
    until(lambda: len(rows()) >= 2, "two rows")
    (state,) = states()
    assert (state.experiment, state.asked, state.computed) == ("tiny", 6, True)
    assert 2 <= state.done < 6 and state.minutes_left is not None
    running.send_signal(signal.SIGKILL)
    running.wait()
    (state,) = states()
    assert not state.computed and state.minutes_left is None
