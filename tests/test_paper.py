"""Each file of size `paper` comes to its figure: real ids and formats, tiny weights, a few rows.

`fakehub` answers as the hub does: models under their own ids with as many layers as they have,
Gemma Scope and Llama Scope in the layout of their repositories, shards of text as they are kept.
What still may fail on the real thing depends on size alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from fakehub import served
from safetensors.torch import save_file

from sae_lora.corpora import corpus
from sae_lora.notebooks import experiments

zstandard = pytest.importorskip("zstandard")
pytest.importorskip("datasets")

D = 16  # the width of every model
LATENTS = 64
FOLDER = ROOT / "nbs" / "experiments" / "params" / "paper"
MODELS = {
    "google/gemma-2-2b": ("Gemma2", 26),
    "google/gemma-2-9b": ("Gemma2", 42),
    "google/gemma-2-27b": ("Gemma2", 46),
    "meta-llama/Llama-3.1-8B": ("Llama", 32),
    "meta-llama/Llama-3.2-1B": ("Llama", 16),
}


# What lies on the hub.


def texts() -> list[str]:
    "Prose, the same for every data set."
    return [d for _, d in zip(range(400), corpus("prose"))]


def tokenizer(bos: str, eos: str):
    "Bytes and some hundred pairs of them; as the real ones do, it puts `bos` before a text."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made = dict(vocab_size=700, special_tokens=["<pad>", bos, eos], initial_alphabet=alphabet)
    tok.train_from_iterator(texts(), trainers.BpeTrainer(show_progress=False, **made))
    tok.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tok.token_to_id(bos))]
    )
    own = dict(bos_token=bos, eos_token=eos, pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=tok, **own)


def write_model(folder: Path, kind: str, layers: int):
    "A random model of a kind, with as many layers as the real one."
    import transformers

    names = ("<bos>", "<eos>") if kind == "Gemma2" else ("<|begin_of_text|>", "<|end_of_text|>")
    tok = tokenizer(*names)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tok),
        hidden_size=D,
        intermediate_size=2 * D,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id,
    )
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(config)
    for p in lm.parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.2)
    lm.save_pretrained(folder)
    tok.save_pretrained(folder)


def directions(seed: int) -> tuple[np.ndarray, np.ndarray]:
    "Encoder `(D, LATENTS)` and decoder of an SAE that explains some of anything."
    draw = np.random.default_rng(seed)
    decoder = draw.normal(size=(LATENTS, D)).astype(np.float32)
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    return decoder.T.copy() / 2, decoder


def write_gemma_scope(path: Path):
    "`params.npz` of one SAE of Gemma Scope."
    path.parent.mkdir(parents=True)
    encoder, decoder = directions(len(str(path)))
    none, thresholds = np.zeros(LATENTS, np.float32), np.full(LATENTS, 0.3, np.float32)
    bias = np.zeros(D, np.float32)
    arrays = dict(W_enc=encoder, W_dec=decoder, b_enc=none, b_dec=bias, threshold=thresholds)
    np.savez(path, **arrays)


def write_llama_scope(folder: Path, layer: int):
    "One SAE of Llama Scope: `hyperparams.json` and `checkpoints/final.safetensors`."
    encoder, decoder = directions(layer)
    (folder / "checkpoints").mkdir(parents=True)
    at = f"blocks.{layer}.hook_resid_post"
    about = dict(
        hook_point_in=at,
        hook_point_out=at,
        d_model=D,
        d_sae=LATENTS,
        act_fn="jumprelu",
        jump_relu_threshold=0.3,
        norm_activation="dataset-wise",
        dataset_average_activation_norm={"in": 4.0, "out": 4.0},
        sparsity_include_decoder_norm=True,
        use_decoder_bias=True,
        top_k=50,
    )
    (folder / "hyperparams.json").write_text(json.dumps(about))
    tensors = {
        "encoder.weight": encoder.T,
        "encoder.bias": np.zeros(LATENTS, np.float32),
        "decoder.weight": decoder.T,
        "decoder.bias": np.zeros(D, np.float32),
    }
    tensors = {n: torch.tensor(np.ascontiguousarray(x)) for n, x in tensors.items()}
    save_file(tensors, folder / "checkpoints" / "final.safetensors")


def write_texts(folder: Path):
    "The Pile as `.jsonl.zst` shards, SlimPajama as Parquet."
    import pyarrow
    from pyarrow.parquet import write_table

    pile, slim = folder / "monology/pile-uncopyrighted", folder / "DKYoon/SlimPajama-6B/data"
    (pile / "train").mkdir(parents=True)
    slim.mkdir(parents=True)
    rows = [dict(text=d, meta=dict(pile_set_name="Pile-CC")) for d in texts()]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name in ("train/00", "val", "test"):
        (pile / f"{name}.jsonl.zst").write_bytes(zstandard.compress(lines))
    (pile / "README.md").write_text("---\nlicense: other\n---\n")
    meta = [dict(redpajama_set_name="RedPajamaC4") for _ in rows]
    table = pyarrow.table({"text": texts(), "meta": meta, "__index_level_0__": range(len(rows))})
    for split in ("train", "validation", "test"):
        write_table(table, slim / f"{split}-00000-of-00001-0123456789abcdef.parquet")


def write_hellaswag(folder: Path):
    "The one benchmark that comes from the hub."
    import pyarrow
    from pyarrow.parquet import write_table

    folder.mkdir(parents=True)
    ends = ["sits down.", "stands up.", "falls over.", "runs away."]
    own = dict(activity_label="Reading", ctx_a="A man opens a book.", ctx_b="he", source_id="a~v_1")
    own |= dict(ctx="A man opens a book. he", endings=ends, split="val", split_type="indomain")
    table = pyarrow.Table.from_pylist([own | dict(ind=i, label=str(i % 4)) for i in range(6)])
    for split in ("train", "validation", "test"):
        write_table(table, folder / f"{split}-00000-of-00001.parquet")


def named(value) -> set[str]:
    "All strings in what a file of parameters says."
    if isinstance(value, str):
        return {value}
    parts = list(value.values()) if isinstance(value, dict) else value
    return set().union(*map(named, parts)) if isinstance(parts, list) else set()


def write_hub(folder: Path):
    "Everything that the files of size `paper` name."
    asked = set().union(*(named(yaml.safe_load(f.read_text())) for f in FOLDER.glob("*.yml")))
    for name in asked & MODELS.keys():
        write_model(folder / "models" / name, *MODELS[name])
    for spec in asked:
        if spec.startswith("gemma-scope"):
            release, _, path = spec.partition(":")
            write_gemma_scope(folder / "models/google" / release / path / "params.npz")
    for layer in range(32):
        name = f"Llama3_1-8B-Base-L{layer}R-32x"
        write_llama_scope(folder / "models/fnlp/Llama3_1-8B-Base-LXR-32x" / name, layer)
    write_texts(folder / "datasets")
    write_hellaswag(folder / "datasets/Rowan/hellaswag/data")


# The walk.

BUDGET = dict(length=64, text_tokens=4096, valid_tokens=1024)
SPEC = dict(layer=12, width=512, k=4, tokens=4096, stream=True)
FEW = {
    "01_time_to_loss": dict(
        tokens=256,
        measure_tokens=256,
        points=2,
        k=8,
        rank=2,
        worlds=[
            dict(model=m, layer=12, width=64, sae_tokens=[1024, 2048], kl_tokens=256)
            for m in ("google/gemma-2-2b", "meta-llama/Llama-3.2-1B")
        ],
    ),
    "02_sparsity": dict(tokens=128, ranks=[1, 4]),
    "03_width": dict(tokens=128, ranks=[1, 4]),
    "04_layer": dict(tokens=128, ranks=[1, 4], all_at=4),
    "05_model_size": dict(tokens=128, ranks=[1, 64]),
    "06_one_layer": dict(tokens=128, rank=2),
    "07_many_saes": dict(tokens=128, rank=2),
    "08_sae_metrics": dict(
        tokens=128, rank=2, sae=SPEC, data="sample", probe_texts=6, letters="st", words=12, cards=2
    ),
    "09_steering": dict(
        tokens=128,
        sae=SPEC,
        valid_tokens=16384,
        data="sample",
        candidates=8,
        known_rows=64,
        choices=["evenly"],  # about others there are too few texts in so few rows
        latents=2,
        examples=12,
        negatives=3,
        alphas=[0.1, 1.0],
    ),
    "10_benchmarks": dict(
        tokens=128,
        rank=2,
        data="sample",
        tasks=dict(mmlu=1, hellaswag=2, truthfulqa_mc1=1, blimp=1),
        others=[],
    ),
    "11_token_losses": dict(tokens=128, rank=2, sae=SPEC),
    "12_activations": dict(tokens=128, rank=2, sae=SPEC),
    "13_ways_to_close_the_gap": dict(
        rank=2,
        sae=SPEC,
        budgets=[256],
        seeds=[0],
        strengths=[1.0],
        probe_texts=6,
        agreement_rows=2,
        data="sample",
    ),
    "14_speed": dict(  # it measures memory in processes of their own, with an SAE of the registry
        rank=2,
        sae=SPEC,
        text_tokens=16384,
        published_tokens=1024,
        fast_tokens=1024,
        long_tokens=1024,
        points=2,
        rounds=1,
        vocabulary=4096,
        positions=512,
        ranks=[1, 2],
        sweep_tokens=384,
        flat_tokens=256,
        steps_a_round=3,
        fuse=False,
    ),
    "15_recipe": dict(
        tokens=256,
        rank=2,
        variants={"fast": {}, "4 rows a step": {"batch": 4}},
        again=["fast"],
        batch_tokens=256,
        batch_rates={1: [1e-3, 2e-3], 2: [1e-3]},
    ),
    "16_sites": dict(
        tokens=128,
        rank=2,
        k=8,
        sae_tokens=2048,
        worlds=[dict(model="google/gemma-2-2b", layer=12, width=64)],
        seeds=[0],
    ),
    "17_replacement_model": dict(
        tokens=512,  # in four stages
        rank=2,
        seeds=[0],
        coder=dict(width=64, k=8, tokens=2048, transcoder=True, skip=True, stream=True),
    ),
    "18_more_from_each_token": dict(
        tokens=256,
        rank=2,
        ideas={"fast": [{}], "Muon": [{"optimizer": "muon"}], "hard rows": [{"hard": True}]},
        again=["fast"],
    ),
    "19_budget": dict(budgets=[64, 128, 256], several=[128], rank=2, seeds=[0, 1]),
}


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    "A function that walks through an experiment, and says how it ended."
    folder = tmp_path_factory.mktemp("hub")
    write_hub(folder)
    hub = served(folder)
    environment = os.environ | dict(
        HF_ENDPOINT=hub.address,
        HF_HUB_OFFLINE="0",
        HF_HOME=str(folder / "home"),
        HF_DATASETS_CACHE=str(folder / "home" / "datasets"),
        HF_HUB_DISABLE_XET="1",
        NO_PROXY="127.0.0.1",
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        SAE_LORA_CACHE=str(folder / "cache"),
        SAE_LORA_RESULTS=str(folder / "rows"),
    )
    command = [sys.executable, ROOT / "tests" / "walk.py"]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)
    process.stdout.readline()

    def ask(name: str) -> tuple[dict, str]:
        said = folder / f"{name}.out"
        request = dict(name=name, values=BUDGET | FEW[name], environment={}, said=str(said))
        print(json.dumps(request), file=process.stdin, flush=True)
        return json.loads(process.stdout.readline()), said.read_text()

    yield ask
    process.stdin.close()
    process.wait()
    hub.shutdown()


def test_there_is_a_file_for_every_experiment():
    assert [p.stem for p in sorted(FOLDER.glob("*.yml"))] == experiments() == sorted(FEW)


@pytest.mark.parametrize("name", experiments())
def test_the_file_comes_to_its_figure(walk, name):
    found, said = walk(name)
    assert found["raised"] is None, f"{found['raised']}\n{said[-3000:]}"
    assert found["figures"] > 0
