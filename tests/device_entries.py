"""What users do with the package, entry by entry, on any device: for the pretend one and for a GPU.

An entry is a function of a device and a dtype that calls public functions as a user does: the model
is on the device, and everything else is left where the package puts it (SAEs as `load_sae` gives
them, rows as `token_blocks` does). It returns numbers, which have to be those of the CPU.
"""

import importlib
import json
import os
import pkgutil
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import lru_cache, partial
from io import StringIO
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Callable, NamedTuple
from unittest.mock import patch

import conftest
import torch
from conftest import random_sae, tiny
from torch import Tensor, nn

import sae_lora

MODULES = [m.name for m in pkgutil.iter_modules(sae_lora.__path__) if m.name[0] != "_"]
PACKAGE = {name: importlib.import_module(f"sae_lora.{name}") for name in MODULES}
SAID = Counter(name for module in PACKAGE.values() for name in module.__all__)
HOMES = {n: module for module in PACKAGE.values() for n in module.__all__ if SAID[n] == 1}


class Names:
    "The public names of the package that one module alone has, wherever that is now."

    def __getattr__(self, name: str):
        return getattr(HOMES[name], name)


api = Names()


class Entry(NamedTuple):
    """Something to run on a device; the public functions it tries, as `module.name`; packages.

    Two right sums differ in their last digits. Where they are stored in bfloat16 on the way, some
    of them are `rounded` to different neighbours."""

    run: Callable
    covers: tuple
    needs: tuple
    rounded: bool

    @property
    def tolerance(self) -> float:
        "How far a result may be off, as a part of its size."
        return 1e-4 if self.rounded else 1e-5


ENTRIES: dict[str, Entry] = {}


def _run(function: Callable, more: tuple, device, dtype):
    return function(device, dtype, *more)


def covers(*names, each=((),), needs=(), rounded=False):
    "Register a function as an entry, or as one for each tuple of further arguments."

    def register(function):
        for more in each:
            name = "-".join([function.__name__, *map(str, more)])
            ENTRIES[name] = Entry(partial(_run, function, more), names, needs, rounded)
        return function

    return register


KINDS = [("topk",), ("jumprelu",)]


# What the entries share: a tokenizer, models, SAEs and text, all tiny and on disk.

SYLLABLES = ("an", "el", "ir", "os", "un", "ad", "em", "ig", "ol", "ur", "at")
WORDS = [f"{letter}{s}{letter}" for letter in "abcdefgh" for s in SYLLABLES]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "Ċ", ".", ":", "Ġ", "!"]


@lru_cache(None)
def _room() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def room(*parts: str) -> Path:
    "A path in a folder that goes when the process ends."
    return Path(_room().name).joinpath(*parts)


def fresh() -> Path:
    "A new folder for what an entry writes."
    return Path(tempfile.mkdtemp(dir=room()))


def tokenizer():
    "97 tokens; most are words of three letters and more, with the space before them."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = SPECIAL + [f"Ġ{w}" for w in WORDS]
    vocabulary = {t: i for i, t in enumerate(tokens)}
    tok = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tok.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def letter_texts() -> tuple[list[str], list[str]]:
    "Twelve texts for each of four letters, of words that begin with it; and the letters."
    draw = random.Random(1)
    letters = [letter for letter in "abcd" for _ in range(12)]
    words = {}
    for word in WORDS:
        words.setdefault(word[0], []).append(word)
    return [" ".join(draw.choices(words[c], k=6)) for c in letters], letters


@lru_cache(None)
def model_folder(architecture: str = "llama", layers: int = 4) -> Path:
    "A tiny model on disk. Words of a letter have something in common, for probes to find."
    with patch.dict(conftest.SMALL, num_hidden_layers=layers, max_position_embeddings=256):
        lm, folder = tiny(architecture), room(f"model-{architecture}-{layers}")
    g = torch.Generator().manual_seed(1)
    letters = torch.randn(8, 32, generator=g).repeat_interleave(len(SYLLABLES), 0)
    lm.get_input_embeddings().weight.data[len(SPECIAL) :] += letters
    lm.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def loaded(device, dtype, architecture: str = "llama") -> tuple:
    "Model and tokenizer, as a user has them."
    return api.load_lm(model_folder(architecture), dtype, device)


@lru_cache(None)
def sae_folder(kind: str = "topk", layer: int = 1) -> Path:
    "An SAE on disk that suits any hidden states: its latents are coordinates, up and down."
    sae = random_sae(kind, hook_name=api.hook_point(layer), seed=layer)
    q = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(layer)))[0]
    with torch.no_grad():
        sae.W_dec.copy_(torch.cat([q, -q]))
        sae.W_enc.copy_(sae.W_dec.T)
        if kind == "jumprelu":
            sae.threshold.add_(6)  # enough is lost for an adapter to win something back
    api.save_sae(sae, room(f"sae-{kind}-{layer}"))
    return room(f"sae-{kind}-{layer}")


def sae(kind: str = "topk", layer: int = 1):
    "An SAE as `load_sae` gives it: on the CPU."
    return api.load_sae(sae_folder(kind, layer))


@lru_cache(None)
def documents(n: int = 120) -> list[str]:
    "Texts of 6 to 40 words; each word is mostly of the letter of the one before."
    draw, out = random.Random(0), []
    for _ in range(n):
        words = [draw.choice(WORDS)]
        for _ in range(draw.randint(5, 39)):
            same = [w for w in WORDS if w[0] == words[-1][0]]
            words.append(draw.choice(same if draw.random() < 0.7 else WORDS))
        out.append(" ".join(words))
    return out


@lru_cache(None)
def text_file() -> Path:
    "The same kind of text as a file, long enough for rows of 256 tokens to be held out."
    lines = [json.dumps({"text": d}) for d in documents(900)]
    room("text.jsonl").write_text("\n".join(lines) + "\n")
    return room("text.jsonl")


ROWS = {"plain": {}, "padded": dict(pack=False), "per_document": dict(per_document=True)}


@lru_cache(None)
def blocks(kind: str = "plain"):
    "Rows of 16 tokens: end to end, one text each and padding, or each document by itself."
    return api.token_blocks(documents(), tokenizer(), 16, 24 * 16, 12 * 16, share=0.3, **ROWS[kind])


def numbers(lm, seed: int = 0):
    "Give the adapter of `lm` weights that do something."
    g = torch.Generator().manual_seed(seed)
    for p in api.lora_parameters(lm).values():
        p.data.copy_(torch.randn(p.shape, generator=g) * 0.1)


def adapted(device, dtype, kind: str = "topk", architecture: str = "llama") -> tuple:
    "A model with an adapter, its tokenizer, and SAEs as `load_sae` gives them."
    lm, tok = loaded(device, dtype, architecture)
    api.add_lora(lm, {1: sae(kind)}, rank=2)
    numbers(lm)
    return lm, tok, {1: sae(kind)}


RUN = dict(tokens=4 * 2 * 16, batch=2)  # four steps


def parameters(lm, name=None) -> Tensor:
    "The adapter's weights, as one vector."
    return torch.cat([p.detach().flatten() for p in api.lora_parameters(lm, name).values()])


def losses_of(curve: list[dict]) -> list[float]:
    "What a curve says that does not depend on the clock."
    return [row["loss"] for row in curve]


# Passes through the model.


