"""Every lab's format: the numbers of its own definition, the right place, or one line that refuses.

`published` writes the folders. What is loaded has the same activations and the same
reconstruction as the formula, and comes back from our own format as it was. A mutant, a folder with
one thing wrong, is refused.
"""

import json
import math
from pathlib import Path
from typing import Callable
from unittest.mock import patch

import numpy as np
import pytest
import torch
import yaml
from conftest import random_sae
from published import CASES, D, K, N, Weights, e2e_tensors, made, write
from safetensors.torch import load_file
from torch.nn.functional import relu

from sae_lora import sae as sae_module
from sae_lora.files import UsageError
from sae_lora.formats import FORMATS, load_sae, recognised
from sae_lora.options import parse_saes
from sae_lora.sae import fingerprint, reconstruct, save_sae
from sae_lora.sites import hook_name, replaced_name, site_of, transcodes

X = torch.randn(3, 7, D, generator=torch.Generator().manual_seed(1))


# What each must be.

EVERY = [(name, dtype) for name, (_, dtypes, _) in CASES.items() for dtype in dtypes]
IDS = [f"{name}-{str(dtype)[6:]}" for name, dtype in EVERY]


def close(found, wanted):
    scale = max(1, float(wanted.abs().max()))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("name, dtype", EVERY, ids=IDS)
@torch.no_grad()
def test_numbers_are_those_of_the_definition(name, dtype, tmp_path):
    wanted = made(name, tmp_path, dtype)
    sae = load_sae(wanted.path)
    acts, y = wanted.formula(X)
    assert type(sae).__name__ == wanted.kind and sae.dtype == torch.float32
    assert {p.dtype for p in sae.parameters()} == {torch.float32}
    close(sae.encode(X), acts)
    close(sae(X), y)
    close(reconstruct(sae, X), y)
    with patch.object(sae_module, "PIECE", 4 * N):  # four positions at a time
        close(reconstruct(sae, X), y)
    assert reconstruct(sae, X.bfloat16()).dtype == torch.bfloat16
    assert (hook_name(sae), sae.cfg.metadata.model_name) == (wanted.reads, wanted.model)
    assert replaced_name(sae) == (wanted.replaces or wanted.reads)
    assert transcodes(sae) == bool(wanted.replaces) and site_of(sae) is not None
    assert sae.cfg.metadata.expected_l0 == wanted.l0


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_is_saved_comes_back(name, tmp_path):
    sae = load_sae(made(name, tmp_path / "published").path)
    save_sae(sae, tmp_path / "ours")
    again = load_sae(tmp_path / "ours")
    assert type(again) is type(sae) and fingerprint(again) == fingerprint(sae)
    about, before = again.cfg.to_dict(), sae.cfg.to_dict()
    assert about.pop("metadata") | dict(source=None) == before.pop("metadata") | dict(source=None)
    assert about == before
    assert torch.equal(reconstruct(again, X), reconstruct(sae, X))


def test_every_format_has_a_case(tmp_path):
    named = {recognised(made(name, tmp_path / name).path)[0].name for name in CASES}
    assert named == {known.name for known in FORMATS} - {"cross-layer transcoders"}


# Mutants: one thing is wrong, and one line says which.

MUTANTS: dict[str, tuple] = {}


def mutant(told: str, of: str, how: Callable, *words: str):
    "A damage `how` of the folder of the case `of`, and words that must be said."
    MUTANTS[told] = of, how, words


def weights_in(path: Path) -> Path:
    "The file of weights at the path of a case."
    if path.is_file():
        return path
    found = [p for p in path.rglob("*") if p.suffix in (".safetensors", ".npz", ".pt")]
    return sorted(found)[-1]


def read(path: Path) -> dict:
    if path.suffix == ".npz":
        return {name: torch.tensor(x) for name, x in np.load(path).items()}
    return torch.load(path) if path.suffix in (".pt", ".pth") else load_file(path)


