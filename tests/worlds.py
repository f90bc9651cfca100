"""What several test files share: a tokenizer of numbers, texts, rows, and pairs of sentences."""

import os
import random
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sae_lora.lora import lora_parameters

FAMILIES = [
    "gemma2",
    "gemma3",
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "phi",
    "olmo",
    "gpt2",
    "gpt_neox",
    "opt",
]

PAD = 0
BOS = 1
EOS = 2
TWO = 3


def tokenizer(template: str | None = None, endoftext: bool = False) -> PreTrainedTokenizerFast:
    "Numbers as words: `w7` is 7. `template` is what the tokenizer puts round a text."
    names = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<two>": TWO}
    if endoftext:
        names = {"<pad>": PAD, "<bos>": BOS, "<|endoftext|>": EOS, "<two>": TWO}
    words = Tokenizer(models.WordLevel(names | {f"w{i}": i for i in range(4, 97)}, unk_token="w4"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        used = [(n, i) for n, i in names.items() if n in template]
        words.post_processor = processors.TemplateProcessing(single=template, special_tokens=used)
    eos = "<|endoftext|>" if endoftext else "<eos>"
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<bos>", eos_token=eos, pad_token="<pad>"
    )


def texts(n: int = 24) -> list[str]:
    "Documents of 3 to 40 words; none of them holds a special token."
    draw = random.Random(0)

    def document() -> str:
        length = draw.randint(3, 40)
        return " ".join(f"w{draw.randint(5, 96)}" for _ in range(length))

    return [document() for _ in range(n)]


PAIRS = [
    ("The keys to the door are here.", "The keys to the door is here."),
    (
        "A picture of my friends hangs there, above the old chair.",
        "A picture of my friends hang there, above the old chair.",
    ),
    ("Dogs bark.", "Dogs barks."),
    ("The authors of the book write well.", "The authors of the book writes well."),
]


def shared(name: str) -> Path:
    "A data set in the shared folder; the test is skipped where it is not there."
    path = Path(os.environ.get("SAE_LORA_DATA", ROOT.parent / "shared" / "data")) / name
    if not path.exists():
        pytest.skip(f"{name} is not on this machine; put it in the folder that SAE_LORA_DATA names")
    return path


# A short run on a tiny model: what it is trained on, and how.
ROWS = torch.randint(3, 97, (24, 16), generator=torch.Generator().manual_seed(0))
RUN = dict(tokens=16 * 16, batch=2, precision="fp32")


def trained(lm, name=None) -> dict[str, torch.Tensor]:
    "A copy of the weights of an adapter, with `default` for its name."
    return {
        n.replace(name, "default") if name else n: p.detach().clone()
        for n, p in lora_parameters(lm, name).items()
    }


# Rows that begin with <eos>, as those of a tokenizer that puts nothing before a text.
AFTER_EOS = torch.cat(
    [
        torch.full((6, 1), EOS),
        torch.randint(4, 97, (6, 15), generator=torch.Generator().manual_seed(0)),
    ],
    1,
)

# What a check finds where all is well.
GOOD = dict(
    model="m",
    device="cpu",
    dtype="float32",
    ce=2.7,
    perplexity=15.0,
    beginnings={"<eos>": 2.7, "<bos>": 2.65},
    tokens=1000,
    gap=0.1,
    ci95=dict(gap=[0.08, 0.12]),
    saes=[dict(layer=3, l0=30.0, promised_l0=32.0, fvu=0.2)],
    step_tokens=512,
    step_seconds=2.0,
    check_seconds=30.0,
    evaluate_seconds_per_token=0.01,
    state_bytes=100,
    peak_memory_bytes=2 * 10**9,
)
