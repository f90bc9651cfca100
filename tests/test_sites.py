"""Sites within blocks: every spelling, the right module in every family, and splices there."""

import json
import os
import signal
import tempfile
import warnings

import pytest
import torch
from conftest import CONFIGS, random_sae, tiny
from worlds import tokenizer

from sae_lora.adapters import attach_adapter, save_adapter
from sae_lora.anatomy import FAMILIES, canonical, place, width_at
from sae_lora.files import Stopped, UsageError
from sae_lora.fit import check_fit, seen_and_replaced
from sae_lora.hidden import hidden, hidden_each
from sae_lora.latents import _into_stream
from sae_lora.lm import decoder_blocks
from sae_lora.lora import add_lora, lora_layers, lora_parameters, targets_of
from sae_lora.metrics import fidelity, sparsity
from sae_lora.models import prefix_layer
from sae_lora.sites import READ, REPLACED, Site, layer_before, point_of, site_of
from sae_lora.splice import Identity, check_saes, splice
from sae_lora.states import harvest
from sae_lora.train import fit_lora
from sae_lora.train_sae import fit_at

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS}
WITHIN = [name for name in CONFIGS if tiny(name).config.model_type in FAMILIES]
MLP = Site(1, "hook_mlp_out")


def lively(name: str, **changes):
    "A tiny model whose norms have gains that differ, so that one norm is not taken for another."
    lm = tiny(name)
    torch.manual_seed(5)
    for p in lm.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p)
    return lm


def transcoder(read: str = "blocks.1.mlp.hook_in", seed: int = 0, skip: bool = False):
    "A ReLU transcoder with random weights."
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.transcoder import (
        SkipTranscoder,
        SkipTranscoderConfig,
        Transcoder,
        TranscoderConfig,
    )

    about = SAEMetadata(hook_name=read, hook_name_out="blocks.1.hook_mlp_out", model_name="tiny")
    kind, config = (
        (SkipTranscoder, SkipTranscoderConfig) if skip else (Transcoder, TranscoderConfig)
    )
    sae = kind(config(32, 64, d_out=32, apply_b_dec_to_input=False, metadata=about))
    torch.manual_seed(seed)
    for p in sae.parameters():
        p.data = torch.randn_like(p) * 0.2
    return sae.eval().requires_grad_(False)


@pytest.mark.parametrize(
    "name, site",
    [
        ("12", 12),
        ("-1", -1),
        ("layers.12", 12),
        ("model.layers.12.output", 12),
        ("transformer.h.3", 3),
        ("gpt_neox.layers.3", 3),
        ("blocks.12.hook_resid_post", 12),
        ("blocks.0.hook_resid_pre", -1),
        ("L12R", 12),
        ("layers_output.5", 5),
        ("model.layers_output[5]", 5),
        ("blocks.12.hook_mlp_out", Site(12, "hook_mlp_out")),
        ("model.layers.12.post_feedforward_layernorm.output", Site(12, "hook_mlp_out")),
        ("layers.12.post_feedforward_layernorm", Site(12, "hook_mlp_out")),
        ("L8TC", Site(8, "hook_mlp_out")),
        ("L8M", Site(8, "hook_mlp_out")),
        ("L8A", Site(8, "hook_attn_out")),
        ("layers.3.mlp", Site(3, "mlp.hook_out")),
        ("mlps_output[7]", Site(7, "mlp.hook_out")),
        ("h.0.attn", Site(0, "attn.hook_out")),
        ("gpt_neox.layers.2.attention", Site(2, "attn.hook_out")),
        ("attentions_output.2", Site(2, "attn.hook_out")),
        ("blocks.12.attn.hook_z", Site(12, "attn.hook_z")),
        ("model.layers.9.self_attn.o_proj.input", Site(9, "attn.hook_z")),
        ("transformer.h.9.attn.c_proj.input", Site(9, "attn.hook_z")),
    ],
)
def test_every_spelling(name, site):
    assert site_of(name) == site


@pytest.mark.parametrize(
    "name", ["", "lm_head", "blocks.x.hook_mlp_out", "blocks.3.hook_q", "embed_tokens", "3.4.5"]
)
def test_what_is_no_site_is_refused(name):
    with pytest.raises(UsageError, match="not known"):
        site_of(name)


def test_what_is_only_read_is_no_site():
    for point in READ:
        assert point_of(f"blocks.3.{point}") == (3, point)
        with pytest.raises(UsageError, match="only read"):
            site_of(f"blocks.3.{point}")


