"""What is read is checked at the door.

One line names the file, what was found, what is allowed and what to do.
"""

import io
import json
import random
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CONFIGS, random_sae, tiny
from safetensors.torch import load_file, save_file
from typing_extensions import TypedDict
from worlds import tokenizer

from sae_lora import hub
from sae_lora.adapters import attach_adapter, load_adapter, push_to_hub, save_adapter
from sae_lora.checked import (
    Count,
    Finite,
    conforming,
    mistake,
    read_json,
    read_lines,
    read_tensors,
    read_yaml,
)
from sae_lora.documents import document_parts, documents
from sae_lora.files import UsageError
from sae_lora.formats import load_sae
from sae_lora.lm import load_lm
from sae_lora.lora import add_lora, lora_parameters
from sae_lora.pretrained import causal
from sae_lora.probing import labelled
from sae_lora.sae import save_sae
from sae_lora.text import token_blocks


def refused(*words, by):
    "What is said: one line of at most 300 characters with all of `words`, and soon."
    began = time.perf_counter()
    with pytest.raises(UsageError) as e:
        by()
    said = str(e.value)
    assert len(said) <= 300 and "\n" not in said and all(w in said for w in words), said
    assert e.value.__cause__ is None and time.perf_counter() - began < 10
    return said


def change(path: Path, **changes):
    "Change keys of a `.json` file; a key that becomes `...` is removed."
    said = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in said.items() if v is not ...}))


def rewrite(path: Path, how):
    "Change the tensors of a file in place."
    tensors = load_file(path)
    how(tensors)
    save_file({n: x.contiguous() for n, x in tensors.items()}, path, {"format": "pt"})


def pickled() -> bytes:
    f = io.BytesIO()
    torch.save({"a": torch.ones(2)}, f)
    return f.getvalue()


# the mechanism

BROKEN = {
    "empty": b"",
    "no json": b"{oops",
    "a list": b"[]",
    "null": b"null",
    "not utf-8": b"\xff\xfe{",
    "deep": b'{"a":' * 3000,
    "long": b'{"n": ' + b"9" * 9999 + b"}",
}
Shelf = TypedDict("Shelf", {"name": str, "boards": Count, "share": Finite})


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_json_and_yaml(tmp_path, kind):
    for name, read in (("a.json", read_json), ("a.yml", read_yaml)):
        (tmp_path / name).write_bytes(BROKEN[kind])
        if name == "a.json" or kind not in ("long",):
            refused(name, "restore", by=lambda: read(tmp_path / name, Shelf))
    (tmp_path / "a.jsonl").write_bytes(
        b'{"name": "x", "boards": 1, "share": 0.5}\n' + BROKEN[kind] + b"\n{}"
    )
    refused("a.jsonl", by=lambda: list(read_lines(tmp_path / "a.jsonl", Shelf)))


@pytest.mark.parametrize(
    "value, words",
    [
        ({"name": "x", "boards": 1}, ["share is missing"]),
        ({"name": 3, "boards": 1, "share": 0}, ["name is 3", "text"]),
        ({"name": "x", "boards": True, "share": 0}, ["boards is true"]),
        ({"name": "x", "boards": 0, "share": 0}, ["boards is 0", "greater"]),
        ({"name": "x", "boards": "1", "share": 0}, ["boards is '1'", "whole number"]),
        ({"name": "x", "boards": 10**30, "share": 0}, ["boards", "less"]),
        ({"name": "x", "boards": 1, "share": float("nan")}, ["share is nan"]),
        ([], ["a list", "an object"]),
        ({"name": "x" * 9999, "boards": "y" * 9999, "share": 0}, ["boards"]),
        ({"name": {}, "boards": [], "share": None}, ["2 more faults"]),
    ],
)
def test_values_that_do_not_conform(value, words):
    refused("x.json", *words, "mend it", by=lambda: conforming(value, Shelf, "x.json", "mend it"))


def test_what_conforms_comes_back_as_it_was():
    value = {"name": "x", "boards": 2, "share": 1, "more": [1]}
    assert conforming(value, Shelf, "x") is value


def test_a_message_is_never_long():
    assert len(str(mistake("a/" * 999, "b " * 999, "c " * 999))) <= 300


