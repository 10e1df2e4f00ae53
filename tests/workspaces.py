"""Workspaces with a small model, data and weights in them, as the stages before would leave them."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from indexed_writer import IndexedDatasetWriter
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaTokenizerFast, PreTrainedTokenizerFast

from megatron_core_impl.checkpoint.foreign import Rearranged, invert
from megatron_core_impl.checkpoint.sharded import open_weights, write_index, write_rank_file
from megatron_core_impl.checkpoint.slicing import whole
from megatron_core_impl.data.tokenizer import load_tokenizer
from megatron_core_impl.models import families
from stages import runtime, verify
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts import config as c
from stages.contracts import specs
from stages.contracts.data_settings import DataSettings
from stages.contracts.train_settings import TrainSettings

HEAD_DIM, HEADS, KV_HEADS, HIDDEN = 16, 4, 2, 64
STEP = 7  # of the checkpoint

Tensors = dict[str, Tensor]


def text() -> str:
    """Some text: this project's own."""
    return "\n".join(p.read_text() for p in sorted((Path(__file__).parents[1] / "stages" / "contracts").glob("*.py")))


@cache
def sentencepiece_model(vocab_size: int = 400) -> bytes:
    """A SentencePiece model with byte fallback."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text().splitlines()), model_writer=model, model_type="bpe", vocab_size=vocab_size,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        num_threads=1, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, character_coverage=0.99,
    )  # fmt: skip
    return model.getvalue()


def write_tokenizer(folder: Path, kind: str) -> None:
    """Save a tokenizer as Hugging Face folders have it, that of Llama 2 as it came: legacy is false."""
    if kind == "sentencepiece":
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
        LlamaTokenizerFast.from_pretrained(folder, legacy=False).save_pretrained(folder)
        return
    model = ByteLevelBPETokenizer()
    model.train_from_iterator(text().splitlines(), vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def write_model(
    folder: Path, *, tokenizer: str = "sentencepiece", seed: int = 0, model_type: str = "llama", **changes: Any
) -> None:
    """Save a small random model with grouped-query attention and its tokenizer as a Hugging Face folder."""
    folder.mkdir(parents=True)
    write_tokenizer(folder, tokenizer)
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "vocab_size": 400, "hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "max_position_embeddings": 128,
        "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "dtype": "float32",
    }  # fmt: skip
    fields |= changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)  # ones and zeros would hide a norm or a bias that is forgotten
    model.to(getattr(torch, fields["dtype"])).save_pretrained(folder)


@dataclass
class Workspace:
    """A workspace after download, preprocess and convert; after merge too, once `train` was called."""

    root: Path
    model: a.ModelArtifact
    dataset: a.DatasetArtifact
    weights: a.WeightsArtifact

    @property
    def source(self) -> Path:
        """The Hugging Face folder."""
        return self.model.folder(self.root) / "files"

    def tensors(self) -> Tensors:
        """The base model's weights."""
        return read_canonical(self.source)

    def verify_spec(self, **settings: Any) -> specs.VerifySpec:
        inputs = {"model": self.model, "weights": self.weights, "dataset": self.dataset}
        return specs.VerifySpec(
            workspace=str(self.root), inputs=references(inputs), settings=c.VerifySettings(**small(settings))
        )

    def train(self, tensors: Tensors, **facts: Any) -> tuple[a.CheckpointArtifact, a.WeightsArtifact]:
        """Pretend that training ended with these weights: a checkpoint (without content) and what merge makes of it."""
        checkpoint_spec = specs.TrainSpec(
            workspace=str(self.root),
            inputs=references({"weights": self.weights, "dataset": self.dataset}),
            settings=TrainSettings(steps=STEP),
        )
        checkpoint = publish(
            checkpoint_spec, a.CheckpointArtifact, {"checkpoints/step-000007/state.json": b"{}"},
            model=self.model.model, tokenizer=self.dataset.tokenizer, checkpoint="checkpoints/step-000007", step=STEP,
            consumed_samples=56, consumed_tokens=57344, tp=1, pp=1, dp=1, loss_before=5.5, loss_after=2.25,
        )  # fmt: skip
        merge_spec = specs.MergeSpec(workspace=str(self.root), inputs=references({"checkpoint": checkpoint}))
        merged = write_weights(merge_spec, tensors, self.model.model.model_copy(update=facts), trained_steps=STEP)
        return checkpoint, merged

    def export_spec(
        self,
        checkpoint: a.CheckpointArtifact,
        merged: a.WeightsArtifact,
        prompts: tuple[str, ...] = (),
        export: dict[str, Any] | None = None,
        **settings: Any,
    ) -> specs.ExportSpec:
        inputs = {"model": self.model, "weights": merged, "dataset": self.dataset, "checkpoint": checkpoint}
        return specs.ExportSpec(
            workspace=str(self.root),
            inputs=references(inputs),
            settings=c.ExportSettings(prompts=prompts, max_new_tokens=8, **(export or {})),
            verify=c.VerifySettings(**small(settings)),
        )


