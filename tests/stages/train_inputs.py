"""Workspaces as the train stage finds them, for its tests: small weights, text and conversations."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from indexed_writer import IndexedDatasetWriter
from tiny_training import MODEL, write_dataset, write_weights

from megatron_core_impl.config import ModelConfig
from stages import runtime
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts.specs import PreprocessSpec, Ref, ShardSpec, Spec, TrainSpec
from stages.contracts.train_settings import LayoutSettings, TrainSettings

SETTINGS = {
    "steps": 40, "sequence_length": 16, "micro_batch_size": 2, "global_batch_size": 4, "lr": 1e-2, "precision": "fp32",
    "split": "80,20,0", "eval_interval": 1000, "eval_batches": 1, "checkpoint_interval": 1000, "log_interval": 1,
}  # fmt: skip


def put(spec: Spec, write: Callable[[Path], None], kind: type[a.Artifact], **facts: Any) -> a.Artifact:
    """Publish an artifact of the test's own."""

    def run(spec: Spec, ctx: Context) -> a.Artifact:
        write(ctx.scratch)
        return ctx.artifact(kind, figure="made by a test", **facts)

    return runtime.execute(spec, run)


def put_weights(workspace: Path, model: ModelConfig = MODEL, tp: int = 1, pp: int = 1) -> a.Artifact:
    """The weights of `MODEL`, said to be those of another model where one is given."""
    source = {"weights": Ref(path=f"convert/{hash(model)}")}
    return put(
        ShardSpec(workspace=str(workspace), inputs=source, tp=tp, pp=pp), write_weights, a.WeightsArtifact,
        model=a.ModelFacts(**asdict(model), dtype="float32", parameters=5_000), tp=tp, pp=pp, tensors=21, bytes=1,
        content=f"the weights of {hash(model)}",
    )  # fmt: skip


def put_dataset(workspace: Path, documents: int = 40, vocab_size: int = MODEL.vocab_size, bos_eos: str = "none") -> a.Artifact:
    source = {"data": Ref(path=f"download/{documents}-{vocab_size}-{bos_eos}")}
    return put(
        PreprocessSpec(workspace=str(workspace), inputs=source),
        lambda scratch: write_dataset(scratch, documents), a.DatasetArtifact,
        tokenizer=a.TokenizerFacts(kind="sentencepiece", vocab_size=vocab_size, eod_id=2, bos_id=1, fingerprint="f"),
        dtype="uint16", documents=documents, empty_documents=0, malformed_lines=0, tokens=1, bos_eos=bos_eos, content="text",
        sets=(a.DatasetSet(name="data", role="all", documents=documents, tokens=1, empty_documents=0, malformed_lines=0,
                           blank_lines=0, longest=1, lengths={}, left_out={}),),
    )  # fmt: skip


def spec_of(
    workspace: Path, *, tp: int = 1, pp: int = 1, dp: int = 1, vpp: int = 1,
    weights: a.Artifact | None = None, dataset: a.Artifact | None = None, **settings: Any,
) -> TrainSpec:  # fmt: skip
    inputs = {"weights": weights or put_weights(workspace, tp=tp, pp=pp), "dataset": dataset or put_dataset(workspace)}
    return TrainSpec(
        workspace=str(workspace),
        inputs={name: Ref(path=one.path, fingerprint=one.fingerprint) for name, one in inputs.items()},
        layout=LayoutSettings(tp=tp, pp=pp, dp=dp, vpp=vpp),
        settings=TrainSettings(**(SETTINGS | settings)),
    )


def cut_spec(workspace: Path, *, tp: int = 1, pp: int = 1, **settings: Any) -> TrainSpec:
    """The spec of a training whose shards are those of one model, whatever the layout."""
    weights = put_weights(workspace, tp=tp, pp=pp)
    assert isinstance(weights, a.WeightsArtifact)
    spec = spec_of(workspace, tp=tp, pp=pp, weights=weights, **settings)
    ref = Ref(path=weights.path, fingerprint=weights.fingerprint, content=weights.content)
    return spec.model_copy(update={"inputs": {**spec.inputs, "weights": ref}})


def put_conversations(workspace: Path, sizes: Sequence[int]) -> a.Artifact:
    """Conversations whose second half is the answer."""
    return put(
        PreprocessSpec(workspace=str(workspace), inputs={"data": Ref(path="download/chat")}),
        lambda scratch: write_conversations(scratch, sizes), a.DatasetArtifact,
        tokenizer=a.TokenizerFacts(kind="sentencepiece", vocab_size=MODEL.vocab_size, eod_id=2, bos_id=1, fingerprint="f"),
        dtype="uint16", documents=len(sizes), empty_documents=0, malformed_lines=0, tokens=1, bos_eos="none",
        content="conversations",
        sets=(a.DatasetSet(name="data", role="all", documents=len(sizes), tokens=1, empty_documents=0, malformed_lines=0,
                           blank_lines=0, longest=1, lengths={}, left_out={}),),
    )  # fmt: skip


def write_conversations(folder: Path, sizes: Sequence[int]) -> None:
    random = np.random.RandomState(0)
    with (
        IndexedDatasetWriter(folder / "data-text", np.uint16) as texts,
        IndexedDatasetWriter(folder / "data-role", np.uint16) as roles,
    ):
        for size in sizes:
            texts.add_sequence(random.randint(0, MODEL.vocab_size, size).astype(np.uint16))
            roles.add_sequence(np.repeat(np.array([1, 2], np.uint16), [size // 2, size - size // 2]))
