"""A hostile user: a tiny world on disk, the command run in it, and a judge of what came of it.

`python tests/hostile.py --mutants 200 --seeds 3 --kills 20` is the longer campaign: it prints how
many of each kind went wrong, each with the command line that does it again, and ends with 1 if any.
`python tests/hostile.py --again KIND WAY NUMBER` does one of its damages again, and with a command,
an option and a value one of its options.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from conftest import SMALL

HERE = Path(__file__).parent
LINE = 300  # characters that a mistake may take
SECONDS = 15.0  # of the processor that a command may take here
PATIENCE = 300.0  # of the clock, on a machine that has other things to do
REFUSED = 2


# A command, and what is left of it.


@dataclass
class Ran:
    "What a command left behind: exit code, outputs, seconds; what it changed, by path."

    arguments: list
    code: int
    out: str
    err: str
    cpu: float
    wall: float
    hung: bool
    changed: dict = field(default_factory=dict)
    folder: Path | None = None

    @property
    def line(self) -> str:
        "The command line, to be run again."
        return f"sae-lora {shlex.join(self.arguments)}"

    @property
    def lines(self) -> list[str]:
        "The lines of standard error, without what was overwritten: progress bars."
        shown = [line.split("\r")[-1].rstrip() for line in self.err.split("\n")]
        return [line for line in shown if line]

    @property
    def told(self) -> str:
        "What the command says of the mistake."
        return "\n".join(line for line in self.lines if line.startswith("sae-lora:"))


class Commands:
    "The process that forks for every command."

    def __init__(self, environment: dict, cwd: Path):
        import sae_lora

        package = str(Path(sae_lora.__file__).parent.parent)
        paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | environment | dict(PYTHONPATH=os.pathsep.join(paths))
        self.process = subprocess.Popen(
            [sys.executable, HERE / "forked.py"],
            text=True,
            cwd=cwd,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.process.stdout.readline()

    def ask(self, **request) -> dict:
        "Send a request, give the answer."
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self):
        "End the process."
        self.process.stdin.close()
        self.process.wait()


@dataclass
class Started:
    "A command that runs."

    commands: Commands
    process: int
    arguments: list
    said: Path
    folder: Path

    def told(self, number: int):
        "Send a signal to its process; it may be over."
        os.kill(self.process, number)

    def wait(self, seconds: float = PATIENCE) -> Ran:
        "What came of it, once it is over."
        found = self.commands.ask(do="wait", process=self.process, seconds=seconds)
        out, err = (Path(f"{self.said}.{kind}") for kind in ("out", "err"))
        texts = [path.read_bytes().decode(errors="replace") for path in (out, err)]
        for path in (out, err):
            path.unlink()
        return Ran(
            self.arguments,
            found["code"],
            *texts,
            found["cpu"],
            found["wall"],
            found["hung"],
            folder=self.folder,
        )


# What is on disk.


def seen(path: Path) -> str:
    "What a path holds, in short."
    if path.is_symlink():
        return f"link {os.readlink(path)}"
    if path.is_dir():
        return "folder"
    if not path.is_file():
        return "special"
    return hashlib.blake2b(path.read_bytes(), digest_size=12).hexdigest()


def snapshot(folder: Path) -> dict[str, str]:
    "All that is below a folder, byte for byte, by path."
    found = {}
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            path = Path(place, name)
            found[str(path)] = seen(path)
    return found


def changes(before: dict, after: dict) -> dict[str, str]:
    "Paths that were `made`, `changed` or `removed`."
    words = {}
    for path in before.keys() | after.keys():
        if before.get(path) != after.get(path):
            kind = "changed" if path in after else "removed"
            words[path] = kind if path in before else "made"
    return dict(sorted(words.items()))


# The world.

MODEL = SMALL | dict(max_position_embeddings=512)
BUDGET = ("--length", 16, "--rank", 2, "--tokens", 160, "--valid-tokens", 256)
LONGER = ("--length", 16, "--rank", 2, "--tokens", 3200, "--valid-tokens", 256)
LONGER_SAE = ("--tokens", 131_072)
SMALL_SAE = (
    "--layer",
    1,
    "--width",
    64,
    "--k",
    8,
    "--tokens",
    16_384,
    "--batch",
    128,
    "--text-tokens",
    4096,
    "--valid-tokens",
    768,
)


def write_model(folder: Path, seed: int = 0, **settings):
    "A tiny Llama, with its tokenizer, whose embeddings have something in common by first letter."
    import torch
    from device_entries import SPECIAL, SYLLABLES, tokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(LlamaConfig(**MODEL | settings))
    for p in lm.parameters():
        if p.dim() > 1:
            p.data.normal_(0, 0.3)
    letters = torch.randn(8, lm.config.hidden_size).repeat_interleave(len(SYLLABLES), 0)
    lm.get_input_embeddings().weight.data[len(SPECIAL) :] += letters
    lm.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


HEADS = dict(
    attn_q=(32, 32),
    attn_k=(16, 32),
    attn_v=(16, 32),
    attn_output=(32, 32),
    ffn_gate=(64, 32),
    ffn_up=(64, 32),
    ffn_down=(32, 64),
)


def gguf_tensors(tokens: int, blocks: int = 4):
    "Names and weights of a tiny Llama, as GGUF has them."
    import numpy as np

    draw = np.random.default_rng(0)
    of_blocks = {f"blk.{i}.{n}": shape for i in range(blocks) for n, shape in HEADS.items()}
    norms = ["output_norm", *(f"blk.{i}.{n}_norm" for i in range(blocks) for n in ("attn", "ffn"))]
    shapes = dict(token_embd=(tokens, 32), output=(tokens, 32)) | of_blocks
    for name, shape in shapes.items():
        yield f"{name}.weight", draw.normal(0, 0.3, size=shape).astype(np.float32)
    for name in norms:
        yield f"{name}.weight", np.ones(32, np.float32)


def write_gguf(path: Path):
    "A tiny Llama of 259 tokens in one file."
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = ["<|endoftext|>", *bytes_to_unicode().values(), "an", "el"]
    made = gguf.GGUFWriter(path, "llama")
    numbers = dict(
        context_length=512,
        embedding_length=32,
        block_count=4,
        feed_forward_length=64,
        head_count=4,
        head_count_kv=2,
        layer_norm_rms_eps=1e-5,
        rope_dimension_count=8,
        vocab_size=len(tokens),
        tokenizer_model="gpt2",
        tokenizer_pre="default",
        token_list=tokens,
        token_merges=["a n", "e l"],
        bos_token_id=0,
        eos_token_id=0,
        token_types=[3] + [1] * (len(tokens) - 1),
    )
    for name, value in numbers.items():
        getattr(made, f"add_{name}")(value)
    for name, value in gguf_tensors(len(tokens)):
        made.add_tensor(name, value)
    for part in ("header", "kv_data", "tensors"):
        getattr(made, f"write_{part}_to_file")()
    made.close()


def write_scope(folder: Path):
    "An SAE in the form of Gemma Scope that suits any hidden states of width 32."
    import numpy as np

    folder.mkdir(parents=True)
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))
    decoder = np.concatenate([q, -q])
    arrays = dict(
        W_enc=decoder.T,
        W_dec=decoder,
        b_enc=np.zeros(64),
        b_dec=np.zeros(32),
        threshold=np.full(64, 0.5),
    )
    np.savez(folder / "params.npz", **{n: a.astype(np.float32) for n, a in arrays.items()})


def write_texts(folder: Path):
    "The same kind of text in every form that is read."
    import pyarrow
    import pyarrow.parquet
    from device_entries import documents

    docs = documents(900)
    folder.mkdir()
    (folder / "text.txt").write_text("\n\n".join(docs))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in docs))
    (folder / "text.csv").write_text("n,text\n" + "".join(f"{i},{d}\n" for i, d in enumerate(docs)))
    pyarrow.parquet.write_table(pyarrow.table({"text": docs}), folder / "text.parquet")


NOTEBOOK = """# A tiny experiment

