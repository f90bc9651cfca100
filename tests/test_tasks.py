"""Benchmarks are lm-eval's to the digit, steering and scores are what their formulas say, SAEBench's measures are exact where the answer is known."""
import json
import math
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT, random_sae, tiny
from sae_lora import latents as latents_module
from sae_lora.files import UsageError
from sae_lora.latents import agreement, cards_page, latent_cards, promotes, some_latents
from sae_lora.lm import hidden, layers, stack
from sae_lora.lora import add_lora, lora_parameters, without_lora
from sae_lora.metrics import token_losses
from sae_lora.saebench import _regression, absorbed, absorption, decoder, explained_variance, labelled, loss_recovered, pooled, probe, scr, top_latents, tpp
from sae_lora.splice import Identity, splice
from sae_lora.steering import Steered, log_likelihoods, passages, positives, scaled_change, steer, steering_effect, text_rows, tune_alpha
from sae_lora.tasks import LOCAL, as_model, benchmark, benchmark_all, local_tasks, models, recovered

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS}
PAIRS = [("The keys to the door are here.", "The keys to the door is here."), ("A picture of my friends hangs there, above the old chair.", "A picture of my friends hang there, above the old chair."),
         ("Dogs bark.", "Dogs barks."), ("The authors of the book write well.", "The authors of the book writes well.")]


def shared(name: str) -> Path:
    path = Path(os.environ.get("SAE_LORA_DATA", ROOT.parent / "shared" / "data")) / name
    if not path.exists(): pytest.skip(f"{name} is not on this machine; put it in the folder that SAE_LORA_DATA names")
    return path


@pytest.fixture
def data(tmp_path):
    "A folder with a few rows in the form of each benchmark."
    for folder in ("blimp", "mmlu", "truthfulqa"): (tmp_path / folder).mkdir()
    for name in ("adjunct_island", "wh_island"): (tmp_path / "blimp" / f"{name}.jsonl").write_text("".join(json.dumps(dict(sentence_good=a, sentence_bad=b)) + "\n" for a, b in PAIRS))
    (tmp_path / "mmlu" / "anatomy_test.csv").write_text('question,A,B,C,D,answer\n" How many, if any? ",1.50,None,3,"4, or more",2\n')
    (tmp_path / "truthfulqa" / "TruthfulQA.csv").write_text('Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\nx,y,Is it?,It is not,It is not; No.,It is; Yes.; ,z\n')
    return tmp_path


@pytest.fixture
def adapted(clean):
    lm, tok, saes, blocks = clean
    add_lora(lm, saes, rank=2)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in lora_parameters(lm).values(): p.normal_(0, 0.03, generator=g)
    return lm, tok, saes, blocks


# benchmarks

def test_base_is_lm_eval_called_directly(clean, data, tmp_path):
    "lm-eval's own entry point, on its own way of reading a file, on the model of a user who knows nothing of us."
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    lm, tok, _, _ = clean
    here = tmp_path / "yaml"
    here.mkdir()
    (here / "direct.yaml").write_text(f'task: direct\ndataset_path: json\ndataset_kwargs: {{data_files: {{train: {data}/blimp/wh_island.jsonl}}}}\noutput_type: multiple_choice\nvalidation_split: train\n'
                                      'doc_to_text: ""\ndoc_to_target: 0\ndoc_to_choice: "{{[sentence_good, sentence_bad]}}"\nnum_fewshot: 0\nmetric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n')
    direct = simple_evaluate(model=HFLM(pretrained=lm, tokenizer=tok, batch_size=4), tasks=["direct"], task_manager=TaskManager(include_path=str(here), include_defaults=False))
    ours = benchmark(lm, tok, "blimp_wh_island", data=data, batch_size=4)["blimp_wh_island"]
    assert ours["value"] == direct["results"]["direct"]["acc,none"] and ours["stderr"] == direct["results"]["direct"]["acc_stderr,none"]
    assert ours["items"] == [s["acc"] for s in direct["samples"]["direct"]] and ours["n"] == len(PAIRS)