def tensors(**changes) -> Callable:
    "A change of tensors: to another value, by a function of the old one, or `None` for no such."

    def apply(path: Path):
        file = weights_in(path)
        found = read(file)
        for name, change in changes.items():
            name = name.replace("__", ".")
            new = change(found[name]) if callable(change) else change
            found.pop(name, None)
            found |= {} if new is None else {name: new}
        contiguous = {n: x.contiguous() if torch.is_tensor(x) else x for n, x in found.items()}
        write(file, contiguous)

    return apply


def config(file: str, **changes) -> Callable:
    "A change of keys of a configuration; `a__b` is `b` in `a`, and `...` is no such key."

    def apply(path: Path):
        at = next(p / file for p in (path, path.parent) if (p / file).is_file())
        read_in, written = (
            (yaml.safe_load, yaml.safe_dump) if "yaml" in file else (json.loads, json.dumps)
        )
        about = read_in(at.read_text())
        for name, value in changes.items():
            *parents, key = name.split("__")
            where = about
            for parent in parents:
                where = where[parent]
            where |= {key: value}
            if value is ...:
                del where[key]
        at.write_text(written(about))

    return apply


def renamed(old: str, new: str) -> Callable:
    "Another name for a folder or a file in the path; the path that is then loaded."

    def apply(path: Path) -> Path:
        at = next(p for p in (path, *path.parents) if p.name == old)
        to = at.with_name(new)
        to.parent.mkdir(parents=True, exist_ok=True)
        at.rename(to)
        return to / path.relative_to(at)

    return apply


def beside(name: str, content: bytes = b"") -> Callable:
    "A file in place of the one that is loaded."

    def apply(path: Path) -> Path:
        place = path if path.is_dir() else path.parent
        (place / name).write_bytes(content)
        return place / name

    return apply


class Planted:
    "What a pickle would run."

    def __reduce__(self):
        return print, ("this ran",)


def square(turned: bool, even: bool = True) -> Callable:
    "As many latents as dimensions; transposed, or with norms that tell nothing."

    def apply(path: Path):
        w = Weights(torch.float32, latents=D)
        decoder = w.D if even else w.S
        sizes = dict(b_enc=w.b, b_dec=w.c, threshold=w.threshold)
        write(weights_in(path), dict(W_enc=w.E.T, W_dec=decoder.T if turned else decoder) | sizes)

    return apply


nan = dict(b_enc=lambda x: x * torch.nan)
turn = torch.t

SCOPE, SCOPE_2 = "gemma scope 1 res", "gemma scope 2 resid_post config"
CODER_2, AFFINE = "gemma scope 2 transcoder", "gemma scope 2 transcoder config affine"
mutant("scope: square, transposed", SCOPE, square(turned=True), "transposed")
mutant("scope: square, no norms", SCOPE, square(turned=False, even=False), "cannot be told")
mutant("scope: transposed", SCOPE, tensors(W_dec=turn), "W_dec", "transposed")
mutant("scope: no bias", SCOPE, tensors(b_dec=None), "missing: b_dec")
mutant("scope: one more", SCOPE, tensors(scaling_factor=torch.ones(N)), "not known: scaling_factor")
mutant("scope: NaN", SCOPE, tensors(**nan), "b_enc holds NaN")
mutant(
    "scope: no site",
    SCOPE,
    renamed("gemma-scope-2b-pt-res", "mine"),
    "says where it belongs",
    "hook",
)
mutant("scope: no layer", SCOPE, renamed("layer_12", "twelve"), "says where it belongs")
mutant("scope: embedding", SCOPE, renamed("layer_12", "embedding"), "embeddings")
mutant("scope: skip in an SAE", SCOPE, tensors(W_skip=torch.ones(D, D)), "W_skip", "transcoder")
skip = torch.ones(D, D)
mutant(
    "scope 2: skip in an SAE", SCOPE_2, tensors(affine_skip_connection=skip), "affine", "transcoder"
)
mutant("scope 2: no skip", AFFINE, tensors(affine_skip_connection=None), "missing: affine")
mutant(
    "scope 2: not affine",
    AFFINE,
    config("config.json", affine_connection=False),
    "not known: affine",
)
mutant(
    "scope 2: another rule",
    SCOPE_2,
    config("config.json", architecture="topk"),
    "'topk'",
    "jump_relu",
)
hook = dict(hf_hook_point_in="model.layers.9.router.output")
mutant("scope 2: another module", SCOPE_2, config("config.json", **hook), "router")
hook = dict(hf_hook_point_in="model.layers.9.pre_feedforward_layernorm.output")
mutant("scope 2: an SAE of what is read", SCOPE_2, config("config.json", **hook), "only read")
mutant("scope 2: no site", CODER_2, renamed("transcoder_all", "all"), "says where it belongs")
mutant("scope 2: all layers", CODER_2, tensors(w_dec=torch.ones(N, 18, D)), "cross-layer", "18")
mutant("scope 2: clt", CODER_2, beside("params_layer_3.safetensors"), "cross-layer")

