"""A verdict is never stronger than its rows: each rule, with made-up rows, in all four outcomes."""

import json
import re

import numpy as np
import pytest

from sae_lora import claims, metrics, verdicts
from sae_lora.claims import claims_page
from sae_lora.metrics import Estimate
from sae_lora.results import key
from sae_lora.verdicts import VERDICTS, joint_verdict

AGREES, PARTLY, NO, NOT_TESTED = VERDICTS


def seeds(value: float, half: float = 0.01, n: int = 3) -> Estimate:
    return Estimate(value, value - half, value + half, n)


def one(value: float, half: float = 0.01) -> Estimate:
    return seeds(value, half, 1)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (seeds(0.5), AGREES),
        (one(0.5), PARTLY),  # one seed
        (seeds(0.5, half=0.3), PARTLY),  # the interval reaches below
        (Estimate(0.5), PARTLY),  # no interval
        (one(0.1), NO),
        (one(0.29, half=0.05), NOT_TESTED),  # too wide to tell
        (Estimate(0.1), NOT_TESTED),
        (None, NOT_TESTED),
    ],
)
def test_at_least_so_much(found, verdict):
    assert verdicts.more_than(found, 0.3) == verdict


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([seeds(0.5), seeds(0.3)], AGREES),
        ([seeds(0.5), one(0.3)], PARTLY),
        ([seeds(0.5, 0.2), seeds(0.3, 0.2)], PARTLY),
        ([one(0.3), one(0.5)], NO),
        ([one(0.3)], NOT_TESTED),
        ([Estimate(0.3), Estimate(0.5)], NOT_TESTED),
    ],
)
def test_falls(found, verdict):
    assert verdicts.falls(found) == verdict


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([seeds(0.30), seeds(0.31)], AGREES),
        ([one(0.30), one(0.31)], PARTLY),
        ([one(0.3), one(0.5)], NO),
        ([one(0.3)], NOT_TESTED),
        ([one(0.3, 0.2), one(0.5, 0.2)], NOT_TESTED),
    ],
)
def test_hardly_depends(found, verdict):
    assert verdicts.hardly_depends(found, 0.05) == verdict


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        ([seeds(0.1), seeds(0.2)], AGREES),
        ([one(0.1), one(0.2), one(-0.2)], PARTLY),
        ([one(0.1), one(-0.2)], NO),
        ([Estimate(0.1), Estimate(-0.1)], NOT_TESTED),
        ([], NOT_TESTED),
    ],
)
def test_improves(found, verdict):
    assert verdicts.mostly_better(found) == verdict


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (seeds(0.0, 0.005), AGREES),
        (one(0.0, 0.005), PARTLY),
        (one(-0.02), NO),
        (one(0.0, 0.05), NOT_TESTED),
        (Estimate(0.0), NOT_TESTED),
    ],
)
def test_nothing_is_lost(found, verdict):
    assert verdicts.kept(found) == verdict


@pytest.mark.parametrize(
    ("parts", "verdict"),
    [
        ([AGREES, AGREES], AGREES),
        ([AGREES, NO], PARTLY),
        ([PARTLY, NOT_TESTED], PARTLY),
        ([NO, NOT_TESTED], NO),
        ([NOT_TESTED], NOT_TESTED),
        ([], NOT_TESTED),
    ],
)
def test_a_claim_of_parts(parts, verdict):
    assert joint_verdict(parts) == verdict


def test_an_interval_over_seeds_is_students():
    found = metrics.over_seeds([1.0, 2.0, 3.0])
    assert found.value == 2 and found.high - found.value == pytest.approx(4.3027 / 3**0.5, 1e-4)
    assert metrics.over_seeds([1.0]) == Estimate(1.0)


def write(folder, experiment: str, rows: list[tuple[dict, dict]]):
    "Rows as they are kept, in a made-up project."
    (folder / "nbs" / "experiments").mkdir(parents=True, exist_ok=True)
    (folder / "data" / "results").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(dict(key=key(p), parameters=p, metrics=m)) + "\n" for p, m in rows]
    (folder / "data" / "results" / f"{experiment}.jsonl").write_text("".join(lines))


def adapted(closed: float, kl: float, **metrics) -> dict:
    ends = dict(gap_closed=[closed - 0.01, closed + 0.01])
    share = dict(kl=dict(spliced=1.0, adapted=1 - kl), gap=1.0)
    return dict(gap_closed=closed, ci95=ends) | share | metrics


def test_rows_of_two_models_are_needed_for_every_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = dict(model="a", rank=64, tokens=512)
    rows = [(run | dict(seed=s), adapted(0.45 + s / 100, 0.2)) for s in range(3)]
    write(tmp_path, "05_model_size", rows)
    assert list(claims.size_found().parts.values()) == [NOT_TESTED]
    more = [(p | dict(model="b"), m) for p, m in rows]
    write(tmp_path, "05_model_size", rows + more)
    assert list(claims.size_found().parts.values()) == [AGREES]
    fewer = [(p | dict(model="b", tokens=256), m) for p, m in rows]
    write(tmp_path, "05_model_size", rows + fewer)  # budgets differ, and so may the shares
    assert list(claims.size_found().parts.values()) == [NOT_TESTED]
    low = [(p | dict(model="c"), adapted(0.1 + p["seed"] / 100, 0.2)) for p, _ in rows]
    write(tmp_path, "05_model_size", rows + low)  # the mean of all would lie within the bound
    assert list(claims.size_found().parts.values()) == [PARTLY]


