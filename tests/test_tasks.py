"""Benchmarks are lm-eval's to the digit, whatever file they are read from."""

import json
import sys
from contextlib import nullcontext

import pytest
import torch
from conftest import tiny
from worlds import BOS, PAIRS, shared, tokenizer

from sae_lora.agreement import agreement
from sae_lora.benchmark_files import LOCAL, local_tasks
from sae_lora.files import UsageError
from sae_lora.models import as_model
from sae_lora.probing import labelled, probe
from sae_lora.saebench import loss_recovered
from sae_lora.splice import splice
from sae_lora.steering import scaled_change, steer, steering_effect
from sae_lora.tasks import benchmark, benchmark_all, recovered
from sae_lora.text import text_rows

IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def data(tmp_path):
    "A folder with a few rows in the form of each benchmark."
    for folder in ("blimp", "mmlu", "truthfulqa"):
        (tmp_path / folder).mkdir()
    for name in ("adjunct_island", "wh_island"):
        (tmp_path / "blimp" / f"{name}.jsonl").write_text(
            "".join(json.dumps(dict(sentence_good=a, sentence_bad=b)) + "\n" for a, b in PAIRS)
        )
    (tmp_path / "mmlu" / "anatomy_test.csv").write_text(
        'question,A,B,C,D,answer\n" How many, if any? ",1.50,None,3,"4, or more",2\n'
    )
    (tmp_path / "truthfulqa" / "TruthfulQA.csv").write_text(
        "Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source\n"
        "x,y,Is it?,It is not,It is not; No.,It is; Yes.; ,z\n"
    )
    return tmp_path


def test_base_is_lm_eval_called_directly(clean, data, tmp_path):
    "lm-eval's own entry point and own way of reading a file, on a model we did not touch."
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm, tok, _, _ = clean
    here = tmp_path / "yaml"
    here.mkdir()
    (here / "direct.yaml").write_text(
        "task: direct\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{train: {data}/blimp/wh_island.jsonl}}}}\n"
        "output_type: multiple_choice\nvalidation_split: train\n"
        'doc_to_text: ""\ndoc_to_target: 0\n'
        'doc_to_choice: "{{[sentence_good, sentence_bad]}}"\nnum_fewshot: 0\n'
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
    )
    direct = simple_evaluate(
        model=HFLM(pretrained=lm, tokenizer=tok, batch_size=4),
        tasks=["direct"],
        task_manager=TaskManager(include_path=str(here), include_defaults=False),
    )
    ours = benchmark(lm, tok, "blimp_wh_island", data=data, batch_size=4)["blimp_wh_island"]
    assert (
        ours["value"] == direct["results"]["direct"]["acc,none"]
        and ours["stderr"] == direct["results"]["direct"]["acc_stderr,none"]
    )
    assert ours["items"] == [s["acc"] for s in direct["samples"]["direct"]] and ours["n"] == len(
        PAIRS
    )


def test_base_is_lm_eval_called_directly_on_real_data(clean):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm, tok, saes, _ = clean
    folder = shared("blimp").parent
    (task,) = local_tasks("blimp_principle_A_case_1", folder)
    direct = evaluate(
        HFLM(pretrained=lm, tokenizer=tok, batch_size=16),
        TaskManager(include_defaults=False).load([task]),
        limit=30,
    )["results"][task["task"]]
    four = benchmark_all(lm, tok, task["task"], saes, data=folder, limit=30, batch_size=16)
    assert (
        list(four) == ["base", "spliced"]
        and four["base"][task["task"]]["value"] == direct["acc,none"]
        and four["base"][task["task"]]["stderr"] == direct["acc_stderr,none"]
    )


def prompts(name, data):
    "What lm-eval asks: pairs of context and continuation."
    from lm_eval.tasks import TaskManager

    task = TaskManager(include_defaults=False).load(local_tasks(name, data))["tasks"][name]
    task.set_config("num_fewshot", 0)
    task.build_all_requests(limit=1, rank=0, world_size=1)
    return [i.args for i in task.instances]


