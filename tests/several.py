"""Several processes of one run, forked from one that has imported all: as torchrun starts them,
but at once."""

import os
import socket

import torch

PATIENCE = 300.0  # seconds that a few steps may take on a busy machine


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Killed(Exception):
    "What ends a run in its midst."


def joined(rank: int, number: int, port: int, work, given: tuple, environment: dict):
    "Be one of `number` processes of a run, as torchrun starts them."
    told = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=number, LOCAL_WORLD_SIZE=number)
    told |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS=1)
    os.environ |= {k: str(v) for k, v in told.items()} | environment
    torch.set_num_threads(1)
    try:
        work(*given)
    except Killed:
        os._exit(0)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def together(forks, number: int, work, *given, **environment):
    "Run `work(*given)` in so many processes."
    port = free_port()
    every = [
        forks.Process(target=joined, args=(rank, number, port, work, given, environment))
        for rank in range(number)
    ]
    for process in every:
        process.start()
    for process in every:
        process.join(PATIENCE)
    codes = [process.exitcode for process in every]
    for process in every:
        process.kill()
    assert codes == [0] * number