@covers(
    "lm.load_lm",
    "lm.stack",
    "lm.decoder_blocks",
    "lm.special_ids",
    "hidden.hidden",
    "hidden.resume",
    "hidden.hidden_each",
    "lm.head",
    "lm.Head",
    "text.model_inputs",
    "text.token_ids",
    "text.Blocks",
    "text.token_blocks",
    "text.beginning",
    "text.separator",
    "text.targets",
    "text.digest",
    "text.seen_before",
    "lm.on_device",
    "lm.device_of",
    each=[("llama",), ("gemma3",), ("gpt2",)],
)
def passes(device, dtype, architecture):
    lm, _ = loaded(device, dtype, architecture)
    W, out = api.head(lm), {"special": api.special_ids(lm)}
    for kind in ROWS:
        batch = api.model_inputs(blocks(kind).train[:4])
        h = api.hidden(lm, batch, 1)
        with api.resume(lm, 1, h):
            final = api.hidden(lm, batch, "final")
        each = list(api.hidden_each(lm, batch, [-1, 2, "final"]))
        wanted = api.targets(blocks(kind).train[:4])
        ids = api.on_device(lm, batch)["input_ids"]
        named, seen = api.digest(ids) == api.digest(batch["input_ids"]), api.seen_before(ids, ids)
        out[kind] = dict(h=h, final=final, logits=W(final), each=each, wanted=wanted, named=named)
        out[kind]["seen"] = seen
    return out


@covers(
    "splice.splice",
    "splice.Splice",
    "splice.check_saes",
    "fit.check_fit",
    "fit.fvu",
    "fit.replaced",
    "splice.replaceable",
    "splice.positions_kept",
    "splice.Identity",
    "formats.load_sae",
    "sae.reconstruct",
    "sae.active",
    "sae.fingerprint",
    "sae.pieces",
    "splice.at_home",
    each=[(k, a) for k in ("topk", "jumprelu") for a in ("llama", "gemma2", "gpt2")],
)
def splices(device, dtype, kind, architecture):
    lm, _ = loaded(device, dtype, architecture)
    out = {}
    for rows in ROWS:
        batch = api.model_inputs(blocks(rows).train[:4])
        api.check_fit(lm, {1: sae(kind)}, batch)
        with api.splice(lm, {1: sae(kind), 2: sae(kind, 2)}) as state, torch.no_grad():
            spliced = api.hidden(lm, batch, "final")
        with api.splice(lm, {-1: api.Identity(32)}, keep="none"), torch.no_grad():
            plain = api.hidden(lm, batch, "final")
        out[rows] = dict(spliced=spliced, plain=plain, fired=sum(state.fired.values()))
    x = api.replaced(lm, batch, 1)
    own = api.check_saes(lm, {1: sae(kind)})[1]  # this puts an SAE where it belongs
    with torch.no_grad():
        found = api.reconstruct(own, x)
        active = PACKAGE["sae"].active(own, x.float())[0].sort().values if kind == "topk" else None
        with patch.object(PACKAGE["sae"], "PIECE", 64 * 5):  # five positions at a time
            parted = api.reconstruct(own, x)
    where = api.replaceable(lm, batch)
    return out | dict(
        x=x,
        found=found,
        active=active,
        parted=parted,
        fvu=api.fvu(x.float(), found.float()),
        where=where,
        fingerprint=api.fingerprint(own),
    )


@covers("splice.splice", "formats.load_sae", each=KINDS)
def generation(device, dtype, kind):
    lm, tok, saes = adapted(device, dtype, kind)
    ids = blocks().valid[:2, :6].to(device)  # Hugging Face's own function takes what is there
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    with api.splice(lm, saes):
        cached, plain = (lm.generate(ids, **options, use_cache=c) for c in (True, False))
    assert dtype != torch.float32 or torch.equal(cached, plain)
    return dict(cached=cached)


@covers(
    "kinds.Largest",
    "kinds.GroupMaxSAE",
    "kinds.GroupMaxSAEConfig",
    "kinds.TopKTranscoder",
    "kinds.TopKTranscoderConfig",
    "kinds.TopKSkipTranscoder",
    "kinds.TopKSkipTranscoderConfig",
    "sae.reconstruct",
    "sae.active",
    each=[("groupmax",), ("topk_transcoder",), ("topk_skip_transcoder",)],
)
def kinds_that_saelens_lacks(device, dtype, kind):
    make, configure = PACKAGE["kinds"].KINDS[kind]
    wide = {} if kind == "groupmax" else dict(d_out=24)
    torch.manual_seed(0)
    own = make(configure(d_in=32, d_sae=64, k=8, **wide)).requires_grad_(False)
    for p in own.parameters():
        p.copy_(torch.randn_like(p))
    x = torch.randn(4, 6, 32).to(dtype)
    own, x = own.to(device), x.to(device)
    with torch.no_grad():
        active = PACKAGE["sae"].active(own, x)[0].sort().values
        with patch.object(PACKAGE["sae"], "PIECE", 64 * 5):
            parted = api.reconstruct(own, x)
        return dict(found=api.reconstruct(own, x), active=active, parted=parted)


@covers("sae.save_sae", "formats.load_sae", "sae.fingerprint")
def saes_saved_from_the_device(device, dtype):
    lm, _ = loaded(device, dtype)
    own, folder = api.check_saes(lm, {1: sae()})[1], fresh()
    api.save_sae(own, folder / "whole")
    api.save_sae(own, folder / "half", half=True)
    again, half = (api.load_sae(folder / n) for n in ("whole", "half"))
    assert api.fingerprint(again) == api.fingerprint(own)
    return dict(half=half.W_dec)


# Adapters.


@covers(
    "lora.add_lora",
    "lora.lora_parameters",
    "lora.lora_layers",
    "lora.without_lora",
    "lora.only",
    "lm.linears",
    each=[("llama",), ("gemma2",), ("gpt2",)],
)
def adapters_on_and_off(device, dtype, architecture):
    lm, _ = loaded(device, dtype, architecture)
    batch, out = api.model_inputs(blocks().train[:4]), {}
    for name in ("one", "two"):
        api.add_lora(lm, {1: sae()}, rank=2, name=name)
        numbers(lm)
    with torch.no_grad():
        for name in ("one", "two"):
            with api.only(lm, name):
                out[name] = api.hidden(lm, batch, "final")
        with api.without_lora(lm):
            out["base"] = api.hidden(lm, batch, "final")
    return out | dict(layers=PACKAGE["lora"].lora_layers(lm), first=parameters(lm, "one"))


@covers(
    "adapters.save_adapter",
    "adapters.attach_adapter",
    "adapters.load_adapter",
    "adapters.Adapted",
    each=KINDS,
)
def adapters_saved_and_loaded(device, dtype, kind):
    lm, _, saes = adapted(device, dtype, kind)
    folder, rows = fresh(), blocks().valid
    report = api.fidelity(lm, saes, rows)
    api.save_adapter(lm, saes, folder, metrics=report)
    lm, _ = loaded(device, dtype)
    attached = api.attach_adapter(lm, folder)
    with api.splice(lm, attached):
        inside = api.hidden(lm, api.model_inputs(rows[:2]), "final")
    again = api.fidelity(lm, attached, rows)
    lm, _, saes, spliced = api.load_adapter(folder, dtype=dtype, device=device)
    with spliced(), torch.no_grad():
        loaded_inside = api.hidden(lm, api.model_inputs(rows[:2]), "final")
    curve = api.fit_lora(
        api.load_adapter(folder, True, dtype=dtype, device=device).lm,
        saes,
        blocks().train,
        **RUN,
    )
    return dict(
        report=report, again=again, inside=inside, loaded=loaded_inside, curve=losses_of(curve)
    )


