"""AdamW whose state is shared out over the replicas by rows of each parameter: ZeRO stage 1 (https://arxiv.org/abs/1910.02054).

Of a parameter with r rows on its tp rank, each of dp replicas owns c = ceil(r / dp) rows. The parameter's storage and its main
gradient (fp32) have c·dp rows, so that they are gathered and reduced in place; rows beyond r are zero and stay zero. Master
weights and moments (fp32) exist for the owned rows only. Where the model itself computes in fp32, its storage is the master.

A step:   hooks add each micro batch's gradients to the main gradients, which frees them at once
          finalize: reduce-scatter over dp, what tp owes, the norm        (parallel.finalize)
          clip, AdamW on the owned rows, round into the parameter's storage, all-gather over dp
"""

from math import isfinite

import torch
from torch import Tensor, nn

from megatron_core_impl import collectives
from megatron_core_impl.checkpoint.slicing import Slice, dp_rows, shape_of
from megatron_core_impl.layers.parameter import ShardedParameter
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models.transformer import Transformer
from megatron_core_impl.parallel.finalize import finalize_gradients
from megatron_core_impl.parallel.parallelize import Reader, read_rows

EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"  # AdamW's moments; in checkpoints they bear their parameter's name after a dot


class _Shard:
    """One parameter, its main gradient, and the optimizer state of the rows that this rank owns."""

    def __init__(self, parameter: ShardedParameter, mesh: Mesh) -> None:
        dp, rows = mesh.layout.dp, parameter.shape[0]
        block = -(-rows // dp)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        self.parameter = parameter
        self.rows = rows
        self.data = parameter.data  # [dp·c, ...]
        if block * dp != rows:
            self.data = parameter.data.new_zeros(block * dp, *parameter.shape[1:])
            self.data[:rows] = parameter.data
            parameter.data = self.data[:rows]
        self.main_grad = torch.zeros_like(self.data, dtype=wide)  # [dp·c, ...]
        self.is_empty = True  # the main gradient holds nothing of this step yet
        self.own_data = self.data.chunk(dp)[mesh.dp_rank]  # [c, ...]
        self.master = nn.Parameter(self.own_data.to(wide))  # shares storage where the types are the same
        self.master.grad = self.main_grad.chunk(dp)[mesh.dp_rank]
        self.moments = {name: torch.zeros_like(self.master, requires_grad=False) for name in (EXP_AVG, EXP_AVG_SQ)}
        self.piece = _owned(parameter, dp, mesh.dp_rank)
        parameter.register_post_accumulate_grad_hook(self._accumulate)  # type: ignore[no-untyped-call]

    def _accumulate(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if self.is_empty:
            self.main_grad[: self.rows].copy_(parameter.grad)
            self.main_grad[self.rows :].zero_()  # the last step's reduction may have left anything there
            self.is_empty = False
        else:
            self.main_grad[: self.rows].add_(parameter.grad)
        parameter.grad = None

    def states(self, name: str) -> list[tuple[str, Tensor]]:
        """What a checkpoint holds of this parameter: names and [c, ...] tensors, of which the first rows are `piece`."""
        return [(name, self.master.data), *((f"{moment}.{name}", values) for moment, values in self.moments.items())]


class ZeroOptimizer:
    """Owns main gradients, master weights and AdamW's moments. Make it after the model's weights are loaded.

    Args:
        model: its parameters move into storage of the optimizer's making, and their gradients go to it through hooks.
        mesh: the model's.
        betas, eps, weight_decay: of AdamW. Parameters of one dim (norms) do not decay.
        clip_grad: largest norm of the whole model's gradient; 0 does not clip.
    """

    def __init__(
        self, model: Transformer, mesh: Mesh, *, betas: tuple[float, float], eps: float, weight_decay: float, clip_grad: float
    ) -> None:
        self.mesh = mesh
        self.clip_grad = clip_grad
        self._shards = {name: _Shard(parameter, mesh) for name, parameter in model.sharded_parameters().items()}
        self._step_count = 0
        shards = self._shards.values()
        self._adamw = torch.optim.AdamW(
            [
                {"params": [s.master for s in shards if len(s.parameter.spec.shape) > 1], "weight_decay": weight_decay},
                {"params": [s.master for s in shards if len(s.parameter.spec.shape) == 1], "weight_decay": 0.0},
            ],
            betas=betas,
            eps=eps,
            fused=True,
        )
        for shard in shards:  # now, not at the first step: a run that does not fit says so at once, and `load` has a place
            self._adamw.state[shard.master] = {
                "step": torch.zeros((), dtype=torch.float32, device=mesh.device),
                **shard.moments,
            }

    @property
    def step_count(self) -> int:
        """Updates made so far. Setting it is part of resuming."""
        return self._step_count

    @step_count.setter
    def step_count(self, value: int) -> None:
        self._step_count = value
        for state in self._adamw.state.values():
            state["step"].fill_(value)

    def begin_step(self) -> None:
        """Forget all gradients. Backward passes from here on add up until `step`."""
        for shard in self._shards.values():
            shard.is_empty = True

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Update the weights with the gradients that backward passes have left since `begin_step`.

        Returns:
            The norm of the whole model's gradient, before clipping.

        Raises:
            FloatingPointError: the norm is not finite. Weights and state are as before the step, on every rank.
        """
        shards = list(self._shards.values())
        for shard in shards:
            if shard.is_empty:
                shard.main_grad.zero_()
        grads, norm_tensor = finalize_gradients([s.parameter for s in shards], [s.main_grad for s in shards], self.mesh)
        norm = float(norm_tensor)
        if not isfinite(norm):
            raise FloatingPointError(f"the gradient norm of step {self.step_count + 1} is {norm}; nothing was updated")
        if 0 < self.clip_grad < norm:
            torch._foreach_mul_(grads, self.clip_grad / (norm + 1e-6))
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()
        self._step_count += 1
        self._publish()
        self.begin_step()
        return norm

    def named_pieces(self) -> list[tuple[str, tuple[int, ...], Slice, Tensor]]:
        """The state that this rank must write to a checkpoint: name, global shape, slice, values (views, not copies).

        Master weights under their canonical names, moments as `exp_avg.<name>` and `exp_avg_sq.<name>`. Over all ranks the
        slices tile every tensor: replicas appear once, run-time padding never.
        """
        pieces = []
        for name, shard in self._shards.items():
            if shard.parameter.is_replicated and self.mesh.tp_rank != 0:
                continue
            if rows := shape_of(shard.piece)[0]:
                shape = shard.parameter.spec.shape
                pieces += [(state, shape, shard.piece, values[:rows]) for state, values in shard.states(name)]
        return pieces

    def load(self, reader: Reader) -> None:
        """Read masters and moments in place, from a training checkpoint of any layout, and the model's weights with them.

        `step_count` is the caller's to set.
        """
        for name, shard in self._shards.items():
            for state, values in shard.states(name):
                read_rows(reader, state, shard.parameter.spec.shape, shard.piece, into=values)
        self._publish()

    def load_masters(self, reader: Reader) -> None:
        """Read the masters only: training starts from all the digits that are stored, not from those the model computes in."""
        for name, shard in self._shards.items():
            read_rows(reader, name, shard.parameter.spec.shape, shard.piece, into=shard.master.data)
        self._publish()

    @torch.no_grad()
    def _publish(self) -> None:
        """Bring the masters of all replicas into every model."""
        for shard in self._shards.values():
            if shard.own_data.dtype != shard.master.dtype:
                shard.own_data.copy_(shard.master)
        collectives.all_gather_blocks_([s.data for s in self._shards.values()], self.mesh.dp_group, self.mesh.dp_rank)


def _owned(parameter: ShardedParameter, dp: int, dp_rank: int) -> Slice:
    """The part of the global tensor whose optimizer state a dp rank owns, without run-time padding."""
    (start, stop), *rest = parameter.piece
    low, high = dp_rows(parameter.shape[0], dp, dp_rank)
    return ((min(start + low, stop), min(start + high, stop)), *rest)
