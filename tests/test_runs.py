"""Whole runs of the command on the real model: what they write.

And that one that is killed and resumed ends where an unbroken one does.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

KEYS = (
    "model saes text tokens seed recipe ce kl gap gap_closed kl_closed ci95 l0 fvu train_seconds "
    "tokens_per_second device peak_memory_bytes versions"
).split()
SMALL = ["--tokens", "3072", "--valid-tokens", "1024", "--rank", "8"]


def command(*arguments):
    return [sys.executable, "-c", "from sae_lora.cli import main; main()", *map(str, arguments)]


def run(*arguments) -> dict:
    done = subprocess.run(command(*arguments, "--json"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    "A small run: its folder and report."
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    return out, run("adapt", "--out", out, *SMALL)


def test_report_and_files(unbroken):
    out, report = unbroken
    assert all(k in report for k in KEYS) and report == json.loads(
        (out / "report.json").read_text()
    )
    assert set(report["ce"]) == {"base", "spliced", "adapted", "adapted_unspliced"} and set(
        report["kl"]
    ) == {"spliced", "adapted", "adapted_unspliced"}
    assert (
        report["ce"]["base"] < report["ce"]["adapted"] < report["ce"]["spliced"]
        and report["gap_closed"] > 0.05
    )
    assert {p.name for p in out.iterdir()} == {"adapter", "curve.png", "report.json"}
    assert {"adapter_config.json", "adapter_model.safetensors", "sae_lora.json", "README.md"} <= {
        p.name for p in (out / "adapter").iterdir()
    }


@pytest.mark.parametrize("options", [[], ["--shard"]])
def test_two_processes_share_the_command(unbroken, tmp_path, options):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--no_python",
        *command("adapt", "--out", tmp_path / "run", *SMALL, *options),
    ]
    done = subprocess.run(
        launch, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    for model, value in unbroken[1]["ce"].items():
        assert abs(report["ce"][model] - value) < 0.005


def test_evaluate_measures_the_same(unbroken):
    out, report = unbroken
    again = run("evaluate", out, "--valid-tokens", 1024)
    assert all(k in again for k in KEYS)
    for model, value in report["ce"].items():
        assert abs(again["ce"][model] - value) < 1e-4


def test_evaluate_on_other_text(unbroken, ag_news):
    out, _ = unbroken
    other = run("evaluate", out, "--text", ag_news, "--valid-tokens", 1024)
    assert other["text"] == str(ag_news) and other["ce"]["adapted"] < other["ce"]["spliced"]


def killed(out, seconds: float, *arguments, told=subprocess.DEVNULL):
    "Start a command, and kill it so long after its first checkpoint of this start."
    state = out / "state.safetensors"
    before = state.stat().st_mtime_ns if state.exists() else 0
    process = subprocess.Popen(command(*arguments), stdout=subprocess.DEVNULL, stderr=told)
    while process.poll() is None and not (state.exists() and state.stat().st_mtime_ns > before):
        time.sleep(0.05)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "report.json").exists(), "the run was over before it was killed"


def test_killed_twice_and_resumed_is_unbroken_bit_for_bit(unbroken, tmp_path):
    out = tmp_path / "broken"
    asked = ["adapt", "--out", out, *SMALL]
    killed(out, 0.2, *asked)
    killed(out, 1.0, *asked, "--resume")
    changed = subprocess.run(
        command(*asked, "--resume", "--lr", "0.01"), capture_output=True, text=True
    )
    assert changed.returncode == 2 and "lr=" in changed.stderr
    run(*asked, "--resume")
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (unbroken[0] / name).read_bytes()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "A demo by time, killed and resumed: its folder, what it promised, what it said at the end."
    folder = tmp_path_factory.mktemp("demo")
    out, promised = folder / "demo", folder / "promised"
    with promised.open("w") as told:
        killed(out, 0.0, "demo", "--out", out, "--minutes", 0.05, told=told)
    done = subprocess.run(
        command("demo", "--out", out, "--minutes", 60, "--resume"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out, promised.read_text(), done.stdout


def test_a_demo_by_time_is_resumed_with_the_tokens_it_chose(demo):
    report = json.loads((demo[0] / "report.json").read_text())  # 60 minutes would be more tokens
    assert report["tokens"] == report["check"]["train_tokens"] == 8192
    assert report["valid_tokens"] == 32 * 255
    assert 0 < report["kl_closed"] < 1 and report["changes"] == {"fuse": False}


def test_a_demo_speaks_to_people(demo):
    _, promised, said = demo
    assert "training on about 8,000 tokens, which this machine does in" in promised
    assert "held-out" in promised
    assert "adapted, unspliced" in said and "spliced → adapted" in said
    last = " ".join(said.split("Splicing")[-1].split())
    assert "wins back" in last and "% in KL (" in last
    assert "of that in cross-entropy (95% interval" in last


def test_the_check_of_a_run_is_in_its_report(unbroken):
    found = unbroken[1]["check"]
    assert found["train_tokens"] == 3072 and found["warnings"] == [] and found["tokens"] == 4 * 255
    assert found["saes"][0]["promised_l0"] == 32 and abs(found["saes"][0]["l0"] - 32) < 1
    assert set(found["beginnings"]) == {"<|endoftext|>", "<|im_start|>"}


def test_check_foretells_what_adapt_takes(unbroken):
    found = run("check", *SMALL)
    assert found["perplexity"] < 30 and 0 < found["gap"] < 0.3 and found["warnings"] == []
    assert abs(found["memory_bytes"] / unbroken[1]["peak_memory_bytes"] - 1) < 0.2
    done = subprocess.run(command("check", *SMALL), capture_output=True, text=True)
    assert (
        done.returncode == 0
        and "SAE at 14" in done.stdout
        and "held-out tokens" in done.stdout
        and "GB of memory" in done.stdout
    )


def test_train_sae(tmp_path):
    from sae_lens import SAE

    report = run(
        "train-sae",
        "--out",
        tmp_path / "sae",
        "--tokens",
        16384,
        "--text-tokens",
        16384,
        "--valid-tokens",
        2048,
        "--width",
        256,
        "--k",
        8,
        "--layer",
        3,
    )
    assert (
        report["tokens"] == 16384
        and report["l0"] <= 8
        and 0 < report["fvu"] < 1
        and "TopK SAE, layer 3" in (tmp_path / "sae" / "README.md").read_text()
    )
    assert SAE.load_from_disk(tmp_path / "sae").cfg.metadata.hook_name == "blocks.3.hook_resid_post"