# Measures.


@covers(
    "metrics.fidelity",
    "metrics.fidelities",
    "metrics.token_losses",
    "metrics.fidelity_of",
    "metrics.held_out_loss",
    "metrics.sparsity",
    "models.four_models",
    "models.prefix_layer",
    "metrics.bootstrap",
    "loss.losses",
    "loss.joined",
    "loss.cross_entropy",
    "metrics.usual",
    "models.tagged",
    each=[*(("topk", r) for r in ROWS), ("jumprelu", "padded")],
)
def measures(device, dtype, kind, rows):
    lm, _, saes = adapted(device, dtype, kind)
    valid, out = blocks(rows).valid, {"shared": api.prefix_layer(lm, saes)}

    def fresh_saes():
        return {1: sae(kind)}  # on the CPU, for each measure again

    out["fidelity"] = api.fidelity(lm, fresh_saes(), valid)
    out["fidelities"] = api.fidelities(lm, fresh_saes(), valid, ["default"])
    tokens = api.token_losses(lm, fresh_saes(), valid, batch=5)
    out["tokens"] = torch.stack([x for kind in ("ce", "kl") for x in tokens[kind].values()])
    out["some"] = api.fidelity_of(tokens, which=api.token_ids(valid)[:, 1:] % 2 == 0)
    out["held_out"] = api.held_out_loss(lm, fresh_saes(), valid)()
    out["sparsity"] = api.sparsity(lm, sae(kind), 1, valid)
    with torch.no_grad():
        batch = api.model_inputs(valid[:2])
        out["four"] = api.four_models(lm, fresh_saes(), batch)
    return out


@covers("saebench.loss_recovered", "saebench.Zero", "saebench.explained_variance", each=KINDS)
def recovery(device, dtype, kind):
    out = {}
    for clean in ("base", "adapted_unspliced"):
        lm, _, saes = adapted(device, dtype, kind)
        out[clean] = api.loss_recovered(lm, saes, blocks("padded").valid, clean)
    x = api.replaced(lm, api.model_inputs(blocks().valid[:4]), 1).float()
    with torch.no_grad():
        found = api.reconstruct(api.check_saes(lm, saes)[1], x)
    return out | dict(explained=api.explained_variance(x, found))


@covers(
    "states.harvest",
    "states.known_states",
    "arithmetic.arithmetic",
    "arithmetic.prepared",
    "arithmetic.attention",
    "arithmetic.frozen_in_bf16",
    "arithmetic.hold_memory",
    each=[("llama",), ("gpt2",)],
    rounded=True,
)
def cached_states(device, dtype, architecture):
    lm, _ = loaded(device, dtype, architecture)
    rows, out = blocks("padded").train, {}

    def means(x):
        return torch.stack([x.float().mean(0), x.float().abs().mean(0)])  # x is in bfloat16

    out["one"] = means(api.harvest(lm, rows, 1))
    for again in (False, True):  # once to fill the cache, once to read it
        out[f"each {again}"] = [means(x) for x in api.harvest(lm, rows, [0, 2], cached=True)]
    api.add_lora(lm, {1: sae()}, rank=2)
    numbers(lm)
    known = api.known_states(lm, rows, 1, api.arithmetic(device))
    return out | dict(known=known)


# Training.


TRAINED = dict(recipe="fast", layers=(1,), kind="topk", architecture="llama", adapter={})


def trained(device, dtype, rows="plain", **given) -> dict:
    "An adapter trained from scratch: weights and losses. What is not in `TRAINED` is an option."
    how = SimpleNamespace(**TRAINED | {n: v for n, v in given.items() if n in TRAINED})
    options = {name: value for name, value in given.items() if name not in TRAINED}
    lm, _ = loaded(device, dtype, how.architecture)
    saes = {i: sae(how.kind, i) for i in how.layers}
    api.add_lora(lm, saes, rank=2, **how.adapter)
    curve = api.fit_lora(lm, saes, blocks(rows).train, recipe=how.recipe, **RUN | options)
    return dict(parameters=parameters(lm), losses=losses_of(curve))


@covers(
    "objective.distill",
    "objective.distill_each",
    "objective.published_each",
    "objective.Objective",
    "loss.kl_loss",
    "loss.kl_rows",
    "lm.head",
    each=KINDS,
)
def objectives(device, dtype, kind):
    lm, _, _ = adapted(device, dtype, kind)
    W, out = api.head(lm), {}
    batch = api.model_inputs(blocks("padded").train[:4])
    for name in ("ours", "published"):
        if name == "ours":
            found = api.distill(lm, {1: sae(kind)}, W, batch)
        else:
            objective = api.Objective(W, keep="none")
            (found,) = api.published_each(lm, {None: {1: sae(kind)}}, objective, batch)
        found.backward()
        out[name] = found, [p.grad for p in api.lora_parameters(lm).values()]
        lm.zero_grad()
    logits = torch.randn(2, 3, 97, generator=torch.Generator().manual_seed(0)).to(device)
    return out | dict(rows=api.kl_rows(logits[0], logits[1], 1.0, 5.0))


@covers(
    "train.fit_lora",
    "train.fit_kl",
    "devices.same_random_numbers",
    "train.trainable_lora",
    "loop.loop",
    "loop.order",
    "loop.schedule",
    "processes.average",
    "processes.own_rows",
    "lora.add_lora",
    "lora.lora_parameters",
    "arithmetic.compiled",
    each=[("topk", "llama"), ("topk", "gemma2"), ("topk", "gpt2"), ("jumprelu", "llama")],
)
def training(device, dtype, kind, architecture):
    return trained(device, dtype, kind=kind, architecture=architecture)


WAYS = {
    "padded": dict(rows="padded"),
    "per_document": dict(rows="per_document"),
    "two_saes": dict(layers=(1, 2)),
    "before_the_blocks": dict(layers=(-1,)),
    "nothing_kept": dict(keep="none"),
    "held_unspliced": dict(keep_unspliced=0.5),
    "published": dict(recipe="published", adapter=dict(alpha=4), batch=1),
}


@covers("train.fit_lora", each=[(w,) for w in WAYS])
def ways_of_training(device, dtype, way):
    return trained(device, dtype, **WAYS[way])


@covers("train.fit_lora", "metrics.held_out_loss")
def training_measured(device, dtype):
    lm, _ = loaded(device, dtype)
    api.add_lora(lm, {1: sae()}, rank=2)
    measure = api.held_out_loss(lm, {1: sae()}, blocks().valid)
    curve = api.fit_lora(lm, {1: sae()}, blocks().train, **RUN, measure=measure)
    return [(row["loss"], row["ce"]) for row in curve]


@covers(
    "train.fit_lora",
    "arithmetic.arithmetic",
    "arithmetic.frozen_in_bf16",
    "arithmetic.attention",
)
def mixed_precision(device, dtype):
    found = trained(device, dtype, precision="bf16")
    assert found["parameters"].isfinite().all()
    return {}  # the numbers depend on which operations are in bfloat16, and a CPU has its own list


@covers("train.fit_loras", "states.known_states", each=[("computed",), ("cached",)])
def side_by_side(device, dtype, how):
    lm, _ = loaded(device, dtype)
    students = {f"s{i}": {1: sae(kind)} for i, kind in enumerate(("topk", "jumprelu"))}
    for name, own in students.items():
        api.add_lora(lm, own, rank=2, name=name)
    rows = blocks("padded").train[:4]  # twice
    curves = api.fit_loras(lm, students, rows, **RUN, cached=how == "cached")
    return dict(parameters=parameters(lm), losses={n: losses_of(c) for n, c in curves.items()})