OLD, OLD_TC = "llama scope R", "llama scope TC"
HYPER = "hyperparams.json"
mutant(
    "llama: no norms", OLD, config(HYPER, dataset_average_activation_norm=...), "norm is missing"
)
mutant(
    "llama: one norm", OLD_TC, config(HYPER, dataset_average_activation_norm__out=...), "norm.out"
)
mutant("llama: another norm", OLD, config(HYPER, norm_activation="token-wise"), "token-wise")
mutant("llama: another rule", OLD, config(HYPER, act_fn="topk"), "act_fn", "jumprelu")
mutant("llama: another width", OLD, config(HYPER, d_sae=128), "128 latents", "64")
mutant("llama: transposed", OLD, tensors(encoder__weight=turn), "encoder.weight", "transposed")
mutant("llama: no bias", OLD, tensors(decoder__bias=None), "missing: decoder.bias")

NEW, NEW_TC = "llamascopium jumprelu", "llamascopium topk transcoder"
ABOUT = "config.json"
norm = "dataset_average_activation_norm.blocks.3"
unscaled = {f"{norm}.hook_resid_post": None}
mutant("scopium: unfolded norm", NEW, tensors(**unscaled), "norm_factor")
unscaled = {f"{norm}.hook_mlp_out": None}
mutant("scopium: unfolded transcoder", NEW_TC, tensors(**unscaled), "two mean norms")
mutant("scopium: clt", NEW, config(ABOUT, sae_type="clt"), "'clt'")
mutant("scopium: two gates", NEW, config(ABOUT, use_glu_encoder=True), "use_glu_encoder")
mutant("scopium: norm of tokens", NEW, config(ABOUT, norm_activation="token-wise"), "token-wise")
mutant("scopium: rule of batches", NEW, config(ABOUT, act_fn="batchtopk"), "batchtopk", "jumprelu")
mutant("scopium: another width", NEW, config(ABOUT, expansion_factor=2.0), "32 latents", "64")
mutant("scopium: no k", NEW_TC, config(ABOUT, top_k=...), "top_k is missing")
mutant("scopium: one more", NEW, tensors(W_E_glu=torch.ones(D, N)), "not known: W_E_glu")
gate = dict(activation_function__log_jumprelu_threshold=None)
mutant("scopium: no gate", NEW, tensors(**gate), "log_jumprelu_threshold")

