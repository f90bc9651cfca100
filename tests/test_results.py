"""Rows are keyed by all their parameters, kept the moment they exist, and computed once."""

import json

import pytest

from sae_lora.cluster import Step
from sae_lora.files import UsageError
from sae_lora.grid import rows_of
from sae_lora.results import Results, key, project, rows_path


@pytest.fixture
def rows_folder(monkeypatch, tmp_path):
    "Where the rows of a test go."
    monkeypatch.setenv("SAE_LORA_RESULTS", str(tmp_path))
    monkeypatch.setenv("SAE_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_keys_are_what_they_were():
    "A key that changed would lose every committed row."
    parameters = dict(sae={"layer": 14, "k": 8}, lr=1e-3, tokens=65_536, text="dø", near=None)
    assert key(parameters) == "ee94bea96f4e"
    assert key({"b": 1, "a": [2.0]}) == key({"a": [2.0], "b": 1})


def test_committed_rows_are_whole(root):
    for path in (root / "data" / "results").glob("*.jsonl"):
        rows = Results(path).rows()
        assert rows and list(rows) == sorted(rows), path


def test_rows_come_in_the_order_that_is_asked_for(rows_folder):
    asked = []

    def squares(group):
        asked.append([p["rank"] for p in group])
        for p in group:
            yield dict(square=dict(of=p["rank"] ** 2))

    runs = [dict(k=k, rank=r) for r in (3, 1, 2) for k in (8, 16)]
    table = rows_of("squares", runs[2:4], squares)
    assert table["square.of"].tolist() == [1, 1]
    table = rows_of("squares", runs, squares)
    assert table["square.of"].tolist() == [9, 9, 1, 1, 4, 4] and table["k"].tolist() == [8, 16] * 3
    assert asked == [[1], [1], [3, 2], [3, 2]]  # what was there is not computed again


def test_a_row_is_kept_the_moment_it_exists(rows_folder):
    def broken(group):
        yield dict(square=1)
        raise RuntimeError("the machine was switched off")

    with pytest.raises(RuntimeError):
        rows_of("squares", [dict(rank=1), dict(rank=2)], broken)
    (row,) = Results(rows_path("squares")).rows().values()
    assert row["parameters"] == dict(rank=1)


def test_what_has_to_be_prepared_is_prepared_for_what_is_missing(rows_folder):
    prepared = []

    def compute(group):
        return (dict(square=0) for _ in group)

    def needs(runs):
        def step(p):
            return Step(f"for {p}", lambda: prepared.append(p))

        return [[step(p)] for p in runs]

    rows_of("squares", [dict(rank=1)], compute)
    for _ in range(2):
        rows_of("squares", [dict(rank=1), dict(rank=2)], compute, needs)
    assert prepared == [dict(rank=2)]


def test_drawing_computes_nothing(rows_folder, monkeypatch):
    rows_of("squares", [dict(rank=1)], lambda group: [dict(square=1)])
    monkeypatch.setenv("SAE_LORA_DRAW", "1")
    assert rows_of("others", [dict(rank=1)], None, also=("squares",)).square.tolist() == [1]
    with pytest.raises(UsageError, match="1 of 2 rows of squares are missing; `sae-lora run squ"):
        rows_of("squares", [dict(rank=1), dict(rank=2)], None)


def test_a_table_of_all_that_is_known(rows_folder):
    "Parameters and metrics, nested names joined by dots."
    Results(rows_path("r")).add(dict(sae=dict(k=8)), dict(ce=dict(base=1.0)))
    table = rows_of("r", [dict(sae=dict(k=8))], None)
    assert table.iloc[0].to_dict() == {"sae.k": 8, "ce.base": 1.0}


def test_the_same_results_the_same_file(rows_folder):
    results = Results(rows_path("r"))
    results.add(dict(x=2), dict(square=4))
    results.add(dict(x=3), dict(square=9))
    before = results.path.read_text()
    results.add(dict(x=2), dict(square=4))
    assert results.path.read_text() == before
    assert "provenance" in json.loads(before.splitlines()[0])


def test_no_clone_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sae_lora.results.data_path", lambda: tmp_path / "data")
    with pytest.raises(UsageError, match="clone it and run the command there"):
        project()