def read_canonical(folder: Path) -> Tensors:
    """The canonical tensors of a Hugging Face folder."""
    config = families.config_from_hf(json.loads((folder / "config.json").read_text()))
    reader = Rearranged(open_weights(folder), invert(families.family_of(config).hf_tensors(config)))
    return {name: reader.read(name) for name in reader.names}


def small(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of verify for a small model."""
    return {"batches": 2, "batch_size": 2, "sequence_length": 48, **settings}


def references(inputs: dict[str, a.Artifact]) -> dict[str, specs.Ref]:
    """Artifacts as inputs of a spec."""
    return {name: specs.Ref(path=artifact.path, fingerprint=artifact.fingerprint) for name, artifact in inputs.items()}


def publish(spec: specs.Spec, kind: type[a.Artifact], files: dict[str, bytes] | Callable[[Path], None], **facts: Any) -> Any:
    """An artifact that the stage of a spec could have made."""

    def run(spec: specs.Spec, ctx: Context) -> a.Artifact:
        for name in spec.inputs:
            ctx.input(name, a.Artifact)
        if callable(files):
            files(ctx.scratch)
        else:
            for name, content in files.items():
                (ctx.scratch / name).parent.mkdir(parents=True, exist_ok=True)
                (ctx.scratch / name).write_bytes(content)
        return ctx.artifact(kind, figure="made for a test", **facts)

    return runtime.execute(spec, run)


def write_weights(spec: specs.Spec, tensors: Tensors, model: a.ModelFacts, *, trained_steps: int = 0) -> a.WeightsArtifact:
    """Canonical weights."""

    def write(folder: Path) -> None:
        write_rank_file(folder, 0, ((name, tuple(t.shape), whole(t.shape), t) for name, t in tensors.items()))
        write_index(folder)

    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    artifact: a.WeightsArtifact = publish(
        spec, a.WeightsArtifact, write, model=model, tp=1, pp=1, tensors=len(tensors), bytes=size, trained_steps=trained_steps
    )
    return artifact


def make_workspace(
    root: Path,
    *,
    tokenizer: str = "sentencepiece",
    documents: list[str] | None = None,
    edit: Callable[[Tensors], None] | None = None,
    facts: dict[str, Any] | None = None,
    files: Callable[[Path], None] | None = None,
    **model: Any,
) -> Workspace:
    """A workspace after download, preprocess and convert.

    Args:
        documents: the data; default: this project's own text.
        edit: changes the canonical weights in place, as a wrong conversion would.
        facts: what the canonical weights wrongly say of the model.
        files: changes the Hugging Face folder before it is recorded.
        model: fields of its config.json.
    """
    workspace = str(root)
    source = root / "source"
    write_model(source, tokenizer=tokenizer, **model)
    tensors = read_canonical(source)
    if files is not None:
        files(source)
    hf = families.config_from_hf(json.loads((source / "config.json").read_text()))
    dtype = model.get("dtype", "float32")
    model_facts = a.ModelFacts(**asdict(hf), dtype=dtype, parameters=families.count_parameters(hf))
    contents = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    downloaded = publish(
        specs.DownloadModelSpec(workspace=workspace, model=c.ModelSettings(source=str(source))), a.ModelArtifact,
        {f"files/{name}": content for name, content in contents.items()},
        model=model_facts, tokenizer_files=tuple(sorted(name for name in contents if "token" in name)),
        license="mit", source="source", revision=None,
    )  # fmt: skip
    raw = publish(
        specs.DownloadDataSpec(workspace=workspace, data=DataSettings(source="text")), a.RawDataArtifact,
        {"data.jsonl": b"{}\n"}, documents=1, source="text", revision=None, text_bytes=1,
        sets=(a.RawSet(name="data", files=("data.jsonl",), origins=("text",), format="text", text_columns=("text",), columns={},
                       source="text", role="all", documents=1, text_bytes=1),),
    )  # fmt: skip
    tokens = load_tokenizer(source, tokenizer)  # type: ignore[arg-type]
    parts = documents or text().split("\n\n\n")
    ids = [[*tokens.encode(part), tokens.eod_id] for part in parts]
    examples = [{"text": part, "ids": tokens.encode(part)} for part in parts[:4]]

    def write(folder: Path) -> None:
        with IndexedDatasetWriter(folder / "data", np.dtype("<u2")) as writer:
            writer.add_documents(np.concatenate(ids).astype("<u2"), np.array([len(d) for d in ids], np.int32))
        (folder / "examples.json").write_text(json.dumps(examples))

    dataset = publish(
        specs.PreprocessSpec(workspace=workspace, inputs=references({"data": raw, "model": downloaded})), a.DatasetArtifact,
        write,
        tokenizer=a.TokenizerFacts(
            kind=tokens.kind, vocab_size=tokens.vocab_size, eod_id=tokens.eod_id, bos_id=tokens.bos_id,
            fingerprint=tokens.fingerprint,
        ),
        dtype="uint16", documents=len(ids), empty_documents=0, malformed_lines=0,
        tokens=sum(map(len, ids)), bos_eos="eos", content="text",
        sets=(
            a.DatasetSet(
                name="data", role="all", documents=len(ids), tokens=sum(map(len, ids)), empty_documents=0, malformed_lines=0,
                blank_lines=0, longest=1, lengths={}, left_out={},
            ),
        ),
    )  # fmt: skip
    if edit is not None:
        edit(tensors)
    convert_spec = specs.ConvertSpec(workspace=workspace, inputs=references({"model": downloaded}))
    weights = write_weights(convert_spec, tensors, model_facts.model_copy(update=facts or {}))
    return Workspace(root, downloaded, dataset, weights)


def start(spec: specs.Spec, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the stage of a spec as a process."""
    file = Path(spec.workspace) / f"{spec.STAGE}.json"
    file.write_text(spec.model_dump_json())
    return subprocess.run(
        [sys.executable, "-m", f"stages.{spec.STAGE}", str(file)],
        capture_output=True, text=True, cwd=Path(__file__).parents[1], env={**os.environ, **environment}, check=False,
    )  # fmt: skip


def rewrite(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Make an artifact say something else, in earnest: with the fingerprint of what it then says."""
    file = folder / a.ARTIFACT_FILE
    content = json.loads(file.read_text())
    edit(content)
    artifact = a.parse_artifact(json.dumps(content))
    content["fingerprint"] = a.fingerprint_of(artifact.kind, artifact.files, artifact.facts())
    file.write_text(json.dumps(content))


def check(workspace: Workspace, **settings: Any) -> a.VerificationArtifact:
    """Verify a workspace's weights, in this process."""
    artifact = runtime.execute(workspace.verify_spec(**settings), verify.run)
    assert isinstance(artifact, a.VerificationArtifact)
    return artifact