def test_yaml_makes_nothing_but_values(tmp_path):
    (tmp_path / "a.yml").write_text(f"a: !!python/object/apply:os.system ['touch {tmp_path}/ran']")
    refused("a.yml", by=lambda: read_yaml(tmp_path / "a.yml"))
    assert not (tmp_path / "ran").exists()


def test_what_is_no_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for path, word in (
        (tmp_path, "a folder"),
        (tmp_path / "link", "a link to nothing"),
        ("/dev/zero", "no regular file"),
        (tmp_path / "gone", "no such file"),
        ("x" * 5000, "too long"),
        ("a\0b", "null"),
    ):
        refused(word, by=lambda: read_json(path))
        refused(word, by=lambda: read_tensors(path))


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_tensors(tmp_path, kind):
    path, expected = tmp_path / f"a.{kind}", {"W": (2, 3), "b": (3,)}

    def write(**tensors):
        np.savez(
            path, **{n: x.numpy() for n, x in tensors.items()}
        ) if kind == "npz" else save_file(tensors, path)

    W, b = torch.ones(2, 3), torch.ones(3)
    write(W=W, b=b)
    assert read_tensors(path, expected)["W"].equal(W)
    whole = path.read_bytes()
    write(W=W)
    refused("missing: b", by=lambda: read_tensors(path, expected))
    write(W=W, b=b, c=b.clone())
    refused("not known: c", by=lambda: read_tensors(path, expected))
    write(W=W.T.contiguous(), b=b)
    refused("W has shape (3, 2)", "transposed", by=lambda: read_tensors(path, expected))
    write(W=W * torch.nan, b=b)
    refused("W holds NaN", by=lambda: read_tensors(path, expected))
    for content in (whole[:-4], whole[:9], b"", b"12345", pickled(), bytes(999)):
        path.write_bytes(content)
        refused("damaged", kind, by=lambda: read_tensors(path, expected))


def test_an_overflowing_sum_is_no_infinity(tmp_path):
    save_file(
        {
            "a": torch.full((3,), 6e4, dtype=torch.float16),
            "b": torch.ones(3, dtype=torch.float8_e4m3fn),
            "c": torch.ones(2, dtype=torch.long),
        },
        tmp_path / "a.safetensors",
    )
    assert len(read_tensors(tmp_path / "a.safetensors")) == 3


# the hub


def test_a_hub_that_does_not_answer_is_given_up_once(monkeypatch, capsys):
    from huggingface_hub import constants, snapshot_download

    asked, never = [], threading.Event()

    class Silent:
        def head(self, *a, **k):
            asked.append(1), never.wait(60)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    monkeypatch.setattr(hub, "get_session", Silent)
    hub._answers.cache_clear()
    try:
        refused("no/such", "cannot be reached", by=lambda: load_lm("no/such"))
        refused("no/data", "cannot be reached", by=lambda: list(documents("no/data")))
        refused("nobody/repo:x", by=lambda: load_sae("nobody/repo:x"))
        refused("no/adapter", by=lambda: attach_adapter(tiny("llama"), "no/adapter"))
        assert len(asked) <= 2 and not constants.HF_HUB_OFFLINE  # a minute may end in between
        with hub.asking(), pytest.raises(Exception):
            snapshot_download("no/such")
        assert "".join(capsys.readouterr()) == ""
    finally:
        never.set()
        hub._answers.cache_clear()


def test_no_pickle_through_the_registry(monkeypatch, tmp_path):
    import sae_lens

    class Planted:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save(Planted(), tmp_path / "weights.pt")
    monkeypatch.setattr(
        sae_lens.SAE,
        "from_pretrained",
        lambda *a: torch.load(tmp_path / "weights.pt", weights_only=False),
    )
    refused("release:id", "could not be loaded", by=lambda: load_sae("a:b"))
    assert not (tmp_path / "ran").exists()


# models


