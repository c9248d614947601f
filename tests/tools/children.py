"""Functions in processes of their own: to be killed, or to be the ranks of one run."""

import faulthandler
import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

from torch.multiprocessing import start_processes

# One server imports torch once, and forks: a child is there at once, and inherits no thread.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["act24.tools.run.train", "torch.utils.tensorboard"])


def exit_code(function: Callable[..., None], *arguments: Any) -> int | None:
    """Run `function` in a child to its end; minus the signal's number if that killed it."""
    child = CONTEXT.Process(target=function, args=arguments)
    child.start()
    child.join(120)
    child.kill()
    return child.exitcode


def run_ranks(count: int, function: Callable[..., None], *arguments: Any) -> None:
    """Run `function` on `count` processes, as torchrun would start them; raises what one of them raises."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    start_processes(_rank, (count, port, function, arguments), count, start_method="forkserver")


def _rank(rank: int, count: int, port: int, function: Callable[..., None], arguments: Any) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "localhost", **{name: str(value) for name, value in places.items()}}
    faulthandler.dump_traceback_later(120, exit=True)  # a rank that waits in vain says where
    function(*arguments)
