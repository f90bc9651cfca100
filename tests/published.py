"""Folders as every lab publishes them, with random weights, and what an SAE of each computes.

Each case writes a folder in exactly its format's layout, and gives the formula of the format's own
definition in plain tensors.
"""

import json
import math
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch.nn.functional import normalize, relu

D, N = 16, 64
K = 5
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Case(NamedTuple):
    "A folder that was written, and what its SAE must be."

    path: Path
    formula: Callable  # of hidden states: activations and reconstruction
    reads: str
    replaces: str | None = None
    kind: str = "JumpReLUSAE"
    model: str | None = None
    l0: float | None = None


class Weights:
    "Random weights: `numbers` as the formulas take them, in float32; `saved` in the file's dtype."

    def __init__(self, dtype: torch.dtype, latents: int = N, width: int = D):
        self.dtype = dtype
        self.chance = torch.Generator().manual_seed(0)
        self.E = self(latents, width)
        self.b = self(latents)
        self.D = self(latents, width)
        self.D = self.rounded(self.D / self.D.norm(dim=1, keepdim=True))
        self.c = self(width)
        self.threshold = self(latents).abs()
        self.S = self(width, width)

    def __call__(self, *shape: int) -> torch.Tensor:
        return self.rounded(torch.randn(*shape, generator=self.chance))

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.dtype).float()

    def saved(self, **tensors: torch.Tensor) -> dict:
        return {n.replace("__", "."): x.to(self.dtype).contiguous() for n, x in tensors.items()}


def largest(z, k: int = K):
    "The k largest, and zero for what is negative."
    return torch.zeros_like(z).scatter(-1, (top := relu(z).topk(k)).indices, top.values)


def over(z, threshold):
    return relu(z) * (z > threshold)


def write(path: Path, tensors: dict, config=None, name: str = "config.json") -> Path:
    "Write weights, and a configuration beside them."
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **{n: x.float().numpy() for n, x in tensors.items()})
    elif path.suffix in (".pt", ".pth"):
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    if config is not None:
        text = yaml.safe_dump(config) if name.endswith("yaml") else json.dumps(config)
        (path.parent / name).write_text(text)
    return path


CASES: dict[str, tuple[Callable, tuple]] = {}


def case(*dtypes, **variants):
    "Register a function of a folder, a dtype and options as cases, one for each of `variants`."

    def register(function):
        name = function.__name__.replace("_", " ")
        for variant, options in (variants or {"": {}}).items():
            CASES[f"{name} {variant}".strip()] = (function, dtypes or FLOATS, options)
        return function

    return register


# Gemma Scope.

ONE = {
    "res": ("blocks.12.hook_resid_post", None),
    "mlp": ("blocks.12.hook_mlp_out", None),
    "att": ("blocks.12.attn.hook_z", None),
    "transcoders": ("blocks.12.ln2.hook_normalized", "blocks.12.hook_mlp_out"),
}


@case(torch.float32, **{site: dict(site=site) for site in ONE})
def gemma_scope_1(folder, dtype, site):
    w = Weights(dtype)
    path = folder / f"gemma-scope-2b-pt-{site}" / "layer_12/width_16k/average_l0_82/params.npz"
    write(path, dict(W_enc=w.E.T, W_dec=w.D, b_enc=w.b, b_dec=w.c, threshold=w.threshold))

    def formula(x):
        acts = over(x @ w.E.T + w.b, w.threshold)
        return acts, acts @ w.D + w.c

    reads, replaces = ONE[site]
    kind = "JumpReLUTranscoder" if replaces else "JumpReLUSAE"
    return Case(path, formula, reads, replaces, kind, "google/gemma-2-2b", 82)


TWO = {
    "resid_post": ("output", None, "hook_resid_post", None),
    "attn_out": ("self_attn.o_proj.input", None, "attn.hook_z", None),
    "mlp_out": ("post_feedforward_layernorm.output", None, "hook_mlp_out", None),
    "transcoder": (
        "pre_feedforward_layernorm.output",
        "post_feedforward_layernorm.output",
        "mlp.hook_in",
        "hook_mlp_out",
    ),
}
VARIANTS = {
    f"{site}{' config' if config else ''}{' affine' if affine else ''}": (
        dict(site=site, config=config, affine=affine)
    )
    for site in TWO
    for config in (False, True)
    for affine in (False, True)
    if not affine or site == "transcoder"
}