@pytest.fixture
def model(tmp_path) -> Path:
    "A folder with a tiny Llama and its tokenizer."
    tiny("llama").save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    "name", sorted(set(CONFIGS) - {"qwen2"})
)  # its tokenizer adds a token that this model lacks
def test_every_architecture_is_loaded_as_it_was(tmp_path, name):
    lm, ids = tiny(name), torch.arange(4, 20)[None]
    lm.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    again, _ = load_lm(str(tmp_path), device="cpu")
    assert causal(again) and again.config._attn_implementation == lm.config._attn_implementation
    torch.testing.assert_close(again(input_ids=ids).logits, lm(input_ids=ids).logits)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num_attention_heads=0), ["num_attention_heads is 0"]),
        (dict(hidden_size="32"), ["hidden_size is '32'"]),
        (dict(num_hidden_layers=3 * 10**9), ["3000000000 layers"]),
        (dict(vocab_size=10**10), ["config.json describes"]),
        (dict(num_hidden_layers=6), ["missing: model.layers.4"]),
        (dict(num_hidden_layers=3), ["unexpected: model.layers.3"]),
        (dict(intermediate_size=80), ["another shape"]),
        (
            dict(quantization_config=dict(quant_method="bitsandbytes", load_in_4bit=True)),
            ["bitsandbytes"],
        ),
        (dict(is_encoder_decoder=True), ["encoder", "decoder-only"]),
        (dict(model_type="nothing"), ["nothing"]),
        (dict(num_key_value_heads=0), ["could not be loaded"]),
    ],
)
def test_configurations(model, changes, words):
    change(model / "config.json", **changes)
    refused(*words, by=lambda: load_lm(str(model)))


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_model_does_not_choose_how_attention_is_computed(model, key, monkeypatch):
    from transformers import modeling_utils

    monkeypatch.setattr(
        modeling_utils,
        "lazy_import_flash_attention",
        lambda *a, **k: pytest.fail("a kernel was looked for"),
    )
    change(model / "config.json", **{key: "nobody/attention"})
    assert load_lm(str(model), device="cpu")[0].config._attn_implementation == "sdpa"


def test_no_code_of_a_model_is_run(model):
    (model / "own.py").write_text(f"open({str(model / 'ran')!r}, 'w')")
    change(
        model / "config.json",
        model_type="own",
        auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    )
    refused("could not be loaded", by=lambda: load_lm(str(model)))
    change(model / "config.json", model_type="llama", auto_map=...)
    change(
        model / "tokenizer_config.json",
        tokenizer_class="Own",
        auto_map={"AutoTokenizer": ["own.T", None]},
    )
    try:
        load_lm(str(model), device="cpu")
    except UsageError:
        pass
    assert not (model / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"12345", pickled(), bytes(4000), "half"])
def test_weights_that_are_none(model, content):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20_000] if content == "half" else content)
    refused("model.safetensors", "damaged", by=lambda: load_lm(str(model)))
    file.rename(model / "pytorch_model.bin")
    refused("model.safetensors", "pickles are not read", by=lambda: load_lm(str(model)))


def test_weights_in_parts(model):
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names, index = sorted(tensors), model / "model.safetensors.index.json"
    for i in range(2):
        save_file(
            {n: tensors[n] for n in names[i::2]}, model / f"part-{i}.safetensors", {"format": "pt"}
        )
    parts = {n: f"part-{i % 2}.safetensors" for i, n in enumerate(names)}
    index.write_text(json.dumps(dict(metadata={}, weight_map=parts)))
    load_lm(str(model), device="cpu")
    index.write_text(
        json.dumps(dict(metadata={}, weight_map=parts | {names[0]: "../part-0.safetensors"}))
    )
    refused("index.json", "leaves the folder", by=lambda: load_lm(str(model)))
    index.write_text(json.dumps(dict(metadata={}, weight_map=parts)))
    (model / "part-1.safetensors").unlink()
    refused("part-1.safetensors", "no such file", by=lambda: load_lm(str(model)))


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "how, words",
    [
        (lambda w: w.pop(NAME), ["1 weights missing", NAME]),
        (lambda w: w.update(more=torch.ones(2)), ["1 weights unexpected", "more"]),
        (lambda w: w[NAME].fill_(torch.nan), [NAME, "NaN"]),
        (lambda w: w[NAME][0, :1].fill_(torch.inf), [NAME, "1 times"]),
        (lambda w: w.update({NAME: w[NAME].T}), ["another shape", NAME]),
    ],
)
def test_models_that_are_not_whole(model, how, words):
    rewrite(model / "model.safetensors", how)
    refused(*words, by=lambda: load_lm(str(model)))


def test_what_old_files_hold_beside_weights_is_no_fault(model):
    rewrite(
        model / "model.safetensors",
        lambda w: w.update(
            {
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
                "model.layers.0.self_attn.masked_bias": torch.ones(()),
            }
        ),
    )
    load_lm(str(model), device="cpu")