def test_prompts_are_lm_evals(data):
    assert prompts("blimp_wh_island", data) == [
        ("", " " + PAIRS[0][0]),
        ("", " " + PAIRS[0][1]),
    ]  # the space is lm-eval's target delimiter
    said = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    said += "How many, if any?\nA. 1.50\nB. None\nC. 3\nD. 4, or more\nAnswer:"
    assert prompts("mmlu_anatomy", data) == [(said, f" {c}") for c in "ABCD"]
    asked = prompts("truthfulqa_mc1", data)
    assert (
        [a for _, a in asked] == [" It is not.", " It is.", " Yes."]
        and asked[0][0].startswith("Q: What is human life expectancy")
        and asked[0][0].endswith("\n\nQ: Is it?\nA:")
    )


def test_every_file_on_disk_is_a_task_of_lm_eval():
    folder = shared("mmlu").parent
    assert len(local_tasks("blimp", folder)) == len(list((folder / "blimp").glob("*.jsonl"))) == 67
    assert len(local_tasks("mmlu", folder)) == len(list((folder / "mmlu").glob("*_test.csv")))
    for family in LOCAL.values():
        for path in folder.glob(family.files):
            assert family.read(path)
    questions = [
        q for path in (folder / "mmlu").glob("*_test.csv") for q in LOCAL["mmlu"].read(path)
    ]
    assert all(
        len(q["choices"]) == 4 and all(q["choices"]) and q["question"].strip() for q in questions
    )
    assert any(
        'a "$1 off" coupon' in c for q in questions for c in q["choices"]
    )  # quotes inside cells are kept


def test_four_models_and_families(adapted, data):
    lm, tok, saes, _ = adapted
    four = benchmark_all(lm, tok, ["blimp", "truthfulqa_mc1"], saes, data=data, limit=3)
    assert list(four) == ["base", "spliced", "adapted_unspliced", "adapted"]
    for scores in four.values():
        assert list(scores) == [
            "blimp",
            "blimp_adjunct_island",
            "blimp_wh_island",
            "truthfulqa_mc1",
        ]
        assert (
            scores["blimp"]["items"]
            == scores["blimp_adjunct_island"]["items"] + scores["blimp_wh_island"]["items"]
            and scores["blimp"]["n"] == 6
        )
        for s in scores.values():
            assert (
                s["ci95"][0] <= s["value"] <= s["ci95"][1]
                and 0 <= s["ci95"][0]
                and s["ci95"][1] <= 1
            )
    assert benchmark_all(
        lm, tok, ["blimp", "truthfulqa_mc1"], saes, known={"base": "as it was"}, data=data, limit=3
    ) == four | {"base": "as it was"}
    with as_model(lm, saes, "adapted"):
        inside = benchmark(lm, tok, "truthfulqa_mc1", data=data)
    assert (
        inside
        == benchmark(lm, tok, "truthfulqa_mc1", saes, data)
        == {"truthfulqa_mc1": four["adapted"]["truthfulqa_mc1"]}
    )


@pytest.mark.parametrize("keep", ["special", "none"])
def test_right_padding_without_a_mask_changes_nothing(adapted, keep):
    "The log-likelihood of each item is that of the item alone, by plain transformers."
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm, tok, saes, _ = adapted
    asked = [
        Instance("loglikelihood", {}, ("The keys to the door", a), i)
        for i, a in enumerate(
            (
                " are here.",
                " is",
                ", which had been lost for many years, were found at last under the mat.",
            )
        )
    ]
    with splice(lm, saes, keep):
        batched = [
            r[0] for r in HFLM(pretrained=lm, tokenizer=tok, batch_size=3).loglikelihood(asked)
        ]
        for i, together in zip(asked, batched):
            ids = tok("".join(i.args), return_tensors="pt").input_ids
            n = ids.shape[1] - len(tok("The keys to the door").input_ids)
            with torch.no_grad():
                z = lm(ids).logits[0].log_softmax(-1)
            alone = z[-n - 1 : -1].gather(1, ids[0, -n:, None]).sum()
            assert abs(together - float(alone)) < 2e-3