CFG = "cfg.json"
CODER = "sparsify skip transcoder"
mutant("sparsify: signed", "sparsify SAE old", config(CFG, signed=True), "signed")
mutant("sparsify: latents", "sparsify SAE", config(CFG, num_latents=128), "(64, 16)", "(128, 16)")
mutant("sparsify: expansion", "sparsify SAE", config(CFG, expansion_factor=...), "(512, 16)")
mutant("sparsify: activation", "sparsify SAE", config(CFG, activation="relu"), "'relu'", "groupmax")
mutant(
    "sparsify: a new setting", "sparsify SAE", config(CFG, n_targets=3), "n_targets", "not known"
)
mutant("sparsify: k", "sparsify SAE", config(CFG, k=65), "k is 65, of 64")
mutant("sparsify: no k", "sparsify SAE", config(CFG, k=...), "k is missing")
mutant("sparsify: groups", "sparsify SAE groupmax", config(CFG, k=7), "64 latents", "7 groups")
mutant("sparsify: clt", CODER, tensors(W_decs__0=torch.ones(N, D)), "W_decs.0", "cross-layer")
mutant("sparsify: skip, not said", CODER, config(CFG, skip_connection=False), "not known: W_skip")
mutant("sparsify: skip, not there", CODER, tensors(W_skip=None), "missing: W_skip")
mutant("sparsify: a skip in an SAE", "sparsify SAE", tensors(W_skip=skip), "not known: W_skip")
mutant("sparsify: another kind", CODER, config(CFG, transcode=False), "not known: W_skip")
mutant("sparsify: transposed", "sparsify SAE", tensors(encoder__weight=turn), "transposed")
mutant("sparsify: no bias", "sparsify SAE", tensors(b_dec=None), "missing: b_dec")
mutant("sparsify: embeddings", "sparsify SAE", renamed("layers.10", "embed_tokens"), "embeddings")
mutant("sparsify: renamed", "sparsify SAE", renamed("layers.10", "mine"), "says where it belongs")
mutant("sparsify: not an MLP", CODER, renamed("layers.3.mlp", "layers.3.self_attn"), "not an MLP")
mutant("sparsify: a block", CODER, renamed("layers.3.mlp", "layers.3"), "not an MLP")

BATCH, PLAIN = "dictionary learning BatchTopKSAE", "dictionary learning AutoEncoder"
NESTED, TOKEN = "dictionary learning MatryoshkaBatchTopKSAE", "dictionary learning AutoEncoderTopK"
backup = dict(ae={}, step=5, optimizer={}, norm_factor=20.0)
mutant("dictionary: backup", PLAIN, tensors(**backup), "backup")
mutant(
    "dictionary: dense", BATCH, tensors(threshold=torch.tensor(-1.0)), "threshold is -1", "every"
)
mutant(
    "dictionary: dense, nested", NESTED, tensors(threshold=torch.tensor(-1.0)), "threshold is -1"
)
mutant("dictionary: no threshold", BATCH, tensors(threshold=None), "threshold")
mutant("dictionary: class", PLAIN, config(ABOUT, trainer__dict_class="CrossCoder"), "CrossCoder")
mutant(
    "dictionary: another class", PLAIN, config(ABOUT, trainer__dict_class="BatchTopKSAE"), "bias"
)
mutant("dictionary: size", PLAIN, config(ABOUT, trainer__dict_size=128), "64", "dict_size is 128")
mutant("dictionary: width", PLAIN, config(ABOUT, trainer__activation_dim=8), "activation_dim is 8")
mutant("dictionary: k", TOKEN, config(ABOUT, trainer__k=7), "k is 5", "says 7")
mutant("dictionary: k of all", TOKEN, tensors(k=None), "k is 99")
mutant("dictionary: layer", PLAIN, config(ABOUT, trainer__layer=11), "layer is 11", "says 12")
mutant("dictionary: sides", PLAIN, config(ABOUT, buffer__io="in_and_out"), "in_and_out")
mutant("dictionary: module", PLAIN, config(ABOUT, trainer__submodule_name="router_3"), "router_3")
mutant("dictionary: groups", NESTED, tensors(group_sizes=torch.tensor([16, 16])), "32, of 64")
mutant("dictionary: one more", PLAIN, tensors(scale=torch.ones(3)), "not known: scale")
mutant("dictionary: transposed", PLAIN, tensors(decoder__weight=turn), "transposed")
mutant("dictionary: no bias", PLAIN, tensors(encoder__bias=None), "missing: encoder.bias")
mutant("dictionary: an object", PLAIN, tensors(bias=Planted()), "more than tensors")
mutant("dictionary: a number", PLAIN, tensors(step=7), "step is of type int")
mutant("dictionary: NaN", PLAIN, tensors(bias=lambda x: x / 0), "bias holds NaN")
mutant(
    "dictionary: whose", BATCH, lambda path: (path.parent / ABOUT).unlink(), "and of", "config.json"
)
mutant("dictionary: cut", PLAIN, lambda path: path.write_bytes(path.read_bytes()[:900]), "ae.pt")
mutant("dictionary: a list", PLAIN, lambda path: torch.save([1], path), "holds a list")