def test_a_vocabulary_larger_than_the_models(model):
    tok = tokenizer()
    tok.add_tokens(["<image>"], special_tokens=True)
    tok.save_pretrained(model)
    load_lm(str(model), device="cpu")  # text never gives it
    tok.add_tokens(["one more"])
    tok.save_pretrained(model)
    refused("one more", "no embedding", by=lambda: load_lm(str(model)))


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"no"),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer.json", None),
    ],
)
def test_tokenizers_that_are_none(model, name, content):
    (model / name).unlink() if content is None else (model / name).write_bytes(content)
    refused("tokenizer", by=lambda: load_lm(str(model)))


@pytest.mark.parametrize("content", ["[]", "null", "{", "", "{}"])
def test_configurations_that_are_none(model, content):
    (model / "config.json").write_text(content)
    refused("model", by=lambda: load_lm(str(model)))
    (model / "config.json").unlink()
    refused("config.json", "no such file", by=lambda: load_lm(str(model)))


def test_an_encoder_and_half_a_translator(tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM

    small = dict(vocab_size=97, max_position_embeddings=64)
    bert = BertForMaskedLM(
        BertConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            **small,
        )
    )
    bart = BartForConditionalGeneration(
        BartConfig(
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            **small,
        )
    )
    for lm, words in ((bert, ["decoder-only"]), (bart, ["has an encoder"])):
        folder = tmp_path / type(lm).__name__
        lm.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        refused(*words, by=lambda: load_lm(str(folder)))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGUF\3\0\0\0" + bytes(16),
        b"GGUF\3\0\0\0" + b"\1" * 99,
        b"no gguf at all",
        pickled(),
    ],
)
def test_gguf_files_that_are_none(tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    refused("a.gguf", by=lambda: load_lm(str(tmp_path / "a.gguf")))


def test_a_damaged_copy_of_an_embedded_model_is_named(monkeypatch, tmp_path, model):
    from sae_lora import pretrained

    monkeypatch.setattr(pretrained, "embedded", lambda name: model)
    (model / "model.safetensors").write_bytes(b"half")
    assert "smollm2" not in refused(
        str(model)[-60:], "damaged", "delete that folder", by=lambda: load_lm("smollm2-135m")
    )


def test_an_adapter_is_no_model(model):
    (model / "adapter_config.json").write_text("{}")
    refused("an adapter, not a model", by=lambda: load_lm(str(model)))


@pytest.mark.parametrize(
    "name, words",
    [
        ("", ["config.json"]),
        ("./nowhere", ["no such file"]),
        ("/dev/null", ["no regular file"]),
        ("m" * 400, ["too long"]),
        ("a\0b", ["null"]),
        ("nowhere.gguf", ["no such file"]),
    ],
)
def test_names_of_no_model(name, words):
    refused(*words, by=lambda: load_lm(name))


# SAEs


@pytest.fixture
def sae(tmp_path) -> Path:
    save_sae(random_sae(), tmp_path / "sae")
    return tmp_path / "sae"


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(k=...), ["the key k is missing"]),
        (dict(k=0), ["k is 0"]),
        (dict(k=-3), ["k is -3"]),
        (dict(k=31.5), ["k is 31.5"]),
        (dict(k="many"), ["k is 'many'"]),
        (dict(k=None), ["k is null"]),
        (dict(k=65), ["k is 65, of 64 latents"]),
        (dict(metadata=None), ["metadata is null"]),
        (dict(d_in="32"), ["d_in is '32'"]),
        (dict(d_in=33), ["shape (32,)", "(33,)"]),
        (dict(d_sae=10**9), ["1000000000"]),
        (dict(architecture="transcoder"), ["transcoder"]),
        (dict(architecture="nothing"), ["nothing"]),
        (dict(dtype="float99"), ["float99"]),
        (dict(apply_b_dec_to_input="no"), ["apply_b_dec_to_input"]),
    ],
)
def test_configurations_of_saes(sae, changes, words):
    change(sae / "cfg.json", **changes)
    refused(*words, by=lambda: load_sae(sae))


def test_an_older_configuration_is_read(sae):
    change(
        sae / "cfg.json",
        architecture="standard",
        activation_fn_str="topk",
        activation_fn_kwargs=dict(k=8),
        k=...,
        metadata=...,
        hook_name="blocks.1.hook_resid_post",
    )
    assert load_sae(sae).cfg.k == 8
    change(sae / "cfg.json", activation_fn_kwargs={})
    refused("k is missing", by=lambda: load_sae(sae))