def test_base_is_lm_eval_called_directly_on_real_data(clean):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    lm, tok, saes, _ = clean
    folder = shared("blimp").parent
    task, = local_tasks("blimp_principle_A_case_1", folder)
    direct = evaluate(HFLM(pretrained=lm, tokenizer=tok, batch_size=16), TaskManager(include_defaults=False).load([task]), limit=30)["results"][task["task"]]
    four = benchmark_all(lm, tok, task["task"], saes, data=folder, limit=30, batch_size=16)
    assert list(four) == ["base", "spliced"] and four["base"][task["task"]]["value"] == direct["acc,none"] and four["base"][task["task"]]["stderr"] == direct["acc_stderr,none"]


def prompts(name, data):
    "What lm-eval asks: pairs of context and continuation."
    from lm_eval.tasks import TaskManager
    task = TaskManager(include_defaults=False).load(local_tasks(name, data))["tasks"][name]
    task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=1, rank=0, world_size=1)
    return [i.args for i in task.instances]


def test_prompts_are_lm_evals(data):
    assert prompts("blimp_wh_island", data) == [("", " " + PAIRS[0][0]), ("", " " + PAIRS[0][1])]  # the space is lm-eval's target delimiter
    said = "The following are multiple choice questions (with answers) about anatomy.\n\nHow many, if any?\nA. 1.50\nB. None\nC. 3\nD. 4, or more\nAnswer:"
    assert prompts("mmlu_anatomy", data) == [(said, f" {c}") for c in "ABCD"]
    asked = prompts("truthfulqa_mc1", data)
    assert [a for _, a in asked] == [" It is not.", " It is.", " Yes."] and asked[0][0].startswith("Q: What is human life expectancy") and asked[0][0].endswith("\n\nQ: Is it?\nA:")


def test_every_file_on_disk_is_a_task_of_lm_eval():
    folder = shared("mmlu").parent
    assert len(local_tasks("blimp", folder)) == len(list((folder / "blimp").glob("*.jsonl"))) == 67
    assert len(local_tasks("mmlu", folder)) == len(list((folder / "mmlu").glob("*_test.csv")))
    for family in LOCAL.values():
        for path in folder.glob(family.files): assert family.read(path)
    questions = [q for path in (folder / "mmlu").glob("*_test.csv") for q in LOCAL["mmlu"].read(path)]
    assert all(len(q["choices"]) == 4 and all(q["choices"]) and q["question"].strip() for q in questions)
    assert any('a "$1 off" coupon' in c for q in questions for c in q["choices"])  # quotes inside cells are kept


def test_four_models_and_families(adapted, data):
    lm, tok, saes, _ = adapted
    four = benchmark_all(lm, tok, ["blimp", "truthfulqa_mc1"], saes, data=data, limit=3)
    assert list(four) == ["base", "spliced", "adapted_unspliced", "adapted"]
    for scores in four.values():
        assert list(scores) == ["blimp", "blimp_adjunct_island", "blimp_wh_island", "truthfulqa_mc1"]
        assert scores["blimp"]["items"] == scores["blimp_adjunct_island"]["items"] + scores["blimp_wh_island"]["items"] and scores["blimp"]["n"] == 6
        for s in scores.values(): assert s["ci95"][0] <= s["value"] <= s["ci95"][1] and 0 <= s["ci95"][0] and s["ci95"][1] <= 1
    assert benchmark_all(lm, tok, ["blimp", "truthfulqa_mc1"], saes, known={"base": "as it was"}, data=data, limit=3) == four | {"base": "as it was"}
    with as_model(lm, saes, "adapted"): inside = benchmark(lm, tok, "truthfulqa_mc1", data=data)
    assert inside == benchmark(lm, tok, "truthfulqa_mc1", saes, data) == {"truthfulqa_mc1": four["adapted"]["truthfulqa_mc1"]}


