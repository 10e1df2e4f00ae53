"""What stages hand to each other: one typed, self-describing record per result, `artifact.json` in the result's own folder.

An artifact names its files with size and digest, what it was made from, and the *facts* that later stages need: they are
never given a second time as a flag. Paths are relative, so an artifact is valid on the host and inside a container alike.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, TypeAdapter

from megatron_core_impl.config import Activation, NewRows, NormKind, RopeScaling
from megatron_core_impl.data.streams import TEXT
from stages.contracts.config import BosEos, Dtype
from stages.contracts.data_settings import Format
from stages.contracts.settings import Frozen

ARTIFACT_FILE = "artifact.json"


class FileRecord(Frozen):
    """A file of an artifact. Volatile files (logs, curves) are kept but are no part of the fingerprint."""

    size: int = Field(ge=0)
    blake3: str = Field(pattern="^[0-9a-f]{64}$")
    volatile: bool = False


def _is_inside(name: str) -> str:
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ValueError(f"{name} leads out of the folder")
    return name


FileName = Annotated[str, AfterValidator(_is_inside)]  # relative to the artifact's folder


class PublishedFile(Frozen):
    """A file that was published, by the digest that others know it by."""

    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class TokenizerFacts(Frozen):
    """What identifies a tokenizer. Two stages that disagree on one of these must not meet."""

    kind: Literal["sentencepiece", "huggingface"]
    vocab_size: int  # ids 0 … vocab_size-1 can occur in data
    eod_id: int | None  # ends a document: the tokenizer's EOS
    bos_id: int | None
    fingerprint: str  # sha256 over what defines it: its file and the added tokens
    added_tokens: dict[str, int] = {}  # special tokens that the pipeline adds (or asks for, and it has), and their ids


class ModelFacts(Frozen):
    """What identifies a model: the fields of `megatron_core_impl.config.ModelConfig`, its precision, and what was added."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: NormKind
    norm_eps: float
    activation: Activation
    is_gated: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    is_parallel: bool
    has_shared_norm: bool
    sliding_window: int | None
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    dtype: Dtype  # of the stored weights
    parameters: int
    added_tokens: dict[str, int] = {}  # special tokens that the vocabulary has rows for, as the pipeline asked for them
    new_rows: NewRows | None = None  # what the rows that the model lacked began as; None: it lacked none

    def config_fields(self) -> dict[str, Any]:
        """The fields of `ModelConfig`, to build one."""
        others = ("dtype", "parameters", "added_tokens", "new_rows")
        return {name: value for name, value in self if name not in others}


class Versions(Frozen):
    """Of what made an artifact."""

    package: str
    python: str
    torch: str | None = None
    libraries: dict[str, str] = {}  # that read and write models and tokenizers, of those that its process had loaded
    image: str | None = None  # digest of the container image, None for a plain process


class Artifact(Frozen):
    """The common part of every result. Fields of subclasses are facts, and part of the fingerprint."""

    kind: str
    schema_version: Literal[1] = 1
    stage: str
    key: str
    path: str  # of the folder, relative to the workspace: <stage>/<key>
    files: dict[FileName, FileRecord]
    fingerprint: str  # of the content: kind, files that are not volatile, facts
    inputs: dict[str, str]  # input name -> fingerprint
    spec: dict[str, Any]  # what it was made from
    versions: Versions
    figure: str  # the one figure that matters, as a person reads it
    metrics: dict[str, Any] = {}  # further figures, for reports
    wall_seconds: float
    created: str  # ISO 8601, UTC

    COMMON: ClassVar[frozenset[str]] = frozenset()  # set below: names of the fields that are no facts

    def folder(self, workspace: Path) -> Path:
        """Absolute path of the artifact's files."""
        return workspace / self.path

    def facts(self) -> dict[str, Any]:
        """The fields that a subclass adds, as JSON values."""
        return {k: v for k, v in self.model_dump(mode="json").items() if k not in Artifact.COMMON}


Artifact.COMMON = frozenset(Artifact.model_fields)


class ModelArtifact(Artifact):
    """A Hugging Face folder: config, tokenizer files, weights. Under `files/` in the artifact's folder."""

    kind: Literal["model"] = "model"
    model: ModelFacts
    tokenizer_files: tuple[str, ...]  # relative to `files/`
    license: str | None = None
    source: str
    revision: str | None  # commit, for a Hub id


class RawSet(Frozen):
    """The data of one source: files of records, each a document or a conversation."""

    name: str  # of the set in everything that is made from it
    key: str = "data"  # of the source in the configuration
    role: Literal["all", "train", "valid", "test"]  # all: split by train.split
    files: tuple[str, ...]  # relative to the artifact's folder
    origins: tuple[str, ...]  # what a person calls each: the file it is a copy of, or the dataset whose rows are its lines
    format: Format
    text_columns: tuple[str, ...]  # text: the keys of a record that hold text, each a document
    columns: dict[str, str]  # conversations: keys that differ from the format's own
    source: str
    revision: str | None = None
    documents: int | None  # None: not counted yet
    text_bytes: int  # tokenized: of its files

    @property
    def content(self) -> Literal["text", "conversations"]:
        is_text = f"{self.name}{TEXT}.bin" not in self.files if self.format == "tokenized" else self.format == "text"
        return "text" if is_text else "conversations"


def units(sets: Sequence[RawSet]) -> str:
    """What the bytes of some sets are."""
    return " and ".join(dict.fromkeys("tokens" if each.format == "tokenized" else "text" for each in sets))


class RawDataArtifact(Artifact):
    """Files of text or conversations, by source."""

    kind: Literal["raw-data"] = "raw-data"
    documents: int | None
    source: str
    revision: str | None
    text_bytes: int
    sets: tuple[RawSet, ...]