@pytest.mark.parametrize("content", BROKEN)
def test_configurations_of_saes_that_are_none(sae, content):
    (sae / "cfg.json").write_bytes(BROKEN[content])
    refused("cfg.json", by=lambda: load_sae(sae))


@pytest.mark.parametrize(
    "how, words",
    [
        (lambda w: w.pop("b_dec"), ["missing: b_dec"]),
        (lambda w: w.update(more=torch.ones(2)), ["not known: more"]),
        (lambda w: w.update(W_enc=w["W_enc"].T), ["W_enc", "transposed"]),
        (lambda w: w.update(W_skip=torch.ones(32, 32)), ["W_skip", "transcoder"]),
        (lambda w: w["b_enc"].fill_(torch.nan), ["b_enc holds NaN"]),
    ],
)
def test_weights_of_saes(sae, how, words):
    rewrite(sae / "sae_weights.safetensors", how)
    refused("sae_weights.safetensors", *words, by=lambda: load_sae(sae))


@pytest.mark.parametrize(
    "arrays, words",
    [
        (dict(threshold=None), ["missing: threshold"]),
        (dict(W_enc=np.ones((64, 32), "f4")), ["W_enc", "transposed"]),
        (dict(W_enc=np.array(["a", "b"])), ["W_enc does not hold numbers"]),
        (dict(W_skip=np.ones((32, 32), "f4")), ["W_skip", "transcoder"]),
        (dict(b_dec=np.full(32, np.inf, "f4")), ["b_dec holds NaN or infinity"]),
    ],
)
def test_gemma_scope_files(tmp_path, arrays, words):
    whole = dict(
        W_enc=np.ones((32, 64), "f4"),
        W_dec=np.ones((64, 32), "f4"),
        b_enc=np.ones(64, "f4"),
        b_dec=np.ones(32, "f4"),
        threshold=np.ones(64, "f4"),
    )
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_12"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **whole)
    load_sae(folder)
    (folder / "config.json").write_text("[]")
    refused("config.json", "a list", by=lambda: load_sae(folder))
    (folder / "config.json").unlink()
    np.savez(folder / "params.npz", **{n: x for n, x in (whole | arrays).items() if x is not None})
    refused("params.npz", *words, by=lambda: load_sae(folder))


@pytest.mark.parametrize(
    "spec, words",
    [
        ("nowhere", ["no such folder"]),
        ("/dev/zero", ["no regular file"]),
        ("s" * 400, ["too long"]),
        ("nothing:here", ["nothing", "release:id"]),
    ],
)
def test_names_of_no_sae(spec, words):
    refused(*words, by=lambda: load_sae(spec))


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf")])
def test_a_norm_factor_is_above_zero(sae, factor):
    refused("norm_factor", "above 0", by=lambda: load_sae(sae, norm_factor=factor))