def test_a_point_that_no_block_has_is_refused():
    with pytest.raises(UsageError, match="point 'hook_resid_post'; give one of"):
        Site(2, "hook_resid_post")


def test_sites_are_in_the_order_of_a_pass():
    every = [Site(1, p) for p in REPLACED]
    assert sorted([2, *reversed(every), 0, 1]) == [0, *every, 1, 2]
    assert min(every + [0]) == 0 and max(every) < 1 and layer_before(every[0]) == 0


def of_transformer_lens(lm, ids):
    "What TransformerLens' own hooks see in a model."
    from transformer_lens.model_bridge.sources.transformers import boot

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lm.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        bridge = boot(folder, dtype=torch.float32, device="cpu")
        return bridge.run_with_cache(ids)[1]


@torch.no_grad()
@pytest.mark.parametrize("name", WITHIN)
def test_sites_are_where_transformer_lens_has_them(name):
    lm = lively(name)
    if name in ("gpt2", "gpt_neox"):  # which know no such thing, but the bridge would believe it
        del lm.config.num_key_value_heads
    theirs, compared = of_transformer_lens(lm, IDS), 0
    for point in (*REPLACED, *READ):
        try:
            ours = hidden(lm, BATCH, Site(2, point))
        except UsageError:  # tested below
            continue
        if f"blocks.2.{point}" in theirs:
            wanted = theirs[f"blocks.2.{point}"].reshape(ours.shape)
            scale = float(wanted.abs().max())
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5 * max(scale, 1))
            compared += 1
    assert compared >= len(REPLACED)


def test_what_a_family_does_not_have():
    with pytest.raises(UsageError, match="has no blocks.2.ln2.hook_normalized"):
        place(tiny("olmo2"), Site(2, "ln2.hook_normalized"))
    with pytest.raises(UsageError, match="has no blocks.2.hook_resid_mid"):
        place(tiny("gpt_neox"), Site(2, "hook_resid_mid"))
    with pytest.raises(UsageError, match="not known for 'opt'.*give a number"):
        place(tiny("opt"), MLP)
    with pytest.raises(UsageError, match="layer 9 does not exist"):
        place(tiny("llama"), Site(9, "hook_mlp_out"))


@torch.no_grad()
@pytest.mark.parametrize("name", WITHIN)
def test_identity_changes_no_bit_at_any_site(name):
    lm = lively(name)
    full = lm(**BATCH).logits
    for point in REPLACED:
        site = Site(1, point)
        with splice(lm, {site: Identity(width_at(lm, site))}) as state:
            assert torch.equal(lm(**BATCH).logits, full)
        assert list(state.fired.values()) == [1]
    assert torch.equal(lm(**BATCH).logits, full)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_two_names_of_one_place(name):
    lm = tiny(name)
    both = {Site(1, "mlp.hook_out"): Identity(32), MLP: Identity(32)}
    if name == "gemma2":  # a norm stands between
        assert len(check_saes(lm, both)) == 2
    else:
        with pytest.raises(UsageError, match="two SAEs are given for blocks.1.hook_mlp_out"):
            check_saes(lm, both)
        assert canonical(lm, Site(1, "mlp.hook_out")) == MLP


def test_widths_are_those_of_the_site():
    lm = tiny("gemma2")  # four heads of width 8 are 32, as wide as the model
    lm.config.hidden_size = 40
    assert width_at(lm, Site(1, "attn.hook_z")) == 32 and width_at(lm, MLP) == 40
    with pytest.raises(UsageError, match="width 32 where .* hidden states of width 40"):
        check_saes(lm, {MLP: Identity(32)})