@case(**VARIANTS)
def gemma_scope_2(folder, dtype, site, config, affine):
    w = Weights(dtype)
    tensors = dict(w_enc=w.E.T, w_dec=w.D, b_enc=w.b, b_dec=w.c, threshold=w.threshold)
    tensors |= dict(affine_skip_connection=w.S) if affine else {}
    name = f"layer_9_width_16k_l0_small{'_affine' if affine else ''}"
    path = folder / "gemma-scope-2-270m-pt" / f"{site}_all" / name / "params.safetensors"
    hf_in, hf_out, point, point_out = TWO[site]
    about = dict(architecture="jump_relu", model_name="gemma-v3-270m-pt")
    about |= dict(hf_hook_point_in=f"model.layers.9.{hf_in}", affine_connection=affine)
    about |= dict(hf_hook_point_out=f"model.layers.9.{hf_out}") if hf_out else {}
    write(path, w.saved(**tensors), about if config else None)

    def formula(x):
        acts = over(x @ w.E.T + w.b, w.threshold)
        return acts, acts @ w.D + w.c + (x @ w.S if affine else 0)

    replaces = f"blocks.9.{point_out}" if point_out else None
    kind = "JumpReLUSkipTranscoder" if affine else "JumpReLUTranscoder"
    kind = kind if replaces else "JumpReLUSAE"
    return Case(path, formula, f"blocks.9.{point}", replaces, kind, "google/gemma-3-270m")


# Llama Scope and what its authors' library writes.

LLAMA = {
    "R": ("blocks.8.hook_resid_post",) * 2,
    "M": ("blocks.8.hook_mlp_out",) * 2,
    "A": ("blocks.8.hook_attn_out",) * 2,
    "TC": ("blocks.8.ln2.hook_normalized", "blocks.8.hook_mlp_out"),
}


@case(**{site: dict(site=site) for site in LLAMA})
def llama_scope(folder, dtype, site):
    w = Weights(dtype)
    w.D = w.rounded(w.D * (1 + w(N, 1).abs()))
    reads, replaces = LLAMA[site]
    norms = {"in": 6.3125, "out": 6.3125 if reads == replaces else 3.39}
    about = dict(hook_point_in=reads, hook_point_out=replaces, d_model=D, d_sae=N, top_k=50)
    about |= dict(act_fn="jumprelu", jump_relu_threshold=0.2021, norm_activation="dataset-wise")
    about |= dict(dataset_average_activation_norm=norms, sparsity_include_decoder_norm=True)
    about |= dict(use_decoder_bias=True, apply_decoder_bias_to_pre_encoder=False)
    place = folder / f"Llama3_1-8B-Base-L8{site}-8x"
    tensors = w.saved(encoder__weight=w.E, decoder__weight=w.D.T)
    tensors |= w.saved(encoder__bias=w.b, decoder__bias=w.c)
    write(place / "checkpoints" / "final.safetensors", tensors)
    (place / "hyperparams.json").write_text(json.dumps(about))
    f_in, f_out = (math.sqrt(D) / norm for norm in norms.values())

    def formula(x):
        decoder = w.D * f_in / f_out
        z = x @ w.E.T + w.b / f_in
        acts = relu(z) * (z * decoder.norm(dim=1) > 0.2021)
        return acts, acts @ decoder + w.c / f_out

    replaces = None if reads == replaces else replaces
    kind = "JumpReLUTranscoder" if replaces else "JumpReLUSAE"
    return Case(place, formula, reads, replaces, kind, "meta-llama/Llama-3.1-8B", 50)


SCOPIUM = {
    "jumprelu": dict(act_fn="jumprelu"),
    "topk": dict(act_fn="topk"),
    "relu": dict(act_fn="relu"),
    "topk transcoder": dict(act_fn="topk", transcode=True),
    "jumprelu inference": dict(act_fn="jumprelu", norm_activation="inference"),
    "relu without bias": dict(act_fn="relu", bias=False),
}


