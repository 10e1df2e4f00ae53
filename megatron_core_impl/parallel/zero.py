"""AdamW or SGD whose state is shared out over the replicas by rows of each parameter: ZeRO stage 1
(https://arxiv.org/abs/1910.02054).

A step:   each micro batch's gradients are added to the main gradients           (parallel.shard)
          reduce-scatter over dp, layer by layer, under the backward passes        (parallel.buckets)
          what tp and pp owe, the norm                                             (parallel.finalize)
          clip and update the owned rows in one pass, round into the model's precision
          all-gather over dp, layer by layer, under the next forward pass          (parallel.buckets)

Nothing in it waits for the device but the last line, which reads the norm: whether it is finite is decided on the device, by
the update itself.
"""

from math import isfinite

import torch
from torch import Tensor

from megatron_core_impl.checkpoint.slicing import Slice, shape_of
from megatron_core_impl.mesh import Mesh
from megatron_core_impl.models.transformer import Transformer
from megatron_core_impl.optim import OptimizerSettings
from megatron_core_impl.parallel.buckets import Buckets
from megatron_core_impl.parallel.finalize import complete_gradients
from megatron_core_impl.parallel.parallelize import Reader, read_rows
from megatron_core_impl.parallel.shard import Shard

EXP_AVG, EXP_AVG_SQ, MOMENTUM = (
    "exp_avg",
    "exp_avg_sq",
    "momentum_buffer",
)  # in checkpoints a parameter's name follows, after a dot


