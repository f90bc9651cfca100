"""Damages and options drawn at random, and runs killed at any moment; a longer campaign of the same
is `python tests/hostile.py`."""

import signal
import time

import pytest
from hostile import WEIGHTS, Kill, Killed, compared, judged, told_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from mutants import DRAWN, KINDS, OF_BYTES, TRIED, WAYS, damaged, with_option

NUMBERS = st.integers(0, 2**40)
DAMAGES = st.sampled_from(list(KINDS)).flatmap(
    lambda name: st.tuples(
        st.just(name), st.sampled_from(WAYS.get(KINDS[name].form, OF_BYTES)), NUMBERS
    )
)
WRITTEN = st.one_of(
    st.sampled_from(DRAWN),
    st.integers(-(2**80), 2**80).map(str),
    st.floats().map(str),
    st.text(st.characters(exclude_characters="\0/.~", exclude_categories=["Cs"])),
)
VALUES = st.sampled_from(list(TRIED)).flatmap(
    lambda command: st.tuples(st.just(command), st.sampled_from(list(TRIED[command])), WRITTEN)
)
FEW = dict(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def tried_damage(world, name: str, way: str, number: int):
    "What is wrong with a command on a damaged file, and what it left."
    case = world.case()
    try:
        arguments, refused = damaged(world, case, name, way, number)
        cwd = case / "clone" if name == "parameters" else None
        ran = world.run(*arguments, cwd=cwd)
        outs = [case / "out", *([case / KINDS[name].source] if "state" in name else [])]
        return judged(ran, world, outs, refused), ran
    finally:
        world.tidy(case)


def tried_value(world, command: str, option: str, value: str):
    "What is wrong with a command that has an option of this value, and what it left."
    case = world.case()
    try:
        arguments, refused = with_option(world, case, command, option, value)
        ran = world.run(*arguments)
        return judged(ran, world, [case / "out"], refused), ran
    finally:
        world.tidy(case)


def tried(world, first: str, second: str, third):
    "One of both: what is wrong, and what was left."
    if first in KINDS:
        return tried_damage(world, first, second, int(third))
    return tried_value(world, first, second, third)


@settings(max_examples=45, **FEW)
@given(DAMAGES)
def test_damaged_files(tiny_world, damage):
    wrong, ran = tried_damage(tiny_world, *damage)
    assert not wrong, f"{damage}: {told_of(ran, wrong)}"


@settings(max_examples=30, **FEW)
@given(VALUES)
def test_values_of_options(tiny_world, value):
    wrong, ran = tried_value(tiny_world, *value)
    assert not wrong, f"{value}: {told_of(ran, wrong)}"


@pytest.fixture(scope="module")
def killed(tiny_world):
    "Commands that are stopped and go on."
    return Killed(tiny_world)


KILLS = [
    Kill("adapt", signal.SIGKILL, 0.1, False),
    Kill("adapt", signal.SIGINT, 0.2, True),
    Kill("adapt", signal.SIGTERM, 1.0, True),
    Kill("train-sae", signal.SIGKILL, 0.5, True),
    Kill("train-sae", signal.SIGTERM, 0.0, True),
    Kill("train-sae", signal.SIGINT, 0.1, False),
]


@pytest.mark.parametrize("kill", KILLS, ids=str)
def test_killed_and_gone_on_with(killed, kill):
    wrong, ran = killed.wrong(kill)
    assert not wrong, told_of(ran, wrong)


def test_two_runs_do_not_share_a_folder(tiny_world, killed):
    out = tiny_world.case() / "out"
    first = tiny_world.start(*killed.arguments("adapt", out))
    while not (out / "state.safetensors").exists():
        time.sleep(0.004)
    second = tiny_world.start(*killed.arguments("adapt", out), "--resume").wait()
    done = first.wait()
    assert second.code == 2 and "is being written by another run" in second.told, second.err
    assert done.code == 0, done.err
    assert not compared(out, killed.unbroken("adapt"), WEIGHTS["adapt"])