class DatasetSet(Frozen):
    """`<name>.bin` and `<name>.idx`, Megatron's format; of conversations `<name>-text`, `<name>-role` and so on."""

    name: str
    role: Literal["all", "train", "valid", "test"]
    documents: int
    tokens: int
    empty_documents: int  # left out, as they have no tokens
    malformed_lines: int  # left out, named in `malformed.jsonl`
    blank_lines: int
    longest: int  # tokens of the longest document
    lengths: dict[str, int]  # documents by length: "64" counts those of 64 … 127 tokens
    left_out: dict[str, int]  # records left out for other reasons, by reason


class DatasetArtifact(Artifact):
    """The tokens of one set or several, `examples.json` (some documents with their ids), and `malformed.jsonl` where lines were
    refused. Counts are those of all sets.
    """

    kind: Literal["dataset"] = "dataset"
    tokenizer: TokenizerFacts
    content: Literal["text", "conversations"]
    sets: tuple[DatasetSet, ...]
    dtype: Literal["uint16", "int32"]
    documents: int
    empty_documents: int
    malformed_lines: int
    tokens: int
    header_tokens: int = 0  # conversations: at the beginning of every answer, which no metric counts
    end_of_answer: int | None = None  # conversations: id of the control token that ends an answer, if one does
    bos_eos: BosEos


class WeightsArtifact(Artifact):
    """Tensors of a model, canonical (layout 1·1) or sharded: safetensors and `index.json`."""

    kind: Literal["weights"] = "weights"
    model: ModelFacts
    tp: int
    pp: int
    vpp: int = 1
    tensors: int
    bytes: int
    trained_steps: int = 0
    other_dtypes: dict[str, int] = {}  # numbers that are stored otherwise than model.dtype says, kept so from the source
    content: str | None = None  # of shards: what they are of, the same however it is cut; the key of a training takes it


class VerificationArtifact(Artifact):
    """`verification.json`: what was compared, the figures, the gates; and `verification.md`, the same to read."""

    kind: Literal["verification"] = "verification"
    mean_error: float
    max_error: float
    loss_difference: float
    argmax_agreement: float
    allowed_mean_error: float
    precision: Literal["fp32", "bf16"]
    tp: int = 1  # the ranks that our model ran on
    pp: int = 1
    vpp: int = 1


class CheckpointArtifact(Artifact):
    """`checkpoints/step-N`: the last training checkpoint, with metrics.jsonl and TensorBoard files beside it."""

    kind: Literal["checkpoint"] = "checkpoint"
    model: ModelFacts
    tokenizer: TokenizerFacts
    checkpoint: str  # folder of the last one, relative to the artifact's folder
    step: int
    consumed_samples: int
    consumed_tokens: int  # that count: labels with a weight above 0
    tp: int
    pp: int
    dp: int
    vpp: int = 1
    loss_before: float  # on the valid split
    loss_after: float


class ExportArtifact(Artifact):
    """`model/`: what `from_pretrained` loads. `comparison.json` and `.md`, `samples.json` beside it."""

    kind: Literal["export"] = "export"
    model: ModelFacts
    loss_before: float | None
    loss_after: float | None
    mean_error: float  # exported folder, loaded by transformers, against our model
    license: str | None = None
    source: str
    source_revision: str | None


class PushArtifact(Artifact):
    """`receipt.json` and the model card: what was published where. Local targets are checked on reuse."""

    kind: Literal["push"] = "push"
    to: Literal["dry-run", "folder", "hub"]
    target: str  # URL or path
    commit: str | None = None
    branch: str | None = None  # on the Hub
    tag: str | None = None
    published: dict[str, PublishedFile] = {}


AnyArtifact = Annotated[
    ModelArtifact | RawDataArtifact | DatasetArtifact | WeightsArtifact | VerificationArtifact
    | CheckpointArtifact | ExportArtifact | PushArtifact,
    Field(discriminator="kind"),
]  # fmt: skip
_ANY: TypeAdapter[AnyArtifact] = TypeAdapter(AnyArtifact)


class DamagedArtifact(ValueError):
    """An artifact whose files are not what it says. The message names the file and what to do."""


def parse_artifact(data: bytes | str) -> AnyArtifact:
    """Read an artifact of any kind from JSON. Raises pydantic.ValidationError when it is none."""
    return _ANY.validate_json(data)


def fingerprint_of(kind: str, files: dict[str, FileRecord], facts: dict[str, Any]) -> str:
    """Hash of an artifact's content: the same bits and facts give the same fingerprint, whenever and wherever made."""
    content = {
        "kind": kind,
        "files": {name: record.blake3 for name, record in sorted(files.items()) if not record.volatile},
        "facts": {name: value for name, value in facts.items() if name != "kind"},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def load_artifact(folder: Path) -> AnyArtifact:
    """Read the artifact of a folder.

    Raises:
        DamagedArtifact: there is no readable `artifact.json`, or it was changed.
    """
    file = folder / ARTIFACT_FILE
    try:
        artifact = parse_artifact(file.read_bytes())
    except FileNotFoundError:
        raise DamagedArtifact(f"{folder}: no {ARTIFACT_FILE} in it, so no finished result of a stage") from None
    except ValueError as error:
        raise DamagedArtifact(f"{file}: not a readable artifact ({error}). Remove {folder} and run again") from error
    if artifact.fingerprint != fingerprint_of(artifact.kind, artifact.files, artifact.facts()):
        raise DamagedArtifact(f"{file}: its facts do not give its fingerprint: it was changed. Remove {folder} and run again")
    return artifact
