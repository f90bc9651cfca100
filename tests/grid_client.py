"""A client of the grid, for tests that end it: `python grid_client.py WORKERS ROWS SECONDS`.

It asks for rows that depend on their parameters alone, and on a step that several of them share.
"""

import os
import sys
import time
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

from sae_lora.cluster import Step, local_workers
from sae_lora.files import cache_path, written
from sae_lora.grid import rows_of


def runs(n: int) -> list[dict]:
    "So many runs, three of each `k`."
    return [dict(k=i // 3, seed=i % 3, rank=1) for i in range(n)]


def make(k: int):
    "What the rows of one `k` share: a file, whose name says which process made it."
    with written(cache_path("shared", f"{k}-{os.getpid()}")) as part:
        part.write_text(str(k**2))
    return [cache_path("shared", f"{k}-{os.getpid()}")]


def needs(asked: list[dict]) -> list[list[Step]]:
    return [[Step(f"shared {p['k']}", partial(make, p["k"]))] for p in asked]


def compute(seconds: float, group: list[dict]):
    "Rows that take their time."
    for p in group:
        time.sleep(seconds)
        shared = {file.read_text() for file in cache_path("shared").glob(f"{p['k']}-*")}
        yield dict(value=int(shared.pop()) + p["seed"])


def main(workers: int, n: int, seconds: float):
    with local_workers(workers) if workers else nullcontext("") as address:
        with patch.dict(os.environ, SAE_LORA_CLUSTER=address):
            table = rows_of("tiny", runs(n), partial(compute, seconds), needs)
    print("values", *table["value"])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