@case(**SCOPIUM)
def llamascopium(folder, dtype, act_fn, transcode=False, norm_activation="dataset-wise", bias=True):
    w = Weights(dtype)
    w.D = w.rounded(w.D * (1 + w(N, 1).abs()))
    reads = "blocks.3.ln2.hook_normalized" if transcode else "blocks.3.hook_resid_post"
    replaces = "blocks.3.hook_mlp_out" if transcode else reads
    about = dict(sae_type="sae", hook_point_in=reads, hook_point_out=replaces, d_model=D)
    about |= dict(expansion_factor=N / D, act_fn=act_fn, top_k=K, norm_activation=norm_activation)
    about |= dict(sparsity_include_decoder_norm=True, use_decoder_bias=bias, use_glu_encoder=False)
    tensors = w.saved(W_E=w.E.T, b_E=w.b, W_D=w.D) | (w.saved(b_D=w.c) if bias else {})
    if act_fn == "jumprelu":
        gate = w.rounded(w.threshold.log())
        tensors["activation_function.log_jumprelu_threshold"] = gate.to(dtype)
    norms = {reads: 8.0, replaces: 8.0 if reads == replaces else 2.5}
    for hook, norm in norms.items():
        tensors[f"dataset_average_activation_norm.{hook}"] = torch.tensor(norm)
    path = write(folder / "L3" / "sae_weights.safetensors", tensors, about)
    s_in, s_out = (math.sqrt(D) / norms[hook] for hook in (reads, replaces))
    if norm_activation == "inference":
        s_in, s_out = 1.0, 1.0
    rules = {
        "relu": relu,
        "topk": largest,
        "jumprelu": lambda z: over(z, gate.exp()),
    }

    def formula(x):
        norm = w.D.norm(dim=1)
        z = x * s_in @ w.E.T + w.b
        acts = rules[act_fn](z * norm) / norm
        y = (acts @ w.D + (w.c if bias else 0)) / s_out
        # latents are of plain states; those that are chosen by size, in units of their norms
        return acts / s_in * (norm if act_fn == "topk" else 1), y

    kind = {"relu": "StandardSAE", "topk": "TopKSAE", "jumprelu": "JumpReLUSAE"}[act_fn]
    kind = "TopKTranscoder" if transcode else kind
    l0 = K if act_fn == "topk" else None
    return Case(path, formula, reads, replaces if transcode else None, kind, l0=l0)


# sparsify and dictionary_learning.

SPARSIFY = {
    "SAE": {},
    "SAE old": dict(old=True),
    "SAE groupmax": dict(groups=True),
    "SAE with seeds": dict(module="h.0.attn/seed3"),
    "transcoder": dict(module="layers.3.mlp", transcode=True),
    "skip transcoder": dict(module="layers.3.mlp", transcode=True, skip=True),
    "groupmax skip transcoder": dict(module="layers.3.mlp", transcode=True, skip=True, groups=True),
}
MODULES = {
    "layers.10": "blocks.10.hook_resid_post",
    "h.0.attn/seed3": "blocks.0.attn.hook_out",
    "layers.3.mlp": "blocks.3.mlp.hook_out",
}


def one_of_each_group(z, k: int):
    "The largest of each of k groups of neighbours."
    in_groups = relu(z).unflatten(-1, (k, -1))
    return (in_groups * (in_groups == in_groups.amax(-1, keepdim=True))).flatten(-2)


