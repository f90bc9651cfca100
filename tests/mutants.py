"""Ways to damage files, and what has to come of each, for rows of mistakes and for the fuzzer."""

import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Callable, NamedTuple

ABSENT = object()  # in place of a value: the key is taken away


def copied(source: Path, folder: Path, name: str | None = None) -> Path:
    "A copy of a file or folder of the world."
    target = folder / (name or source.name)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copy(source, target)
    return target


# Bytes.


def cut(path: Path, share: float = 0.5):
    "Keep the first part of a file."
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def flip(path: Path, bit: int):
    "Flip one bit of a file."
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


def removed(path: Path):
    "Take a file or folder away."
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def emptied(path: Path):
    "Leave nothing in a file."
    path.write_bytes(b"")


def garbled(path: Path, seed: int = 0):
    "Put bytes without a meaning in a file's place."
    import random

    path.write_bytes(random.Random(seed).randbytes(3000))


def as_folder(path: Path):
    "Put an empty folder in a file's place."
    removed(path)
    path.mkdir()


def as_link(path: Path):
    "Put a link to nothing in a file's place."
    removed(path)
    path.symlink_to(path.parent / "gone")


class Planted:
    "What makes a file when it is unpickled."

    def __reduce__(self):
        return os.mkdir, ("planted",)


def pickled(path: Path):
    "Put a pickle that does something in a file's place."
    path.write_bytes(pickle.dumps(Planted()))


# JSON and YAML.


def at(value, where: list):
    "The place below `value` that a path of keys leads to."
    for key in where:
        value = value[key]
    return value


def changed(data, where: str, value):
    "Put `value` at a path of keys parted by `/`, or take what is there away."
    *way, last = [int(k) if k.isdigit() else k for k in where.split("/")]
    place = at(data, way)
    if value is ABSENT:
        del place[last]
    else:
        place[last] = value
    return data


def edited(path: Path, where: str, value=ABSENT):
    "Change a file of JSON at a path of keys."
    path.write_text(json.dumps(changed(json.loads(path.read_text()), where, value)))


# Tensors.


def tensors(path: Path, change):
    "Let `change` have the tensors of a safetensors file, by name, and write what it leaves."
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as f:
        about = f.metadata()
    kept = load_file(path)
    change(kept)
    save_file({n: t.contiguous() for n, t in kept.items()}, path, about)


def arrays(path: Path, change):
    "The same for an archive of arrays."
    import numpy as np

    kept = dict(np.load(path))
    change(kept)
    np.savez(path, **kept)


def without(name: str):
    "A change that takes a tensor away."
    return lambda kept: kept.pop(name)


def another(name: str, change):
    "A change of one tensor."
    return lambda kept: kept.update({name: change(kept[name])})


def added(name: str, like: str):
    "A change that adds a tensor."
    return lambda kept: kept.update({name: kept[like] * 1})


# What the fuzzer draws: a kind of file, a way to damage it, and a number that says the rest.


class Kind(NamedTuple):
    "A kind of file: where it is, in what form, what reads it, and which of its keys are needed."

    source: str
    file: str
    form: str
    command: Callable
    needed: tuple = ()


def checked(option: str, below: str = ""):
    "A check with the damaged thing as an option."

    def arguments(world, thing: Path, case: Path) -> list:
        spec = thing / below if below else thing
        return [
            "check",
            *world.inputs(**{option: f"1={spec}" if option == "sae" else spec}),
            *world.budget,
        ]

    return arguments


def from_gguf(world, thing: Path, case: Path) -> list:
    "A check of a model in one file, with an SAE that suits any."
    sae = world / "scope" / "res" / "layer_1"
    return ["check", *world.inputs(model=thing, sae=sae), *world.budget]


def measured(world, thing: Path, case: Path) -> list:
    "A run that is measured again."
    return [
        "evaluate",
        thing,
        "--text",
        world / "texts" / "text.jsonl",
        "--valid-tokens",
        256,
        "--out",
        case / "out",
    ]


def resumed(world, thing: Path, case: Path) -> list:
    "A run that goes on."
    return [*world.adapt(thing, budget=world.longer), "--resume"]


def resumed_sae(world, thing: Path, case: Path) -> list:
    "An SAE's training that goes on."
    return [*world.train_sae(thing), *world.longer_sae, "--resume"]


