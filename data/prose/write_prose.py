"""Write `prose.jsonl.xz`: plain continuations, by SmolLM2-135M-Instruct, of `openings.jsonl`.

    python data/prose/write_prose.py MODEL_FOLDER

Every opening is continued `COPIES` times by sampling (temperature and top-k below), in batches of
openings of about the same length. A batch's rows are appended to `prose.part.jsonl` as soon as they
exist, so a stopped run goes on where it was. At the end documents that repeat themselves, or one
another, are dropped and the rest is compressed.
"""

import json
import lzma
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor

HERE = Path(__file__).parent
COPIES, BATCH, NEW_TOKENS, SEED = 4, 128, 320, 0
TEMPERATURE, TOP_K = 0.9, 50


class SampleTopK(LogitsProcessor):
    "Draw among the `TOP_K` likeliest tokens: twice as fast here as sampling 49,152 ways."

    def __call__(self, input_ids, scores):
        top, ids = scores.topk(TOP_K)
        drawn = ids.gather(1, torch.multinomial((top.float() / TEMPERATURE).softmax(-1), 1))
        return torch.full_like(scores, -torch.inf).scatter(1, drawn, 0.0)


def batches(openings, tok):
    "Openings `COPIES` times over, shortest first so that a batch needs little padding."
    rows = sorted(openings * COPIES, key=lambda o: len(tok(o["opening"]).input_ids))
    return [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]


@torch.inference_mode()
def continue_batch(lm, tok, rows):
    "A sampled continuation for each row: full texts, with whether each came to its own end."
    x = tok([r["opening"] for r in rows], return_tensors="pt", padding=True, padding_side="left")
    y = lm.generate(
        **x,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=[0, 2],
        pad_token_id=2,
        cache_implementation="static",
        disable_compile=True,
        do_sample=False,
        logits_processor=[SampleTopK()],
    )
    for row, ids in zip(rows, y):
        new = ids[x.input_ids.shape[1] :]
        ended = bool(((new == 0) | (new == 2)).any())
        yield row | dict(
            text=row["opening"] + tok.decode(new, skip_special_tokens=True), ended=ended
        )


def good(text, seen):
    "Keep a text unless it is short, repeats a line or a phrase, or was written before."
    words = text.split()
    trigrams = list(zip(words, words[1:], words[2:]))
    fresh = len(words) >= 40 and len(set(trigrams)) > 0.75 * len(trigrams) and text not in seen
    seen.add(text)
    return fresh


def main(folder):
    tok = AutoTokenizer.from_pretrained(folder)
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    openings = [json.loads(l) for l in (HERE / "openings.jsonl").open()]
    part = HERE / "prose.part.jsonl"
    done = sum(1 for _ in part.open()) if part.exists() else 0
    for i, rows in enumerate(tqdm(batches(openings, tok))):
        if i * BATCH < done:
            continue
        torch.manual_seed(SEED + i)
        with part.open("a") as f:
            f.writelines(
                json.dumps(r, ensure_ascii=False) + "\n"
                for r in list(continue_batch(lm, tok, rows))
            )
    seen = set()
    kept = [r for r in map(json.loads, part.open()) if good(r["text"], seen)]
    with lzma.open(HERE / "prose.jsonl.xz", "wt", preset=9) as f:
        f.writelines(
            json.dumps(dict(kind=r["kind"], text=r["text"]), ensure_ascii=False) + "\n"
            for r in kept
        )
    print(len(kept), "documents,", sum(len(tok(r["text"]).input_ids) for r in kept), "tokens")


if __name__ == "__main__":
    main(sys.argv[1])
