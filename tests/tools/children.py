"""Functions in processes of their own: to be killed, or to be the ranks of one run."""

import faulthandler
import gc
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from contextlib import closing
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch
from torch.multiprocessing import start_processes

# One server imports once what a run imports, and forks: a child is there at once, and inherits no thread.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "act24.tools.commands.cli",
        "act24.tools.run.train",
        "PIL.PngImagePlugin",
        "PIL.GifImagePlugin",
        "pyarrow",
        "tensorboard.plugins.image.metadata",
        "torch._dynamo",
        "torch.distributed.checkpoint.state_dict",
        "torch.distributed.fsdp",
        "torch.nn.parallel",
        "torch.utils.tensorboard",
    ]
)


def exit_code(function: Callable[..., None], *arguments: Any) -> int | None:
    """Run `function` in a child to its end; minus the signal's number if that killed it."""
    child = CONTEXT.Process(target=_call, args=(function, arguments))
    child.start()
    child.join(120)
    child.kill()
    return child.exitcode


def _call(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    gc.freeze()  # what was imported holds no garbage that is worth a search
    function(*arguments)


class Command:
    """`act24 …` in a child that need not import anything: it runs from here to the end of a `with`.

    Args:
        words: of the command line.
        before: called in the child before the command, by when its output is the command's.
    """

    def __init__(self, *words: object, before: Callable[[], object] | None = None) -> None:
        pipes = [os.pipe(), os.pipe()]
        self.stdout, self.stderr = (os.fdopen(ours, errors="replace") for ours, _ in pipes)
        theirs = [Connection(end) for _, end in pipes]
        arguments = (*theirs, [*map(str, words)], before)
        self.process = CONTEXT.Process(target=_command, args=arguments)
        self.process.start()
        for connection in theirs:
            connection.close()

    def __enter__(self) -> "Command":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        if kind is None:
            self.process.join(120)
        self.process.kill()
        self.process.join()
        self.stdout.close()
        self.stderr.close()

    def end(self) -> tuple[int | None, str, str]:
        """Wait for the end: status, and what is left of both outputs."""
        out, errors = self.stdout.read(), self.stderr.read()
        self.process.join(120)
        return self.process.exitcode, out, errors


def _command(out: Connection, errors: Connection, words: list[str], before: Any) -> None:
    gc.freeze()
    with closing(out), closing(errors):
        os.dup2(out.fileno(), 1)
        os.dup2(errors.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, closefd=False)
    if before is not None:
        before()
    from act24.tools.commands.cli import main

    sys.argv = ["act24", *words]
    main()


def run_ranks(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function` on `count` processes, as torchrun would start them; raises what one of them raises.

    Each has one thread, as below torchrun: with more they spin for each other's cores, and on a machine with
    as many processes as cores already, a run of a second took a minute.
    """
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    start_processes(_rank, (count, port, function, arguments), count, start_method="forkserver")


def _rank(rank: int, count: int, port: int, function: Callable[..., None], arguments: Any) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    gc.freeze()
    os.environ |= {"MASTER_ADDR": "localhost", **{name: str(value) for name, value in places.items()}}
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(120, exit=True)  # a rank that waits in vain says where
    function(*arguments)
