"""Several processes that stay alive for many checks: a fork server imports torch and transformers once."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback

import pytest

PRELOAD = ["torch", "transformers", "zo_finetuner.hf", "zo_finetuner.training", "models"]


class World:
    """`size` processes of one torch.distributed group (gloo).  `run(check, *arguments)`: in each process
    check(*arguments); their results in the order of the ranks.  AssertionError with the traceback of one that fails."""

    def __init__(self, size: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ends = []
        self.processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, port), daemon=True)
            process.start()
            theirs.close()
            self.ends.append(ours)
            self.processes.append(process)

    def run(self, check, *arguments, timeout: float = 600.0, dead: tuple[int, ...] = ()):
        """dead: ranks that are expected to die of it; their result is None."""
        for end in self.ends:
            end.send((check, arguments))
        results = []
        for rank, end in enumerate(self.ends):
            assert end.poll(timeout), f"rank {rank} does not answer"
            try:
                failure, result = end.recv()
            except EOFError:
                assert rank in dead, f"rank {rank} has died"
                failure = result = None
            assert not failure, f"rank {rank}:\n{failure}"
            results.append(result)
        return results

    def close(self) -> None:
        for end in self.ends:
            end.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _serve(end, rank: int, size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    import torch

    from zo_finetuner.ranks import join

    torch.set_num_threads(1)
    join(60.0)
    while True:
        try:
            check, arguments = end.recv()
        except (EOFError, ConnectionResetError):
            os._exit(0)
        try:
            end.send((None, check(*arguments)))
        except Exception:
            end.send((traceback.format_exc(), None))


@pytest.fixture(scope="module")
def of_two_and_four():
    """size -> World, of 2 and of 4 processes."""
    started = {size: World(size) for size in (2, 4)}
    yield started
    for world in started.values():
        world.close()