def rows(world, thing: Path, case: Path) -> list:
    "Rows of an experiment."
    return ["read-rows", thing]


def experiment(world, thing: Path, case: Path) -> list:
    "An experiment with a file of parameters; one word too much, so that nothing is computed."
    return ["run", "00_tiny", "--size", "smoke", "-p", "unknown", 1]


SHAPES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "model_type",
)
KINDS = {
    "model/weights": Kind("model", "model.safetensors", "tensors", checked("model")),
    "model/configuration": Kind("model", "config.json", "json", checked("model"), SHAPES),
    "model/tokenizer": Kind("model", "tokenizer.json", "json", checked("model"), ("model",)),
    "model/of tokenizer": Kind("model", "tokenizer_config.json", "aside", checked("model")),
    "model/of generation": Kind("model", "generation_config.json", "aside", checked("model")),
    "model/gguf": Kind("model.gguf", "", "gguf", from_gguf),
    "sae/weights": Kind("sae", "sae_weights.safetensors", "tensors", checked("sae")),
    "sae/configuration": Kind(
        "sae", "cfg.json", "json", checked("sae"), ("architecture", "d_in", "d_sae", "k")
    ),
    "scope/arrays": Kind(
        "scope", "res/layer_1/params.npz", "arrays", checked("sae", "res/layer_1")
    ),
    "text/txt": Kind("texts/text.txt", "", "text", checked("text")),
    "text/jsonl": Kind("texts/text.jsonl", "", "text", checked("text")),
    "text/csv": Kind("texts/text.csv", "", "text", checked("text")),
    "text/parquet": Kind("texts/text.parquet", "", "table", checked("text")),
    "run/report": Kind("run", "report.json", "json", measured, ("model", "text", "length", "keep")),
    "run/about": Kind(
        "run",
        "adapter/sae_lora.json",
        "json",
        measured,
        ("model", "saes", "saes/0/layer", "saes/0/source", "saes/0/fingerprint"),
    ),
    "run/of peft": Kind(
        "run",
        "adapter/adapter_config.json",
        "json",
        measured,
        ("peft_type", "r", "lora_alpha", "target_modules"),
    ),
    "run/weights": Kind("run", "adapter/adapter_model.safetensors", "tensors", measured),
    "run/of SAE": Kind(
        "run", "adapter/sae-1/cfg.json", "json", measured, ("architecture", "d_in", "d_sae", "k")
    ),
    "run/SAE": Kind("run", "adapter/sae-1/sae_weights.safetensors", "tensors", measured),
    "state/adapter": Kind("stopped", "state.safetensors", "state", resumed),
    "state/SAE": Kind("stopped-sae", "state.safetensors", "state", resumed_sae),
    "rows": Kind("results/rows.jsonl", "", "rows", rows),
    "parameters": Kind("clone", "nbs/experiments/params/smoke/00_tiny.yml", "yaml", experiment),
}

# In which forms a damage has to be refused. Elsewhere what is left may be whole by chance: a text
# that is shorter, a weight that is another, a file that need not be there.
WHOLE = ("tensors", "json", "arrays", "table", "state", "gguf")
MUST = {
    "cut": WHOLE,
    "flip": ("state",),
    "empty": (*WHOLE, "text"),
    "garbage": (*WHOLE, "text", "rows", "yaml", "aside"),
    "folder": (*WHOLE, "text", "rows", "yaml"),
    "link": (*WHOLE, "text", "yaml"),
    "missing": ("tensors", "json", "arrays", "table", "text", "yaml", "gguf"),
    "swap": WHOLE,
    "drop a key": (),
    "retype a key": (),
    "rename a key": (),  # those that are needed
    "drop a tensor": ("tensors", "arrays", "state"),
    "rename a tensor": ("tensors", "arrays", "state"),
    "add a tensor": ("tensors", "arrays", "state"),
    "reshape a tensor": ("tensors", "arrays", "state"),
    "spoil a tensor": ("tensors", "arrays", "state"),
}
OF_BYTES = ("cut", "flip", "empty", "garbage", "folder", "link", "missing", "swap")
OF_KEYS = ("drop a key", "retype a key", "rename a key")
OF_TENSORS = tuple(name for name in MUST if name.endswith("tensor"))
WAYS = {
    "json": OF_BYTES + OF_KEYS,
    "aside": OF_BYTES + OF_KEYS,
    "tensors": OF_BYTES + OF_TENSORS,
    "arrays": OF_BYTES + OF_TENSORS,
    "state": OF_BYTES + OF_TENSORS,
}
OTHER_TYPES = (None, True, -1, 0, 1.5, 2**70, "", "words", [], [1], {}, {"a": 1}, [[[[]]]], "\x00")