@pytest.mark.parametrize("adds", [True, False])
def test_items_begin_as_the_tokenizer_begins_a_text(adds, data):
    """With a context, without one, and as a whole.

    One BOS where the tokenizer puts it there, and lm-eval's own choice where it does not.
    """

    from sae_lora.text import beginning, separator

    lm, tok = tiny("llama"), tokenizer("<bos> $A" if adds else None)
    seen = []
    lm.name_or_path = lm.config._name_or_path = "tiny"
    lm.register_forward_pre_hook(
        lambda m, args, kwargs: seen.extend(kwargs.get("input_ids", args[0] if args else None)),
        with_kwargs=True,
    )
    for task in ("blimp_wh_island", "mmlu_anatomy"):
        benchmark(lm, tok, task, data=data, batch_size=2)
        asked = (
            adds or task == "blimp_wh_island"
        )  # without a context lm-eval puts the tokenizer's bos_token
        assert seen and all(
            (int(row[0]) == BOS) == asked and not (row[1:] == BOS).any() for row in seen
        )
        seen.clear()
    whole = {
        "task": "whole",
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
        "custom_dataset": lambda **_: __import__("datasets").DatasetDict(
            {"test": __import__("datasets").Dataset.from_list([{"text": "w5 w6 w7"}])}
        ),
    }
    benchmark(lm, tok, whole)
    assert [row.tolist() for row in seen] == [[BOS, 5, 6]]
    assert beginning(tok) == ([BOS] if adds else [separator(tok)])


def test_mode_is_restored_even_on_an_error(clean, data):
    lm, tok, saes, _ = clean
    lm.train()
    benchmark(lm, tok, "truthfulqa_mc1", saes, data)
    assert lm.training
    (data / "truthfulqa" / "TruthfulQA.csv").write_text("Question\nWhat?\n")
    with pytest.raises(UsageError, match="TruthfulQA.csv: not in the expected form"):
        benchmark(lm, tok, "truthfulqa_mc1", saes, data)
    assert lm.training and not any(m._forward_hooks for m in lm.modules())
    lm.eval()


def test_mistakes_are_one_line(clean, data, monkeypatch):
    lm, tok, saes, _ = clean
    for call in (
        lambda: benchmark(lm, tok, "blimp_nonsense", data=data),
        lambda: as_model(lm, saes, "adapted").__enter__(),
        lambda: as_model(lm, None, "spliced").__enter__(),
        lambda: steer(lm, saes[14], 14, 4608, 1.0),
        lambda: text_rows(["a", " "], tok),
        lambda: scaled_change(torch.ones(3), torch.ones(3)),
        lambda: steering_effect(lm, tok, nullcontext, {"law": ["a", "b"]}, 1.0),
        lambda: loss_recovered(lm, saes, IDS, clean="adapted_unspliced"),
        lambda: loss_recovered(lm, saes, IDS, clean="student"),
        lambda: agreement(lm, saes, IDS),
        lambda: labelled("/nowhere.csv"),
        lambda: probe(torch.rand(6, 3), list("aabbcc")),
    ):
        with pytest.raises(UsageError) as e:
            call()
        assert "\n" not in str(e.value)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(UsageError, match=r"sae_lora\[tasks\]"):
        benchmark(lm, tok, "blimp", data=data)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UsageError, match=r"sae_lora\[tasks\]"):
        probe(torch.rand(60, 3), ["a", "b"] * 30)


def test_recovered_is_paired():
    """The adapter recovers exactly half of the items that splicing lost, and changes no other.

    So the share is much surer than the scores themselves.
    """
    base = [1.0] * 200 + [0.0] * 200
    scores = {
        m: {"t": {"items": x}}
        for m, x in dict(
            base=base,
            spliced=[0.0] * 100 + base[100:],
            adapted=[1.0] * 50 + [0.0] * 50 + base[100:],
        ).items()
    }
    r = recovered(scores, "t")
    assert (
        r["lost"] == 0.25
        and r["recovered"] == 0.5
        and r["recovered_ci95"][1] - r["recovered_ci95"][0] < 0.25
    )


def test_a_family_of_one_file_is_a_family(clean):
    from sae_lora.experiments import benchmarks

    lm, tok, saes, _ = clean
    found = benchmark(lm, tok, ["mmlu"], data=benchmarks("sample"))
    assert found["mmlu"]["n"] == found["mmlu_astronomy"]["n"] == 4