class Stopped(Exception):
    pass


def check_resumed(whole: Tensor, again: Tensor):
    "After a stop a run ends where an unbroken one does; to the bit, where sums have an order."
    if whole.device.type in ("cuda", "mps"):  # several threads add to one number, in any order
        assert (whole - again).norm() <= 1e-3 * whole.norm(), "not the same after resuming"
    else:
        assert torch.equal(whole, again), "not the same after resuming"


def stopped_at(step: int):
    "A callback that stops a run as a kill would, after its state was saved."

    def callback(row):
        if row["step"] == step:
            raise Stopped

    return callback


@covers(
    "checkpoint.Checkpoint",
    "loop.Descent",
    "loop.Watch",
    "checkpoint.kept_run",
    "checkpoint.Progress",
    "loop.loop",
    "train.fit_lora",
    each=[("fast", "adamw"), ("published", "adamw"), ("fast", "muon")],
)
def stopped_and_resumed(device, dtype, recipe, optimizer):
    ends, file = [], fresh() / "state.safetensors"
    for stops in (None, 2, None):  # unbroken; stopped; resumed
        lm, _ = loaded(device, dtype)
        api.add_lora(lm, {1: sae()}, rank=2, **api.RECIPES[recipe].adapter)
        options = RUN | dict(recipe=recipe, batch=1 if recipe == "published" else 2)
        options["optimizer"] = optimizer
        options["checkpoint"] = file if ends else None
        if stops:
            options["callback"] = stopped_at(stops)
        elif ends:
            torch.manual_seed(99)  # what happened since is no matter
            torch.rand(5, device=device)
        try:
            curve = api.fit_lora(lm, {1: sae()}, blocks().train, **options)
        except Stopped:
            pass
        ends.append((parameters(lm), losses_of(curve)))
    assert api.kept_run(file)["recipe"] == recipe
    (unbroken, curve), _, (resumed, again) = ends
    check_resumed(unbroken, resumed)
    check_resumed(torch.tensor(curve, device=device), torch.tensor(again, device=device))
    return dict(fast=unbroken) if recipe == "fast" else {}  # dropout draws from the device


@covers(
    "variants.finetune_sae",
    "variants.fit_both",
    "variants.fit_linear",
    "variants.LinearAdapter",
    "variants.set_trainable",
    each=KINDS,
)
def saes_trained(device, dtype, kind):
    rows, out = blocks("padded").train, {}
    lm, _ = loaded(device, dtype)
    saes = {1: sae(kind)}
    out["finetuned"] = losses_of(api.finetune_sae(lm, saes, rows, **RUN)), saes[1].W_dec
    saes = {1: sae(kind)}
    curve = api.finetune_sae(lm, saes, rows, parameters=["b_dec"], **RUN)
    out["part"] = losses_of(curve), saes[1].b_dec
    linear, curve = api.fit_linear(lm, {1: sae(kind)}, rows, rank=3, **RUN)
    out["linear"] = losses_of(curve), linear[1].B, api.fidelity(lm, linear, blocks().valid)
    api.add_lora(lm, {1: sae(kind)}, rank=2)
    saes = {1: sae(kind)}
    curve = api.fit_both(lm, saes, rows, **RUN)
    out["both"] = losses_of(curve), saes[1].W_dec, parameters(lm)
    linear, curve = api.fit_linear(lm, {1: sae(kind)}, rows, rank=3, beside=True, **RUN)
    out["beside"] = losses_of(curve), linear[1].B, parameters(lm)
    return out


@covers("starts.start_at", each=[("inputs",), ("error",), ("gradient",)])
def begun(device, dtype, start):
    lm, _ = loaded(device, dtype)
    api.add_lora(lm, {1: sae()}, rank=2)
    for name in ("plain", "padded"):
        api.start_at(lm, {1: sae()}, blocks(name).train[:4], start)
    found = api.lora_parameters(lm)
    for p in found.values():
        assert p.device.type == torch.device(device).type and p.dtype == torch.float32
    return {n: p.norm() for n, p in found.items()}  # directions have two signs


@covers("train_sae.random_at", "new_saes.unscaled_transcoder")
def random_saes(device, dtype):
    lm, _ = loaded(device, dtype)
    site = api.Site(1, "hook_mlp_out")
    saes = {site: api.random_at(lm, site, 64, 8, transcoder=True)}
    return dict(weights=saes[site].W_dec, fidelity=api.fidelity(lm, saes, blocks().valid))


@covers("train_sae.untrained_sae", "train_sae.fit_e2e", "new_saes.new_sae", "new_saes.unscaled")
def saes_end_to_end(device, dtype):
    lm, _ = loaded(device, dtype)
    new = api.untrained_sae(lm, 1, blocks().train, 64, 8)
    trained, curve = api.fit_e2e(lm, 1, blocks().train, width=64, k=8, **RUN)
    return dict(
        new=new.W_enc,
        trained=trained.W_dec,
        losses=losses_of(curve),
        sparsity=api.sparsity(lm, trained, 1, blocks().valid),
    )


@covers(
    "train_sae.fit_sae",
    "train_sae.SAEOptions",
    "new_saes.unscaled",
    "new_saes.training_loss",
    "states.harvest",
    "loop.loop",
)
def saes_for_hidden_states(device, dtype):
    lm, _ = loaded(device, dtype)
    x, file = api.harvest(lm, blocks().train, 1), fresh() / "state.safetensors"
    options = dict(tokens=1280, width=64, k=8, batch=128, dead_after=300, points=5)
    with chosen(device, dtype):  # nothing here says where to train
        whole, curve = api.fit_sae(x, **options)
        try:
            api.fit_sae(x, **options, checkpoint=file, callback=stopped_at(4))
        except Stopped:
            pass
        again, _ = api.fit_sae(x, **options, checkpoint=file)
    check_resumed(whole.W_dec, again.W_dec)
    return dict(
        W_dec=whole.W_dec,
        losses=losses_of(curve),
        sparsity=api.sparsity(lm, whole, 1, blocks().valid),
    )


@covers(
    "stream.fit_stream",
    "stream.Stream",
    "stream.StreamOptions",
    "shuffle.Buffer",
    "shuffle.Slots",
    "shuffle.Passes",
    "learner.Learner",
    "learner.check_training",
    "new_saes.blank_sae",
    "new_saes.centred",
    "states.replaceable_states",
    "metrics.stray_from",
    rounded=True,
)
def saes_from_a_stream(device, dtype):
    lm, _ = loaded(device, dtype)
    rows, file = blocks().train, fresh() / "state.safetensors"
    specs = [dict(site=1, width=64, k=8)]
    specs += [dict(site=api.Site(2, "hook_mlp_out"), width=64, k=8, transcoder=True, skip=True)]
    options = dict(tokens=768, batch=128, buffer=256, dead_after=300, points=5)
    whole = api.fit_stream(lm, rows, specs, **options)
    try:
        api.fit_stream(lm, rows, specs, **options, checkpoint=file, callback=stopped_at(4))
    except Stopped:
        pass
    again = api.fit_stream(lm, rows, specs, **options, checkpoint=file)
    out = {}
    for i, ((sae, curve), (other, _)) in enumerate(zip(whole, again)):
        check_resumed(sae.W_dec, other.W_dec)
        out[f"{i}"] = sae.W_dec, losses_of(curve)
    return out