@torch.no_grad()
@pytest.mark.parametrize("name", WITHIN)
def test_two_sites_are_two_splices_in_any_order(name):
    lm = lively(name)
    saes = {MLP: random_sae(seed=1), Site(1, "hook_attn_out"): random_sae(seed=2), 2: random_sae()}
    with splice(lm, saes):
        together = lm(**BATCH).logits
    with splice(lm, dict(reversed(saes.items()))):
        assert torch.equal(lm(**BATCH).logits, together)
    first, second, third = saes
    with splice(lm, {third: saes[third]}), splice(lm, {first: saes[first]}):
        with splice(lm, {second: saes[second]}):
            assert torch.equal(lm(**BATCH).logits, together)
    assert not torch.allclose(together, lm(**BATCH).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("site", [MLP, Site(2, "attn.hook_z"), "transcoder"])
def test_generation_with_a_cache_and_padding(name, site):
    lm = lively(name)
    saes = {MLP: transcoder()} if site == "transcoder" else {site: random_sae()}
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    with splice(lm, saes):
        cached = lm.generate(IDS, **options, use_cache=True)
        assert torch.equal(lm.generate(IDS, **options, use_cache=False), cached)
        left = torch.cat([torch.zeros(2, 3, dtype=torch.long), IDS], 1)
        mask = (torch.arange(15) > 2).long().expand(2, -1)
        padded = lm.generate(left, attention_mask=mask, **options)
    assert torch.equal(padded[:, 15:], cached[:, 12:])


def relu_model():
    "A GPT-2 whose MLPs are ReLU networks, and the transcoder that the MLP of block 1 is."
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small = dict(vocab_size=97, n_positions=64, n_embd=32, n_layer=4, n_head=4, n_inner=64)
    config = GPT2Config(**small, activation_function="relu", bos_token_id=1)
    lm = GPT2LMHeadModel(config).eval().requires_grad_(False)
    lm.name_or_path, sae = "tiny-relu", transcoder()
    mlp = lm.transformer.h[1].mlp
    own = dict(W_enc=mlp.c_fc.weight, b_enc=mlp.c_fc.bias)
    sae.load_state_dict(own | dict(W_dec=mlp.c_proj.weight, b_dec=mlp.c_proj.bias))
    return lm, sae


def test_a_transcoder_that_is_the_mlp_costs_nothing():
    lm, sae = relu_model()
    for keep in ("special", "none"):
        with splice(lm, {MLP: sae}, keep), torch.no_grad():
            spliced = lm(**BATCH).logits
        torch.testing.assert_close(spliced, lm(**BATCH).logits, rtol=1e-5, atol=1e-5)
    found = fidelity(lm, {MLP: sae}, torch.cat([IDS] * 4))
    assert abs(found["gap"]) < 1e-6 and found["kl"]["spliced"] < 1e-6
    check_fit(lm, {MLP: sae}, BATCH, limit=1e-6)
    told = sparsity(lm, sae, MLP, IDS)
    assert told["fvu"] < 1e-6 and told["l0"] > 1


@torch.no_grad()
def test_the_dense_mlp_computes_kept_positions_alone():
    lm, sae = relu_model()
    rows = []
    lm.transformer.h[1].mlp.c_fc.register_forward_pre_hook(
        lambda module, args: rows.append(args[0].flatten(0, -2).shape[0])
    )
    with splice(lm, {MLP: sae}):
        lm(**BATCH)
    with splice(lm, {MLP: sae}, keep="none"):
        lm(**BATCH)
    lm(**BATCH)
    assert rows == [2, 24]  # the first position of both rows; nothing; everything


@torch.no_grad()
@pytest.mark.parametrize("name", WITHIN)
@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_reads_and_writes_where_it_should(name, skip):
    lm, seen = lively(name), []
    for point in READ:
        sae = transcoder(f"blocks.1.{point}", skip=skip)
        try:
            x = hidden(lm, BATCH, Site(1, point))
        except UsageError:
            continue
        handle = place(lm, MLP).module.register_forward_hook(lambda m, a, out: seen.append(out))
        with splice(lm, {MLP: sae}, keep="none"):
            lm(**BATCH)
        handle.remove()
        torch.testing.assert_close(seen.pop(), sae(x), rtol=1e-4, atol=1e-4)
        read, replaced = seen_and_replaced(lm, BATCH, sae, MLP)
        assert read.shape == replaced.shape == (2 * 11, 32)
    assert torch.equal(replaced, hidden(lm, BATCH, MLP)[:, 1:].flatten(0, 1))


def test_transcoders_where_they_cannot_be():
    lm = tiny("llama")
    for where in (1, Site(1, "hook_attn_out")):
        with pytest.raises(UsageError, match="it can replace an MLP alone"):
            check_saes(lm, {where: transcoder()})
    with pytest.raises(UsageError, match="reads blocks.1.mlp.hook_in; give one that reads"):
        check_saes(lm, {Site(2, "hook_mlp_out"): transcoder()})
    with pytest.raises(UsageError, match="reads blocks.1.hook_attn_out"):
        check_saes(lm, {MLP: transcoder("blocks.1.hook_attn_out")})


@torch.no_grad()
def test_several_sites_in_one_pass():
    lm = lively("gemma3")
    at = [
        0,
        *(Site(1, p) for p in sorted((*READ, *REPLACED), key=lambda p: Site(1, p))),
        1,
        "final",
    ]
    for site, h in zip(at, hidden_each(lm, BATCH, at)):
        assert torch.equal(h, hidden(lm, BATCH, site))
    states = harvest(lm, IDS, [Site(1, "attn.hook_z"), MLP, 2])
    assert [x.shape for x in states] == [(22, 32)] * 3
    assert torch.equal(states[1], harvest(lm, IDS, MLP))


@pytest.mark.parametrize(
    "name, point, parts",
    [
        ("llama", "attn.hook_z", {"o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("llama", "hook_attn_out", {"gate_proj", "up_proj", "down_proj"}),
        ("llama", "hook_mlp_out", set()),
        ("phi", "attn.hook_z", {"dense"}),
        ("phi", "hook_attn_out", set()),
        ("gpt2", "attn.hook_z", {"c_proj", "c_fc"}),
    ],
)
def test_adapters_after_a_site_within_a_block(name, point, parts):
    lm, site = tiny(name), Site(1, point)
    names = targets_of(lm, "after", {site: Identity(32)})
    assert {n.split(".")[-1] for n in names if ".1." in n} == parts
    assert not any(".0." in n for n in names) and any(".3." in n for n in names)
    add_lora(lm, {site: Identity(32)}, rank=2)
    assert prefix_layer(lm, {site: Identity(32)}) == 0 and min(lora_layers(lm)) == (2 - bool(parts))


def test_an_mlp_that_is_replaced_is_not_adapted():
    lm = tiny("llama")
    names = targets_of(lm, "all", {MLP: transcoder()})
    assert not any("layers.1.mlp" in n for n in names) and any(
        "layers.1.self_attn" in n for n in names
    )
    with pytest.raises(UsageError, match=r"layers \[0\] are all before .* blocks.1.hook_mlp_out"):
        targets_of(lm, [0], {MLP: transcoder()})
    with pytest.raises(UsageError, match="no linear that an adapter could go on"):
        targets_of(lm, [0, 1], {Site(0, "hook_attn_out"): random_sae(), MLP: transcoder()}, ["x"])


def test_the_adapter_of_the_projection_sees_what_the_splice_gives():
    lm, site = tiny("llama"), Site(1, "attn.hook_z")
    add_lora(lm, {site: Identity(32)}, rank=2)
    seen = []
    projection = decoder_blocks(lm)[1].self_attn.o_proj
    projection.lora_A["default"].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with splice(lm, {site: random_sae()}, keep="none"), torch.no_grad():
        lm(**BATCH)
        spliced = seen.pop()
    x = hidden(lm, BATCH, site)
    torch.testing.assert_close(spliced, random_sae()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["mlp", "heads", "transcoder", "several"])
def test_training_at_a_site(where, monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_LORA_CACHE", str(tmp_path))
    rows = torch.randint(3, 97, (16, 16), generator=torch.Generator().manual_seed(0))
    heads = {Site(1, "attn.hook_z"): random_sae()}
    saes = {
        "mlp": {MLP: random_sae()},
        "heads": heads,
        "transcoder": {MLP: transcoder()},
        "several": heads | {MLP: transcoder(), 2: random_sae()},
    }[where]
    trained = {}
    for how in (dict(), dict(cached=True), dict(fuse=True)):
        lm = lively("llama")
        add_lora(lm, saes, rank=2)
        before = fidelity(lm, saes, rows)["kl"]["spliced"]
        curve = fit_lora(lm, saes, rows, 1024, batch=4, lr=1e-2, precision="fp32", **how)
        trained[str(how)] = [p.detach().clone() for p in lora_parameters(lm).values()]
        assert fidelity(lm, saes, rows)["kl"]["adapted"] < before and len(curve) > 2
    plain, cached, fused = trained.values()
    for a, b, c in zip(plain, cached, fused):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a, c, rtol=1e-2, atol=1e-3)


def test_adapters_remember_sites(tmp_path):
    saes = {MLP: transcoder(), Site(2, "attn.hook_z"): random_sae(hook_name="blocks.2.attn.hook_z")}
    lm = tiny("llama")
    add_lora(lm, saes, rank=2)
    for name, p in lora_parameters(lm).items():
        p.data += 0.1 * torch.randn_like(p)
    save_adapter(lm, saes, tmp_path / "adapter")
    about = json.loads((tmp_path / "adapter" / "sae_lora.json").read_text())
    assert [e["site"] for e in about["saes"]] == ["blocks.1.hook_mlp_out", "blocks.2.attn.hook_z"]
    with splice(lm, saes), torch.no_grad():
        wanted = lm(**BATCH).logits
    again = tiny("llama")
    given = attach_adapter(again, tmp_path / "adapter", saes)
    with splice(again, given), torch.no_grad():
        torch.testing.assert_close(again(**BATCH).logits, wanted)
    wrong = dict(saes)
    wrong[Site(1, "hook_attn_out")] = wrong.pop(MLP)
    with pytest.raises(UsageError, match="at blocks.1.hook_mlp_out, not to none given there"):
        attach_adapter(tiny("llama"), tmp_path / "adapter", wrong)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(site="blocks.1.hook_q"), "not known"),
        (dict(site="blocks.2.hook_mlp_out"), "not in layer 1"),
        (dict(site="blocks.1.hook_resid_mid"), "only read"),
        (dict(site=7), "site is 7"),
    ],
)
def test_sites_in_a_changed_file_are_refused(changes, words, tmp_path):
    saes, lm = {MLP: random_sae(hook_name="blocks.1.hook_mlp_out")}, tiny("llama")
    add_lora(lm, saes, rank=2)
    save_adapter(lm, saes, tmp_path / "adapter")
    where = tmp_path / "adapter" / "sae_lora.json"
    about = json.loads(where.read_text())
    about["saes"][0] |= changes
    where.write_text(json.dumps(about))
    with pytest.raises(UsageError, match=words):
        attach_adapter(tiny("llama"), tmp_path / "adapter")