SET = "config.yaml"
mutant(
    "circuit: clt", "circuit tracer relu", config(SET, model_kind="cross_layer_transcoder"), "many"
)
mutant("circuit: clt files", "circuit tracer relu", beside("W_enc_0.safetensors"), "cross-layer")
mutant("circuit: several", "circuit tracer relu", lambda path: path.parent, "2 transcoders")
mutant("circuit: a hook", "circuit tracer relu", config(SET, feature_input_hook="hook_x"), "hook_x")
mutant("circuit: no hook", "circuit tracer relu", config(SET, feature_output_hook=...), "missing")
mutant("circuit: no k", "circuit tracer topk", config(SET, k=...), "k is missing")
mutant("circuit: k", "circuit tracer topk", config(SET, k=65), "k is 65, of 64")
mutant("circuit: rule", "circuit tracer topk", config(SET, activation="gelu"), "gelu")
below = dict(activation_function__threshold=lambda x: -x)
mutant("circuit: below 0", "circuit tracer threshold", tensors(**below), "below 0")
mutant("circuit: one more", "circuit tracer skip", tensors(W_gate=skip), "not known: W_gate")
mutant(
    "circuit: alone", "circuit tracer relu", lambda path: (path.parent / SET).unlink(), "neither"
)

GPT2, GOOD = "openai resid_post_mlp TopK", "linear layers Goodfire 8B"
act = dict(activation_state_dict=dict(k=K, postact_fn="Identity"))
mutant("openai: activation", GPT2, tensors(activation="Sigmoid"), "Sigmoid")
mutant("openai: negative", GPT2, tensors(**act), "Identity")
mutant("openai: no k", GPT2, tensors(activation_state_dict={}), "k is missing")
mutant("openai: k", GPT2, tensors(activation_state_dict=dict(k=65)), "k is 65, of 64")
mutant("openai: one more", GPT2, tensors(gain=torch.ones(3)), "not known: gain")
site = "resid_post_mlp_v5_32k"
mutant("openai: no site", GPT2, renamed(site, "mine"), "says where it belongs")
mutant("openai: neurons", GPT2, renamed(site, "mlp_post_act_v5_32k"), "mlp_post_act")
mutant("openai: only read", GPT2, renamed(site, "resid_post_attn_v5_32k"), "only read")
mutant(
    "goodfire: no layer",
    GOOD,
    renamed("Llama-3.1-8B-Instruct-SAE-l19.pth", "a.pth"),
    "says where it belongs",
)
mutant(
    "goodfire: no bias", GOOD, tensors(encoder_linear__bias=None), "missing: encoder_linear.bias"
)
mutant("goodfire: an object", GOOD, tensors(encoder_linear__bias=Planted()), "more than tensors")
repo = "models--Qwen--SAE-Res-Qwen3-1.7B-Base-W1K-L0_5"
mutant("qwen: no k", "qwen scope", renamed(repo, "qwen"), "how many latents are active")
mutant("qwen: latents", "qwen scope", renamed(repo, repo.replace("W1K", "W2K")), "1024", "2048")


def e2e_with(*places: str, **more) -> Callable:
    "A checkpoint of e2e_sae with other places, or with more."

    def apply(path: Path):
        found = e2e_tensors(Weights(torch.float32), *places)
        torch.save(found | more, path / "samples_900.pt")

    return apply