# Sites within blocks.


def transcoder(device, dtype, read: str, layer: int = 2):
    "A transcoder of the MLP of a layer, as a file gives it: on the CPU."
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.transcoder import SkipTranscoder, SkipTranscoderConfig

    hooks = dict(hook_name=f"blocks.{layer}.{read}", hook_name_out=f"blocks.{layer}.hook_mlp_out")
    about = dict(apply_b_dec_to_input=False, metadata=SAEMetadata(**hooks))
    made = SkipTranscoder(SkipTranscoderConfig(32, 64, d_out=32, **about))
    torch.manual_seed(3)
    for p in made.parameters():
        p.data = torch.randn(p.shape) * 0.2
    return made.eval().requires_grad_(False)


@covers(
    "fit.seen_and_replaced",
    "anatomy.at_site",
    "anatomy.normalised",
    "hidden.watched",
    "hidden.with_forwards",
    each=[(a,) for a in ("llama", "gemma2", "gpt2")],
)
def splices_within_blocks(device, dtype, architecture):
    lm, _ = loaded(device, dtype, architecture)
    out = {}
    heads, mlp = api.Site(1, "attn.hook_z"), api.Site(2, "hook_mlp_out")
    saes = {heads: sae(), mlp: transcoder(device, dtype, "ln2.hook_normalized")}
    for rows in ROWS:
        batch = api.model_inputs(blocks(rows).train[:4])
        with api.splice(lm, saes), torch.no_grad():
            spliced = api.hidden(lm, batch, "final")
        out[rows] = spliced, api.seen_and_replaced(lm, batch, saes[mlp], mlp)
    api.add_lora(lm, saes, rank=2)
    out["losses"] = losses_of(api.fit_lora(lm, saes, blocks().train, **RUN))
    out["sparsity"] = api.sparsity(lm, saes[mlp], mlp, blocks().valid)
    return out


@covers("new_saes.new_transcoder", "new_saes.unscaled_transcoder", "train_sae.fit_at")
def transcoders_trained(device, dtype):
    lm, _ = loaded(device, dtype)
    site, options = api.Site(1, "hook_mlp_out"), dict(width=64, k=8, batch=128, points=5)
    made, curve, _ = api.fit_at(
        lm, blocks().train, site, 1280, transcoder=True, skip=True, **options
    )
    gathered = api.harvest(lm, blocks().train, [api.Site(1, "mlp.hook_in"), site])
    x, y = (states.to(device) for states in gathered)
    fresh_one, *factors = api.new_transcoder(x, y, width=64, k=8)
    fresh_one = dict(b_enc=fresh_one.b_enc, factors=factors)
    return dict(W_dec=made.W_dec, W_skip=made.W_skip, losses=losses_of(curve), fresh=fresh_one)


@covers(
    "export.merged",
    "export.merged_weights",
    "export.kl_of_merging",
    "export.write_circuit_tracer",
    "export.run_export",
    "cli.export",
)
def exports(device, dtype):
    lm, _ = loaded(device, dtype)
    saes, folder = {1: sae()}, fresh()
    api.add_lora(lm, saes, rank=2)
    plain, rows = api.merged(lm), blocks().valid
    with torch.no_grad():
        final = api.hidden(plain, api.model_inputs(rows), "final")
    coder = transcoder(device, dtype, "mlp.hook_in", layer=0)
    api.write_circuit_tracer({api.Site(0, "hook_mlp_out"): coder}, "tiny", folder / "set")
    api.save_adapter(lm, saes, folder / "adapter")
    with chosen(device, dtype):
        told = api.run_export(folder / "adapter", folder / "out", tokens=128, length=32)
    arguments = [folder / "adapter", "--to", folder / "again", "--length", 32]
    again = command(device, dtype, "export", *arguments)
    assert again["saes"] == told["saes"]
    return dict(kl=api.kl_of_merging(lm, plain, saes, rows), final=final, tokens=told["tokens"])


# Steering, latents and the measures of SAEBench.

SETS = {
    "positive": [" ".join(WORDS[i : i + 5 + i]) for i in range(4)],
    "other": [" ".join(WORDS[20 + i : 27 + 2 * i]) for i in range(3)],
    "more": [" ".join(WORDS[40 + i : 46 + 3 * i]) for i in range(3)],
}


def loudest(device, dtype) -> int:
    "A latent that fires."
    lm, _ = loaded(device, dtype)
    f = api.firing(lm, sae(), 1, blocks().valid, list(range(64)))
    return int((f > 0).float().mean((0, 1)).argmax())


@covers(
    "steering.steer",
    "steering.Steered",
    "steering.steering_effect",
    "steering.tune_alpha",
    "steering.steering_changes",
    "steering.scaled_change",
    "steering.mean_interval",
    "steering.log_likelihoods",
    "text.text_rows",
    each=KINDS,
)
def steered(device, dtype, kind):
    lm, tok, saes = adapted(device, dtype, kind)
    rows = api.text_rows(SETS["positive"], tok)
    with api.steer(lm, sae(kind), 1, 5, 0.7):
        inside = api.log_likelihoods(lm, rows)
    tuned = api.tune_alpha(
        lm, tok, partial(api.steer, lm, sae(kind), 1, 5), SETS, alphas=(0.1, 1.0)
    )
    adding = partial(api.steer, lm, sae(kind), 1, 5, size=2.0)
    effect = api.steering_effect(lm, tok, adding, SETS, 0.5)
    means = {}
    for kind_of_score, sides in effect.items():
        means[kind_of_score] = {}
        for side, by in sides.items():
            own = {model: v["mean"] for model, v in by.items()}
            means[kind_of_score][side] = own | dict(scale=100.0)  # that of the means
    return dict(inside=inside, tuned=tuned, effect=means)


@covers(
    "latents.firing",
    "latents.latents_at",
    "latents.positives",
    "latents.passages",
    "latents.passage_texts",
    each=KINDS,
)
def firings(device, dtype, kind):
    lm, tok = loaded(device, dtype)
    rows, latent = blocks("padded").valid, loudest(device, dtype)
    with torch.no_grad():
        at = api.latents_at(lm, sae(kind), 1, rows)
    return dict(
        at=at,
        firing=api.firing(lm, sae(kind), 1, rows, [latent, 3]),
        text=api.positives(lm, tok, sae(kind), 1, latent, rows, n=3),
    )


@covers(
    "agreement.agreement",
    "cards.latent_cards",
    "cards.cards_page",
    "latents.latents_in_model",
    "latents.promotes",
    "latents.some_latents",
    "latents.output_scores",
    "latents.persistence",
    each=KINDS,
)
def cards_of_latents(device, dtype, kind):
    lm, tok, _ = adapted(device, dtype, kind)
    rows, out = blocks("padded").valid, {}
    chosen = api.some_latents(lm, sae(kind), 1, rows, 3, low=0.02, high=0.9)
    two = {1: sae(kind), 2: sae(kind, 2)}
    out["agreement"] = api.agreement(lm, two, rows, top=3)
    out["promotes"] = api.promotes(lm, tok, sae(kind), chosen)
    out["scores"] = api.output_scores(lm, sae(kind), 1, rows).nan_to_num()
    out["persistence"] = api.persistence(lm, sae(kind), 1, rows).nan_to_num()
    made = api.latent_cards(lm, tok, {2: sae(kind, 2)}, {2: chosen}, rows)
    assert "latent-cards" in api.cards_page(made)
    shown = [(c["rate"], c["top_overlap"], c["promotes"]) for c in made]
    return out | dict(chosen=chosen, cards=shown)