def test_a_stopped_run_at_a_site_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_LORA_CACHE", str(tmp_path))
    rows = torch.randint(3, 97, (16, 16), generator=torch.Generator().manual_seed(0))
    saes, found = {MLP: transcoder(skip=True), 2: random_sae()}, []
    for stop in (None, 4):
        lm = tiny("llama")
        add_lora(lm, saes, rank=2)
        given = dict(tokens=512, batch=4, lr=1e-2, precision="fp32")
        given |= dict(checkpoint=tmp_path / f"state-{stop}.safetensors")
        if stop:
            steps = []

            def stopping(step, *args):
                steps.append(step)
                if len(steps) == stop:
                    os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does

            with pytest.raises(Stopped):
                fit_lora(lm, saes, rows, **given, callback=stopping)
            assert given["checkpoint"].exists()
        fit_lora(lm, saes, rows, **given)
        found.append([p.detach().clone() for p in lora_parameters(lm).values()])
    for a, b in zip(*found):
        assert torch.equal(a, b)


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_learns_the_mlp(skip, tmp_path, monkeypatch):
    monkeypatch.setenv("SAE_LORA_CACHE", str(tmp_path))
    lm, _ = relu_model()
    rows = torch.randint(3, 97, (64, 32), generator=torch.Generator().manual_seed(1))
    options = dict(width=64, k=24, batch=256, lr=1e-2, skip=skip)
    sae, curve, n = fit_at(lm, rows, MLP, 60_000, transcoder=True, **options)
    assert n == 64 * 31 and sae.cfg.architecture() == f"topk_{'skip_' * skip}transcoder"
    assert (sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out) == (
        "blocks.1.mlp.hook_in",
        "blocks.1.hook_mlp_out",
    )
    measured = sparsity(lm, sae, MLP, rows)
    assert measured["fvu"] < 0.2 and measured["l0"] <= 24
    assert abs(measured["fvu"] - curve[-1]["loss"]) < 0.1
    check_fit(lm, {MLP: sae}, {"input_ids": rows[:8]})


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_latents_of_the_heads_write_through_the_projection(name):
    lm, sae = tiny(name), random_sae(hook_name="blocks.1.attn.hook_z")
    projection = place(lm, Site(1, "attn.hook_z")).module
    weight = projection.weight if name == "gpt2" else projection.weight.T
    torch.testing.assert_close(_into_stream(lm, sae, sae.W_dec), sae.W_dec @ weight)
    other = random_sae(hook_name="blocks.1.hook_mlp_out")
    assert _into_stream(lm, other, other.W_dec) is other.W_dec


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_special_tokens_keep_what_the_model_writes(name):
    "A row that begins with a BOS, and has another within."
    lm, ids = lively(name), IDS.clone()
    ids[:, 0] = ids[:, 6] = lm.config.bos_token_id
    own, seen = hidden(lm, dict(input_ids=ids), MLP), []
    handle = place(lm, MLP).module.register_forward_hook(lambda m, a, out: seen.append(out))
    with splice(lm, {MLP: transcoder()}):
        lm(ids)
    handle.remove()
    torch.testing.assert_close(seen[0][:, [0, 6]], own[:, [0, 6]], rtol=1e-5, atol=1e-5)
    others = [i for i in range(12) if i not in (0, 6)]
    assert not torch.isclose(seen[0][:, others], own[:, others], rtol=1e-3).all(-1).any()
