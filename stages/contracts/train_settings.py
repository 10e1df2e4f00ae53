"""Training: its length, batches, optimizer, precision, data and intervals, and the processes that share it."""

from dataclasses import replace
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from megatron_core_impl.config import Layout
from megatron_core_impl.data.splits import split_shares
from megatron_core_impl.optim import BatchSchedule
from megatron_core_impl.train_config import TrainConfig
from stages.contracts.settings import NOT_IN_KEY, Frozen

MOST_STEPS = 10**9


class LayoutSettings(Frozen):
    """How many processes share the model and the data. Processes = tp × pp × dp.

    None of it is in the key of a training: it changes at most where sums are rounded on the way, and a training that is not
    finished goes on from its checkpoint under any layout.
    """

    tp: int = Field(
        1, ge=1, description="tensor parallel: processes that share each layer", json_schema_extra=NOT_IN_KEY
    )  # fmt: skip
    pp: int = Field(
        1, ge=1, description="pipeline parallel: processes, or groups of tp, that hold different layers",
        json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip
    dp: int = Field(1, ge=1, description="data parallel: replicas that share each batch", json_schema_extra=NOT_IN_KEY)
    vpp: int = Field(
        1, ge=1,
        description="parts of the layers that each pp rank holds: above 1 the pipeline idles less and sends more (interleaved)",
        json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip

    @model_validator(mode="after")
    def _vpp_fits(self) -> Self:
        self.layout()
        return self

    def layout(self) -> Layout:
        """The same, as the core has it."""
        return Layout(tp=self.tp, pp=self.pp, dp=self.dp, vpp=self.vpp)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp


class TrainSettings(Frozen):
    """Training. Its length is given in steps, epochs or tokens; the other two follow."""

    steps: int | None = Field(None, ge=1, le=MOST_STEPS, description="length in optimizer updates; or give epochs, or tokens")
    epochs: float | None = Field(
        None, gt=0, le=1e6, description="length in passes over the training documents: as many whole steps as fit in"
    )
    tokens: int | None = Field(None, ge=1, le=10**18, description="length in tokens: as many whole steps as fit in")
    sequence_length: int = Field(1024, ge=2, le=2**24, description="tokens per sample")
    micro_batch_size: int = Field(
        1, ge=1, le=2**20, description="samples per forward pass of one replica; can be lowered to go on after out of memory",
        json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip
    global_batch_size: int = Field(8, ge=1, le=2**24, description="samples per optimizer update, over all replicas")
    ramp_start: int | None = Field(
        None, ge=1, description="samples of the first updates, where batches grow to global_batch_size; default: they do not"
    )
    ramp_increment: int | None = Field(None, ge=1, description="with ramp_start: samples that a batch grows by at a time")
    ramp_samples: int | None = Field(
        None, ge=1, description="with ramp_start: samples after which a batch has grown to global_batch_size"
    )

    optimizer: Literal["adamw", "sgd"] = Field(
        "adamw", description="adamw, with decoupled weight decay, or sgd; neither decays 1-D parameters"
    )
    lr: float = Field(3e-4, gt=0, description="highest learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the decay")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    schedule: Literal["cosine", "linear", "constant", "inverse-square-root"] = Field("cosine", description="shape of the decay")
    decay_steps: int | None = Field(None, ge=1, description="step at which min_lr is reached; default: steps")
    beta1: float = Field(0.9, ge=0, lt=1, description="adamw: decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="adamw: decay of the second moment")
    eps: float = Field(1e-5, gt=0, description="adamw: epsilon")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd: momentum")
    weight_decay: float = Field(0.1, ge=0, description="weight decay; where it grows, that of the last step")
    weight_decay_start: float | None = Field(
        None, ge=0, description="weight decay before the first step, where it grows to weight_decay; default: it does not"
    )
    weight_decay_style: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="how weight decay grows from weight_decay_start over all steps"
    )
    clip_grad: float = Field(1.0, ge=0, description="largest global gradient norm; 0 does not clip")

    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="bf16 and fp16 keep fp32 master weights and gradients; fp16 scales the loss"
    )
    loss_scale: float | None = Field(None, gt=0, description="fp16: a scale that does not change; default: it is searched for")
    initial_loss_scale: float = Field(2.0**16, gt=0, description="fp16: where the search for the loss scale begins")
    min_loss_scale: float = Field(1.0, gt=0, description="fp16: the loss scale never falls below it")
    loss_scale_window: int = Field(1000, ge=1, description="fp16: finite steps in a row after which the loss scale doubles")
    loss_scale_hysteresis: int = Field(
        2, ge=1, description="fp16: steps without a finite gradient, since it last doubled, after which the loss scale halves"
    )
    max_skipped_steps: int = Field(
        20, ge=1, description="steps in a row without a finite gradient, which are skipped, that stop the run",
        json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip

    hidden_dropout: float = Field(0.0, ge=0, lt=1, description="share of the hidden states that is zeroed while training")
    attention_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the attention weights that is zeroed while training"
    )
    lima_dropout: bool = Field(
        False, description="hidden_dropout grows from 0 in the first layer to its value in the last, as LIMA was trained"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="activations computed again in the backward pass, to save memory: selective those that are cheap, full all",
        json_schema_extra=NOT_IN_KEY,
    )
    recompute_layers_per_unit: int = Field(
        1, ge=1, description="recompute full: layers between two kept activations", json_schema_extra=NOT_IN_KEY
    )
    # These three are not in the key, as micro_batch_size: they change at most where sums are rounded on the way.
    compile: bool = Field(
        False, description="torch.compile for norms, rotary embedding and activations; needs a C++ compiler, on GPUs triton",
        json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip
    attention_kernel: Literal["auto", "flash-attn", "varlen", "sdpa"] = Field(
        "auto",
        description="what computes attention: the package flash-attn, PyTorch's varlen_attn, or its "
        "scaled_dot_product_attention; auto takes the fastest that is there",
        json_schema_extra=NOT_IN_KEY,
    )
    overlap: bool = Field(
        True, description="sum gradients and gather weights over dp while other layers compute", json_schema_extra=NOT_IN_KEY
    )

    seed: int = Field(1234, ge=0, lt=2**32, description="of the order of data, and of dropout")
    split: str = Field("969,30,1", description="shares of train, valid, test documents")
    reset_position_ids: bool = Field(False, description="positions begin anew after the token that ends a document")
    reset_attention_mask: bool = Field(False, description="attention does not look beyond the beginning of its document")
    eod_mask_loss: bool = Field(
        False, description="nothing is learnt from what follows the token that ends a document: the first word of another"
    )
    skip_steps: tuple[int, ...] = Field(
        (), description="steps, counted from 1, that read their data and compute their loss, but change nothing"
    )

    eval_interval: int = Field(
        100,
        ge=1,
        description="steps between evaluations on the valid split; more, where they would take over 5 % of the time",
    )
    eval_batches: int | None = Field(
        None, ge=1, le=10**6,
        description="most global batches per evaluation, the same ones each time; default: as many as keep all evaluations "
        "below 5 % of the training's time, at most 100",
    )  # fmt: skip
    checkpoint_interval: int = Field(100, ge=1, description="steps between checkpoints", json_schema_extra=NOT_IN_KEY)
    keep_checkpoints: int = Field(2, ge=2, description="newest checkpoints that are kept", json_schema_extra=NOT_IN_KEY)
    log_interval: int = Field(10, ge=1, description="steps between lines of the log", json_schema_extra=NOT_IN_KEY)
    stop_after_minutes: float | None = Field(
        None, gt=0, description="save a checkpoint and stop after so long, to go on another time; default: never",
        json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip

    packing: bool = Field(
        True, description="conversations: several to a sample, attention and positions those of each alone; else one each"
    )
    too_long: Literal["error", "drop", "truncate"] = Field(
        "error", description="conversations: what becomes of those longer than a sample"
    )
    system_weight: float = Field(0.0, ge=0, description="conversations: what the system's tokens count in the loss")
    user_weight: float = Field(0.0, ge=0, description="conversations: what the user's tokens count")
    assistant_weight: float = Field(1.0, ge=0, description="conversations: what the assistant's tokens count")

    # To compute what Megatron-LLM computes, digit by digit. There is no other reason to set them.
    reference_first_lr: bool = Field(
        False, description="parity with Megatron-LLM: the schedules lag one step, so the first step has learning rate 0"
    )
    reference_loss_mean: bool = Field(
        False,
        description="parity with Megatron-LLM: the loss is the mean of each micro batch's mean, however few tokens count in it",
    )

    def decisive(self) -> list[str]:
        by_micro_batch = ["micro_batch_size"] if self.reference_loss_mean else []
        return by_micro_batch + super().decisive()

    def train_config(self, tokens_per_epoch: int | None = None) -> TrainConfig:
        """The same, as the core has it, in steps.

        Args:
            tokens_per_epoch: of the training documents. None: not known yet; then `epochs` count as the longest run there is,
                and what depends on the number of steps is refused once it is known.

        Raises:
            ValueError: the settings do not go together, or the length is less than one step.
        """
        longest = TrainConfig(**self.model_dump(exclude={"epochs", "tokens"}) | {"steps": MOST_STEPS})
        if self.steps is not None:
            return replace(longest, steps=self.steps)
        if self.tokens is not None:
            given, samples = f"tokens={self.tokens:,}", self.tokens // self.sequence_length
        elif self.epochs is not None and tokens_per_epoch is not None:
            given = f"epochs={self.epochs:g} of {tokens_per_epoch:,} tokens each"
            samples = (int(self.epochs * tokens_per_epoch) - 1) // self.sequence_length
        else:
            return longest
        steps = min(longest.batches.steps_within(samples), MOST_STEPS)
        if steps < 1:
            raise ValueError(
                f"{given} is less than one step of {longest.batches.sizes[0]:,} × {self.sequence_length:,} tokens: train for "
                "longer, or lower global_batch_size or sequence_length"
            )
        return replace(longest, steps=steps)

    def batches(self) -> BatchSchedule:
        """The size of the global batch over the run."""
        return self.train_config().batches

    @field_validator("split")
    @classmethod
    def _split_is_shares(cls, value: str) -> str:
        if min(split_shares(value)[:2]) == 0:
            raise ValueError('must be shares of train, valid and test such as "969,30,1", the first two above 0')
        return value

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        given = [name for name in ("steps", "epochs", "tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            told = f"not {' and '.join(given)}" if given else "and none of them is given"
            raise ValueError(f"the length is given by exactly one of steps, epochs and tokens, {told}")
        self.train_config()
        return self


def check_batches(train: TrainSettings, layout: LayoutSettings) -> None:
    """Refuse batches that the layout cannot share out.

    Raises:
        ValueError: naming the settings, their values and the legal ones.
    """
    train.train_config().check_layout(layout.layout())
