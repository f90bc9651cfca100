"""The embedded world: the shipped SAE is what its card says, and a wheel brings it all along."""

import json
import re
import subprocess
import sys
import time
import zipfile

import pytest

from sae_lora.corpora import corpus, for_validation
from sae_lora.files import UsageError, data_path
from sae_lora.metrics import fidelity, sparsity
from sae_lora.text import Blocks, token_blocks


def test_shipped_sae_is_what_its_card_says(world):
    lm, tok, saes, _ = world
    said = json.loads((data_path("sae") / "report.json").read_text())
    rows = token_blocks("default", tok, 256, 256, 2**13).valid
    own, gap = sparsity(lm, saes[14], 14, rows), fidelity(lm, saes, rows)["gap"]
    assert (
        31 < own["l0"] <= 32
        and abs(own["fvu"] - said["fvu"]) < 0.02
        and 0 < gap <= 0.35
        and said["dead"] <= 0.05
    )


def test_shipped_sae_on_news(world, ag_news):
    lm, tok, saes, _ = world
    rows = token_blocks(str(ag_news), tok, 256, 0, 2**12, share=1.0).valid
    assert 0 < fidelity(lm, saes, rows)["gap"] <= 0.8


def test_card_says_how_it_was_made():
    card = (data_path("sae") / "README.md").read_text()
    for word in ("FVU", "L0", "dead latents", "nats per token", "positions of `default` text"):
        assert word in card
    assert int(re.search(r"([\d,]+) with repeats", card)[1].replace(",", "")) >= 2_000_000


def test_training_and_validation_share_no_document(world):
    tok = world[1]
    text = list(corpus("prose"))[:300]
    blocks: Blocks = token_blocks(text, tok, 64, 2**20, 2**20)
    train = " ".join(tok.decode(r) for r in blocks.train)
    held = [t for t in text if for_validation(t)]
    assert held and not any(t[60:160] in train for t in held)


def test_sentences_as_lm_eval_scores_them(world):
    rows = token_blocks(
        "prose",
        world[1],
        64,
        2**12,
        2**12,
        per_document=True,
        cut=1.0,
        between=(20, 20),
        sep="<|im_start|>",
        lead=" ",
    ).train
    begin = world[1].convert_tokens_to_ids("<|im_start|>")
    assert ((rows[:, 0] == begin) == (rows[:, 1] == 0)).all() and (rows[:, 0] != 0).all()
    assert all(
        t.startswith("Ġ")
        for t in world[1].convert_ids_to_tokens(rows[:, 0, 2:][rows[:, 1, 2:] == 1])
    )  # a row's own first word may be amid a sentence
    with pytest.raises(UsageError, match="sep='<bos>' is no token"):
        token_blocks("prose", world[1], sep="<bos>")


def test_second_load_is_quick():
    from sae_lora.lm import load_lm

    load_lm()
    start = time.perf_counter()
    load_lm()
    assert (
        time.perf_counter() - start < 30
    )  # a bound on the way it is done (no dequantising), not a benchmark


def test_sae_lens_is_imported_only_when_an_sae_is_read():
    code = "import sys, sae_lora.cli\n"
    code += "print(*[n in sys.modules for n in ('sae_lens', 'wandb', 'nbdev', 'fastcore')])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
        == ["False"] * 4
    )


def test_wheel_is_whole_and_light(root, tmp_path):
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            tmp_path,
            root,
        ],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert wheel.stat().st_size <= 30 * 2**20
    for name in (
        "sae_lora/cli.py",
        "sae_lora/data/sae/sae_weights.safetensors",
        "sae_lora/data/prose/prose.jsonl.xz",
    ):
        assert name in names