@covers(
    "agreement.latent_changes",
    "explorer.explored",
    "explorer.continuation",
    "explorer.explorer_files",
    each=KINDS,
)
def latents_explored(device, dtype, kind):
    lm, tok, _ = adapted(device, dtype, kind)
    rows, later = blocks("padded").valid, {2: sae(kind, 2)}
    pair = ("base", "adapted_unspliced")
    found = api.explored(lm, tok, later, 2, rows, latents=8, steered=1)
    assert "index.html" in api.explorer_files(found)
    assert api.continuation(lm, tok, WORDS[0], 2)
    return dict(changes=api.latent_changes(lm, later, 2, rows, pair))


@covers(
    "probing.pooled",
    "probing.probe",
    "probing.split_by_class",
    "probing.balanced",
    "probing.fitted_probe",
    "probing.top_latents",
    "removal.Points",
    "removal.tpp",
    "removal.scr",
    "latents.decoder",
    each=KINDS,
    needs=("sklearn",),
)
def probes(device, dtype, kind):
    lm, tok = loaded(device, dtype)
    own = sae(kind)
    texts, y = letter_texts()
    X, F = api.pooled(lm, tok, own, 1, texts)
    D = api.decoder(own)  # which is on the device by now
    one = torch.tensor([c in "ab" for c in y])
    other = torch.arange(len(y)) % 2 == 0
    top = api.top_latents(F, one, 3)
    return dict(
        X=X,
        F=F,
        D=D,
        top=top,
        probe=api.probe(F, y, (2, None)),
        tpp=api.tpp(X, F, D, y, n=3),
        scr=api.scr(X, F, D, one, other, n=3),
    )


@covers(
    "absorption.absorption",
    "absorption.absorbed",
    "absorption.letter_words",
    "absorption.main_latents",
    each=KINDS,
    needs=("sklearn",),
)
def absorptions(device, dtype, kind):
    lm, tok = loaded(device, dtype)
    found = api.absorption(lm, tok, sae(kind), 1, letters="abcdef", n=11)
    assert dtype != torch.float32 or found["letters"], "no letter was found: nothing was tried"
    # Fractions depend on scikit-learn's fit, which stops at 1e-4; which latents it needs does not.
    main = {c: (r["main"], r["words"]) for c, r in found["letters"].items()}
    own = api.check_saes(lm, {1: sae(kind)})[1]
    with torch.no_grad():
        h, f, _ = api.latents_at(lm, own, 1, blocks().valid[:2])
        x, f = h[:, 3:].flatten(0, 1).float(), f[:, 3:].flatten(0, 1).float()
        here = api.absorbed(x, f, api.decoder(own), own.W_dec[0], [0, 1])
    return dict(main=main, here=here)


# Benchmarks.

PAIRS = [(f"{a}.", f"{b}.") for a, b in zip(documents()[:6], documents()[6:12])]


@lru_cache(None)
def benchmark_data() -> Path:
    "A benchmark of a few sentences in the form of BLiMP."
    path = room("data", "blimp", "wh_island.jsonl")
    path.parent.mkdir(parents=True)
    lines = [json.dumps(dict(sentence_good=a, sentence_bad=b)) for a, b in PAIRS]
    path.write_text("\n".join(lines) + "\n")
    return room("data")


@covers(
    "tasks.benchmark",
    "tasks.benchmark_all",
    "tasks.recovered",
    "benchmark_files.local_tasks",
    "benchmark_files.Family",
    "models.as_model",
    "models.models_of",
    each=KINDS,
    needs=("lm_eval", "datasets"),
)
def benchmarks(device, dtype, kind):
    lm, tok, saes = adapted(device, dtype, kind)
    options = dict(data=benchmark_data(), batch_size=4)
    one = api.benchmark(lm, tok, "blimp_wh_island", {1: sae(kind)}, **options)
    four = api.benchmark_all(lm, tok, "blimp_wh_island", saes, **options)
    shared = api.recovered(four, "blimp_wh_island")["lost"]
    return dict(one=one, four=four, lost=shared)


# Commands and experiments: here the package chooses the device.


@contextmanager
def chosen(device, dtype):
    "Inside, the package takes `device` and `dtype` where a user names none; a list of the models."
    given, load = [], api.load_lm

    def load_lm(model="smollm2-135m", dtype=dtype, **options):
        lm, tok = load(model, dtype, **options)
        given.append(lm)
        return lm, tok

    with ExitStack() as stack:
        for name, stand_in in (("default_device", lambda: str(device)), ("load_lm", load_lm)):
            for module in PACKAGE.values():
                if hasattr(module, name):
                    stack.enter_context(patch.object(module, name, stand_in))
        yield given


def on(lms: list, device) -> bool:
    "Whether all models were put on the device."
    kind = torch.device(device).type
    return bool(lms) and all(p.device.type == kind for lm in lms for p in lm.parameters())


CLOCK = {
    "train_seconds",
    "tokens_per_second",
    "first_step_seconds",
    "step_seconds",
    "evaluate_seconds",
    "check_seconds",
    "evaluate_seconds_per_token",
    "peak_memory_bytes",
    "memory_bytes",
    "device_memory_bytes",
    "warnings",
    "versions",
    "device",
    "source",
    "dtype",
}


def lasting(report):
    "A report without what depends on the machine, the clock or the folder."
    if isinstance(report, list):
        return [lasting(r) for r in report]
    if isinstance(report, dict):
        return {k: lasting(v) for k, v in report.items() if k not in CLOCK}
    return report


def command(device, dtype, *arguments) -> dict:
    "The report of a `sae-lora` command."
    said, argv = StringIO(), ["sae-lora", *map(str, arguments), "--json"]
    with chosen(device, dtype) as lms, patch.object(sys, "argv", argv), redirect_stdout(said):
        try:
            api.main()
        except SystemExit as stop:
            assert not stop.code, f"exit code {stop.code}"
    assert on(lms, device), f"{arguments[0]} did not put its model on {device}"
    return lasting(json.loads(said.getvalue()))


def run_options(*saes) -> list:
    "Arguments of `adapt` and `check` for a small run."
    specs = [x for s in saes for x in ("--sae", s)]
    return [
        *specs,
        "--model",
        model_folder(),
        "--text",
        text_file(),
        "--length",
        16,
        "--rank",
        2,
        "--tokens",
        160,
        "--valid-tokens",
        256,
    ]


COMMANDS = (
    "adapt.run_adapt",
    "adapt.ready",
    "adapt.short_check",
    "report.report",
    "report.held_out",
    "report.check_length",
    "report.longest_row",
    "report.run_folder",
    "options.parse_saes",
    "options.parse_layers",
    "options.parse_batch",
    "cli.main",
    "check.preflight",
    "check.base_loss",
    "check.beginning_losses",
    "check.beginnings",
    "check.tried",
    "check.timed_steps",
    "check.step_rows",
    "check.expected",
    "train.fuses",
    "check.warnings_of",
    "devices.peak_memory",
    "devices.memory_of",
    "devices.checked_device",
    "devices.free_memory",
    "devices.room_for",
    "devices.weight_bytes",
    "check.promised_l0",
)
SPECS = {"one": [("topk", 1)], "two": [("topk", 1), ("jumprelu", 2)]}