two = e2e_with("blocks-2-hook_resid_pre", "blocks-6-hook_resid_pre")
mutant("e2e: two places", "e2e sae", two, "blocks.2.hook_resid_pre", "hook")
mutant("e2e: heads", "e2e sae", e2e_with("blocks-6-attn-hook_z"), "attn.hook_z", "not folded")
code = {"blocks-6-hook_resid_pre.codebook": skip}
mutant("e2e: codebook", "e2e sae", e2e_with("blocks-6-hook_resid_pre", **code), "codebook")

OURS, OURS_SKIP = "saelens transcoder", "saelens skip transcoder"
WHITE = dict(normalize_activations="covariance_whitening")
mutant("saelens: no width", OURS, config(CFG, d_out=...), "transcoder", "d_out")
mutant("saelens: another kind", OURS_SKIP, config(CFG, architecture="transcoder"), "W_skip")
mutant("saelens: an SAE's", OURS_SKIP, config(CFG, architecture="standard"), "W_skip", "transcoder")
mutant("saelens: no k", OURS, config(CFG, architecture="topk_transcoder"), "k is missing")
mutant("saelens: whitened", OURS, config(CFG, **WHITE), "whitened")
scaled = dict(normalize_activations="expected_average_only_in")
mutant("saelens: scaled", OURS, config(CFG, **scaled), "factors that are not in the file")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_refused_in_one_line(name, tmp_path, capsys):
    of, how, words = MUTANTS[name]
    path = made(of, tmp_path).path
    if name == "dictionary: k of all":
        config(ABOUT, trainer__k=99)(path)
    moved = how(path)
    with pytest.raises(UsageError) as e:
        load_sae(moved if isinstance(moved, Path) else path)
    said = str(e.value)
    assert len(said) <= 300 and "\n" not in said and all(word in said for word in words), said
    assert e.value.__cause__ is None and capsys.readouterr().out == ""


# Places that the user says, objects, and the registry.


def test_a_hook_says_what_no_name_does(tmp_path):
    path = tmp_path / "params.npz"
    made(SCOPE, tmp_path / "named").path.rename(path)
    assert site_of(load_sae(path, hook="layers.7.mlp")) == site_of("blocks.7.mlp.hook_out")
    assert site_of(load_sae(path, hook=7)) == 7
    transcoder = load_sae(path, hook="blocks.7.ln2.hook_normalized")
    assert type(transcoder).__name__ == "JumpReLUTranscoder"
    assert hook_name(transcoder) == "blocks.7.ln2.hook_normalized"
    assert str(site_of(transcoder)) == "blocks.7.hook_mlp_out"
    with pytest.raises(UsageError, match="no.such.hook"):
        load_sae(path, hook="blocks.7.no.such.hook")


MOVED = [name for name in CASES if name.split()[0] not in ("e2e", "gemma")]


@pytest.mark.parametrize("name", MOVED)
def test_a_hook_overrides_the_place(name, tmp_path):
    wanted = made(name, tmp_path)
    replaced = "blocks.2.hook_mlp_out"
    sae = load_sae(wanted.path, hook=replaced)
    assert replaced_name(sae) == replaced
    assert hook_name(sae) == (wanted.reads if wanted.replaces else replaced)
    if wanted.replaces:
        sae = load_sae(wanted.path, hook="blocks.2.hook_resid_mid")
        assert hook_name(sae) == "blocks.2.hook_resid_mid"
        assert replaced_name(sae) == wanted.replaces


def test_a_layer_on_the_command_line_is_the_place_of_a_file_that_has_none(tmp_path):
    path = tmp_path / "params.npz"
    made(SCOPE, tmp_path / "named").path.rename(path)
    assert list(parse_saes([f"7={path}"])) == [7]
    with pytest.raises(UsageError, match="LAYER="):
        parse_saes([str(path)])