# text


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("a.csv", b"id,text\n1,one\n2\n", ["line 3", "1 cells"]),
        ("a.csv", b"1,2.5\n-3,4e5\n", ["too short", "numbers"]),
        ("a.csv", b"a\0b\n", ["too short"]),
        ("a.jsonl", b'{"text": "x"}\n3\n', ["line 2", "'3'"]),
        ("a.jsonl", b"null\n", ["line 1"]),
        ("a.jsonl", b'["one", "two"]', ["line 1", "object a line"]),
        ("a.jsonl", b"[" * 9999, ["deep"]),
        ("a.jsonl", b'{"text": 3}', ["no column of text"]),
        ("a.jsonl", b"9" * 9999, ["line 1"]),
        ("a.txt", b"\xff\xfe\x00", ["not readable"]),
        ("a.parquet", b"PAR1" + bytes(99) + b"PAR1", ["not readable"]),
    ],
)
def test_texts_that_are_none(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    if content == b"a\0b\n":
        assert list(documents(str(tmp_path / name)))  # a text like any other
    else:
        refused(name, *words, by=lambda: list(documents(str(tmp_path / name))))


def test_nulls_are_passed_over(tmp_path):
    import pandas as pd

    pd.DataFrame(dict(text=["one", None, "two"], id=[1, 2, 3])).to_parquet(tmp_path / "a.parquet")
    assert list(documents(str(tmp_path / "a.parquet"))) == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('{"text": null}\n{"text": "three"}\n')
    assert list(documents(str(tmp_path))) == ["one", "two", "three"]
    pd.DataFrame(dict(text=[None, None])).to_parquet(tmp_path / "a.parquet")
    refused("no text", by=lambda: list(documents(str(tmp_path / "a.parquet"))))


def test_a_corrupt_page_of_parquet_is_named(tmp_path):
    import pandas as pd

    path = tmp_path / "a.parquet"
    pd.DataFrame(dict(text=[f"document {i}" * 20 for i in range(500)])).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[40:400] = bytes(360)
    path.write_bytes(content)
    refused("a.parquet", "not readable", by=lambda: list(documents(str(path))))


def test_folders_of_text(tmp_path):
    (tmp_path / "old.txt").mkdir()
    refused("no .txt", by=lambda: list(documents(str(tmp_path))))
    (tmp_path / "a.txt").write_text("one")
    assert list(documents(str(tmp_path))) == ["one\n\n"]
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone")
    refused("b.txt", "a link to nothing", by=lambda: list(documents(str(tmp_path))))


@pytest.mark.parametrize(
    "source, words",
    [
        ("/dev/zero", ["no regular file"]),
        ("t" * 400, ["too long"]),
        ("gone.txt", ["no such file"]),
        ("./gone", ["no such file"]),
        ("not an id", ["nor a dataset"]),
        ("a\0b", ["null"]),
    ],
)
def test_names_of_no_text(source, words):
    refused(*words, by=lambda: list(documents(source)))


@pytest.mark.parametrize("name", ["one line", "sentences", "no space at all"])
def test_a_text_of_one_paragraph_is_cut(tmp_path, name):
    draw = random.Random(0)
    text = {
        "one line": " ".join(f"w{draw.randint(5, 96)}" for _ in range(160_000)),
        "sentences": "w5 w6 w7. " * 65_000,
        "no space at all": "w" * 650_000,
    }[name]
    (tmp_path / "a.txt").write_text(text)
    found = list(documents(str(tmp_path / "a.txt")))
    assert (
        "".join(found).strip() == text.strip() and max(map(len, found)) <= 2000 and len(found) > 300
    )
    if name == "one line":
        assert len(token_blocks(str(tmp_path / "a.txt"), tokenizer(), 64).valid)
    (tmp_path / "a.jsonl").write_text(json.dumps(dict(text=text)))
    assert "".join(documents(str(tmp_path / "a.jsonl"))) == text


def test_a_document_of_bearable_length_is_whole():
    assert list(document_parts("x" * 100_000)) == ["x" * 100_000] and list(document_parts("")) == [
        ""
    ]
    lines = list(document_parts("one line\n" * 20_000))
    assert all(p.endswith("\n") for p in lines) and "".join(lines) == "one line\n" * 20_000


@pytest.mark.parametrize("column", ["text", "content", "raw_content"])
def test_a_mark_before_the_first_character_is_no_text(tmp_path, column):
    table = f"id,{column}\n1,one\n2,two\n"
    (tmp_path / "a.csv").write_text(table, encoding="utf-8-sig")
    assert list(documents(str(tmp_path / "a.csv"))) == ["one", "two"]
    line = json.dumps({column: "one"})
    (tmp_path / "a.jsonl").write_text(line, encoding="utf-8-sig")
    assert list(documents(str(tmp_path / "a.jsonl"))) == ["one"]
    (tmp_path / "a.txt").write_text("one", encoding="utf-8-sig")
    assert list(documents(str(tmp_path / "a.txt"))) == ["one\n\n"]


def test_the_header_of_labelled_text_is_no_class(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("label,text\n" + "a,one\nb,two\n" * 3)
    texts, y = labelled(path, n=2)
    assert texts == ["one", "one", "two", "two"] and y == ["a", "a", "b", "b"]
    path.write_text("a,one\nb,two\n")
    assert labelled(path, n=2)[0] == ["one", "two"]


@pytest.mark.parametrize(
    "numbers", [dict(share=2.0), dict(cut=-0.5), dict(tokens=-1), dict(valid_tokens=float("nan"))]
)
def test_numbers_of_blocks(numbers):
    refused(
        *numbers,
        "give a number from",
        by=lambda: token_blocks(["w5 w6"] * 99, tokenizer(), 8, **numbers),
    )


# adapters


@pytest.fixture
def adapter(tmp_path) -> Path:
    lm, saes = tiny("llama"), {1: random_sae()}
    add_lora(lm, saes, rank=2)
    save_adapter(lm, saes, tmp_path / "adapter")
    return tmp_path / "adapter"


def attached(folder):
    return lambda: attach_adapter(tiny("llama"), folder)


def entry(folder, **changes):
    "Change what `sae_lora.json` says of its SAE."
    said = json.loads((folder / "sae_lora.json").read_text())["saes"][0]
    change(folder / "sae_lora.json", saes=[said | changes])


def test_a_whole_adapter_is_attached(adapter):
    lm = tiny("llama")
    assert list(attach_adapter(lm, adapter)) == [1] and len(lora_parameters(lm)) == 28
    refused("carries an adapter", by=lambda: attach_adapter(lm, adapter))


def test_of_several_adapters_the_one_that_is_on_is_saved(tmp_path):
    lm, saes = tiny("llama"), {1: random_sae()}
    add_lora(lm, saes, rank=2, name="small")
    add_lora(lm, saes, rank=4, name="large")
    lm.set_adapter(["small", "large"])
    refused("large", "set_adapter", by=lambda: save_adapter(lm, saes, tmp_path / "both"))
    lm.set_adapter("small")
    refused("keep 'all'", by=lambda: save_adapter(lm, saes, tmp_path / "one", keep="all"))
    save_adapter(lm, saes, tmp_path / "one")
    saved = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert "Rank 2, alpha 2;" in (tmp_path / "one" / "README.md").read_text()
    assert saved["r"] == 2 and list(attach_adapter(tiny("llama"), tmp_path / "one")) == [1]


@pytest.mark.parametrize("name", ["sae_lora.json", "adapter_config.json"])
@pytest.mark.parametrize("content", [*BROKEN.values(), b"{}", None])
def test_files_of_an_adapter_that_are_none(adapter, name, content):
    (adapter / name).unlink() if content is None else (adapter / name).write_bytes(content)
    refused(name, by=attached(adapter))
    refused(name, by=lambda: load_adapter(adapter))  # before the model is loaded
    refused(name, by=lambda: push_to_hub(adapter, "a/b"))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(layer=3), ["layer 3", "blocks.1"]),
        (dict(layer=99), ["layer 99"]),
        (dict(layer="1"), ["layer is '1'"]),
        (dict(layer=2**70), ["layer"]),
        (dict(fingerprint="0" * 16), ["belongs to SAE 0000"]),
        (dict(source=None), ["source is null"]),
        (dict(source="../../.."), ["not in this folder"]),
        (dict(source=""), ["not in this folder"]),
        (dict(source="/etc"), ["not in this folder"]),
        (dict(source="~/sae"), ["not in this folder"]),
        (dict(source="default"), ["belongs to SAE"]),
        (dict(source="sae-1/../../adapter/sae-1"), []),
    ],
)
def test_the_sae_of_an_adapter(adapter, changes, words):
    entry(adapter, **changes)
    if words:
        refused(*words, by=attached(adapter))
    else:
        attached(adapter)()  # a long way round, but in the folder


