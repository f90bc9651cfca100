"""A process that has loaded the package and forks for every command: each starts at once, in a
process of its own, with signals, limits and outputs of its own.

It reads requests, one JSON object a line, and answers each with one: `start` and `wait`.
"""

import atexit
import faulthandler
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path

LOADED = (
    "sae_lora.cli",
    "sae_lora.plots",
    "sae_lens",
    "peft",
    "yaml",
    "matplotlib.pyplot",
    "transformers.models.llama.modeling_llama",
    "pyarrow.parquet",
    "nbformat",
    "pandas",
    "sae_lens.saes.topk_sae",
    "sae_lens.saes.jumprelu_sae",
    "accelerate.utils",
)
MEMORY = 6 * 2**30  # bytes of its own that a command may have
PROCESSOR = 20  # seconds of the processor that it may take


def load():
    "Import what commands import, where it is installed."
    for name in LOADED:
        try:
            importlib.import_module(name)
        except ImportError:
            pass


def code_of(stop: SystemExit) -> int:
    "The exit code of a process that ends with `stop`."
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


def called(arguments: list) -> int:
    "The exit code of the command with `arguments`; what is raised is printed, as Python does."
    from sae_lora import cli

    sys.argv = ["sae-lora", *arguments]
    try:
        cli.main()
        return 0
    except SystemExit as stop:
        return code_of(stop)
    except BaseException as e:
        traceback.print_exc()
        return 130 if isinstance(e, KeyboardInterrupt) else 1


def rows_read(path: str) -> int:
    "The exit code of a command that does nothing but read the rows of an experiment."
    from sae_lora.files import UsageError
    from sae_lora.results import Results

    try:
        Results(path).rows()
        return 0
    except UsageError as e:
        print(f"sae-lora: {e}", file=sys.stderr)
        return 2
    except BaseException:
        traceback.print_exc()
        return 1


def redirected(said: str):
    "Let standard output and error go to the files `said.out` and `said.err`; no input."
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, kind in ((1, "out"), (2, "err")):
        file = os.open(f"{said}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, number)


def limited(limits: dict):
    "Set limits on what the process may use, by the names of `resource`; of memory, in addition."
    has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for name, most in ({"DATA": MEMORY, "CPU": PROCESSOR} | limits).items():
        most += has if name == "AS" else 0
        last = most + 1 if name == "CPU" else most  # a second to say where it is
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, last))


def child(request: dict):
    "Be the process of one command, and end."
    code = 1
    try:
        os.setsid()
        redirected(request["said"])
        faulthandler.register(signal.SIGUSR1)
        faulthandler.register(signal.SIGXCPU, chain=True)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        limited(request["limits"])
        arguments = request["arguments"]
        read = arguments[0] == "read-rows"
        code = rows_read(arguments[1]) if read else called(arguments)
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                pass
        os._exit(code)


STARTED = {}


def start(request: dict) -> dict:
    "Start a command: the number of its process."
    process = os.fork()
    if process == 0:
        child(request)
    STARTED[process] = time.monotonic()
    return dict(process=process)


def ended(process: int, seconds: float) -> tuple:
    "What `wait4` says of a process once it is over; it is ended after so many seconds."
    until, told = time.monotonic() + seconds, False
    while True:
        found, status, used = os.wait4(process, os.WNOHANG)
        if found:
            return status, used, told
        if time.monotonic() > until:
            os.killpg(process, signal.SIGKILL if told else signal.SIGUSR1)
            told, until = True, time.monotonic() + 1
        time.sleep(0.004)


def wait(request: dict) -> dict:
    "Wait for a process: its exit code, seconds of processor and clock, whether it had to be ended."
    status, used, hung = ended(request["process"], request["seconds"])
    code = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - STARTED.pop(request["process"])
    return dict(code=code, cpu=used.ru_utime + used.ru_stime, wall=wall, hung=hung)


def serve():
    "Answer requests until there are no more."
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    load()
    print(json.dumps(dict(ready=True)), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = dict(start=start, wait=wait)[request.pop("do")](request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
