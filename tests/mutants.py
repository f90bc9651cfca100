"""Ways to damage files, and what has to come of each: what the rows of mistakes and the fuzzer use."""
import json
import os
import pickle
import shutil
from pathlib import Path

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
    path.write_bytes(data[:int(len(data) * share)])


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