def test_nothing_outside_the_folder_is_read(adapter, tmp_path):
    shutil.move(adapter / "sae-1", tmp_path / "elsewhere")
    for source in ("../elsewhere", str(tmp_path / "elsewhere")):
        entry(adapter, source=source)
        refused("not in this folder", by=attached(adapter))
    (adapter / "sae-1").symlink_to(tmp_path / "elsewhere")
    entry(adapter, source="sae-1")
    refused("not in this folder", by=attached(adapter))


def test_two_saes_at_one_layer(adapter):
    said = json.loads((adapter / "sae_lora.json").read_text())["saes"]
    change(adapter / "sae_lora.json", saes=said * 2)
    refused("two SAEs", by=attached(adapter))
    change(adapter / "sae_lora.json", saes=[])
    refused("a list that is not empty", by=attached(adapter))
    change(adapter / "sae_lora.json", saes=said, positions=dict(keep="some"))
    refused("keep is 'some'", "'special' or 'none'", by=attached(adapter))


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(peft_type="IA3"), ["peft_type is 'IA3'"]),
        (dict(r=3), ["has shape (2,", "(3,"]),
        (dict(r=10**9), ["1000000000"]),
        (dict(r=0), ["r is 0"]),
        (dict(lora_alpha="much"), ["lora_alpha is 'much'"]),
        (dict(target_modules=["nothing"]), ["no nothing"]),
        (dict(target_modules=["model.layers.2.mlp.up_proj"]), ["not known"]),
        (dict(target_modules=None), ["target_modules is null"]),
        (dict(use_dora=True), ["missing"]),
        (dict(use_rslora=...), ["use_rslora is missing"]),
        (dict(layer_replication=[[0, 4]]), ["layer_replication"]),
        (dict(use_bdlora={"nblocks": 2}), ["use_bdlora"]),
        (dict(layers_to_transform=[2]), ["layers_to_transform is [2]", "only None"]),
        (dict(alora_invocation_tokens=[5]), ["alora_invocation_tokens"]),
        (dict(bias="all"), ["bias is 'all'; only 'none' is supported"]),
        (dict(use_qalora=True), ["use_qalora is True"]),
        (dict(trainable_token_indices=[3]), ["trainable_token_indices"]),
        (dict(target_parameters=["a.weight"]), ["target_parameters"]),
    ],
)
def test_configurations_of_adapters(adapter, changes, words):
    change(adapter / "adapter_config.json", **changes)
    refused(*words, by=attached(adapter))


