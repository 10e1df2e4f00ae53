"""The one place that knows ranks and process groups.

The processes of a run form a mesh with the axes pp (outermost), dp, tp (innermost), numbered as Megatron numbers them: the
ranks of a tp group are neighbours, which on one machine means the fastest links. A `Mesh` is passed to whatever needs it;
there are no globals. An axis of size 1 has no group, and code that finds no group calls no collective.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from megatron_core_impl.config import Layout

AXES = ("pp", "dp", "tp")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Where this process stands among all processes of a run."""

    layout: Layout
    rank: int  # global
    pp_rank: int
    dp_rank: int
    tp_rank: int
    pp_group: dist.ProcessGroup | None  # None: the axis has size 1
    dp_group: dist.ProcessGroup | None
    tp_group: dist.ProcessGroup | None
    kv_group: dist.ProcessGroup | None  # tp ranks that hold the same key/value heads; None: nobody else does
    world_group: dist.ProcessGroup | None  # all axes together; None: this process is alone
    device: torch.device

    @classmethod
    def single(cls, device: torch.device | str = "cpu") -> Self:
        """The mesh of a process that is alone. Needs no process group."""
        return cls(
            layout=Layout(),
            rank=0, pp_rank=0, dp_rank=0, tp_rank=0,
            pp_group=None, dp_group=None, tp_group=None, kv_group=None, world_group=None,
            device=torch.device(device),
        )  # fmt: skip


def init_mesh(layout: Layout, device: torch.device | str, *, kv_replicas: int = 1) -> Mesh:
    """This process's place in a layout. Every process of the run calls it, after `init_process_group`.

    Args:
        layout: the axes.
        device: this process's.
        kv_replicas: neighbouring tp ranks that hold the same key/value heads (`Layout.kv_replicas`).

    Raises:
        ValueError: the number of processes is not that of the layout.
    """
    device = torch.device(device)
    if not dist.is_initialized():
        if layout.world_size > 1:
            raise ValueError(
                f"tp={layout.tp} × pp={layout.pp} × dp={layout.dp} needs {layout.world_size} processes with a process group, "
                "but this one stands alone. Start it with torchrun"
            )
        return Mesh.single(device)
    if dist.get_world_size() != layout.world_size:
        raise ValueError(
            f"tp={layout.tp} × pp={layout.pp} × dp={layout.dp} needs {layout.world_size} processes, "
            f"but {dist.get_world_size()} were started. Start as many (torchrun --nproc-per-node), or change the layout"
        )
    sizes = (layout.pp, layout.dp, layout.tp)
    axes = init_device_mesh(device.type, sizes, mesh_dim_names=AXES)
    groups = {axis: axes.get_group(axis) if size > 1 else None for axis, size in zip(AXES, sizes, strict=True)}
    if kv_replicas > 1:  # tp ranks are neighbours in the numbering, so their replicas are too
        blocks = init_device_mesh(device.type, (layout.world_size // kv_replicas, kv_replicas), mesh_dim_names=("rest", "kv"))
        groups["kv"] = blocks.get_group("kv")
    rank = dist.get_rank()
    pp_rank, dp_rank, tp_rank = layout.coordinates(rank)
    return Mesh(
        layout=layout,
        rank=rank, pp_rank=pp_rank, dp_rank=dp_rank, tp_rank=tp_rank,
        pp_group=groups["pp"], dp_group=groups["dp"], tp_group=groups["tp"], kv_group=groups.get("kv"),
        world_group=dist.group.WORLD if layout.world_size > 1 else None,
        device=device,
    )  # fmt: skip