@case(**SPARSIFY)
def sparsify(
    folder,
    dtype,
    module="layers.10",
    transcode=False,
    skip=False,
    groups=False,
    old=False,
):
    w = Weights(dtype)
    k = 8 if groups else K
    cfg = dict(expansion_factor=N // D, normalize_decoder=True, k=k, d_in=D, num_latents=0)
    if not old:
        cfg |= dict(multi_topk=False, transcode=transcode, skip_connection=skip)
        cfg |= dict(activation="groupmax" if groups else "topk")
    else:
        cfg |= dict(signed=False)
    tensors = w.saved(encoder__weight=w.E, encoder__bias=w.b, W_dec=w.D, b_dec=w.c)
    tensors |= w.saved(W_skip=w.S) if skip else {}
    path = folder / "run" / module / "sae.safetensors"
    write(path, tensors, cfg, "cfg.json")
    (folder / "run" / "config.json").write_text('{"model": "EleutherAI/pythia-160m", "lr": 1}')

    def formula(x):
        z = (x if transcode else x - w.c) @ w.E.T + w.b
        acts = one_of_each_group(z, k) if groups else largest(z)
        return acts, acts @ w.D + w.c + (x @ w.S.T if skip else 0)

    kind = "TopKSkipTranscoder" if skip else "TopKTranscoder"
    kind = kind if transcode else "GroupMaxSAE" if groups else "TopKSAE"
    reads = "blocks.3.mlp.hook_in" if transcode else MODULES[module]
    replaces = MODULES[module] if transcode else None
    return Case(path.parent, formula, reads, replaces, kind, "EleutherAI/pythia-160m", k)


CLASSES = {
    "AutoEncoder": "StandardSAE",
    "AutoEncoderNew": "StandardSAE",
    "GatedAutoEncoder": "GatedSAE",
    "JumpReluAutoEncoder": "JumpReLUSAE",
    "AutoEncoderTopK": "TopKSAE",
    "BatchTopKSAE": "JumpReLUSAE",
    "MatryoshkaBatchTopKSAE": "JumpReLUSAE",
}


def dictionary(w, name: str) -> tuple[dict, Callable]:
    "The tensors of a class of dictionary_learning, and its activations."
    linear = dict(encoder__weight=w.E, decoder__weight=w.D.T)
    plain = dict(W_enc=w.E.T, b_enc=w.b, W_dec=w.D, b_dec=w.c)
    biases = linear | dict(encoder__bias=w.b, b_dec=w.c)
    counts = dict(k=torch.tensor(K), threshold=torch.tensor(0.75))
    groups = dict(group_sizes=torch.tensor([16, 48]))
    gates = dict(decoder_bias=w.c, r_mag=w(N), gate_bias=w(N), mag_bias=w.b)

    def gated(x):
        z = (x - w.c) @ w.E.T
        return (z + gates["gate_bias"] > 0) * relu(gates["r_mag"].exp() * z + w.b)

    return {
        "AutoEncoder": (
            linear | dict(encoder__bias=w.b, bias=w.c),
            lambda x: relu((x - w.c) @ w.E.T + w.b),
        ),
        "AutoEncoderNew": (
            linear | dict(encoder__bias=w.b, decoder__bias=w.c),
            lambda x: relu(x @ w.E.T + w.b),
        ),
        "GatedAutoEncoder": (linear | gates, gated),
        "JumpReluAutoEncoder": (
            plain | dict(threshold=w.threshold),
            lambda x: over(x @ w.E.T + w.b, w.threshold),
        ),
        "AutoEncoderTopK": (biases | counts, lambda x: largest((x - w.c) @ w.E.T + w.b)),
        "BatchTopKSAE": (biases | counts, lambda x: over((x - w.c) @ w.E.T + w.b, 0.75)),
        "MatryoshkaBatchTopKSAE": (
            plain | counts | groups,
            lambda x: over((x - w.c) @ w.E.T + w.b, 0.75),
        ),
    }[name]


def archive(tensors: dict, dtype) -> dict:
    "Tensors by the names of the file, weights in the file's dtype, counts as they are."
    names = {name.replace("__", "."): x for name, x in tensors.items()}
    counts = {n: x for n, x in names.items() if not x.dim() or not x.is_floating_point()}
    return {n: x.to(dtype).contiguous() for n, x in names.items()} | counts


@case(torch.float32, torch.bfloat16, **{name: dict(name=name) for name in CLASSES})
def dictionary_learning(folder, dtype, name):
    tensors, acts_of = dictionary(w := Weights(dtype), name)
    trainer = dict(dict_class=name, activation_dim=D, dict_size=N, layer=12, lr=1e-4)
    trainer |= dict(lm_name="google/gemma-2-2b", submodule_name="resid_post_layer_12")
    trainer |= dict(k=K) if "TopK" in name else {}
    about = dict(trainer=trainer, buffer=dict(ctx_len=128, io="out", d_submodule=D))
    path = write(folder / "trainer_0" / "ae.pt", archive(tensors, dtype), about)

    def formula(x):
        acts = acts_of(x)
        return acts, acts @ w.D + w.c

    model, l0 = "google/gemma-2-2b", K if "TopK" in name else None
    return Case(path, formula, "blocks.12.hook_resid_post", None, CLASSES[name], model, l0)


PLACES = {
    "mlp": (dict(submodule_name="mlp_out_layer_3", layer=3), "out", "blocks.3.mlp.hook_out"),
    "attn": (dict(submodule_name="attn_out", layer=3), "out", "blocks.3.attn.hook_out"),
    "module": (dict(submodule_name="gpt_neox.layers.3"), "out", "blocks.3.hook_resid_post"),
    "input": (dict(submodule_name="resid_post_layer_3"), "in", "blocks.3.hook_resid_pre"),
}


@case(torch.float32, **{name: dict(place=name) for name in PLACES})
def dictionary_learning_at(folder, dtype, place):
    found = dictionary_learning(folder, dtype, "AutoEncoder")
    trainer, io, reads = PLACES[place]
    about = dict(trainer=dict(dict_class="AutoEncoder") | trainer, buffer=dict(io=io))
    (found.path.parent / "config.json").write_text(json.dumps(about))
    return found._replace(reads=reads, model=None)


@case(torch.float32)
def dictionary_learning_without_a_configuration(folder, dtype):
    found = dictionary_learning(folder, dtype, "AutoEncoder")
    path = folder / "mlp_out_layer1" / "10_32768" / "ae.pt"
    path.parent.mkdir(parents=True)
    found.path.rename(path)
    return found._replace(path=path.parent, reads="blocks.1.mlp.hook_out", model=None)


# circuit-tracer.

CIRCUITS = {
    "relu": {},
    "skip": dict(skip=True),
    "threshold": dict(gate=True, reads="ln2.hook_normalized"),
    "threshold skip": dict(gate=True, skip=True),
    "topk": dict(rule="topk", reads="hook_resid_mid"),
    "topk skip": dict(rule="topk", skip=True, replaces="mlp.hook_out"),
}


@case(**CIRCUITS)
def circuit_tracer(
    folder, dtype, skip=False, gate=False, rule=None, reads="mlp.hook_in", replaces="hook_mlp_out"
):
    w = Weights(dtype)
    tensors = w.saved(W_enc=w.E, W_dec=w.D, b_enc=w.b, b_dec=w.c)
    tensors |= w.saved(W_skip=w.S) if skip else {}
    tensors |= w.saved(activation_function__threshold=w.threshold) if gate else {}
    about = dict(model_name="Qwen/Qwen3-0.6B", model_kind="transcoder_set", scan="qwen")
    about |= dict(feature_input_hook=reads, feature_output_hook=replaces)
    about |= dict(activation=rule, k=60) if rule else {}
    for layer in (0, 4):
        path = write(folder / "set" / f"layer_{layer}.safetensors", tensors, about, "config.yaml")

    def formula(x):
        z = x @ w.E.T + w.b
        if rule == "topk":  # of 64 latents 60 are kept, so some are negative, and stay so
            top = z.topk(60)
            acts = torch.zeros_like(z).scatter(-1, top.indices, top.values)
        else:
            acts = over(z, w.threshold if gate else 0)
        return acts, acts @ w.D + w.c + (x @ w.S.T if skip else 0)

    name = ("JumpReLU" if gate else "TopK" if rule else "") + ("Skip" if skip else "")
    l0 = 60 if rule else None
    reads, replaces = f"blocks.4.{reads}", f"blocks.4.{replaces}"
    return Case(path, formula, reads, replaces, f"{name}Transcoder", "Qwen/Qwen3-0.6B", l0)


# Files that are one archive.

OPENAI = {
    "resid_post_mlp": "hook_resid_post",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_delta_attn": "hook_attn_out",
}


@case(**{f"{site} {act}": dict(site=site, act=act) for site in OPENAI for act in ("TopK", "ReLU")})
def openai(folder, dtype, site, act):
    w = Weights(dtype)
    tensors = w.saved(encoder__weight=w.E, latent_bias=w.b, decoder__weight=w.D.T, pre_bias=w.c)
    tensors |= dict(stats_last_nonzero=torch.zeros(N, dtype=torch.long), activation=act)
    if act == "TopK":
        tensors |= dict(activation_state_dict=dict(k=K, postact_fn="ReLU"))
    path = write(folder / f"{site}_v5_32k" / "autoencoders" / "6.pt", tensors)

    def formula(x):
        if act == "ReLU":
            acts = relu((x - w.c) @ w.E.T + w.b)
            return acts, acts @ w.D + w.c
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        acts = largest(((x - mean) / (std + 1e-5) - w.c) @ w.E.T + w.b)
        return acts, (acts @ w.D + w.c) * std + mean

    kind, l0 = ("TopKSAE", K) if act == "TopK" else ("StandardSAE", None)
    reads = f"blocks.6.{OPENAI[site]}"
    return Case(path, formula, reads, None, kind, "openai-community/gpt2", l0)


LINEAR = {
    "Goodfire 8B": dict(
        file="Llama-3.1-8B-Instruct-SAE-l19.pth", model="meta-llama/Llama-3.1-8B-Instruct", layer=19
    ),
    "Goodfire 70B": dict(
        file="Llama-3.3-70B-Instruct-SAE-l50.pt",
        model="meta-llama/Llama-3.3-70B-Instruct",
        layer=50,
    ),
    "DeepSeek": dict(
        file="DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
        model="deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        layer=19,
    ),
}


@case(**LINEAR)
def linear_layers(folder, dtype, file, model, layer):
    w = Weights(dtype)
    part = "" if "DeepSeek" in file else "_linear"
    names = {f"encoder{part}.weight": w.E, f"encoder{part}.bias": w.b}
    names |= {f"decoder{part}.weight": w.D.T, f"decoder{part}.bias": w.c}
    path = write(folder / file, w.saved(**names))

    def formula(x):
        acts = relu(x @ w.E.T + w.b)
        return acts, acts @ w.D + w.c

    reads = f"blocks.{layer}.hook_resid_post"
    return Case(path, formula, reads, None, "StandardSAE", model)


@case()
def qwen_scope(folder, dtype):
    w = Weights(dtype, latents=1024)
    place = folder / "models--Qwen--SAE-Res-Qwen3-1.7B-Base-W1K-L0_5" / "snapshots" / "0123abc"
    path = place / "layer7.sae.pt"
    write(path, w.saved(W_enc=w.E, W_dec=w.D.T, b_enc=w.b, b_dec=w.c))

    def formula(x):
        acts = largest(x @ w.E.T + w.b)
        return acts, acts @ w.D + w.c

    reads = "blocks.7.hook_resid_post"
    return Case(path, formula, reads, None, "TopKSAE", "Qwen/Qwen3-1.7B-Base", 5)


def e2e_tensors(w, *places: str) -> dict:
    one = dict(encoder__0__weight=w.E, encoder__0__bias=w.b, decoder__weight=3 * w.D.T)
    one |= dict(decoder__bias=w.c)
    return {f"{place}.{name}": x.clone() for place in places for name, x in w.saved(**one).items()}


@case()
def e2e_sae(folder, dtype):
    w = Weights(dtype)
    about = dict(tlens_model_name="gpt2-small", seed=0)
    for n in (90, 400):
        tensors = e2e_tensors(w, "blocks-6-hook_resid_pre")
        write(folder / "run" / f"samples_{n}.pt", tensors, about, "final_config.yaml")

    def formula(x):
        acts = relu((x - x.mean(-1, keepdim=True)) @ w.E.T + w.b)
        decoder = w.rounded(3 * w.D.T)
        return acts, acts @ normalize(decoder, dim=0).T + w.c

    reads = "blocks.6.hook_resid_pre"
    return Case(folder / "run", formula, reads, None, "StandardSAE", "openai-community/gpt2")


# SAELens' own.

TRANSCODERS = {
    "transcoder": "Transcoder",
    "skip_transcoder": "SkipTranscoder",
    "jumprelu_transcoder": "JumpReLUTranscoder",
    "jumprelu_skip_transcoder": "JumpReLUSkipTranscoder",
}


@case(**{name.replace("_", " "): dict(architecture=name) for name in TRANSCODERS})
def saelens(folder, dtype, architecture):
    w = Weights(dtype)
    skip, gate = "skip" in architecture, "jumprelu" in architecture
    tensors = dict(W_enc=w.E.T, b_enc=w.b, W_dec=w.D[:, :12], b_dec=w.c[:12])
    tensors |= dict(W_skip=w.S[:12]) if skip else {}
    tensors |= dict(threshold=w.threshold) if gate else {}
    about = dict(hook_name="blocks.3.mlp.hook_in", hook_name_out="blocks.3.hook_mlp_out")
    cfg = dict(architecture=architecture, d_in=D, d_sae=N, d_out=12, apply_b_dec_to_input=False)
    cfg |= dict(dtype=str(dtype)[6:], device="cpu", normalize_activations="none")
    cfg |= dict(metadata=about | dict(sae_lens_version="6.54.12", model_name="tiny"))
    path = write(folder / "sae_weights.safetensors", w.saved(**tensors), cfg, "cfg.json")

    def formula(x):
        acts = over(x @ w.E.T + w.b, w.threshold if gate else 0)
        return acts, acts @ w.D[:, :12] + w.c[:12] + (x @ w.S[:12].T if skip else 0)

    kind = TRANSCODERS[architecture]
    return Case(path.parent, formula, *about.values(), kind, "tiny")


def made(name: str, folder: Path, dtype=torch.float32) -> Case:
    function, _, options = CASES[name]
    return function(folder, dtype, **options)