def test_a_hook_chooses_one_of_several(tmp_path):
    path = made("e2e sae", tmp_path).path
    two(path)
    assert hook_name(load_sae(path, hook=1)) == "blocks.2.hook_resid_pre"
    assert hook_name(load_sae(path, hook="blocks.6.hook_resid_pre")) == "blocks.6.hook_resid_pre"


def test_a_mean_norm_that_is_not_in_the_file_is_given(tmp_path):
    wanted = made("llamascopium jumprelu", tmp_path)
    tensors(**{f"{norm}.hook_resid_post": None})(wanted.path)
    sae = load_sae(wanted.path, norm_factor=math.sqrt(D) / 8)
    acts, y = wanted.formula(X)
    close(sae.encode(X) * 8 / math.sqrt(D), acts)  # in units of scaled states
    close(sae(X), y)


def test_a_factor_that_no_activation_was_scaled_by_is_refused():
    with pytest.raises(UsageError, match="were not scaled; leave norm_factor out"):
        load_sae("default", norm_factor=2.0)


def test_wrappers_of_saelens_drop_a_skip_connection_and_we_do_not(tmp_path):
    sae = load_sae(made("sparsify skip transcoder", tmp_path).path)
    dropped = reconstruct(sae, X) - sae.decode(sae.encode(X))
    close(dropped, X @ sae.W_skip.T)


@pytest.mark.parametrize("content", [b"", bytes(300), b'{"a": 1}', b"hello world" * 30])
def test_what_is_no_archive_is_told_so(content, tmp_path):
    path = made(GOOD, tmp_path).path
    path.write_bytes(content)
    with pytest.raises(UsageError, match="damaged, or no archive"):
        load_sae(path)


def test_no_code_of_an_archive_runs(tmp_path, capsys):
    path = made("qwen scope", tmp_path).path
    torch.save({"W_enc": Planted()}, path)
    with pytest.raises(UsageError, match="more than tensors"):
        load_sae(path)
    assert capsys.readouterr().out == ""


def test_an_archive_of_before_2020_is_read(tmp_path):
    wanted = made(GOOD, tmp_path)
    found = torch.load(wanted.path)
    torch.save(found, wanted.path, _use_new_zipfile_serialization=False)
    close(load_sae(wanted.path)(X), wanted.formula(X)[1])


def test_an_object_is_made_to_suit_hugging_face(tmp_path):
    "Heads side by side, the stream with its mean, and Hugging Face's own names; once."
    sae = random_sae("standard", d_in=D, hook_name="blocks.3.attn.hook_z")
    sae.cfg.reshape_activations = "hook_z"
    sae.turn_on_forward_pass_hook_z_reshaping()
    wanted = sae(X.view(3, 7, 4, 4)).flatten(-2)
    close(load_sae(sae)(X), wanted)
    save_sae(sae, tmp_path / "heads")
    close(load_sae(tmp_path / "heads")(X), wanted)


@pytest.mark.parametrize("config", [dict(), dict(apply_b_dec_to_input=False)])
@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu"])
def test_a_centred_release_reads_the_stream_with_its_mean(kind, config, tmp_path):
    sae = random_sae(kind, d_in=D, **config)
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    wanted = sae(X - X.mean(-1, keepdim=True))
    folded = load_sae(sae)
    close(folded(X), wanted)
    save_sae(folded, tmp_path / "sae")
    close(load_sae(tmp_path / "sae")(X), wanted)  # it is folded once


def test_a_centred_release_that_cannot_be_folded_is_refused():
    sae = random_sae("gated", d_in=D)
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    with pytest.raises(UsageError, match="centred stream with gated"):
        load_sae(sae)


def test_a_dense_object_is_refused():
    sae = random_sae("jumprelu", d_in=D)
    sae.threshold.fill_(-1)
    with pytest.raises(UsageError, match="every positive latent"):
        load_sae(sae)