@covers(
    *COMMANDS,
    "cli.adapt",
    "cli.evaluate",
    "adapters.attach_adapter",
    "files.free_folder",
    "report.write_report",
    "report.measure_again",
    "check.summary",
    each=[(s,) for s in SPECS],
)
def adapt_and_evaluate(device, dtype, specs):
    folder = fresh()
    options = run_options(*(sae_folder(*s) for s in SPECS[specs]))
    made = command(device, dtype, "adapt", "--out", folder / "run", *options)
    measured = command(
        device, dtype, "evaluate", folder / "run", "--text", text_file(), "--valid-tokens", 256
    )
    return dict(made=made, measured=measured)


@covers("cli.adapt", "adapt.run_adapt")
def adapt_as_published(device, dtype):
    options = [*run_options(sae_folder()), "--recipe", "published"]
    made = command(device, dtype, "adapt", "--out", fresh() / "run", *options)
    return dict(base=made["ce"]["base"], spliced=made["ce"]["spliced"])  # dropout is the device's


@covers("cli.check", "adapt.long_check", "check.preflight", "model_card.no_share")
def checked(device, dtype):
    return command(device, dtype, "check", *run_options(sae_folder()))


@covers("check.preflight", "check.timed_steps", "check.tried")
def a_check_leaves_no_trace(device, dtype):
    lm, tok = loaded(device, dtype)
    saes, rows = {1: sae()}, blocks().valid  # making these draws random numbers, the first time
    there = torch if device == "cpu" else torch.get_device_module(device)
    torch.manual_seed(5)
    before = torch.get_rng_state(), there.get_rng_state()
    found = api.preflight(lm, tok, saes, rows, dict(rank=2, lora_dropout=0.1))
    for state, was in zip((torch.get_rng_state(), there.get_rng_state()), before):
        assert torch.equal(state, was), "random numbers after a check are others than without"
    assert not api.lora_parameters(lm)
    return lasting(found)


@covers("cli.train_sae", "sae_run.run_train_sae", "sae_run.measure_sae", "sae_run.sae_card")
def train_sae(device, dtype):
    return command(
        device,
        dtype,
        "train-sae",
        "--out",
        fresh() / "sae",
        "--model",
        model_folder(),
        "--text",
        text_file(),
        "--layer",
        1,
        "--width",
        64,
        "--k",
        8,
        "--tokens",
        1024,
        "--batch",
        128,
        "--text-tokens",
        2048,
        "--valid-tokens",
        768,
    )


@contextmanager
def small_demo():
    "The model, the SAE and the text of `demo` are others inside: the command has no options."

    def data_path(*parts):
        return sae_folder(layer=14)

    with (
        patch.object(PACKAGE["pretrained"], "embedded", lambda name: model_folder(layers=16)),
        patch.object(PACKAGE["formats"], "data_path", data_path),
        patch.object(PACKAGE["text"], "corpus", lambda source: documents(900)),
    ):
        yield


@covers(
    "cli.demo",
    "terminal.shaded",
    "terminal.show",
    "report.sentence",
    "report.stretches",
    "model_card.won_back",
    *COMMANDS[:5],
)
def demo(device, dtype):
    with small_demo():
        report = command(device, dtype, "demo", "--out", fresh() / "run", "--tokens", 1024)
    from rich.console import Console

    said = StringIO()
    api.show(report, Console(file=said))
    lm, tok, saes = adapted(device, dtype)
    rows = blocks().valid
    for found in api.stretches(rows, api.token_losses(lm, saes, rows), width=5):
        api.shaded(tok, Console(file=said), **found)
    assert "closed" in said.getvalue() and "spliced → adapted" in said.getvalue()
    return report


WORLD = dict(length=16, text_tokens=24 * 16, valid_tokens=256)


@covers(
    "experiments.world",
    "experiments.gather",
    "experiments.sae_steps",
    "experiments.trained_sae",
    "experiments.saes_at",
    "experiments.with_adapters",
    "experiments.adapted_rows",
    "experiments.cacheable",
    "results.provenance",
    "results.Results",
)
def experiment(device, dtype):
    spec = dict(layer=1, width=64, k=8, tokens=2048)
    world = dict(model=str(model_folder()), text=str(text_file()), **WORLD)
    runs = [
        world | dict(rank=r, layers="after", tokens=128, recipe="fast", seed=0, sae=spec)
        for r in (1, 2)
    ]
    with chosen(device, dtype) as lms, patch.dict(os.environ, SAE_LORA_RESULTS=str(fresh())):
        api.world.cache_clear()
        for step in api.sae_steps(runs)[0]:
            step.work()
        api.gather(runs)
        rows = list(api.adapted_rows(runs)) + list(api.adapted_rows(runs[:1]))
        recalled = list(api.adapted_rows(runs[:1]))
        api.world.cache_clear()
    assert on(lms, device) and api.provenance()["device"]
    for row in rows + recalled:
        row.pop("train_seconds")
        row.pop("sae_seconds")
    assert compared(recalled[0]["ce"], rows[-1]["ce"])[0] < 1e-6
    return rows


def small_run(**own) -> dict:
    "The parameters of a row on a tiny model."
    world = dict(model=str(model_folder()), text=str(text_file()), **WORLD)
    run = dict(sae=dict(layer=1, width=64, k=8, tokens=2048), rank=2, tokens=128, seed=0)
    return world | run | own


@contextmanager
def small_rows(device, dtype):
    "Inside, worlds are on the device, rows go to a folder of their own, and no world is kept."
    with chosen(device, dtype) as lms, patch.dict(os.environ, SAE_LORA_RESULTS=str(fresh())):
        api.world.cache_clear()
        yield lms
        api.world.cache_clear()


@covers(
    "ways.way_rows",
    "ways.by_way",
    "ways.layers_of_way",
    "ways.ground",
    "ways.Ground",
    "ways.losses_of",
    "ways.which_fire",
    "ways.same_latents",
    each=[("LoRA near",), ("LoRA + SAE",), ("linear",), ("end-to-end",)],
    needs=("sklearn",),
)
def way(device, dtype, name):
    texts, y = letter_texts()
    asked = small_run(way=name, near=1, keep_unspliced=0.0, data="sample", agreement_rows=4)
    PACKAGE["ways"]._ground.cache_clear()
    with (
        small_rows(device, dtype) as lms,
        patch.object(PACKAGE["ways"], "labelled", lambda *a: (texts, y)),
    ):
        (row,) = api.way_rows([asked | dict(probe_texts=12)])
    PACKAGE["ways"]._ground.cache_clear()
    assert on(lms, device)
    row.pop("seconds")
    return {k: row[k] for k in ("held", "news", "spliced", "jaccard")}


@covers(
    "recipe_study.changed",
    "recipe_study.variant_rows",
    "recipe_study.rate_rows",
    "recipe_study.idea_rows",
    "recipe_study.hardest",
)
def variant(device, dtype):
    changes = dict(lr=3e-4, times_b=8.0, layers=[2])
    ideas = [dict(hard=True, average=0.5, beside=True), dict(use_dora=True, average=0.5)]
    with small_rows(device, dtype) as lms:
        rows = list(api.variant_rows([small_run(changes=changes)]))
        rows += api.rate_rows([small_run(batch=2, lr=lr) for lr in (1e-3, 4e-3)])
        rows += api.idea_rows([small_run(changes=c) for c in ideas])
    assert on(lms, device)
    for row in rows:
        row.pop("seconds")
        row.pop("tuning", None)  # shares, quotients of small differences
    return rows


