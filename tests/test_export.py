"""What is exported is read by plain code: transformers, SAELens, and circuit-tracer's own rule."""

import json

import pytest
import torch
import yaml
from conftest import random_sae, tiny
from safetensors.torch import load_file
from test_sites import transcoder
from transformers import AutoModelForCausalLM

from sae_lora.export import export_lines, merged, run_export, write_circuit_tracer
from sae_lora.files import UsageError
from sae_lora.lora import add_lora, lora_parameters
from sae_lora.sites import Site

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))


def adapted(name: str, **options):
    "A tiny model with a trained-looking adapter."
    lm = tiny(name)
    add_lora(lm, {1: random_sae()}, rank=2, **options)
    torch.manual_seed(1)
    for p in lora_parameters(lm).values():
        p.data += 0.1 * torch.randn_like(p)
    return lm


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("options", [dict(), dict(alpha=7, use_rslora=True)])
def test_a_merged_model_is_the_adapted_one(name, options):
    lm = adapted(name, **options)
    lm.generation_config.eos_token_id = [2, 5]
    plain = merged(lm)
    assert plain.generation_config.eos_token_id == [2, 5]
    torch.testing.assert_close(plain(IDS).logits, lm(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not any("lora_" in n or "base_layer" in n for n in plain.state_dict())


def test_what_cannot_be_merged_is_refused():
    with pytest.raises(UsageError, match="cannot be merged"):
        merged(adapted("llama", use_dora=True))


def own_rule(folder, layer: int, x):
    "A TopK or ReLU transcoder by circuit-tracer's definition."
    about = yaml.safe_load((folder / "config.yaml").read_text())
    w = load_file(folder / f"layer_{layer}.safetensors")
    a = torch.relu(x @ w["W_enc"].T + w["b_enc"])
    if about.get("activation") == "topk":
        values, at = a.topk(about["k"], dim=-1)
        a = torch.zeros_like(a).scatter(-1, at, values)
    y = a @ w["W_dec"] + w["b_dec"]
    return y + x @ w["W_skip"].T if "W_skip" in w else y


@torch.no_grad()
@pytest.mark.parametrize("skip", [False, True])
def test_a_set_of_transcoders_is_read_by_its_definition(skip, tmp_path):
    saes = {Site(i, "hook_mlp_out"): transcoder(seed=i, skip=skip) for i in range(3)}
    write_circuit_tracer(saes, "some/model", tmp_path / "set")
    about = yaml.safe_load((tmp_path / "set" / "config.yaml").read_text())
    assert about["model_kind"] == "transcoder_set" and about["feature_input_hook"] == "mlp.hook_in"
    x = torch.randn(4, 32)
    for site, sae in saes.items():
        torch.testing.assert_close(own_rule(tmp_path / "set", site.layer, x), sae(x))


def test_what_is_no_set_is_refused(tmp_path):
    one, other = transcoder(), transcoder(skip=True)
    with pytest.raises(UsageError, match="at every layer from 0 on"):
        write_circuit_tracer({Site(1, "hook_mlp_out"): one}, "m", tmp_path / "set")
    with pytest.raises(UsageError, match="alike"):
        both = {Site(0, "hook_mlp_out"): one, Site(1, "hook_mlp_out"): other}
        write_circuit_tracer(both, "m", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_the_folder_of_an_export(tmp_path, tiny_world):
    from sae_lens import SAE

    run, out = tiny_world / "run", tmp_path / "out"
    text = str(tiny_world / "texts" / "text.jsonl")
    found = run_export(run, out, text=text)
    assert abs(found["kl_of_merging"]) < 1e-5 and found["no_circuit_tracer"]
    assert json.loads((out / "export.json").read_text()) == found
    AutoModelForCausalLM.from_pretrained(out / "model")
    for name in found["saes"]:
        assert SAE.load_from_disk(out / "saes" / name).cfg.metadata.hook_name == name
    assert found["model"] in export_lines(found)
    (out / "mine.txt").write_text("mine")
    run_export(run, out, text=text)  # over an earlier export
    assert (out / "mine.txt").exists()
    (out / "export.json").unlink()
    with pytest.raises(UsageError):
        run_export(run, out, text=text)
