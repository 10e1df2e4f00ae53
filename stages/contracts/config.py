"""The pipeline's configuration: what a person writes in YAML, typed and checked before anything starts.

Every field's description is what the web UI's form and the help of a single stage show. Settings of a stage are
part of that stage's key (see `specs.py`), except those marked with `NOT_IN_KEY`, which change how a result is made but not
the result.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from megatron_core_impl.config import Layout
from megatron_core_impl.data.conversations import keys_of
from megatron_core_impl.optim import BatchSchedule
from megatron_core_impl.train_config import TrainConfig

MOST_STEPS = 10**9

BosEos = Literal["none", "eos", "both"]
NOT_IN_KEY: dict[str, Any] = {"not_in_key": True}  # json_schema_extra of settings that do not change a stage's result


class Frozen(BaseModel):
    """Base of everything here: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    def decisive(self) -> list[str]:
        """Names of the fields that decide a stage's result, and so belong in its key."""
        extras = {name: field.json_schema_extra for name, field in type(self).model_fields.items()}
        return [name for name, extra in extras.items() if not (isinstance(extra, dict) and extra.get("not_in_key"))]


class ModelSettings(Frozen):
    """Where the base model comes from."""

    source: str = Field(min_length=1, description="Hub id such as meta-llama/Llama-2-7b-hf, or a local Hugging Face folder")
    revision: str = Field("main", min_length=1, description="branch, tag or commit of a Hub id; a commit is reproducible")
    allow_pickle: bool = Field(False, description="accept pickled weights (.bin) where a model has no safetensors")
    added_tokens: tuple[str, ...] = Field(
        (), description="special tokens to add, e.g. <|im_start|>; the vocabulary and the embeddings grow by them",
        json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip

    @field_validator("added_tokens")
    @classmethod
    def _tokens_differ(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if "" in value or len(set(value)) < len(value):
            raise ValueError("must be tokens that are not empty, each once")
        return value


Format = Literal["text", "messages", "sharegpt", "alpaca", "question-answer"]


class SourceOptions(Frozen):
    """How a source is read."""

    revision: str = Field("main", min_length=1, description="branch, tag or commit of a Hub dataset")
    subset: str | None = Field(None, description="configuration name of a Hub dataset")
    data_dir: str | None = Field(None, description="folder inside a Hub dataset, e.g. julia")
    split: str = Field("train", description="split of a Hub dataset, or of one that was saved to disk")
    format: Format = Field(
        "text",
        description="text: each record is a document; else conversations: messages as OpenAI writes them, sharegpt "
        "(conversations of from and value), alpaca (instruction, input, output), question-answer",
    )
    text_column: str = Field("text", min_length=1, description="text: column, or key of a JSON line, that holds the text")
    columns: dict[str, str] = Field(
        {}, description="conversations: columns that are named otherwise, e.g. {question: prompt, answer: response}"
    )
    include: tuple[str, ...] = Field(("**/*",), min_length=1, description="folder: glob patterns of the files to read")
    exclude: tuple[str, ...] = Field((), description="folder: glob patterns of the files to leave out")

    @model_validator(mode="after")
    def _columns_fit_format(self) -> Self:
        if self.format != "text":
            keys_of(self.format, self.columns)
        elif self.columns:
            raise ValueError("columns is for conversations; where the text has another name, set text_column")
        return self

    @property
    def content(self) -> Literal["text", "conversations"]:
        return "text" if self.format == "text" else "conversations"


class SourceSettings(SourceOptions):
    """One of several sources."""

    source: str = Field(min_length=1, description="as data.source")
    weight: float = Field(
        1.0, gt=0, description="its share of the samples, in proportion to the other sources'", json_schema_extra=NOT_IN_KEY
    )


class NamedSource(NamedTuple):
    """A source, and what its data are for: split into train, valid and test by train.split, or one of them as a whole."""

    name: str  # of its files
    key: str  # in the configuration
    role: Literal["all", "train", "valid", "test"]
    settings: SourceSettings


class DataSettings(SourceOptions):
    """Where the text, or the conversations, come from: one source, or several that are blended."""

    source: str | None = Field(
        None, min_length=1,
        description="Hub dataset id; a local .jsonl, .jsonl.gz, .jsonl.zst or .parquet file; a folder or glob of these; "
        "a folder of source files; or a folder that `datasets` saved",
    )  # fmt: skip
    blend: tuple[SourceSettings, ...] = Field((), description="instead of source: several, each with a weight")
    valid: tuple[SourceSettings, ...] = Field(
        (), description="held-out data of its own; then all of source or blend is for training, and train.split is not used"
    )
    test: tuple[SourceSettings, ...] = Field((), description="with valid: data for the last evaluation")

    @model_validator(mode="after")
    def _sources_fit_together(self) -> Self:
        if (self.source is None) == (not self.blend):
            raise ValueError("data needs either source, for one, or blend, for several")
        if self.test and not self.valid:
            raise ValueError("test needs valid: without it, train.split cuts all three out of the same data")
        contents = {named.settings.content for named in self.sources()}
        if len(contents) > 1:
            raise ValueError("the sources hold text and conversations; a model is trained on one of them. See format")
        return self

    def sources(self) -> tuple[NamedSource, ...]:
        """All sources, those for training first."""
        if self.source is not None:
            options = {name: getattr(self, name) for name in SourceOptions.model_fields}
            mine = [("data", "data", SourceSettings(source=self.source, **options))]
        else:
            mine = [(f"data-{i}", f"data.blend[{i}]", settings) for i, settings in enumerate(self.blend)]
        return (
            *(NamedSource(name, key, "train" if self.valid else "all", settings) for name, key, settings in mine),
            *(NamedSource(f"valid-{i}", f"data.valid[{i}]", "valid", settings) for i, settings in enumerate(self.valid)),
            *(NamedSource(f"test-{i}", f"data.test[{i}]", "test", settings) for i, settings in enumerate(self.test)),
        )

    @property
    def content(self) -> Literal["text", "conversations"]:
        return self.sources()[0].settings.content


class PreprocessSettings(Frozen):
    """Text to token ids."""

    tokenizer: Literal["auto", "sentencepiece", "huggingface"] = Field(
        "auto", description="which tokenizer of the model's folder: auto takes tokenizer.model if there, else tokenizer.json"
    )
    chat_template: Literal["tokenizer", "chatml", "megatron-llm"] = Field(
        "tokenizer",
        description="conversations as text: by the tokenizer's own template; as ChatML; or as ChatML with Megatron-LLM's roles "
        "(system, question, answer), whose files are then the same",
    )
    bos_eos: BosEos = Field(
        "eos", description="tokens around a document: none, eos (one at its end), or both (BOS before it, too)"
    )
    max_malformed: float = Field(0.0, ge=0.0, le=1.0, description="largest share of malformed lines that does not fail")
    workers: int = Field(2, ge=1, le=256, description="processes that tokenize", json_schema_extra=NOT_IN_KEY)

    # To write what Megatron-LLM writes, byte by byte. There is no other reason to set it.
    reference_special_text: bool = Field(
        False, description="parity with Megatron-LLM: special tokens written out in a text, such as </s>, become their ids"
    )


class VerifySettings(Frozen):
    """The gate between conversion and training: our model against transformers on the same tokens."""

    batches: int = Field(2, ge=1, description="batches compared")
    batch_size: int = Field(2, ge=1, description="sequences per batch")
    sequence_length: int = Field(256, ge=2, le=2**24, description="tokens per sequence")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="precision both models compute in")
    max_mean_error: float | None = Field(
        None,
        gt=0,
        description="largest mean |Δlogit| that passes; default 1e-4 in fp32 and 5e-2 in bf16 (the guide: 1e-2, 1e-1)",
    )
    max_loss_difference: float | None = Field(None, gt=0, description="largest |Δloss|; default 1e-4 in fp32, 5e-2 in bf16")
    min_argmax_agreement: float | None = Field(
        None, ge=0, le=1, description="smallest share of positions with the same best token; default 0.999 in fp32, 0.9 in bf16"
    )


class LayoutSettings(Frozen):
    """How many processes share the model and the data. Processes = tp × pp × dp."""

    tp: int = Field(1, ge=1, description="tensor parallel: processes that share each layer")
    pp: int = Field(1, ge=1, description="pipeline parallel: processes, or groups of tp, that hold different layers")
    dp: int = Field(1, ge=1, description="data parallel: replicas that share each batch")
    vpp: int = Field(
        1, ge=1,
        description="parts of the layers that each pp rank holds: above 1 the pipeline idles less and sends more (interleaved)",
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

    eval_interval: int = Field(100, ge=1, description="steps between evaluations on the valid split")
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
        try:
            shares = [float(part) for part in value.split(",")]
        except ValueError:
            shares = []
        if len(shares) != 3 or min(shares) < 0 or min(shares[:2]) == 0:
            raise ValueError('must be three shares of train, valid and test such as "969,30,1", the first two above 0')
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


class ExportSettings(Frozen):
    """The Hugging Face folder."""

    prompts: tuple[str, ...] = Field(
        (), description="texts that the model continues, before and after training, for the report"
    )
    max_new_tokens: int = Field(48, ge=1, description="length of each continuation")
    answers: int = Field(
        0, ge=0, description="conversations: held-out ones whose last answer the model gives, before and after training"
    )


class PushSettings(Frozen):
    """Where the model is published. The Hub token is read from the environment variable HF_TOKEN, never from here."""

    to: Literal["dry-run", "folder", "hub"] = Field("dry-run", description="dry-run says what it would upload")
    repo: str | None = Field(None, pattern=r"^[\w.-]+/[\w.-]+$", description="hub: owner/name of the model repo")
    folder: str | None = Field(None, min_length=1, description="folder: a folder that stands for the Hub")
    private: bool = Field(True, description="hub: make the repo private")
    commit_message: str = Field("Upload model fine-tuned with megatron-flows", min_length=1, description="hub: of the upload")

    @model_validator(mode="after")
    def _target_is_named(self) -> Self:
        if self.to == "hub" and self.repo is None:
            raise ValueError("to=hub needs repo, e.g. repo: my-name/my-model")
        if self.to == "folder" and self.folder is None:
            raise ValueError("to=folder needs folder, e.g. folder: workspace/hub")
        return self


class PipelineConfig(Frozen):
    """One run of the whole workflow, from a base model and text to a published model."""

    workspace: str = Field(
        "workspace", min_length=1, description="folder of everything that runs make", json_schema_extra=NOT_IN_KEY
    )
    model: ModelSettings
    data: DataSettings
    preprocess: PreprocessSettings = PreprocessSettings()
    verify: VerifySettings = VerifySettings()
    layout: LayoutSettings = LayoutSettings()
    train: TrainSettings
    export: ExportSettings = ExportSettings()
    push: PushSettings = PushSettings()

    @property
    def workspace_path(self) -> Path:
        """The workspace as an absolute path."""
        return Path(self.workspace).expanduser().resolve()

    @model_validator(mode="after")
    def _batches_fit_layout(self) -> Self:
        check_batches(self.train, self.layout)
        return self
