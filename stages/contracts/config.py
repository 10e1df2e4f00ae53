"""The pipeline's configuration: what a person writes in YAML, typed and checked before anything starts.

Every field's description is what the web UI's form and the help of a single stage show. Settings of a stage are
part of that stage's key (see `specs.py`), except those marked with `NOT_IN_KEY`, which change how a result is made but not
the result.
"""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from megatron_core_impl.config import NewRows
from stages.contracts.data_settings import DataSettings
from stages.contracts.launch_settings import LaunchSettings
from stages.contracts.settings import NOT_IN_KEY, Frozen
from stages.contracts.sizes import Bytes
from stages.contracts.train_settings import LayoutSettings, TrainSettings, check_batches

BosEos = Literal["none", "eos", "both"]
REF = r"^[A-Za-z0-9][A-Za-z0-9_-]*([./][A-Za-z0-9_-]+)*$"  # name of a branch or tag
Dtype = Literal["float32", "bfloat16", "float16"]  # of stored weights, as config.json says it
SpecialName = Literal["bos", "eos", "pad", "unk", "sep", "cls", "mask"]  # bos_token and so on


class ModelSettings(Frozen):
    """Where the base model comes from."""

    source: str = Field(
        min_length=1,
        description="Hub id such as meta-llama/Llama-2-7b-hf; or a local folder of Hugging Face, of Meta (params.json and "
        "consolidated.NN.pth), or of Megatron-LLM (latest_checkpointed_iteration.txt)",
    )
    config: dict[str, Any] = Field(
        {},
        description="of Meta's and Megatron-LLM's checkpoints, which have no config.json: fields of one that they do not tell, "
        "or not truly, e.g. {max_position_embeddings: 4096}",
    )
    revision: str = Field("main", min_length=1, description="branch, tag or commit of a Hub id; a commit is reproducible")
    allow_pickle: bool = Field(False, description="accept pickled weights (.bin) where a model has no safetensors")
    added_tokens: tuple[str, ...] = Field(
        (), description="special tokens to add, e.g. <|im_start|>; the vocabulary and the embeddings grow by them",
        json_schema_extra=NOT_IN_KEY,
    )  # fmt: skip
    new_rows: NewRows = Field(
        "mean",
        description="what the rows of added tokens begin as, in the embedding and the output layer: the mean of the rows that "
        "are there; zeros; last, a copy of the last row (as Megatron-LLM does); or normal, drawn with their mean and deviation",
        json_schema_extra=NOT_IN_KEY,
    )
    dtype: Dtype | None = Field(
        None,
        description="precision that the weights are rounded to before training starts from them; default: as they are stored",
        json_schema_extra=NOT_IN_KEY,
    )

    @field_validator("added_tokens")
    @classmethod
    def _tokens_differ(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value) or not all(token and token == token.strip() and token.isprintable() for token in value):
            raise ValueError("must be printable tokens without white space around them, each once")
        return value

    @model_validator(mode="after")
    def _new_rows_are_of_tokens(self) -> Self:
        if self.new_rows != "mean" and not self.added_tokens:
            raise ValueError(f"new_rows={self.new_rows} is for added tokens, and added_tokens names none: leave it out")
        return self


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
    """The gate before training, and after it: our model against transformers on the same tokens."""

    batches: int = Field(2, ge=1, description="batches compared")
    batch_size: int = Field(2, ge=1, description="sequences per batch")
    sequence_length: int = Field(256, ge=2, le=2**24, description="tokens per sequence")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="precision our model computes in; transformers' computes in fp32, and to measure its rounding in bf16, too",
    )
    max_mean_error: float | None = Field(
        None,
        gt=0,
        description="largest mean |Δlogit| that passes; default 1e-4 in fp32 and 5e-2 in bf16 (the guide: 1e-2, 1e-1)",
    )
    max_loss_difference: float | None = Field(None, gt=0, description="largest |Δloss|; default 1e-4 in fp32, 5e-2 in bf16")
    min_argmax_agreement: float | None = Field(
        None, ge=0, le=1, description="smallest share of positions with the same best token; default 0.999 in fp32, 0.9 in bf16"
    )


class MegatronLLMSettings(Frozen):
    """The layout of a checkpoint for Megatron-LLM."""

    tp: int = Field(1, ge=1, description="its tensor parallel ranks")
    pp: int = Field(1, ge=1, description="its pipeline parallel ranks")