def test_how_an_adapter_began_is_no_part_of_what_it_is(adapter):
    change(adapter / "adapter_config.json", init_lora_weights="gaussian", loftq_config={"bits": 4})
    assert list(attach_adapter(tiny("llama"), adapter)) == [1]


A = "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    "how, words",
    [
        (lambda w: w.pop(A), ["missing", A]),
        (lambda w: w.update(more=torch.ones(2)), ["not known: more"]),
        (lambda w: w[A].fill_(torch.nan), [A, "NaN"]),
        (lambda w: w.update({A: w[A].T}), ["transposed"]),
    ],
)
def test_weights_of_adapters(adapter, how, words):
    rewrite(adapter / "adapter_model.safetensors", how)
    lm = tiny("llama")
    refused("adapter_model.safetensors", *words, by=lambda: attach_adapter(lm, adapter))
    assert not lora_parameters(lm)


@pytest.mark.parametrize("content", [b"", b"12345", pickled(), bytes(4000), "half"])
def test_weights_of_adapters_that_are_none(adapter, content):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10] if content == "half" else content)
    refused("adapter_model.safetensors", "damaged", by=attached(adapter))
    refused("adapter_model.safetensors", "damaged", by=lambda: push_to_hub(adapter, "a/b"))
    file.rename(adapter / "adapter_model.bin")
    refused("pickles are not read", by=attached(adapter))


def test_an_adapter_of_another_model(adapter):
    refused("the model has no", by=lambda: attach_adapter(tiny("gpt2"), adapter))


@pytest.mark.parametrize(
    "options",
    [dict(rank=10**9), dict(rank=2.5), dict(rank=2, alpha=0.0), dict(rank=2, alpha=float("nan"))],
)
def test_numbers_of_adapters(options):
    refused(list(options)[-1], by=lambda: add_lora(tiny("llama"), {1: random_sae()}, **options))


# rows and parameters


def test_rows_are_checked(tmp_path):
    from sae_lora.results import Results

    rows = Results(tmp_path / "r.jsonl")
    rows.add(dict(a=1), dict(x=0.5))
    whole = rows.path.read_text()
    for content, word in (
        (whole + "[]\n", "line 2"),
        (whole.replace('"a": 1', '"a": 2'), "other parameters"),
        (whole.replace('"metrics"', '"numbers"'), "metrics is missing"),
        (whole[:-9], "line 1"),
    ):
        rows.path.write_text(content)
        refused("r.jsonl", word, by=rows.rows)


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(size="../x"), ["no size '../x'", "smoke, laptop"]),
        (dict(params=dict(ranks="abc")), ["ranks is 'abc'", "a list"]),
        (dict(params=dict(seeds=[1.5])), ["seeds.0 is 1.5"]),
        (dict(params=dict(tokens="many")), ["tokens is 'many'", "whole number"]),
        (dict(params=dict(sae=3)), ["no parameter 'sae'", "saes"]),
        (dict(params=dict(model=None)), ["model is null"]),
    ],
)
def test_parameters_of_experiments(given, words):
    pytest.importorskip("nbformat")
    from sae_lora.notebooks import settings

    refused("02_sparsity", *words, by=lambda: settings("02_sparsity", **given))