def hub(monkeypatch, root: Path):
    "Let `root / repository / file` be the hub, for SAELens and for us."
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def download(repo_id, filename, subfolder=None, **options):
        path = root / repo_id / (subfolder or "") / filename
        if not path.exists():
            raise EntryNotFoundError(filename)
        return str(path)

    def shapes(repo_id, filename):
        return {name: list(x.shape) for name, x in load_file(root / repo_id / filename).items()}

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)


@pytest.mark.parametrize("site", ["R", "M", "A"])
def test_llama_scope_by_its_name_in_the_registry(site, tmp_path, monkeypatch):
    wanted = made(f"llama scope {site}", tmp_path)
    folder = tmp_path / "fnlp" / f"Llama3_1-8B-Base-LX{site}-8x"
    folder.mkdir(parents=True)
    wanted.path.rename(folder / wanted.path.name)
    hub(monkeypatch, tmp_path)
    sae = load_sae(f"llama_scope_lx{site.lower()}_8x:l8{site.lower()}_8x")
    acts, y = wanted.formula(X)
    close(sae.encode(X), acts)
    close(sae(X), y)
    assert hook_name(sae) == wanted.reads


def test_llama_scope_of_the_distilled_model_has_its_scale_in_the_registry(tmp_path, monkeypatch):
    w = Weights(torch.float32)
    hook = "blocks.0.hook_resid_post"
    about = dict(hook_point_in=hook, hook_point_out=hook, d_model=D, expansion_factor=N // D)
    about |= dict(act_fn="jumprelu", norm_activation="dataset-wise", use_decoder_bias=True)
    about |= dict(sparsity_include_decoder_norm=True)
    found = w.saved(encoder__weight=w.E, encoder__bias=w.b)
    found |= w.saved(decoder__weight=2 * w.D.T, decoder__bias=w.c)
    found |= dict(log_jumprelu_threshold=w.threshold.log())
    folder = tmp_path / "fnlp/Llama-Scope-R1-Distill/800M-Slimpajama-0-OpenR1-Math-220k/L0R"
    write(folder / "sae_weights.safetensors", found, about)
    hub(monkeypatch, tmp_path)
    sae = load_sae("llama_scope_r1_distill:l0r_800m_slimpajama")
    s = 53.52995401997436
    z = X * s @ w.E.T + w.b
    acts = relu(z) * (z * 2 > w.threshold)
    close(sae.encode(X), acts)
    close(sae(X), (acts @ (2 * w.D) + w.c) / s)


@pytest.mark.parametrize("affine", [False, True])
def test_a_transcoder_of_the_registry_reads_what_its_module_does(affine, tmp_path, monkeypatch):
    name = "gemma scope 2 transcoder config" + (" affine" if affine else "")
    wanted = made(name, tmp_path)
    folder = wanted.path.parent
    to = tmp_path / "google" / "gemma-scope-2-270m-pt" / "transcoder_all"
    to.mkdir(parents=True)
    folder.rename(to / folder.name)
    hub(monkeypatch, tmp_path)
    sae = load_sae(f"gemma-scope-2-270m-pt-transcoders-all:{folder.name}")
    acts, y = wanted.formula(X)
    close(sae.encode(X), acts)
    close(reconstruct(sae, X), y)
    assert (hook_name(sae), replaced_name(sae)) == (wanted.reads, wanted.replaces)
    save_sae(sae, tmp_path / "ours")
    sae = load_sae(tmp_path / "ours", hook="blocks.9.hook_resid_mid")
    assert (hook_name(sae), replaced_name(sae)) == ("blocks.9.hook_resid_mid", wanted.replaces)


def test_what_the_registry_reads_and_no_block_has_is_refused(monkeypatch):
    import sae_lens

    with pytest.raises(UsageError, match="cross-layer"):
        load_sae("mntss-gemma-2-2b-2.5m-clt-as-per-layer:layer_0")
    embedding = random_sae(hook_name="hook_embed")
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda *a: embedding)
    with pytest.raises(UsageError, match="embeddings"):
        load_sae("gemma-scope-2b-pt-res:embedding/width_4k/average_l0_21")