class ExportSettings(Frozen):
    """The Hugging Face folder."""

    dtype: Dtype | None = Field(
        None,
        description="precision of the published weights, to which training's fp32 weights are rounded once; default: the "
        "model's",
    )
    shard_size: Bytes = Field(
        5_000_000_000, ge=1, description="largest file of weights, unless one tensor is larger: bytes, or a size such as 5GB"
    )
    override_special_tokens: dict[SpecialName, str] = Field(
        {}, description="what the published tokenizer and generation take for bos, eos, pad, unk, sep, cls or mask: tokens "
        "that the vocabulary has, e.g. {eos: <|im_end|>}",
    )  # fmt: skip
    megatron_llm: MegatronLLMSettings | None = Field(
        None, description="write a checkpoint for Megatron-LLM, too, in this layout: {tp: 2, pp: 1}"
    )
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
    branch: str = Field("main", pattern=REF, description="hub: branch of the repo, made from main if it is not there")
    tag: str | None = Field(None, pattern=REF, description="hub: tag for the commit, one that the repo does not have")
    commit_message: str = Field("Upload model fine-tuned with megatron-flows", min_length=1, description="hub: of the upload")

    @field_validator("branch", "tag")
    @classmethod
    def _is_a_plain_name(cls, value: str | None) -> str | None:
        if value is not None and value.startswith("refs/"):
            raise ValueError(f"{value} must be a plain name, such as main or v1.0")
        return value

    @model_validator(mode="after")
    def _target_is_named(self) -> Self:
        if self.tag == self.branch:
            raise ValueError(f"tag and branch must differ, both are {self.tag}")
        if self.to == "hub" and self.repo is None:
            raise ValueError("to=hub needs repo, e.g. repo: my-name/my-model")
        if self.to == "folder" and self.folder is None:
            raise ValueError("to=folder needs folder, e.g. folder: workspace/hub")
        return self


ONLY_FOR = {  # settings, by section, that decide something for one kind of data only
    "text": (
        ("preprocess", "bos_eos"), ("train", "reset_position_ids"), ("train", "reset_attention_mask"),
        ("train", "eod_mask_loss"),
    ),
    "conversations": (
        ("preprocess", "chat_template"), ("train", "packing"), ("train", "too_long"), ("train", "system_weight"),
        ("train", "user_weight"), ("train", "assistant_weight"), ("export", "answers"),
    ),
}  # fmt: skip


def workspace_folder(workspace: str) -> Path:
    """A workspace as an absolute path.

    Raises:
        ValueError: it is none, in words for people.
    """
    try:
        return Path(workspace).expanduser().resolve()
    except (RuntimeError, ValueError) as error:  # no such user, links that go round in a circle, a NUL byte
        raise ValueError(f"{workspace!r} cannot be a folder ({error}): give a path such as ~/workspace") from None


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
    launch: LaunchSettings = LaunchSettings()

    @field_validator("workspace")
    @classmethod
    def _is_a_folder(cls, workspace: str) -> str:
        workspace_folder(workspace)
        return workspace

    @property
    def workspace_path(self) -> Path:
        """The workspace as an absolute path."""
        return workspace_folder(self.workspace)

    @property
    def processes_per_machine(self) -> int:
        """How many processes of training each machine has."""
        return self.layout.world_size // (len(self.launch.hosts) or 1)

    @model_validator(mode="after")
    def _settings_mean_something(self) -> Self:
        """What is set and would be without effect is a misunderstanding."""
        contents = {named.settings.content for named in self.data.sources()}
        for other, fields in ONLY_FOR.items():
            if other in contents or None in contents:
                continue
            for section, name in fields:
                settings = getattr(self, section)
                if (value := getattr(settings, name)) != type(settings).model_fields[name].default:
                    raise ValueError(
                        f"{section}.{name}={value} is for {other}, and data.format={self.data.sources()[0].settings.format} is "
                        "not: leave it out"
                    )
        return self

    @model_validator(mode="after")
    def _batches_fit_layout(self) -> Self:
        check_batches(self.train, self.layout)
        return self

    @model_validator(mode="after")
    def _processes_fit_hosts(self) -> Self:
        hosts, processes = len(self.launch.hosts) or 1, self.layout.world_size
        if processes % hosts:
            raise ValueError(
                f"launch.hosts: {hosts} machines cannot share the {processes} processes of layout (tp × pp × dp) evenly. "
                "Change one of them"
            )
        return self