> Nothing is claimed.
"""


def write_clone(folder: Path):
    "A clone with one experiment, which prints its parameters."
    import nbformat

    v4, notebooks = nbformat.v4, folder / "nbs" / "experiments"
    cells = [
        v4.new_markdown_cell(NOTEBOOK),
        v4.new_code_cell("rank = 2\nranks = [1, 2]"),
        v4.new_code_cell("print(rank, ranks)"),
    ]
    cells[1].metadata["tags"] = ["parameters"]
    about = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    (notebooks / "params" / "smoke").mkdir(parents=True)
    nbformat.write(v4.new_notebook(cells=cells, metadata=about), notebooks / "00_tiny.ipynb")
    (notebooks / "params" / "smoke" / "00_tiny.yml").write_text("estimate_minutes: 1\nrank: 3\n")


class World:
    "A folder with everything that commands read, and a way to run them in it."

    budget = BUDGET
    longer = LONGER
    longer_sae = LONGER_SAE

    def __init__(self, root: Path):
        self.root = root
        self.cases = itertools.count()
        for name in ("home", "cache", "temporary", "said", "results"):
            (root / name).mkdir()
        self.environment = dict(
            SAE_LORA_CACHE=str(root / "cache"),
            SAE_LORA_RESULTS=str(root / "results"),
            HOME=str(root / "home"),
            HF_HOME=str(root / "home" / "hub"),
            HF_HUB_OFFLINE="1",
            TMPDIR=str(root / "temporary"),
            PIP_NO_INDEX="1",
            PIP_FIND_LINKS="",
            OMP_NUM_THREADS="1",
            TOKENIZERS_PARALLELISM="false",
            PYTHONUTF8="1",
            COLUMNS="200",
            MPLCONFIGDIR=str(root / "home" / "mpl"),
        )
        self.write()
        self.commands = Commands(self.environment, root)
        self.make()
        self.before = snapshot(root)

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    def write(self):
        "What is written without the command."
        write_model(self / "model")
        write_model(self / "other-model", seed=1)
        write_gguf(self / "model.gguf")
        write_scope(self / "scope" / "res" / "layer_1")
        write_texts(self / "texts")
        write_clone(self / "clone")
        rows = [
            dict(key=key, parameters=dict(rank=1), metrics=dict(ce=1.0), provenance={})
            for key in ("a", "b")
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (self / "results" / "rows.jsonl").write_text(lines)

    def make(self):
        "What the command itself makes: an SAE, a run, and a run that was stopped."
        for name, layer in (("sae", 1), ("other-sae", 2)):
            self.must(*self.train_sae(self / name), "--layer", layer)
        self.must(*self.adapt(self / "run"))
        self.stop(*self.adapt(self / "stopped", budget=LONGER))
        self.stop(*self.train_sae(self / "stopped-sae"), *LONGER_SAE)

    def adapt(self, out, sae=None, model=None, text=None, budget=BUDGET) -> list:
        "The arguments of a small run."
        return ["adapt", "--out", out, *self.inputs(sae, model, text), *budget]

    def inputs(self, sae=None, model=None, text=None) -> list:
        "Model, SAE and text as options."
        return [
            "--model",
            model or self / "model",
            "--sae",
            sae or self / "sae",
            "--text",
            text or self / "texts" / "text.jsonl",
        ]

    def train_sae(self, out, model=None, text=None) -> list:
        "The arguments of a small SAE's training."
        return [
            "train-sae",
            "--out",
            out,
            "--model",
            model or self / "model",
            "--text",
            text or self / "texts" / "text.jsonl",
            *SMALL_SAE,
        ]

    def start(self, *arguments, cwd=None, environment=None, limits=None) -> Started:
        "Start a command."
        arguments = [str(a) for a in arguments]
        cwd, said = cwd or self.root, self / "said" / str(next(self.cases))
        answer = self.commands.ask(
            do="start",
            arguments=arguments,
            cwd=str(cwd),
            said=str(said),
            env=environment or {},
            limits=limits or {},
        )
        return Started(self.commands, answer["process"], arguments, said, cwd)

    def run(self, *arguments, **options) -> Ran:
        "Run a command to its end, and see what it changed."
        before = snapshot(self.root)
        ran = self.start(*arguments, **options).wait()
        ran.changed = changes(before, snapshot(self.root))
        return ran

    def must(self, *arguments, **options) -> Ran:
        "Run a command that has to end well."
        ran = self.start(*arguments, **options).wait()
        if ran.code:
            raise RuntimeError(f"{ran.line} ended with {ran.code}:\n{ran.err[-3000:]}")
        return ran

    def stop(
        self, *arguments, number=signal.SIGKILL, delay: float = 0.0, late: bool = True, **options
    ) -> Ran:
        "Start a command and stop it some time after it began, or if `late` wrote its state."
        out = Path(arguments[arguments.index("--out") + 1])
        started, until = self.start(*arguments, **options), time.monotonic() + PATIENCE

        def there() -> bool:
            return (out / "state.safetensors").exists() or (out / "report.json").exists()

        while late and not there() and time.monotonic() < until:
            time.sleep(0.004)
        time.sleep(delay)
        started.told(number)
        return started.wait()

    def case(self) -> Path:
        "A new folder for one case."
        path = self / f"case-{next(self.cases)}"
        path.mkdir()
        return path

    def tidy(self, case: Path):
        "Remove the folder of a case, and what commands left in the cache."
        shutil.rmtree(case, ignore_errors=True)
        shutil.rmtree(self / "cache", ignore_errors=True)
        for name in ("cache", "temporary"):
            shutil.rmtree(self / name, ignore_errors=True)
            (self / name).mkdir()

    def close(self):
        "End the process that forks."
        self.commands.close()


# The judge.

EXPECTED = re.compile(
    r"(model|text|beginning|gap|SAE at -?\d+|budget|warning) {2,}\S|training on|"
    r"[^|]{0,60}: +\d+%\|"
)  # lines of a check, and a progress bar's last form


def judged(
    ran: Ran, world: World, outs=(), refused: bool | None = None, words=(), seconds: float = SECONDS
) -> list[str]:
    """What is wrong with what a command did; nothing if all is right.

    `outs` are the places it may write to. `refused` is whether it has to be refused, or must not
    be; `None` where either will do. `words` have to be in the line of a refusal, which may take so
    many `seconds` of the processor."""
    wrong = [f"takes {ran.cpu:.0f} s, or hangs"] if ran.hung or ran.cpu > seconds else []
    if ran.code not in (0, REFUSED) and not wrong:
        wrong.append(f"ends with {ran.code}")
    if "Traceback" in ran.err + ran.out:
        wrong.append("prints a traceback")
    if refused and ran.code == 0:
        wrong.append("is accepted")
    if refused is False and ran.code == REFUSED:
        wrong.append("is refused")
    return wrong + judged_lines(ran, words) + judged_changes(ran, world, outs)


def judged_lines(ran: Ran, words) -> list[str]:
    "What is wrong with what was said."
    if "Traceback" in ran.err:
        return []
    told = ran.told.splitlines()
    more = [x for x in ran.lines if not (x.startswith("sae-lora:") or EXPECTED.match(x))]
    wrong = [f"says more: {more[0][:150]!r}"] if more else []
    if ran.code == REFUSED and len(told) != 1:
        wrong.append(f"says {len(told)} lines, not one")
    wrong += [f"says {len(line)} characters" for line in told if len(line) > LINE]
    missing = [w for w in words if str(w).lower() not in ran.told.lower()]
    if ran.code == REFUSED and missing:
        wrong.append(f"does not say {', '.join(map(repr, missing))}")
    return wrong


def judged_changes(ran: Ran, world: World, outs) -> list[str]:
    "What is wrong with what was changed on disk."
    free = [str(world / "cache"), *map(str, outs)]
    wrong = []

    def inside(path: str) -> bool:
        return any(path == f or path.startswith(f"{f}/") for f in free)

    for path, how in ran.changed.items():
        if inside(path) and Path(path).name == ".lock":
            continue
        refused = ran.code != 0 and how != "made" and not path.startswith(free[0])
        if not inside(path) or refused:
            wrong.append(f"{Path(path).relative_to(world.root)} was {how}")
    return wrong[:3]


# Runs that are killed.


class Kill(NamedTuple):
    "A command, the signal that ends it, after how long, and whether once its state is there."

    command: str
    number: int
    delay: float
    late: bool


WEIGHTS = {
    "adapt": "adapter/adapter_model.safetensors",
    "train-sae": "sae_weights.safetensors",
    "demo": "adapter/adapter_model.safetensors",
}
GOES_ON = re.compile(r"sae-lora: stopped.*--resume")


class Killed:
    "Commands that are stopped and go on, beside one of each kind that is not stopped."

    def __init__(self, world: World, cache: str | None = None):
        self.world, self.whole = world, {}
        self.demo = dict(environment=dict(SAE_LORA_CACHE=cache or ""), limits=dict(CPU=1800))

    def arguments(self, command: str, out: Path) -> list:
        "A command whose training takes a second or two."
        if command == "adapt":
            return self.world.adapt(out, budget=LONGER)
        if command == "train-sae":
            return [*self.world.train_sae(out), *LONGER_SAE]
        return ["demo", "--out", out, "--tokens", 4096]

    def options(self, command: str) -> dict:
        "What its process needs."
        return self.demo if command == "demo" else {}

    def unbroken(self, command: str) -> Path:
        "The folder of the run that is not stopped."
        if command not in self.whole:
            out = self.world.case() / "unbroken"
            self.world.must(*self.arguments(command, out), **self.options(command))
            self.whole[command] = out
        return self.whole[command]

    def wrong(self, kill: Kill) -> tuple[list[str], Ran]:
        "What is wrong with a run that is stopped and goes on; its first part."
        whole, out = self.unbroken(kill.command), self.world.case() / "out"
        arguments, options = self.arguments(kill.command, out), self.options(kill.command)
        ran = self.world.stop(
            *arguments, number=kill.number, delay=kill.delay, late=kill.late, **options
        )
        over = (out / "report.json").exists()
        wrong = [] if over else judged_stop(ran, kill, (out / "state.safetensors").exists())
        if not over:
            again = self.world.start(*arguments, "--resume", **options).wait(2 * PATIENCE)
            if again.code:
                return wrong + [f"goes on and ends with {again.code}: {again.err[-200:]}"], ran
        return wrong + compared(out, whole, WEIGHTS[kill.command]), ran


def judged_stop(ran: Ran, kill: Kill, state: bool) -> list[str]:
    "What is wrong with how a run ended that was told to stop."
    wrong = ["prints a traceback"] if "Traceback" in ran.err else []
    codes = (128 + kill.number, -kill.number)
    if ran.code not in codes:
        wrong.append(f"ends with {ran.code}, not {codes[0]}")
    if kill.number != signal.SIGKILL and state and not GOES_ON.search(ran.told):
        wrong.append(f"does not say how to go on: {ran.told!r}")
    return wrong


def compared(out: Path, whole: Path, weights: str) -> list[str]:
    "What is wrong with the folder of a run that went on, beside that of one that was not stopped."
    here = {str(p.relative_to(out)) for p in out.rglob("*")}
    wanted = {str(p.relative_to(whole)) for p in whole.rglob("*")}
    wrong = [f"there is {n}" for n in sorted(here - wanted)]
    wrong += [f"there is no {n}" for n in sorted(wanted - here)]
    there = (out / weights).exists()
    if there and (out / weights).read_bytes() != (whole / weights).read_bytes():
        wrong.append(f"{weights} is another")
    return wrong


def told_of(ran: Ran, wrong: list[str]) -> str:
    "A failure: the command line, what is wrong, and the end of what it said."
    frames = re.findall(r'File "([^"]+)", line (\d+)', ran.err)
    own = [f"{Path(f).name}:{n}" for f, n in frames if "/sae_lora/" in f]
    tail = [line for line in ran.lines if line.strip()][-1:]
    said = f"{' > '.join(own[-4:])} {' '.join(tail)[:400]}".strip()
    return f"{ran.line}\n    {'; '.join(wrong)}\n    {said}"


# The longer campaign.


def again(drawn) -> str:
    "The command line that does again what was drawn."
    return f"python tests/hostile.py --again {shlex.join(map(str, drawn))}"


def mutants_of(world: World, examples: int, seed: int, note):
    "Draw damages and options, run each, and `note` what is wrong with it."
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded
    from test_fuzz import DAMAGES, VALUES, tried

    own = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )

    def damages(d):
        note(f"file: {d[0]}", *tried(world, *d), again(d))

    def values(v):
        note(f"option: {v[0]} {v[1]}", *tried(world, *v), again(v))

    for draws, one in ((DAMAGES, damages), (VALUES, values)):
        seeded(seed)(own(given(draws)(one)))()


def kills_of(world: World, number: int, seed: int, note, cache: str):
    "Stop runs at random moments and `note` what is wrong with what came of each."
    draw, killed = random.Random(seed), Killed(world, cache)
    models = Path(cache, "models")
    commands = ["adapt", "train-sae", "adapt", "train-sae", "demo" if models.exists() else "adapt"]
    for i in range(number):
        command = commands[i % len(commands)]
        numbers = (signal.SIGKILL, signal.SIGINT, signal.SIGTERM)
        longest = 20.0 if command == "demo" else 2.5
        kill = Kill(command, numbers[i % 3], draw.random() * longest, draw.random() < 0.7)
        wrong, ran = killed.wrong(kill)
        note(f"kill: {command}, {signal.Signals(kill.number).name}", wrong, ran, f"{kill}")


class Notes:
    "What was tried, and what went wrong, by kind."

    def __init__(self):
        self.tried = Counter()
        self.wrong = Counter()
        self.began = time.time()

    def __call__(self, kind: str, wrong: list[str], ran: Ran, drawn: str):
        "Note one; print it where something is wrong."
        self.tried[kind] += 1
        if wrong:
            self.wrong[kind] += 1
            print(f"{kind}\n    {drawn}\n    {told_of(ran, wrong)}\n", flush=True)

    def table(self) -> str:
        "All kinds, with how many went wrong."
        rows = [
            ("kind", "tried", "wrong"),
            *((k, n, self.wrong[k]) for k, n in sorted(self.tried.items())),
            (f"all, in {time.time() - self.began:.0f} s", self.tried.total(), self.wrong.total()),
        ]
        return "\n".join(f"{kind:40}{n:>8}{wrong:>8}" for kind, n, wrong in rows)


def campaign(world: World, mutants: int, seeds: int, kills: int) -> int:
    "Run all, print what went wrong, and give the exit code."
    notes = Notes()
    cache = os.environ.get("SAE_LORA_CACHE") or str(Path.home() / ".cache" / "sae-lora")
    for seed in range(seeds):
        mutants_of(world, mutants, seed, notes)
    kills_of(world, kills, seeds, notes, cache)
    print(notes.table())
    return 1 if notes.wrong else 0


def once_more(world: World, first: str, second: str, third: str) -> int:
    "Do again what was drawn, print all of it, and give the exit code."
    from test_fuzz import tried

    wrong, ran = tried(world, first, second, third)
    print(told_of(ran, wrong), ran.err, sep="\n\n")
    return 1 if wrong else 0


def options():
    "What the command line says."
    parser = argparse.ArgumentParser(description=__doc__)
    for name, number in (("mutants", 200), ("seeds", 3), ("kills", 20)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--again", nargs=3)
    return parser.parse_args()


def main() -> int:
    "The campaign, or one of its commands again."
    given = vars(options())
    one = given.pop("again")
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder).resolve())
        try:
            return once_more(world, *one) if one else campaign(world, **given)
        finally:
            world.close()


if __name__ == "__main__":
    raise SystemExit(main())
