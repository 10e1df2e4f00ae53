"""What a stage is asked to do: its settings and its inputs, as JSON, and the key under which its result is kept.

The key is a hash of (stage, stage version, settings without paths, fingerprints of the inputs). The same key and an intact
artifact mean that the work is done. `SPECS` is the whole pipeline: which node needs which.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from megatron_core_impl.config import NewRows
from stages.contracts import artifacts as a
from stages.contracts.config import (
    Dtype,
    ExportSettings,
    MegatronLLMSettings,
    ModelSettings,
    PipelineConfig,
    PreprocessSettings,
    PushSettings,
    SpecialName,
    VerifySettings,
)
from stages.contracts.data_settings import DataSettings
from stages.contracts.settings import Frozen
from stages.contracts.sources import is_local, stamp
from stages.contracts.tokenized import stamp_tokenized
from stages.contracts.train_settings import LayoutSettings, TrainSettings, check_batches

# Raise a stage's number when its code changes what it writes for the same spec.
STAGE_VERSIONS = {
    "download": 4, "preprocess": 3, "convert": 2, "verify": 5, "shard": 2, "train": 4, "merge": 2, "export": 5, "push": 3,
}  # fmt: skip


TokenizerKind = Literal["auto", "sentencepiece", "huggingface"]


class Ref(Frozen):
    """An input: the folder of an artifact, and the fingerprint it must have (None, by hand: whatever it has)."""

    path: str = Field(description="folder of the artifact, relative to the workspace")
    fingerprint: str | None = Field(None, description="what the artifact's fingerprint must be; null takes any")
    content: str | None = Field(None, description="what the key takes instead, of weights that are cut: see WeightsArtifact")

    @classmethod
    def to(cls, artifact: a.Artifact) -> Self:
        """The reference to an artifact."""
        content = artifact.content if isinstance(artifact, a.WeightsArtifact) else None
        return cls(path=artifact.path, fingerprint=artifact.fingerprint, content=content)

    @property
    def identity(self) -> str:
        """What decides the key of a result that is made from it."""
        return self.content or self.fingerprint or self.path


class Spec(Frozen):
    """The common part of every spec. Subclasses add `settings` and name their inputs."""

    NODE: ClassVar[str]  # name in the pipeline: the stage, except for download's two
    STAGE: ClassVar[str]
    INPUTS: ClassVar[dict[str, type[a.Artifact]]] = {}  # input name -> kind of artifact

    workspace: str = Field(description="absolute path of the workspace")
    inputs: dict[str, Ref] = {}

    @classmethod
    def of(cls, config: PipelineConfig, **inputs: a.Artifact) -> Self:
        """The spec of this stage in a pipeline, given the artifacts it needs."""
        refs = {name: Ref.to(inputs[name]) for name in cls.INPUTS}
        return cls(workspace=str(config.workspace_path), inputs=refs, **cls.settings_of(config))

    @classmethod
    def settings_of(cls, config: PipelineConfig) -> dict[str, Any]:
        """The parts of the configuration that this stage needs."""
        return {}

    @property
    def talks_to_hub(self) -> bool:
        """Whether the stage gets the Hub's token, and a way out to the network."""
        return False

    @property
    def key(self) -> str:
        """Name of the result: 16 hex digits of a hash of everything that decides it."""
        content = {
            "stage": self.NODE,
            "version": STAGE_VERSIONS[self.STAGE],
            "settings": _key_part(self, leave_out={"workspace", "inputs"}),
            "inputs": {name: ref.identity for name, ref in self.inputs.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def record(self) -> dict[str, Any]:
        """The spec as an artifact keeps it, without paths of this machine: of a local source only the name is left."""

        def without_paths(value: Any, name: str = "") -> Any:
            if isinstance(value, dict):
                if value.get("format") == "tokenized" and value.get("source"):
                    value = {**value, "source": Path(value["source"]).name}  # a prefix, which no file has as its name
                return {key: without_paths(inner, key) for key, inner in value.items()}
            if isinstance(value, list):
                return [without_paths(inner, name) for inner in value]
            if name in ("source", "folder") and isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists()):
                return Path(value).name
            return value

        return without_paths(self.model_dump(mode="json", exclude={"workspace"}))  # type: ignore[no-any-return]

    @property
    def path(self) -> str:
        """Folder of the result, relative to the workspace."""
        return f"{self.STAGE}/{self.key}"

    @property
    def folder(self) -> Path:
        """Folder of the result."""
        return Path(self.workspace) / self.path

    @property
    def scratch(self) -> Path:
        """Folder of the work under way, of which training leaves its checkpoints and its curves when it stops."""
        return scratch_of(self.folder)


def scratch_of(folder: Path) -> Path:
    """The folder of the work under way, by that of the result."""
    return folder.parent / f".{folder.name}.partial"


def refused_of(folder: Path) -> Path:
    """The report of a gate that refused, by the folder of the result that there is none of; its card is beside it, as .md."""
    return folder.parent / f".{folder.name}.failed.json"


def _key_part(model: Frozen, leave_out: frozenset[str] | set[str] = frozenset()) -> dict[str, Any]:
    """The fields of a model that belong in a key, as JSON values."""
    part: dict[str, Any] = {}
    for name in model.decisive():
        if name in leave_out:
            continue
        value = getattr(model, name)
        if isinstance(value, Frozen):
            part[name] = _key_part(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], Frozen):
            part[name] = [_key_part(item) for item in value]
        else:
            part[name] = model.model_dump(mode="json", include={name})[name]
    return part


