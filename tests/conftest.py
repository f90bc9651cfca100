"""Fixtures: the real model once a process, tiny models of many architectures, SAEs made here.

The suite runs in as many processes as there are cores; each computes with its share of them.
"""

import gc
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

from sae_lora.files import patient_threads

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
patient_threads()  # the suite starts processes of its own; before torch is loaded
if WORKERS > 1:
    os.environ["OMP_NUM_THREADS"] = str(max(os.cpu_count() // WORKERS, 1))
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test waits for a hub
ROOT = Path(__file__).parent.parent


# files whose tests are marked `long`; they come first
LONG = {f"test_{name}" for name in "chapters experiments runs hostile devices tasks".split()}
LONG |= {f"test_{name}" for name in "ten_minutes sharded kills paper fuzz".split()}


def pytest_xdist_auto_num_workers(config) -> int:
    "A process for each core that has 5 GB; one where a GPU is tested."
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    here = max(min(os.cpu_count(), memory // (5 * 10**9), 8), 1)
    return 0 if here == 1 or "gpu" in config.option.markexpr else here


def pytest_collection_modifyitems(items):
    "The longest files first: a file's tests stay in one process, for they share what is costly."
    items.sort(key=lambda item: item.path.stem not in LONG)
    for item in items:
        if item.path.stem in LONG:
            item.add_marker("long")


def pytest_collection_finish():
    "What was imported stays: a garbage collection need not look through it, again and again."
    gc.freeze()


def forkserver(modules: list[str]):
    "Where processes come from that have imported these modules already."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(modules)
    return context


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    "The site, built with smalldocs, whatever is installed; once for all processes of the suite."
    pytest.importorskip("smalldocs")
    from sae_lora.site import build_site

    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = shutil.which
    with FileLock(folder / "site.lock"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            shutil, "which", lambda name, *a, **k: name != "quarto" and path(name) or None
        )
        return folder / "_site" if (folder / "_site").exists() else build_site(folder / "_site")


@pytest.fixture(scope="session")
def world():
    """SmolLM2-135M with its tokenizer, the default SAE at its layer, and some held-out rows.

    No test may leave an adapter behind.
    """
    from sae_lora.formats import load_sae
    from sae_lora.lm import load_lm
    from sae_lora.text import token_blocks

    lm, tok = load_lm("smollm2-135m")
    return lm, tok, {14: load_sae("default")}, token_blocks("default", tok, 128, 2**14, 2**12)


@pytest.fixture
def clean(world):
    "The real model without an adapter, before and after."
    lm = world[0]
    yield world
    if getattr(lm, "peft_config", None):
        lm.delete_adapter("default")


@pytest.fixture
def adapted(clean):
    "The real model with a random adapter of rank 2 on it."
    from sae_lora.lora import add_lora, lora_parameters

    lm, tok, saes, blocks = clean
    add_lora(lm, saes, rank=2)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in lora_parameters(lm).values():
            p.normal_(0, 0.03, generator=g)
    return lm, tok, saes, blocks


@pytest.fixture(scope="session")
def ag_news() -> Path:
    "AG News, text that no SAE or adapter of ours was trained on."
    path = (
        Path(os.environ.get("SAE_LORA_DATA", ROOT.parent / "shared" / "data"))
        / "ag_news"
        / "test.csv"
    )
    if not path.exists():
        pytest.skip(
            "AG News is not on this machine; "
            "put ag_news/test.csv in the folder that SAE_LORA_DATA names"
        )
    return path


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory):
    "The folder with everything that commands read."
    from hostile import World

    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.close()


SMALL = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
CONFIGS = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", dict(head_dim=8)),
    "gemma": ("Gemma", dict(head_dim=8)),
    "gemma2": ("Gemma2", dict(head_dim=8, final_logit_softcapping=5.0)),
    "gemma3": ("Gemma3Text", dict(head_dim=8)),
    "phi": ("Phi", {}),
    "phi3": ("Phi3", {}),
    "olmo": ("Olmo", {}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", dict(logits_scaling=4.0)),
    "cohere": ("Cohere", dict(logit_scale=0.25)),
    "gpt2": ("GPT2", dict(n_embd=32, n_layer=4, n_head=4, n_positions=64)),
    "gpt_neox": ("GPTNeoX", {}),
    "opt": ("OPT", dict(ffn_dim=64, word_embed_proj_dim=32)),
    "gptj": ("GPTJ", dict(n_embd=32, n_layer=4, n_head=4, n_positions=64, rotary_dim=4)),
    "gpt_neo": ("GPTNeo", dict(num_layers=4, num_heads=4, attention_types=[[["global"], 4]])),
    "bloom": ("Bloom", dict(n_layer=4, n_head=4)),
    "falcon": ("Falcon", {}),
}


def tiny(name: str, seed: int = 0):
    "A random causal LM of the architecture `name`: four layers, width 32, 97 tokens."
    import transformers

    cls, own = CONFIGS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{cls}Config")(**SMALL | own)
    lm = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for p in lm.parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.3)
    lm.name_or_path = f"tiny-{name}"
    return lm


@pytest.fixture(params=list(CONFIGS))
def any_lm(request):
    return tiny(request.param)


def random_sae(
    architecture: str = "topk", d_in: int = 32, d_sae: int = 64, seed: int = 0, **config
):
    "A SAELens SAE with random weights."
    from sae_lens import saes

    name = {"topk": "TopK", "jumprelu": "JumpReLU", "standard": "Standard", "gated": "Gated"}[
        architecture
    ]
    own = dict(k=8) if architecture == "topk" else {}
    metadata = saes.sae.SAEMetadata(
        hook_name=config.pop("hook_name", "blocks.1.hook_resid_post"), model_name="tiny"
    )
    sae = getattr(saes, f"{name}SAE")(
        getattr(saes, f"{name}SAEConfig")(d_in=d_in, d_sae=d_sae, metadata=metadata, **own | config)
    )
    torch.manual_seed(seed)
    for n, p in sae.named_parameters():
        p.data = (
            torch.rand_like(p) * 0.3
            if n == "threshold"
            else torch.randn_like(p) * (0.3 if p.dim() > 1 else 0.05)
        )
    return sae.eval().requires_grad_(False)


@pytest.fixture
def setting(monkeypatch, tmp_path):
    "A tiny model, an SAE, rows; and a cache of their own."
    monkeypatch.setenv("SAE_LORA_CACHE", str(tmp_path))
    rows = torch.randint(3, 97, (8, 16), generator=torch.Generator().manual_seed(0))
    return tiny("llama"), {1: random_sae()}, rows
