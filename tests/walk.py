"""A process that walks through experiments, each in a process forked from it.

It reads requests, one JSON object a line (`name`, `values`, `environment`, `said`), runs the code
of the experiment's notebook with these values, and answers with how it ended: `figures`, the
seconds it took, and what was raised. Two things are put in: the sizes that SAELens reads off the
names of Gemma Scope's repositories are those of the tiny weights, and the rate of the device is a
number, for to measure it in bfloat16 takes minutes on a processor that has no such instructions.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

MODULES = (
    "sae_lora.experiments",
    "sae_lora.speed",
    "sae_lora.ways",
    "sae_lora.recipe_study",
    "sae_lora.replacement",
    "sae_lora.plots",
    "sae_lora.tasks",
    "sae_lora.absorption",
    "sae_lora.cards",
    "sae_lora.notebooks",
    "sae_lens",
    "datasets",
    "zstandard",
    "lm_eval",
    "transformers.models.gemma2.modeling_gemma2",
    "transformers.models.llama.modeling_llama",
    "IPython.display",
)


def load():
    "Import what the experiments import."
    import importlib

    import matplotlib

    matplotlib.use("Agg")
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ImportError:
            pass


def tiny_widths():
    "Let SAELens take the widths of Gemma Scope's SAEs from their weights."
    import numpy as np
    from huggingface_hub import hf_hub_download
    from sae_lens.loading import pretrained_sae_loaders as loaders

    asked = loaders.get_gemma_2_config_from_hf

    def config(repo_id, folder_name, *args, **kwargs):
        found = asked(repo_id, folder_name, *args, **kwargs)
        path = hf_hub_download(repo_id, "params.npz", subfolder=folder_name)
        with np.load(path) as weights:
            found["d_in"], found["d_sae"] = weights["W_enc"].shape
        return found

    loaders.get_gemma_2_config_from_hf = config


def no_rates():
    "Let the rate of the device be a number."
    from sae_lora import speed

    speed.matmul_rate = lambda dtype, where: 1e12


def walked(name: str, values: dict, answer: dict):
    """Run the code of an experiment; `answer` is told how many figures it drew.

    After its last figure an experiment asserts what its numbers show; those of random weights need
    not."""
    import nbformat
    from matplotlib import pyplot as plt

    from sae_lora.notebooks import settings
    from sae_lora.results import project

    values, _ = settings(name, "paper", values)
    nb = nbformat.read(project() / "nbs" / "experiments" / f"{name}.ipynb", 4)
    module = {"__name__": "__main__"}
    cells = [cell for cell in nb.cells if cell.cell_type == "code"]
    last = max(i for i, cell in enumerate(cells) if "#| fig-cap" in cell.source)
    for i, cell in enumerate(cells):
        try:
            exec(compile(cell.source, f"{name}, {cell.id}", "exec"), module)
        except AssertionError:
            if i <= last:
                raise
        if "parameters" in cell.metadata.get("tags", []):
            module |= values
        answer["figures"] = len(plt.get_fignums())


def child(request: dict, out: Path):
    "Be the process of one experiment, and end."
    sent = os.open(request["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(sent, 1)
    os.dup2(sent, 2)
    began, answer = time.perf_counter(), dict(figures=0, raised=None)
    try:
        os.environ.update(request["environment"])
        walked(request["name"], request["values"], answer)
    except BaseException as e:
        traceback.print_exc()
        answer["raised"] = f"{type(e).__name__}: {e}"
    out.write_text(json.dumps(answer | dict(seconds=time.perf_counter() - began)))
    sys.stdout.flush()
    os._exit(0)


def serve():
    "Answer requests until there are no more."
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    load()
    tiny_widths()
    no_rates()
    print(json.dumps(dict(ready=True)), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        out = Path(request["said"] + ".json")
        process = os.fork()
        if process == 0:
            child(request, out)
        os.waitpid(process, 0)
        print(out.read_text(), file=answers, flush=True)


if __name__ == "__main__":
    serve()