@pytest.mark.parametrize("keep", ["special", "none"])
def test_right_padding_without_a_mask_changes_nothing(adapted, keep):
    "The log-likelihood of each item is that of the item alone, by plain transformers."
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    lm, tok, saes, _ = adapted
    asked = [Instance("loglikelihood", {}, ("The keys to the door", a), i) for i, a in enumerate((" are here.", " is", ", which had been lost for many years, were found at last under the mat."))]
    with splice(lm, saes, keep):
        batched = [r[0] for r in HFLM(pretrained=lm, tokenizer=tok, batch_size=3).loglikelihood(asked)]
        for i, together in zip(asked, batched):
            ids = tok("".join(i.args), return_tensors="pt").input_ids
            n = ids.shape[1] - len(tok("The keys to the door").input_ids)
            with torch.no_grad(): z = lm(ids).logits[0].log_softmax(-1)
            alone = z[-n - 1:-1].gather(1, ids[0, -n:, None]).sum()
            assert abs(together - float(alone)) < 2e-3


@pytest.mark.parametrize("adds", [True, False])
def test_items_begin_as_the_tokenizer_begins_a_text(adds, data):
    "With a context, without one, and as a whole: one BOS where the tokenizer puts it there, and lm-eval's own choice where it does not."
    from test_beginnings import BOS, tokenizer
    from sae_lora.text import beginning, separator
    lm, tok, seen = tiny("llama"), tokenizer("<bos> $A" if adds else None), []
    lm.name_or_path = lm.config._name_or_path = "tiny"
    lm.register_forward_pre_hook(lambda m, args, kwargs: seen.extend(kwargs.get("input_ids", args[0] if args else None)), with_kwargs=True)
    for task in ("blimp_wh_island", "mmlu_anatomy"):
        benchmark(lm, tok, task, data=data, batch_size=2)
        asked = adds or task == "blimp_wh_island"  # without a context lm-eval puts the tokenizer's bos_token
        assert seen and all((int(row[0]) == BOS) == asked and not (row[1:] == BOS).any() for row in seen)
        seen.clear()
    whole = {"task": "whole", "output_type": "loglikelihood_rolling", "test_split": "test", "doc_to_text": "", "doc_to_target": "{{text}}",
             "metric_list": [{"metric": "word_perplexity"}], "custom_dataset": lambda **_: __import__("datasets").DatasetDict({"test": __import__("datasets").Dataset.from_list([{"text": "w5 w6 w7"}])})}
    benchmark(lm, tok, whole)
    assert [row.tolist() for row in seen] == [[BOS, 5, 6]]
    assert beginning(tok) == ([BOS] if adds else [separator(tok)])


def test_mode_is_restored_even_on_an_error(clean, data):
    lm, tok, saes, _ = clean
    lm.train()
    benchmark(lm, tok, "truthfulqa_mc1", saes, data)
    assert lm.training
    (data / "truthfulqa" / "TruthfulQA.csv").write_text("Question\nWhat?\n")
    with pytest.raises(UsageError, match="TruthfulQA.csv: not in the expected form"): benchmark(lm, tok, "truthfulqa_mc1", saes, data)
    assert lm.training and not any(m._forward_hooks for m in lm.modules())
    lm.eval()


def test_mistakes_are_one_line(clean, data, monkeypatch):
    lm, tok, saes, _ = clean
    for call in (lambda: benchmark(lm, tok, "blimp_nonsense", data=data), lambda: as_model(lm, saes, "adapted").__enter__(), lambda: as_model(lm, None, "spliced").__enter__(),
                 lambda: steer(lm, saes[14], 14, 4608, 1.0), lambda: text_rows(["a", " "], tok), lambda: scaled_change(torch.ones(3), torch.ones(3)),
                 lambda: steering_effect(lm, tok, saes[14], 14, 0, {"law": ["a", "b"]}, 1.0), lambda: loss_recovered(lm, saes, IDS, clean="adapted_unspliced"),
                 lambda: loss_recovered(lm, saes, IDS, clean="student"), lambda: agreement(lm, saes, IDS), lambda: labelled("/nowhere.csv"), lambda: probe(torch.rand(6, 3), list("aabbcc"))):
        with pytest.raises(UsageError) as e: call()
        assert "\n" not in str(e.value)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(UsageError, match=r"sae_lora\[tasks\]"): benchmark(lm, tok, "blimp", data=data)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UsageError, match=r"sae_lora\[tasks\]"): probe(torch.rand(60, 3), ["a", "b"] * 30)