@covers("replacement.stages_of", "replacement.fit_curriculum", "replacement.replacement_rows")
def replacement_model(device, dtype):
    coder = dict(width=64, k=8, tokens=2048, transcoder=True, skip=True)
    specs = [dict(layer=i) | coder for i in (1, 2)]
    with small_rows(device, dtype) as lms:
        runs = [small_run(sae=specs, stages=n) | dict(tokens=m) for n, m in ((1, 0), (2, 128))]
        rows = list(api.replacement_rows(runs))
    assert on(lms, device)
    for row in rows:
        row.pop("train_seconds", None)
    return rows


# What a run of the entries needs, what is seen of it, and how numbers are compared.


def fresh_cache() -> Path:
    "A new cache; only the docstrings, which take a minute to read, are those read before."
    cache, kept = fresh(), PACKAGE["files"].cache_path("text")
    kept.mkdir(parents=True, exist_ok=True)
    (cache / "text").symlink_to(kept)
    return cache


@contextmanager
def conditions(mixed: bool = False):
    "Inside, the cache is new, and `auto` means bfloat16 products if `mixed`, else float32's."
    with (
        patch.dict(os.environ, SAE_LORA_CACHE=str(fresh_cache())),
        patch.object(PACKAGE["arithmetic"], "bf16_pays", lambda device="cpu": mixed),
    ):
        yield


def _ours(f) -> bool:
    return getattr(f, "__module__", "").startswith("sae_lora.")


def _called(f) -> bool:
    return isinstance(f, (FunctionType, type)) or hasattr(f, "__wrapped__")


def public() -> dict[str, object]:
    "The functions and classes that the package offers, as `module.name`."
    found = {
        f"{short}.{name}": getattr(module, name)
        for short, module in PACKAGE.items()
        for name in module.__all__
    }
    return {name: f for name, f in found.items() if _ours(f) and _called(f)}


class Recorder:
    "A function that leaves its name when it is called."

    def __init__(self, function, name: str, seen: set):
        self.function = function
        self.name = name
        self.seen = seen

    def __call__(self, *args, **kwargs):
        self.seen.add(self.name)
        return self.function(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self.function, name)


@contextmanager
def recorded(seen: set):
    "Inside, the names of the public functions that are called gather in `seen`."
    wrapped = {
        id(f): Recorder(f, name, seen) for name, f in public().items() if not isinstance(f, type)
    }
    with ExitStack() as stack:
        for module in PACKAGE.values():
            for name, value in list(vars(module).items()):
                if id(value) in wrapped:
                    stack.enter_context(patch.object(module, name, wrapped[id(value)]))
        yield


PRODUCTS = [
    (torch, "matmul"),
    (torch, "mm"),
    (torch, "addmm"),
    (torch, "bmm"),
    (torch, "baddbmm"),
    (torch, "einsum"),
    (Tensor, "matmul"),
    (Tensor, "__matmul__"),
    (Tensor, "mm"),
    (Tensor, "bmm"),
    (nn.functional, "linear"),
    (nn.functional, "embedding_bag"),
]


def _watched(product: Callable, where: set):
    "A product of matrices that notes where it is called with two that are on the CPU."

    def watched(*args, **kwargs):
        operands = [a for a in args if isinstance(a, Tensor) and a.is_floating_point()][:2]
        if all(a.is_cpu and a.dim() > 1 for a in operands):
            where.add(_caller())
        return product(*args, **kwargs)

    return watched


@contextmanager
def products_on_cpu(where: set):
    "Inside, lines that multiply matrices on the CPU gather in `where`: a device should do that."
    with ExitStack() as stack:
        for owner, name in PRODUCTS:
            watched = _watched(getattr(owner, name), where)
            stack.enter_context(patch.object(owner, name, watched))
        yield


def _caller() -> str:
    "The line of the package that is being run, as `module.py:number`."
    frame = sys._getframe(2)
    while frame and Path(frame.f_code.co_filename).parent.name != "sae_lora":
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "elsewhere"


def flat(value, path: str = "") -> dict:
    "What an entry returned, as a CPU tensor, a text or none for each path; numbers together."
    if isinstance(value, dict) and value and all(isinstance(v, float) for v in value.values()):
        value = list(value.values())
    if isinstance(value, dict):
        parts = [flat(v, f"{path}/{k}") for k, v in value.items()]
    elif isinstance(value, (list, tuple)) and not all(isinstance(v, float) for v in value):
        parts = [flat(v, f"{path}/{i}") for i, v in enumerate(value)]
    elif isinstance(value, (Tensor, list, tuple, float, int)):
        return {path: torch.as_tensor(value).detach().cpu().double()}
    else:
        return {path: value}
    return {k: v for part in parts for k, v in part.items()}


# Small differences of losses that are compared themselves, and quotients of them.
QUOTIENTS = ("gap", "gap_closed", "kl_closed", "ci95")


def compared(here, there) -> tuple[float, str]:
    "The largest difference of two results, relative to the size of the numbers, and where it is."
    a, b = flat(here), flat(there)
    assert a.keys() == b.keys(), f"only one has {sorted(a.keys() ^ b.keys())[:5]}"
    worst = (0.0, "")
    for path, x in a.items():
        if not isinstance(x, Tensor):
            assert x == b[path], f"{path}: {x!r} and {b[path]!r}"
        if not isinstance(x, Tensor) or set(path.split("/")) & set(QUOTIENTS):
            continue
        assert x.shape == b[path].shape, f"{path}: {tuple(x.shape)} and {tuple(b[path].shape)}"
        apart = float((x - b[path]).norm()) / max(float(x.norm()), 1e-6)
        worst = max(worst, (apart if apart == apart else float("inf"), path))
    return worst


def not_finite(result) -> list[str]:
    "The paths of a result at which there is a number that is none."
    return [
        path
        for path, x in flat(result).items()
        if isinstance(x, Tensor) and not bool(x.isfinite().all())
    ]


# Entries in which matrices are multiplied on the CPU, rightly.
ON_CPU = {
    "probes": "points and latents of texts are on the CPU, where scikit-learn needs them",
}


def tried(name: str, device, dtype) -> dict:
    "What came of one entry: its result, or the error; and products of matrices on the CPU."
    began, products = time.process_time(), set()
    try:
        with conditions(mixed=dtype == torch.bfloat16), products_on_cpu(products):
            result = ENTRIES[name].run(device, dtype)
        found = dict(result=result, error=None)
    except (Exception, SystemExit) as e:
        frames = [(Path(f.filename), f.lineno) for f in traceback.extract_tb(e.__traceback__)]
        of_package = [f"{f.name}:{n}" for f, n in frames if f.parent.name == "sae_lora"]
        where = of_package or [f"{f.name}:{n}" for f, n in frames]
        error = f"{type(e).__name__}: {str(e)[:600]} ({' > '.join(where[-4:])})"
        found = dict(result=None, error=error)
    wrong = sorted(products) if name.split("-")[0] not in ON_CPU else []
    return found | dict(products=wrong, seconds=time.process_time() - began)


def judged(here: dict, there: dict) -> dict:
    "What came of an entry on a device, and how far its numbers are from the CPU's."
    about = {k: there[k] for k in ("error", "products", "seconds")} | dict(cpu=here["seconds"])
    if here["error"]:
        return about | dict(error=f"on the CPU: {here['error']}")
    if there["error"]:
        return about
    try:
        apart, path = compared(here["result"], there["result"])
    except AssertionError as e:
        return about | dict(error=str(e)[:600])
    return about | dict(apart=apart, path=path)