def paths_of(data, way: str = "") -> list[str]:
    "The paths of all keys in JSON."
    if isinstance(data, dict):
        pairs = [(k, v) for k, v in data.items() if k and "/" not in k and not k.isdigit()]
    elif isinstance(data, list):
        pairs = list(enumerate(data[:3]))
    else:
        pairs = []
    found = []
    for key, value in pairs:
        own = f"{way}/{key}" if way else str(key)
        found += [own, *paths_of(value, own)]
    return found


def kind_of(value) -> str:
    "The type of a value as JSON has it."
    return "number" if type(value) in (int, float) else type(value).__name__


def by_key(path: Path, way: str, number: int, needed: tuple) -> bool:
    "Damage a key of a file of JSON; whether it is one that is needed."
    data = json.loads(path.read_text())
    found = paths_of(data)
    chosen = needed[number // 2 % len(needed)] if needed and number % 2 else None
    where = chosen or found[number // 2 % len(found)]
    *above, key = where.split("/")
    was = at(data, [int(k) if k.isdigit() else k for k in where.split("/")])
    value = OTHER_TYPES[number // 64 % len(OTHER_TYPES)] if way == "retype a key" else ABSENT
    changed(data, where, value)
    if way == "rename a key" and not key.isdigit():
        changed(data, "/".join([*above, f"{key}_"]), was)
    path.write_text(json.dumps(data))
    other = value is ABSENT or kind_of(value) != kind_of(was)
    return other and where in needed and was is not None


def by_tensor(path: Path, way: str, number: int, archive: bool):
    "Damage one of the tensors in a file."

    def change(kept):
        name = sorted(kept)[number % len(kept)]
        value = kept[name]
        if way != "add a tensor":
            del kept[name]
        if way == "spoil a tensor":
            spoilt = value.reshape(-1)[:1] * float("nan") + value
            kept[name] = spoilt if archive else spoilt.to(value.dtype)
        elif way == "reshape a tensor":
            kept[name] = value.reshape(-1)[:-1]
        elif way != "drop a tensor":
            kept[f"{name}_more"] = value * 1

    (arrays if archive else tensors)(path, change)


def spoilable(path: Path, number: int) -> bool:
    "Whether the tensor that a number chooses can hold what is not a number."
    from safetensors import safe_open

    with safe_open(path, "np") as f:
        names = sorted(f.keys())
        return f.get_slice(names[number % len(names)]).get_dtype().startswith(("F", "BF"))


def by_bytes(path: Path, way: str, number: int, world):
    "Damage a file as bytes."
    if way == "cut":
        cut(path, number % 9973 / 9973)
    elif way == "flip":
        flip(path, number % (8 * path.stat().st_size))
    elif way == "garbage":
        garbled(path, number)
    elif way == "swap":
        others = [k for k in KINDS.values() if Path(k.file or k.source).name != path.name]
        other = others[number % len(others)]
        shutil.copy(world / other.source / other.file, path)
    else:
        dict(empty=emptied, folder=as_folder, link=as_link, missing=removed)[way](path)


def damaged(world, case: Path, name: str, way: str, number: int) -> tuple[list, bool | None]:
    "A command on a copy of a file of the kind `name`, damaged, and whether it has to be refused."
    kind = KINDS[name]
    thing = copied(world / kind.source, case)
    path = thing / kind.file if kind.file else thing
    before = path.read_bytes()
    must = kind.form in MUST[way]
    if way in OF_KEYS:
        must = by_key(path, way, number, kind.needed)
    elif way in OF_TENSORS and (
        way != "spoil a tensor" or kind.form == "arrays" or spoilable(path, number)
    ):
        by_tensor(path, way, number, kind.form == "arrays")
    elif way in OF_TENSORS:
        must = False
    else:
        by_bytes(path, way, number, world)
    same = path.is_file() and same_as(path.read_bytes(), before, kind.form)
    return kind.command(world, thing, case), True if must and not same else None


def same_as(after: bytes, before: bytes, form: str) -> bool:
    "Whether a file still says what it said."
    if after == before:
        return True
    try:
        return form == "json" and json.loads(after) == json.loads(before)
    except ValueError:
        return False


# Options.


def whole(low: int, high: float = math.inf):
    "Whole numbers between two; 5.0 is one, too."

    def fits(text: str) -> bool:
        try:
            number = int(text) if re.fullmatch(r"\s*[-+]?[\d_]+\s*", text) else float(text)
            return number == number // 1 and low <= number <= high
        except ValueError:
            return False

    return fits


def real(low: float, high: float = math.inf):
    "Finite numbers between two."

    def fits(text: str) -> bool:
        try:
            return math.isfinite(float(text)) and low <= float(text) <= high
        except ValueError:
            return False

    return fits


def one_of(*names: str):
    "Names from a list."
    return lambda text: text in names


def layers(text: str) -> bool:
    "Layers of the tiny model."
    return bool(re.fullmatch(r"after|all|\s*[+\d_]+\s*([,-]\s*[+\d_]+\s*)*", text))


def there(text: str) -> bool:
    "Paths that lead to something."
    try:
        return bool(text) and Path(text).exists()
    except (OSError, ValueError):
        return False


SHARED = {"--seed": whole(-(2**63), 2**63 - 1), "--device": one_of("", "cpu", "cpu:0")}
OF_A_RUN = SHARED | {
    "--rank": whole(1, 10**6),
    "--layers": layers,
    "--tokens": whole(1, 2**62),
    "--length": whole(2, 512),
    "--recipe": one_of("fast", "published"),
    "--keep": one_of("special", "none"),
    "--batch": lambda t: t == "auto" or whole(1, 10**6)(t),
    "--valid-tokens": whole(2),
    "--model": there,
    "--sae": there,
    "--text": there,
}
TRIED = {
    "check": {k: v for k, v in OF_A_RUN.items() if k != "--seed"},
    "adapt": OF_A_RUN
    | {
        "--lr": real(0, 1e9),
        "--cut": real(0, 1),
        "--keep-unspliced": real(0),
        "--valid-text": lambda t: t == "" or there(t),
    },
    "train-sae": SHARED
    | {
        "--layer": whole(0, 3),
        "--width": whole(1, 2**31),
        "--k": whole(1, 64),
        "--tokens": whole(128, 2**62),
        "--text-tokens": whole(1),
        "--lr": real(0, 1e9),
        "--batch": whole(1, 4096),
        "--valid-tokens": whole(2),
        "--model": there,
        "--text": there,
    },
    "evaluate": {"--valid-tokens": whole(2), "--text": there, "--device": SHARED["--device"]},
}
DRAWN = (
    "",
    " ",
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "-0",
    "1e309",
    "1e-400",
    str(2**31),
    str(2**63),
    str(2**70),
    "9" * 400,
    "1.5",
    "1e5",
    "0x10",
    "1_0",
    "+3",
    " 3",
    "٣",
    "é☃",
    "x" * 5000,
    "../x",
    "/dev/null",
    "/proc/self/mem",
    "--",
    "-",
    "[1,",
    "a=b",
    "a:b:c:d",
    "auto",
    "none",
    "None",
    "true",
    "\n",
    "a\nb",
    "\x1b[31m",
    "%s%n",
    "{0}",
    "$HOME",
    "2-1",
    "1,,2",
    "-1-3",
    "1-",
    "cuda",
    "meta",
    "mps:9",
    "org/name",
    "0=default",
    "1=",
)
LONG_RUNS = ("--tokens", "--width", "--rank")


def with_option(world, case: Path, command: str, option: str, value: str) -> tuple[list, bool]:
    "A command with one option of another value, and whether it has to be refused."
    base = {
        "check": ["check", *world.inputs(), *world.budget],
        "adapt": world.adapt(case / "out"),
        "train-sae": world.train_sae(case / "out"),
        "evaluate": measured(world, world / "run", case),
    }[command]
    if option in LONG_RUNS and TRIED[command][option](value) and float(value) > 4000:
        value = "0"  # it may be meant, and would take long
    return [*base, f"{option}={value}"], None if TRIED[command][option](value) else True