def test_recovered_is_paired():
    "The adapter recovers exactly half of the items that splicing lost, and no other item changes: much surer than the scores themselves."
    base = [1.0] * 200 + [0.0] * 200
    scores = {m: {"t": {"items": x}} for m, x in dict(base=base, spliced=[0.0] * 100 + base[100:], adapted=[1.0] * 50 + [0.0] * 50 + base[100:]).items()}
    r = recovered(scores, "t")
    assert r["lost"] == 0.25 and r["recovered"] == 0.5 and r["recovered_ci95"][1] - r["recovered_ci95"][0] < 0.25


# steering

def test_steering_is_its_formula_and_leaves_no_trace(any_lm):
    sae = random_sae()
    with torch.no_grad():
        h, full = hidden(any_lm, BATCH, 1), any_lm(**BATCH).logits
        d = sae.W_dec[5] / sae.W_dec[5].norm()
        with steer(any_lm, sae, 1, 5, 0.7): steered = hidden(any_lm, BATCH, 1)
        torch.testing.assert_close(steered, h + 0.7 * (h @ d)[..., None] * d, rtol=1e-4, atol=1e-4)
        with steer(any_lm, sae, 1, 5, 0.7, keep="special"): assert torch.equal(hidden(any_lm, BATCH, 1)[:, 0], h[:, 0])
        with pytest.raises(ZeroDivisionError), steer(any_lm, sae, 1, 5, 0.7): 1 / 0
        assert torch.equal(any_lm(**BATCH).logits, full)
        with steer(any_lm, sae, 1, 5, 0.0): torch.testing.assert_close(any_lm(**BATCH).logits, full)


@torch.no_grad()
def test_log_likelihood_fixed_and_as_published():
    "Against both written out for one text at a time; the published one scores a token at its own position."
    lm = tiny("llama")
    rows = IDS.clone()
    rows[1, 7:] = -1
    ours = log_likelihoods(lm, rows)
    for i, n in enumerate((12, 7)):
        log_probs, tokens = lm(rows[i:i + 1, :n]).logits[0].log_softmax(-1), rows[i, :n]
        fixed = log_probs[:-1].gather(1, tokens[1:, None]).mean()
        published = log_probs[1:].gather(1, tokens[1:, None]).mean()
        torch.testing.assert_close(ours["fixed"][i], fixed, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours["published"][i], published, rtol=1e-4, atol=1e-4)
    loss = token_losses(lm, {1: Identity(32)}, rows)
    torch.testing.assert_close(-ours["fixed"], loss["ce"]["base"].sum(1) / loss["real"].sum(1), rtol=1e-4, atol=1e-4)


def test_steering_effect_of_an_untrained_adapter_is_none(clean):
    lm, tok, saes, blocks = clean
    add_lora(lm, saes, rank=1)
    sets = {"positive": [a for a, _ in PAIRS], "law": ["The court is closed.", "A lease must be in writing."], "verse": ["O good convey!", "My lord, I dare not."]}
    effect = steering_effect(lm, tok, saes[14], 14, 3, sets, 0.5)
    for kind in ("fixed", "published"):
        for side, n in (("positive", 4), ("negative", 4)):
            assert effect[kind][side]["difference"] == {"mean": 0.0, "ci90": [0.0, 0.0], "n": n} and effect[kind][side]["base"]["mean"] != 0
    assert tune_alpha(lm, tok, saes[14], 14, 3, sets, alphas=(0.0, 0.5))[1][0.0] == 0


