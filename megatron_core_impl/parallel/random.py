"""Where the random numbers of a step come from: from its number alone, so that no generator's state has to be stored."""

from hashlib import sha256

import torch

from megatron_core_impl.mesh import Mesh


def seed_step(seed: int, step: int, mesh: Mesh) -> None:
    """Seed this process's generators, of its CPU and its GPU, for one step; call it before the step's first forward pass.

    A run that is resumed at a step draws what an uninterrupted run draws there. Every rank has a stream of its own: with
    sequence parallelism the ranks of a tp group hold different tokens, or different heads, and never the same number twice.
    Micro batches follow each other in the stream.

    Args:
        seed: of the run.
        step: its number in the run.
        mesh: where this process stands.
    """
    digest = sha256(f"{seed} {step} {mesh.rank}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big"))
