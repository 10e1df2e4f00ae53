"""Processes for tests that need several: started once per session, joined into process groups of any size as tests ask.

Torch is imported once for all of them, which takes seconds; joining a gloo group takes milliseconds. Functions go to the
workers by name, so they must be at the top of a module, and take the rank's arguments only; inside, `torch.distributed` is
initialised.
"""

import copyreg
import io
import multiprocessing as mp
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

TIMEOUT = 120.0  # seconds that a function may take on all ranks together, the start of workers included; a hang ends there

POOL = "pool-of-tests"  # in the names of the pool's processes


def started_children() -> list[BaseProcess]:
    """The living children of this process that a test has started: all but the pool's."""
    return [child for child in mp.active_children() if not child.name.startswith(POOL)]


class WorkerError(AssertionError):
    """A function failed on a rank, or did not end; the message holds that rank's traceback."""


def dumps(value: Any) -> bytes:
    """Pickle, with tensors as plain bytes: torch's own way, a piece of shared memory for each, takes ten times as long."""
    import torch

    class Pickler(pickle.Pickler):
        dispatch_table = copyreg.dispatch_table | {torch.Tensor: _reduce_tensor}  # type: ignore[assignment]

    file = io.BytesIO()
    Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    return file.getvalue()


def _reduce_tensor(tensor: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    import torch

    plain = tensor.detach().contiguous()
    is_half = plain.dtype == torch.bfloat16  # which numpy does not know
    return _rebuild_tensor, ((plain.view(torch.int16) if is_half else plain).numpy(), is_half)


def _rebuild_tensor(values: Any, is_half: bool) -> Any:
    import torch

    tensor = torch.from_numpy(values)
    return tensor.view(torch.bfloat16) if is_half else tensor


class GlooPool:
    """Runs functions on several ranks at once. Workers start when first needed and live until `close`."""

    def __init__(self) -> None:
        # Workers are copies of one process that has imported what takes seconds to import: torch._dynamo is what PyTorch's
        # optimizers import when they are first made.
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(["torch.distributed", "torch._dynamo", "megatron_core_impl.trainer", "pytest"])
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="gloo-")
        self._groups = 0

    def run(self, fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """`fn(*args)` on ranks 0 … world_size-1 of a fresh gloo group; what each returned, by rank.

        Raises:
            WorkerError: a rank raised, died or did not answer in time. The workers are ended, and start anew when needed.
        """
        while len(self._workers) < world_size:
            self._start()
        self._groups += 1
        store = str(Path(self._folder.name) / f"group-{self._groups}")
        for rank, (_, pipe) in enumerate(self._workers[:world_size]):
            pipe.send_bytes(dumps((fn, args, rank, world_size, store, timeout)))
        try:
            return self._collect(world_size, time.monotonic() + timeout)
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """End all workers."""
        self._end()
        self._folder.cleanup()

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs,), name=f"{POOL}-{len(self._workers)}", daemon=True)
        process.start()
        theirs.close()
        self._workers.append((process, ours))

    def _collect(self, world_size: int, deadline: float) -> list[Any]:
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(self._workers[:world_size])}
        results: dict[int, Any] = {}
        while len(results) < world_size:
            ready = wait([pipe for pipe, rank in ranks.items() if rank not in results], max(0.0, deadline - time.monotonic()))
            if not ready:
                missing = sorted(set(range(world_size)) - set(results))
                raise WorkerError(f"ranks {missing} of {world_size} did not answer in time")
            for pipe in ready:
                rank = ranks[pipe]
                try:
                    succeeded, result = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    raise WorkerError(f"rank {rank} of {world_size} died") from None
                if not succeeded:  # the others may wait for this rank for ever
                    raise WorkerError(f"rank {rank} of {world_size}:\n{result}")
                results[rank] = result
        return [results[rank] for rank in range(world_size)]

    def _end(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()  # a worker holds nothing that needs a farewell, and torch's takes seconds
        for process, _ in self._workers:
            process.join()
        self._workers.clear()


def _work(pipe: Connection) -> None:
    """The life of a worker: one function after the other."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        try:
            fn, args, rank, world_size, store, timeout = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return  # the session has ended
        except Exception:  # the function's module cannot be imported here
            pipe.send_bytes(dumps((False, traceback.format_exc())))
            continue
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world_size),
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
            result = (True, fn(*args))
            dist.barrier()  # nobody leaves while another still needs it
            dist.destroy_process_group()
        except Exception:  # the group stays, so that others wait, and do not fail for want of this rank, until all are killed
            result = (False, traceback.format_exc())
        try:
            pipe.send_bytes(dumps(result))
        except OSError:
            return
        except Exception:  # the result cannot be pickled
            pipe.send_bytes(dumps((False, traceback.format_exc())))