class DownloadModelSpec(Spec):
    """Fetch a model from the Hub, or take a local Hugging Face folder."""

    NODE = "download-model"
    STAGE = "download"
    model: ModelSettings
    stamp: str | None = Field(None, description="identity of a local source, so that a changed folder is taken anew")

    @classmethod
    def settings_of(cls, config: PipelineConfig) -> dict[str, Any]:
        return {"model": config.model, "stamp": stamp(config.model.source)}

    @property
    def talks_to_hub(self) -> bool:
        """See `Spec`."""
        return not is_local(self.model.source)


class DownloadDataSpec(Spec):
    """Fetch a dataset from the Hub, or take local text, as jsonl."""

    NODE = "download-data"
    STAGE = "download"
    data: DataSettings
    stamp: str | None = Field(None, description="identity of a local source, so that changed text is taken anew")

    @classmethod
    def settings_of(cls, config: PipelineConfig) -> dict[str, Any]:
        stamps = [
            stamp_tokenized(settings.source)
            if settings.format == "tokenized"
            else stamp(settings.source, settings.include, settings.exclude)
            for _, _, _, settings in config.data.sources()
        ]
        return {"data": config.data, "stamp": " ".join(filter(None, stamps)) or None}

    @property
    def talks_to_hub(self) -> bool:
        """See `Spec`."""
        wanted = (named.settings for named in self.data.sources() if named.settings.format != "tokenized")
        return not all(is_local(settings.source) for settings in wanted)


class PreprocessSpec(Spec):
    """Text to token ids in Megatron's format."""

    NODE = STAGE = "preprocess"
    INPUTS = {"data": a.RawDataArtifact, "model": a.ModelArtifact}
    settings: PreprocessSettings = PreprocessSettings()
    added_tokens: tuple[str, ...] = Field((), description="as model.added_tokens")

    @classmethod
    def settings_of(cls, config: PipelineConfig) -> dict[str, Any]:
        return {"settings": config.preprocess, "added_tokens": config.model.added_tokens}


class ConvertSpec(Spec):
    """Hugging Face weights to canonical ones."""

    NODE = STAGE = "convert"
    INPUTS = {"model": a.ModelArtifact}
    added_tokens: tuple[str, ...] = Field((), description="as model.added_tokens")
    tokenizer: TokenizerKind = Field("auto", description="as preprocess.tokenizer; only matters for added tokens")
    new_rows: NewRows = Field("mean", description="as model.new_rows; only matters for added tokens")

    @classmethod
    def settings_of(cls, config: PipelineConfig) -> dict[str, Any]:
        model = config.model
        if not model.added_tokens:
            return {}
        return {"added_tokens": model.added_tokens, "tokenizer": config.preprocess.tokenizer, "new_rows": model.new_rows}


class VerifySpec(Spec):
    """Our model against transformers on the same tokens."""

    NODE = STAGE = "verify"
    INPUTS = {"model": a.ModelArtifact, "weights": a.WeightsArtifact, "dataset": a.DatasetArtifact}
    settings: VerifySettings = VerifySettings()
    override_special_tokens: dict[SpecialName, str] = Field({}, description="as export.override_special_tokens")
    megatron_llm: MegatronLLMSettings | None = Field(None, description="as export.megatron_llm")

    @classmethod
    def settings_of(cls, config: PipelineConfig) -> dict[str, Any]:
        """Those of export, too, that a model can turn out not to allow: asked before it is trained."""
        export = config.export
        return {
            "settings": config.verify, "override_special_tokens": export.override_special_tokens,
            "megatron_llm": export.megatron_llm,
        }  # fmt: skip

    @classmethod
    def of(cls, config: PipelineConfig, **inputs: a.Artifact) -> Self:
        """The spec in a pipeline. The weights count as they are cut: the ranks that are compared are those that train."""
        spec = super().of(config, **inputs)
        weights = spec.inputs["weights"].model_copy(update={"content": None})
        return spec.model_copy(update={"inputs": {**spec.inputs, "weights": weights}})