def test_a_measure_that_does_not_follow_makes_it_partly(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    common = dict(rank=64, layers="after", seed=0)
    shares = {8: (0.5, 0.1), 16: (0.4, 0.3)}
    rows = [(common | dict(k=k), adapted(*s, l0=k)) for k, s in shares.items()]
    write(tmp_path, "02_sparsity", rows)
    found = claims.scaling_found("02_sparsity", 64, "l0").parts
    assert found["CE share falls"] == PARTLY and found["KL share falls"] == NOT_TESTED


def test_a_sweep_is_over_seeds_of_the_sae_where_both_ends_have_several(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = []
    for k, share in ((8, 0.5), (16, 0.4), (32, 0.3)):
        for seed in range(1 if k == 16 else 3):
            sae = dict(k=k) | (dict(seed=seed) if seed else {})
            p = dict(rank=64, layers="after", seed=seed, sae=sae)
            rows.append((p, adapted(share + seed / 100, share / 2 + seed / 100, l0=k)))
    write(tmp_path, "02_sparsity", rows)
    assert [len(r) for r in claims.sweep("02_sparsity", 64, "l0")] == [3, 1, 3]
    found = claims.scaling_found("02_sparsity", 64, "l0")
    assert set(found.parts.values()) == {AGREES} and "3 SAE seeds" in found.over
    write(tmp_path, "02_sparsity", rows[:-2])  # one end has one seed again
    found = claims.scaling_found("02_sparsity", 64, "l0")
    assert AGREES not in found.parts.values() and found.over == claims.ONE_SEED
    one_sae = [(dict(p, sae=dict(k=p["sae"]["k"])), m) for p, m in rows]
    write(tmp_path, "02_sparsity", one_sae)
    assert "3 adapter seeds, one SAE" in claims.scaling_found("02_sparsity", 64, "l0").over


def test_adapters_of_one_sae_count_as_one_where_there_are_several_saes():
    rows = []
    for sae, share in ((0, 0.30), (1, 0.40)):
        for seed in range(3):
            p = dict(sae=dict(seed=sae), seed=seed)
            rows.append(dict(parameters=p, metrics=adapted(share + seed / 1000, 0.1)))
    found = verdicts.over_rows(rows, verdicts.ce_closed)
    assert found.seeds == 2 and found == metrics.over_seeds([0.301, 0.401])
    alone = verdicts.over_rows(rows[:3], verdicts.ce_closed)
    assert alone.seeds == 3 and alone.high - alone.low < 0.01


def test_what_a_law_foretells_holds_as_often_as_it_says():
    tokens, held = np.array([1e4, 2e4, 4e4, 8e4, 16e4, 16e4]), 0
    random = np.random.default_rng(0)
    for _ in range(400):
        noise = random.normal(0, 0.01, len(tokens) + 1)
        left = np.append(tokens, 1e6) ** -0.05 * np.exp(noise)
        found = verdicts.foretold(tokens, 1 - left[:-1], 1e6)
        held += found.low <= 1 - left[-1] <= found.high
    assert 0.92 <= held / 400 <= 0.98
    ends = [verdicts.foretold(tokens, 1 - left[:-1], at) for at in (1e5, 1e6)]
    assert ends[0].high - ends[0].low < ends[1].high - ends[1].low
    assert abs(verdicts.exponent(tokens, 1 - left[:-1]).value - 0.05) < 0.02
    with pytest.raises(ValueError, match="three or more"):
        verdicts.exponent(tokens[:2], [0.1, 0.2])


def test_every_claim_is_in_the_table():
    page = claims_page()
    for number, claim in claims.paper_claims().items():
        assert f"| {number} [" in page and claim.source
    agreeing = [line for line in page.splitlines() if "**agrees**" in line]
    assert all("3 SAE seeds" in line for line in agreeing)  # no claim is held up by one SAE


SOURCES = ("abstract", "Fig. ", "scaling figure", "published code", "could not be read")


def test_what_is_said_of_the_paper_has_a_source(root):
    told = 0
    for path in (root / "nbs" / "experiments").glob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            text = "".join(cell["source"])
            for paragraph in text.split("\n\n"):
                if cell["cell_type"] == "markdown" and re.match(
                    "The paper|In the paper", paragraph
                ):
                    told += 1
                    assert any(source in paragraph for source in SOURCES), (path.name, paragraph)
    assert told > 4
    for number, claim in claims.paper_claims().items():
        assert any(s in claim.source for s in ("abstract", "digitised", "second-hand", "not read"))
