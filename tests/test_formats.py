"""SAEs come in many formats and go out in one; adapters are plain PEFT.

Both are read by the libraries they belong to.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_sae, tiny
from safetensors.torch import save_file

from sae_lora.adapters import attach_adapter, load_adapter, save_adapter
from sae_lora.files import UsageError
from sae_lora.fit import check_fit
from sae_lora.formats import load_sae
from sae_lora.lm import load_lm
from sae_lora.lora import add_lora, lora_parameters
from sae_lora.sae import fingerprint, reconstruct, save_sae
from sae_lora.sites import layer_of
from sae_lora.splice import splice

X = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard", "gated"])
def test_every_architecture_goes_out_and_comes_back(architecture, tmp_path):
    from sae_lens import SAE

    sae = random_sae(architecture)
    save_sae(sae, tmp_path / "sae", card="# a card")
    again = load_sae(tmp_path / "sae")
    assert (
        fingerprint(again) == fingerprint(sae)
        and layer_of(again) == 1
        and (tmp_path / "sae" / "README.md").exists()
    )
    torch.testing.assert_close(
        reconstruct(again, X), SAE.load_from_disk(tmp_path / "sae")(X), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "config",
    [
        dict(rescale_acts_by_decoder_norm=True),
        dict(apply_b_dec_to_input=False),
        dict(normalize_activations="layer_norm"),
        dict(normalize_activations="constant_norm_rescale"),
    ],
)
def test_sparse_reconstruction_is_the_dense_one(config):
    sae = random_sae(**config)
    torch.testing.assert_close(reconstruct(sae, X), sae(X), rtol=1e-4, atol=1e-5)


def test_batchtopk_is_saved_as_jumprelu(tmp_path):
    from sae_lens.saes import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=32, d_sae=64, k=8))
    sae.topk_threshold.fill_(0.1)
    save_sae(sae, tmp_path / "sae")
    loaded = load_sae(tmp_path / "sae")
    assert loaded.cfg.architecture() == "jumprelu" and reconstruct(loaded, X).shape == X.shape


def gemma_scope(folder, d_in=32, d_sae=64):
    "A `params.npz` as Gemma Scope publishes it."
    g = np.random.default_rng(0)
    folder.mkdir(parents=True)
    arrays = dict(
        W_enc=g.normal(size=(d_in, d_sae)),
        W_dec=g.normal(size=(d_sae, d_in)),
        b_enc=g.normal(size=d_sae),
        b_dec=g.normal(size=d_in),
        threshold=g.random(d_sae),
    )
    np.savez(folder / "params.npz", **{k: v.astype(np.float32) for k, v in arrays.items()})
    return arrays


@pytest.mark.parametrize("give_file", [True, False])
def test_gemma_scope(tmp_path, give_file):
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82"
    a = gemma_scope(folder)
    sae = load_sae(folder / "params.npz" if give_file else folder)
    before = X.double().numpy() @ a["W_enc"] + a["b_enc"]
    expected = np.where(before > a["threshold"], np.maximum(before, 0), 0) @ a["W_dec"] + a["b_dec"]
    assert layer_of(sae) == 12 and sae.cfg.architecture() == "jumprelu"
    torch.testing.assert_close(
        reconstruct(sae, X).double(), torch.tensor(expected), rtol=1e-3, atol=1e-3
    )


def test_gemma_scope_2(tmp_path):
    folder = tmp_path / "layer_9_width_16k_l0_medium"
    a = gemma_scope(folder)
    (folder / "params.npz").unlink()
    save_file(
        {k.replace("W_", "w_"): torch.tensor(v, dtype=torch.float32) for k, v in a.items()},
        folder / "params.safetensors",
    )
    (folder / "config.json").write_text(
        json.dumps(
            dict(
                architecture="jump_relu",
                hf_hook_point_in="model.layers.9.output",
                model_name="gemma-3-270m",
            )
        )
    )
    assert layer_of(load_sae(folder)) == 9


def test_no_pickle_is_ever_opened(tmp_path):
    folder = tmp_path / "layer_1"
    folder.mkdir()
    np.savez(folder / "params.npz", W_enc=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(UsageError, match="damaged"):
        load_sae(folder)


def test_a_file_cut_short_is_refused(tmp_path):
    save_sae(random_sae(), tmp_path / "sae")
    with (tmp_path / "sae" / "sae_weights.safetensors").open("r+b") as f:
        f.truncate(2000)
    with pytest.raises(UsageError, match="damaged"):
        load_sae(tmp_path / "sae")


def test_an_unfolded_normalisation_is_refused_and_a_factor_mends_it(tmp_path):
    sae = random_sae("standard", normalize_activations="expected_average_only_in")
    save_sae(sae, tmp_path / "sae")
    with pytest.raises(UsageError, match="norm_factor"):
        load_sae(tmp_path / "sae")
    folded = load_sae(tmp_path / "sae", norm_factor=0.5)
    torch.testing.assert_close(
        folded(X), random_sae("standard")(X * 0.5) / 0.5, rtol=1e-4, atol=1e-4
    )


def test_the_registry_is_asked_for_what_is_not_a_path(monkeypatch):
    import sae_lens

    asked = []
    monkeypatch.setattr(
        sae_lens.SAE,
        "from_pretrained",
        lambda release, sae_id: asked.append((release, sae_id)) or random_sae(),
    )
    assert layer_of(load_sae("gemma-scope-2b-pt-res:layer_12/width_16k/average_l0_82")) == 1
    assert asked == [("gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82")]


def test_an_sae_of_another_model_is_refused():
    lm = tiny("llama")
    batch = {"input_ids": torch.randint(3, 97, (2, 12))}
    with pytest.raises(UsageError, match="width 16"), splice(lm, {1: random_sae(d_in=16)}):
        pass
    with pytest.raises(UsageError, match="trained at blocks.1"):
        check_fit(lm, {2: random_sae()}, batch)
    with pytest.raises(UsageError, match="unexplained"):
        check_fit(lm, {1: random_sae()}, batch)


def test_an_adapter_refuses_another_sae(tmp_path):
    lm, saes = tiny("llama"), {1: random_sae()}
    add_lora(lm, saes, rank=2)
    save_adapter(lm, saes, tmp_path / "a")
    assert (tmp_path / "a" / "sae-1").is_dir()  # an SAE that was never in a file comes along
    with pytest.raises(UsageError, match="belongs to SAE"):
        attach_adapter(tiny("llama"), tmp_path / "a", {1: random_sae(seed=5)})
    assert fingerprint(attach_adapter(tiny("llama"), tmp_path / "a")[1]) == fingerprint(saes[1])


def test_plain_peft_plain_saelens_and_a_ten_line_hook(clean, tmp_path):
    "The artefacts need nothing of this package: the same cross-entropy to 1e-4."
    from peft import PeftModel
    from sae_lens import SAE

    from sae_lora.files import data_path
    from sae_lora.metrics import fidelity

    lm, tok, saes, blocks = clean
    rows = blocks.valid[:8]
    add_lora(lm, saes, rank=4)
    with torch.no_grad():
        for p in lora_parameters(lm).values():
            p.normal_(0, 0.02)
    ours = fidelity(lm, saes, rows)["ce"]
    save_adapter(lm, saes, tmp_path / "adapter")

    model = PeftModel.from_pretrained(load_lm("smollm2-135m")[0], tmp_path / "adapter")
    sae = SAE.load_from_disk(data_path("sae"))

    def hook(module, args, out):
        new = sae(out)
        kept = torch.isin(rows, torch.tensor([0, 1, 2]))
        kept[:, 0] = True
        return torch.where(kept[..., None], out, new)

    handle = model.base_model.model.model.layers[14].register_forward_hook(hook)
    with torch.no_grad():
        logits = model(rows).logits
    handle.remove()
    ce = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()
    ).item()
    assert abs(ce - ours["adapted"]) < 1e-4


def test_a_folder_or_hub_id_gives_everything_in_one_line(tmp_path, monkeypatch):
    "The hub's own cache layout, read without a network; what is pushed is what was saved."
    import shutil

    import huggingface_hub

    from sae_lora import adapters

    lm, saes = tiny("llama"), {1: random_sae()}
    batch = {"input_ids": torch.randint(3, 97, (2, 12))}
    lm.save_pretrained(tmp_path / "model")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w1", eos_token="w2").save_pretrained(
        tmp_path / "model"
    )
    lm, tok = load_lm(tmp_path / "model")
    save_sae(saes[1], tmp_path / "mine")
    saes = {1: load_sae(tmp_path / "mine")}
    add_lora(lm, saes, rank=2)
    with torch.no_grad():
        for p in lora_parameters(lm).values():
            p.normal_(0, 0.1)
        with splice(lm, saes):
            before = lm(**batch).logits
    save_adapter(lm, saes, tmp_path / "adapter")
    shutil.rmtree(tmp_path / "mine")  # an SAE from this disk came along
    snapshot = tmp_path / "hub" / "models--someone--small" / "snapshots" / "0123abc"
    shutil.copytree(tmp_path / "adapter", snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(
        adapters,
        "snapshot_download",
        lambda *a, **o: huggingface_hub.snapshot_download(
            *a, cache_dir=tmp_path / "hub", local_files_only=True, **o
        ),
    )
    for source in (tmp_path / "adapter", "someone/small"):
        lm, tok, saes, spliced = load_adapter(source)
        with torch.no_grad(), spliced():
            assert torch.equal(lm(**batch).logits, before)
    with pytest.raises(UsageError, match="someone/else could not be fetched"):
        load_adapter("someone/else")
    with pytest.raises(UsageError, match="no such folder"):
        load_adapter("nothing here")


def test_pushing_sends_the_whole_folder(tmp_path, monkeypatch):
    from sae_lora import adapters

    sent = {}

    class Hub:
        def __init__(self, token):
            sent["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            sent["private"] = private
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            sent["files"] = sorted(p.name for p in Path(folder_path).iterdir())

    monkeypatch.setattr(adapters, "HfApi", Hub)
    lm, saes = tiny("llama"), {1: random_sae()}
    add_lora(lm, saes, rank=2)
    save_adapter(lm, saes, tmp_path / "a")
    assert adapters.push_to_hub(tmp_path / "a", "you/it", private=True) == "https://hub/you/it"
    assert sent == dict(
        token=None, private=True, files=sorted(p.name for p in (tmp_path / "a").iterdir())
    )
    assert {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "sae-1",
        "sae_lora.json",
    } <= set(sent["files"])
    with pytest.raises(UsageError, match="sae_lora.json: no such file"):
        adapters.push_to_hub(tmp_path, "you/it")
