"""The two shares of a row, their relation, and pairs of rows that differ in one parameter."""

import pytest

from sae_lora import two_measures as two


def row(ce: float, kl: float, **parameters) -> dict:
    "A row with a gap of 0.5 in cross-entropy and of 1 in KL."
    losses = dict(base=2.0, spliced=2.5, adapted_unspliced=2.1, adapted=2.5 - 0.5 * ce)
    found = dict(gap=0.5, gap_closed=ce, ci95=dict(gap_closed=[ce, ce]), at=[1], ce=losses)
    found["kl"] = dict(spliced=1.0, adapted=1 - kl)
    return dict(parameters=dict(rank=4, layers="after") | parameters, metrics=found)


def test_the_ratio_is_that_of_losses_over_that_of_gains():
    found = two.two_shares(row(0.4, 0.1))
    assert found["lost"] == 2 and found["gained"] == pytest.approx(0.5)
    assert found["ratio"] == pytest.approx(found["lost"] / found["gained"]) == pytest.approx(4)
    assert found["out"] == pytest.approx(0.1)


def test_pairs_differ_in_one_parameter_alone():
    rows = [row(0.3, 0.1), row(0.4, 0.05, layers="all"), row(0.4, 0.2, layers="all", rank=8)]
    ((one, other),) = two.partners(rows, "layers", "all", "after")
    assert one is rows[1] and other is rows[0]
    (change,) = two.parted([(one, other)]).to_dict("records")
    assert change == pytest.approx(dict(ce=0.1, kl=-0.05))


def test_where_an_adapter_is():
    for p, place in [
        (dict(layers=[3]), "one block"),
        (dict(changes=dict(layers="all")), "all"),
        (dict(changes={}), "after"),
    ]:
        assert two.which_layers(p) == place


def test_the_figure_is_there_and_nothing_untested_is_told_as_tested(root):
    assert (root / two.FIGURE).read_bytes()[:4] == b"\x89PNG"
    for _, tested, said in two.explanations():
        assert (tested == "not tested") == (said in (two.UNMEASURED, two.ONE_MODEL))