class ZeroOptimizer:
    """Owns main gradients, master weights and the optimizer's moments. Make it after the model's weights are loaded.

    Args:
        model: its parameters move into storage of the optimizer's making, and their gradients go to it.
        mesh: the model's.
        settings: which optimizer, and its numbers.
    """

    def __init__(self, model: Transformer, mesh: Mesh, settings: OptimizerSettings) -> None:
        self.mesh = mesh
        self.settings = settings
        parameters = model.sharded_parameters()
        names = moment_names(settings)
        self._shards = {name: Shard(parameter, mesh, names) for name, parameter in parameters.items()}
        self._buckets = Buckets(model, list(self._shards.values()), mesh, settings)
        self._updates = _torch_optimizer(list(self._shards.values()), settings)
        self._norm: Tensor | None = None  # of the complete gradient, still scaled; None: it is not complete yet
        self._step_count = 0

    @property
    def step_count(self) -> int:
        """Updates made so far. Setting it is part of resuming."""
        return self._step_count

    @step_count.setter
    def step_count(self, value: int) -> None:
        self._step_count = value
        for state in self._updates.state.values():
            if "step" in state:
                state["step"].fill_(value)

    def begin_step(self, num_microbatches: int) -> None:
        """Forget all gradients. Those of so many backward passes, of every chunk of this rank's model, add up until `step`."""
        self._norm = None
        self._buckets.open(num_microbatches)
        for shard in self._shards.values():
            shard.open()

    def complete_gradients(self) -> dict[str, tuple[Slice, Tensor]]:
        """Sum up what all ranks have, as `step` is about to use it: no backward pass may follow before the next step.

        Returns:
            For each parameter the slice of the global tensor that this rank owns, and the gradient's values there (a view),
            still scaled and not clipped.
        """
        if self._norm is None:
            self._buckets.finish_reducing()
            shards = list(self._shards.values())
            for shard in shards:
                shard.close()
            self._norm = complete_gradients([s.parameter for s in shards], [s.own_grad for s in shards], self.mesh)
        return {name: (shard.piece, shard.own_grad[: shape_of(shard.piece)[0]]) for name, shard in self._shards.items()}

    @torch.no_grad()
    def step(self, lr: float, *, weight_decay: float | None = None, loss_scale: float = 1.0) -> float:
        """Update the weights with the gradients that backward passes have left since `begin_step`.

        Args:
            lr: the learning rate of this step.
            weight_decay: that of this step; default: the settings'.
            loss_scale: what the loss was multiplied by.

        Returns:
            The norm of the whole model's gradient, before clipping and without the loss's scale.

        Raises:
            FloatingPointError: the norm is not finite. Weights and state are as before the step, on every rank.
        """
        self.complete_gradients()
        assert self._norm is not None
        norm = self._norm / loss_scale
        self.wait_for_weights()
        for group in self._updates.param_groups:
            group["lr"] = lr
            if group["decays"]:
                group["weight_decay"] = self.settings.weight_decay if weight_decay is None else weight_decay
        divisor = torch.full_like(norm, loss_scale)
        if self.settings.clip_grad > 0:
            divisor *= ((norm + 1e-6) / self.settings.clip_grad).clamp_(min=1.0)
        self._update(divisor, is_finite=norm.isfinite())
        self._publish()
        self.begin_step(0)
        value = norm.item()
        if not isfinite(value):
            raise FloatingPointError(f"the gradient norm of step {self.step_count + 1} is {value}; nothing was updated")
        self._step_count += 1
        return value

    def wait_for_weights(self) -> None:
        """Wait for the weights of the last step, which layers wait for by themselves: for whoever reads parameters directly."""
        self._buckets.finish_gathering()

    def named_pieces(self) -> list[tuple[str, tuple[int, ...], Slice, Tensor]]:
        """The state that this rank must write to a checkpoint: name, global shape, slice, values (views, not copies).

        Master weights under their canonical names, moments as `exp_avg.<name>` and `exp_avg_sq.<name>`, or for SGD as
        `momentum_buffer.<name>`. Over all ranks the slices tile every tensor: replicas appear once, run-time padding never.
        """
        self.wait_for_weights()
        pieces = []
        for name, shard in self._shards.items():
            if shard.parameter.replica == 0 and (rows := shape_of(shard.piece)[0]):
                shape = shard.parameter.spec.shape
                pieces += [(state, shape, shard.piece, values[:rows]) for state, values in shard.states(name)]
        return pieces

    def load(self, reader: Reader) -> None:
        """Read masters and moments in place, from a training checkpoint of any layout, and the model's weights with them.

        `step_count` is the caller's to set.
        """
        self.wait_for_weights()
        for name, shard in self._shards.items():
            for state, values in shard.states(name):
                read_rows(reader, state, shard.parameter.spec.shape, shard.piece, into=values)
        self._publish()
        self.wait_for_weights()

    def load_masters(self, reader: Reader) -> None:
        """Read the masters only: training starts from all the digits that are stored, not from those the model computes in."""
        self.wait_for_weights()
        for name, shard in self._shards.items():
            read_rows(reader, name, shard.parameter.spec.shape, shard.piece, into=shard.master.data)
        self._publish()
        self.wait_for_weights()

    def _update(self, divisor: Tensor, is_finite: Tensor) -> None:
        """Update the owned rows with their gradients divided by `divisor`; change nothing where they are not finite.

        PyTorch's fused kernels take both as tensors, as its GradScaler gives them, and divide in the pass that updates.
        """
        grads = [shard.own_grad for shard in self._shards.values()]
        if grads and grads[0].dtype == torch.float64:  # they take it in fp32 only
            torch._foreach_div_(grads, divisor)
            divisor = torch.ones_like(divisor)
        self._updates.grad_scale = divisor.float()  # type: ignore[attr-defined]
        self._updates.found_inf = is_finite.logical_not().float()  # type: ignore[attr-defined]
        self._updates.step()

    @torch.no_grad()
    def _publish(self) -> None:
        """Bring the masters of all replicas into every model."""
        for shard in self._shards.values():
            shard.round()
        self._buckets.start_gathering()


def moment_names(settings: OptimizerSettings) -> tuple[str, ...]:
    """What an optimizer remembers of every number of the model, by the prefixes that its names have in checkpoints."""
    if settings.kind == "adamw":
        return EXP_AVG, EXP_AVG_SQ
    return (MOMENTUM,) if settings.momentum else ()


def _torch_optimizer(shards: list[Shard], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """PyTorch's optimizer over the masters, its state in place.

    Now and not at the first step: a run that does not fit says so at once, and checkpoints have a place to be read to.
    """
    groups = [
        {"params": [s.master for s in shards if len(s.parameter.spec.shape) > 1], "decays": True},
        {"params": [s.master for s in shards if len(s.parameter.spec.shape) == 1], "decays": False, "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if settings.kind == "adamw":
        optimizer = torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True)
    else:
        optimizer = torch.optim.SGD(groups, momentum=settings.momentum, fused=True)
    for shard in shards:
        optimizer.state[shard.master] = dict(shard.moments)
        if settings.kind == "adamw":
            optimizer.state[shard.master]["step"] = torch.zeros((), dtype=torch.float32, device=shard.master.device)
    return optimizer