def test_steering_on_the_negatives_of_the_paper(adapted):
    lm, tok, saes, blocks = adapted
    sets = {p.stem: json.loads(p.read_text())["examples"][:6] for p in sorted(shared("steering").glob("*.json"))}
    assert set(sets) == {"law", "arabic", "biology", "recipes", "shakespeare"}
    with without_lora(lm): found = positives(lm, tok, saes[14], 14, 524, blocks.valid, n=8)
    assert found and all(t.strip() for t in found)
    alpha, _ = tune_alpha(lm, tok, saes[14], 14, 524, {"positive": found[::2], "biology": sets.pop("biology")}, alphas=(0.1, 1.0))
    effect = steering_effect(lm, tok, saes[14], 14, 524, {"positive": found[1::2]} | sets, alpha)
    assert effect["fixed"]["negative"]["difference"]["n"] == 24 and effect["fixed"]["negative"]["base"]["ci90"][0] <= effect["fixed"]["negative"]["base"]["ci90"][1]


def test_passages_are_windows_about_peaks():
    acts = torch.zeros(4, 9)
    acts[0, 0], acts[2, 8], acts[3, 4] = 1.0, 3.0, 2.0
    assert passages(acts, 5, 4) == [(2, 5, 9), (3, 2, 6), (0, 0, 4)] and passages(acts, 1, 100) == [(2, 0, 9)]


# the measures of SAEBench

@torch.no_grad()
def test_loss_recovered_of_both_clean_models():
    lm, sae = tiny("llama"), random_sae()
    add_lora(lm, {1: sae}, rank=2)
    for p in lora_parameters(lm).values(): p.normal_(0, 0.1)
    rows = IDS.clone()
    t = token_losses(lm, {1: sae}, rows)
    mean = {m: float(v.mean()) for m, v in t["ce"].items()}
    base, own = (loss_recovered(lm, {1: sae}, rows, clean=c) for c in ("base", "adapted_unspliced"))
    assert math.isclose(base["ce_clean"], mean["base"], rel_tol=1e-5) and math.isclose(base["ce_sae"], mean["spliced"], rel_tol=1e-5)
    assert math.isclose(own["ce_clean"], mean["adapted_unspliced"], rel_tol=1e-5) and math.isclose(own["ce_sae"], mean["adapted"], rel_tol=1e-5)
    assert math.isclose(base["kl_sae"], float(t["kl"]["spliced"].mean()), rel_tol=1e-4)
    assert math.isclose(own["loss_recovered"], (own["ce_zero"] - own["ce_sae"]) / (own["ce_zero"] - own["ce_clean"]))


def test_explained_variance_of_half_the_error():
    x = torch.randn(2000, 8, dtype=torch.double)
    x -= x.mean(0)
    ev = explained_variance(x, x / 2)
    assert math.isclose(ev["correct"], 0.75, rel_tol=1e-6) and math.isclose(ev["legacy"], 0.75, rel_tol=1e-6)


def test_probe_finds_what_is_there_and_nothing_else():
    g = torch.Generator().manual_seed(1)
    y = np.repeat(["a", "b", "c", "d"], 50)
    F = torch.rand(200, 30, generator=g)
    assert probe(F, y, (1,))[1]["ci95"][0] < 0.55
    for i, c in enumerate("abcd"): F[:, i] += torch.as_tensor(y == c) * 1.0
    found = probe(F, y, (1, None))
    assert found[1]["accuracy"] >= 0.95 and found[None]["accuracy"] > 0.9 and found[1]["n"] == 4 * 30
    assert probe(F, y, (1,), seed=3) == probe(F, y, (1,), seed=3)