class ShardSpec(Spec):
    """Canonical weights, cut for (tp, pp)."""

    NODE = STAGE = "shard"
    INPUTS = {"weights": a.WeightsArtifact}
    tp: int = Field(1, ge=1, description="tensor parallel: ranks that share each layer")
    pp: int = Field(1, ge=1, description="pipeline parallel: ranks that hold different layers")
    vpp: int = Field(1, ge=1, description="parts of the layers that each pp rank holds")
    dtype: Dtype | None = Field(None, description="as model.dtype")

    @classmethod
    def settings_of(cls, config: PipelineConfig) -> dict[str, Any]:
        layout = config.layout
        return {"tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "dtype": config.model.dtype}


class TrainSpec(Spec):
    """Training on tp × pp × dp processes."""

    NODE = STAGE = "train"
    INPUTS = {"weights": a.WeightsArtifact, "dataset": a.DatasetArtifact}
    layout: LayoutSettings = LayoutSettings()
    settings: TrainSettings
    blend: dict[str, float] = Field({}, description="weight of each set of the dataset, by name; default: 1")

    @model_validator(mode="after")
    def _batches_fit_layout(self) -> Self:
        check_batches(self.settings, self.layout)
        return self

    @classmethod
    def settings_of(cls, config: PipelineConfig) -> dict[str, Any]:
        weights = {named.name: named.settings.weight for named in config.data.sources() if named.settings.weight != 1}
        return {"layout": config.layout, "settings": config.train, "blend": weights}


class MergeSpec(Spec):
    """Sharded weights, trained or not, back to canonical ones."""

    NODE = STAGE = "merge"
    INPUTS = {"checkpoint": a.CheckpointArtifact}
    dtype: Dtype | None = Field(None, description="as export.dtype")

    @classmethod
    def settings_of(cls, config: PipelineConfig) -> dict[str, Any]:
        return {"dtype": config.export.dtype}


class ExportSpec(Spec):
    """Canonical weights to a folder that transformers loads."""

    NODE = STAGE = "export"
    INPUTS = {
        "model": a.ModelArtifact, "weights": a.WeightsArtifact, "dataset": a.DatasetArtifact,
        "checkpoint": a.CheckpointArtifact,
    }  # fmt: skip
    settings: ExportSettings = ExportSettings()
    verify: VerifySettings = VerifySettings()

    @classmethod
    def settings_of(cls, config: PipelineConfig) -> dict[str, Any]:
        return {"settings": config.export, "verify": config.verify}


class PushSpec(Spec):
    """Publish the exported model."""

    NODE = STAGE = "push"
    INPUTS = {
        "export": a.ExportArtifact, "checkpoint": a.CheckpointArtifact, "dataset": a.DatasetArtifact,
        "data": a.RawDataArtifact, "verification": a.VerificationArtifact,
    }  # fmt: skip
    settings: PushSettings = PushSettings()

    @classmethod
    def settings_of(cls, config: PipelineConfig) -> dict[str, Any]:
        return {"settings": config.push}

    @property
    def talks_to_hub(self) -> bool:
        """See `Spec`."""
        return self.settings.to == "hub"


# The pipeline in an order in which each node comes after those it needs, and for each node where its inputs come from.
SPECS: dict[str, type[Spec]] = {
    spec.NODE: spec
    for spec in (
        DownloadModelSpec, DownloadDataSpec, PreprocessSpec, ConvertSpec, ShardSpec, VerifySpec, TrainSpec, MergeSpec,
        ExportSpec, PushSpec,
    )
}  # fmt: skip
SOURCES: dict[str, dict[str, str]] = {
    "download-model": {},
    "download-data": {},
    "preprocess": {"data": "download-data", "model": "download-model"},
    "convert": {"model": "download-model"},
    "shard": {"weights": "convert"},
    "verify": {"model": "download-model", "weights": "shard", "dataset": "preprocess"},
    "train": {"weights": "shard", "dataset": "preprocess"},
    "merge": {"checkpoint": "train"},
    "export": {"model": "download-model", "weights": "merge", "dataset": "preprocess", "checkpoint": "train"},
    "push": {
        "export": "export", "checkpoint": "train", "dataset": "preprocess", "data": "download-data",
        "verification": "verify",
    },
}  # fmt: skip
GATES = {"train": "verify"}  # a node that waits for another without using its result