def test_probing_news(clean):
    lm, tok, saes, _ = clean
    texts, y = labelled(shared("ag_news") / "test.csv", n=40)
    assert sorted(set(y)) == ["1", "2", "3", "4"] and len(texts) == 160
    X, F = pooled(lm, tok, saes[14], 14, texts, length=48)
    assert probe(X, y, (None,))[None]["accuracy"] > 0.75 and probe(F, y, (5,))[5]["accuracy"] > 0.6


@torch.no_grad()
def test_pooled_is_the_mean_over_the_text_alone(clean):
    lm, tok, saes, _ = clean
    X, F = pooled(lm, tok, saes[14], 14, ["Tides.", "A much longer text than the first, so that the first is padded."])
    ids = torch.tensor([[tok.get_vocab()["<|endoftext|>"], *tok("Tides.", add_special_tokens=False).input_ids]])
    h = hidden(lm, {"input_ids": ids}, 14)[0, 1:]
    torch.testing.assert_close(X[0], h.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(F[0], saes[14].encode(h).mean(0), rtol=1e-3, atol=1e-3)


def test_tpp_where_one_latent_serves_two_classes():
    "Removing it hurts the other class as much: nothing is targeted."
    y, D = np.repeat([0, 1, 2, 3], 60), torch.eye(5)
    F = torch.zeros(240, 5)
    F[:, 0] = torch.as_tensor((y == 0) | (y == 1)) * 3.0
    F += torch.rand(240, 5, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert abs(tpp(F @ D, F, D, y, n=1)["tpp"]) < 0.2
    own = torch.nn.functional.one_hot(torch.as_tensor(y), 5) * 3.0
    assert tpp(own @ D, own, D, y, n=1) == {"tpp": 0.5, "intended": 0.5, "unintended": 0.0}


def test_scr_is_zero_where_the_wrong_latents_go_and_where_nothing_was_lost():
    a, b = (np.array(v) for v in zip(*[(i, j) for i in (0, 1) for j in (0, 1)] * 40))
    F = torch.stack([torch.as_tensor(v) * s for v, s in ((a, 1.0), (1 - a, 1.0), (b, 2.0), (1 - b, 2.0))], 1).float()
    assert scr(F, F, torch.eye(4), a, b, n=2)["scr"] == 1.0
    loud = F * torch.tensor([4.0, 4.0, 0.1, 0.1])
    assert scr(loud, loud, torch.eye(4), a, b, n=2)["scr"] == 0.0


def test_absorption_of_a_real_letter(clean):
    lm, tok, saes, _ = clean
    found = absorption(lm, tok, saes[14], 14, letters="sm", n=24)
    assert set(found["letters"]) | set(found["left_out"]) == set("sm")
    for r in found["letters"].values(): assert 0 <= r["full"] <= 1 and 0 <= r["fraction"] <= 1 and 1 <= len(r["main"]) <= 10


def test_absorption_agrees_with_sae_bench():
    pytest.importorskip("sae_bench")
    from sae_bench.evals.absorption.feature_absorption_calculator import FeatureAbsorptionCalculator
    g = torch.Generator().manual_seed(0)
    D, p = torch.nn.functional.normalize(torch.randn(40, 16, generator=g), dim=1), torch.randn(16, generator=g)
    f = torch.rand(64, 40, generator=g) * (torch.rand(64, 40, generator=g) < 0.15)
    f[:, :2] *= torch.rand(64, 1, generator=g) < 0.3
    x = f @ D + 0.6 * torch.nn.functional.normalize(p, dim=0)
    words = [f"w{i}" for i in range(64)]
    model = types.SimpleNamespace(to_tokens=lambda s: torch.zeros(1, 3), run_with_cache=lambda prompts, names_filter: (None, {names_filter[0]: x[[int(s.rsplit('w', 1)[1][:-1]) for s in prompts]][:, None]}))
    sae = types.SimpleNamespace(W_dec=D, device="cpu", encode=lambda h: torch.stack([f[(x - r).abs().sum(1).argmin()] for r in h]))
    calculator = FeatureAbsorptionCalculator(model=model, icl_word_list=["a"], max_icl_examples=0, word_token_pos=0)
    theirs = calculator.calculate_absorption(sae, words, p, [0, 1], layer=0, show_progress=False).word_results
    full, fraction = absorbed(x, f, D, p, [0, 1])
    positive = (x @ p > 0)  # theirs is asked about words that the probe finds
    assert positive.sum() > 30
    for i in torch.where(positive)[0].tolist():
        assert bool(full[i]) == theirs[i].is_full_absorption and math.isclose(float(fraction[i]), theirs[i].absorption_fraction, abs_tol=1e-5)


def test_choice_of_latents_and_removal_agree_with_sae_bench():
    pytest.importorskip("sae_bench")
    from sae_bench.evals.scr_and_tpp.main import create_tpp_plotting_dict
    from sae_bench.evals.sparse_probing.probe_training import get_top_k_mean_diff_mask, train_sklearn_probe
    g = torch.Generator().manual_seed(0)
    F, y = torch.rand(200, 30, generator=g), torch.arange(200) % 2 == 0
    from sae_bench.sae_bench_utils import dataset_info
    theirs = get_top_k_mean_diff_mask(F, torch.where(y, dataset_info.POSITIVE_CLASS_LABEL, dataset_info.NEGATIVE_CLASS_LABEL), 4)
    assert set(top_latents(F, y, 4).tolist()) == set(torch.where(~theirs)[0].tolist())
    F[y, 3] += 0.4
    model, _ = train_sklearn_probe(F[:100], y[:100].long(), F[100:], y[100:].long())
    ours = _regression(F[:100], y[:100])
    np.testing.assert_allclose(model.coef_, ours.coef_, atol=1e-4)
    clean, fall = {"a": 0.9, "b": 0.8}, {"a": {10: {"a": 0.5, "b": 0.75}}, "b": {10: {"a": 0.85, "b": 0.6}}}
    overall, _ = create_tpp_plotting_dict(fall, clean)
    assert math.isclose(overall["tpp_threshold_10_total_metric"], ((0.4 - 0.05) + (0.2 - 0.05)) / 2)


# two models

def test_agreement_is_jaccard(monkeypatch):
    "Two models whose latents are set by hand: 1 of 3, then 2 of 2, then none in either."
    lm, sae = tiny("llama"), random_sae(d_sae=64)
    a, b = torch.zeros(2, 12, 64), torch.zeros(2, 12, 64)
    a[0, 1, [0, 1]] = b[0, 1, [1, 2]] = 1.0
    a[1, 5, [4, 5]] = b[1, 5, [4, 5]] = 1.0
    monkeypatch.setattr(latents_module, "_seen", lambda lm, saes, layer, rows, model, keep: ({"base": a, "spliced": b}[model], torch.ones(2, 12, dtype=torch.bool)))
    got = agreement(lm, {1: sae}, IDS, compare=("base", "spliced"), top=1)[1]
    assert math.isclose(got["jaccard"], (1 / 3 + 1) / 2) and got["latents"] == 3 and got["top_overlap"] == 1 and got["positions"] == 24


@torch.no_grad()
def test_an_earlier_splice_moves_what_a_later_sae_sees():
    lm, saes = tiny("llama"), {0: random_sae(), 2: random_sae(seed=1)}
    got = agreement(lm, saes, IDS, compare=("base", "spliced"))
    assert got[0]["jaccard"] == 1 and got[2]["jaccard"] < 1
    with splice(lm, {0: saes[0]}): h = hidden(lm, BATCH, 2)
    seen, real = latents_module._seen(lm, saes, 2, IDS, "spliced", "special")
    torch.testing.assert_close(seen[:, 1:], (saes[2].encode(h) * real[..., None])[:, 1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "gpt_neox", "bloom"])
@torch.no_grad()
def test_what_a_latent_promotes_goes_through_the_final_norm(name):
    lm, sae = tiny(name), random_sae()
    norm = [m for m in stack(lm).children() if getattr(m, "weight", None) is not None and m.weight.dim() == 1][-1]
    norm.weight.normal_()
    gain = norm.weight + 1 if name == "gemma" else norm.weight
    tok = types.SimpleNamespace(batch_decode=lambda ids: ids[:, 0].tolist())
    z = lm.get_output_embeddings().weight @ (sae.W_dec[3] * gain)
    assert promotes(lm, tok, sae, [3], n=5)[0]["promotes"] == z.topk(5).indices.tolist()


def test_cards_are_json_and_show_both_models(adapted):
    lm, tok, saes, blocks = adapted
    with without_lora(lm), torch.no_grad(): f = saes[14].encode(hidden(lm, {"input_ids": blocks.valid[:4]}, 14)[:, 1:])
    latent = int((f > 0).float().mean((0, 1)).argmax())
    card, = json.loads(json.dumps(latent_cards(lm, tok, saes, 14, [latent], blocks.valid[:4], n=2)))
    assert card["rate"]["base"] == card["rate"]["adapted"] > 0 and card["top_overlap"] == 1  # the adapter is after the SAE
    assert len(card["passages"]) == 2 and card["passages"][0]["base"] == card["passages"][0]["adapted"] and max(card["passages"][0]["base"]) > 0
    assert max(card["passages"][0]["base"]) >= max(card["passages"][1]["base"]) and len(card["promotes"]) == 8


def test_latents_can_be_removed_where_the_output_is_a_sum(clean):
    sae = clean[2][14]
    x = torch.randn(5, 576)
    f = sae.encode(x)
    torch.testing.assert_close(f @ decoder(sae) + sae.b_dec, sae.decode(f), rtol=1e-4, atol=1e-4)
    scaled = random_sae(rescale_acts_by_decoder_norm=True)
    f = scaled.encode(torch.randn(5, 32))
    torch.testing.assert_close(f @ decoder(scaled) + scaled.b_dec, scaled.decode(f), rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="layer_norm"): decoder(random_sae(normalize_activations="layer_norm"))


def test_a_page_of_cards_is_searchable_and_escapes_what_it_shows():
    card = dict(layer=1, latent=7, rate=dict(base=0.01, adapted=0.02), top_overlap=0.5, promotes=["<b>", " x"], suppresses=["y"],
                passages=[dict(tokens=["<i>", "a\n"], base=[2.0, 0.0], adapted=[1.0, 0.0]), dict(tokens=["same"], base=[1.0], adapted=[1.0])])
    page = cards_page([card, card | dict(latent=8)])
    assert page.count("<details>") == 2 and 'type="search"' in page and "&lt;i&gt;" in page and "<i>" not in page and "<b>" not in page.replace("<b>latent", "")
    assert page.count("<small>adapted") == 2 and "a⏎" in page  # one line of the two differs, on each card


def test_some_latents_lie_between_the_rates():
    from conftest import random_sae, tiny
    lm, sae, rows = tiny("llama"), random_sae(), torch.randint(3, 97, (6, 16), generator=torch.Generator().manual_seed(0))
    chosen = some_latents(lm, sae, 1, rows, 4, low=0.02, high=0.3)
    rate = (latents_module.latents_at(lm, sae, 1, rows)[1] > 0).sum((0, 1)) / (6 * 15)
    assert len(set(chosen)) == 4 and all(0.02 <= rate[i] <= 0.3 for i in chosen) and rate[chosen[0]] <= rate[chosen[-1]]
    with pytest.raises(UsageError, match="latents fire at between"): some_latents(lm, sae, 1, rows, 10_000, low=0.02, high=0.3)


def test_a_family_of_one_file_is_a_family(clean):
    from sae_lora.experiments import benchmarks
    lm, tok, saes, _ = clean
    found = benchmark(lm, tok, ["mmlu"], data=benchmarks("sample"))
    assert found["mmlu"]["n"] == found["mmlu_astronomy"]["n"] == 4
