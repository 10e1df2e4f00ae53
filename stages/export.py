"""export: trained weights to a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer` load.

Weights are written as safetensors under the family's own Hugging Face names, fused as it fuses them, one block of rows in
memory at a time. config.json, the generation settings, the tokenizer and the licence are the base model's own files, byte for
byte where nothing changed. Then transformers loads the folder, and the comparison of verify runs against our model from the
trained weights: a folder that computes something else than what was trained is never published.

    python -m stages.export SPEC.json

The result is model/, with comparison.json (the figures of that comparison; comparison.md to read) and samples.json (what the
model writes after each prompt, before and after training) beside it; of conversations answers.json, the answers to held-out
questions.
"""

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_core_impl.checkpoint.sharded import open_weights
from megatron_core_impl.config import Layout
from megatron_core_impl.data.tokenizer import load_tokenizer
from megatron_core_impl.json_files import read_json
from megatron_core_impl.models import families
from stages import both_models, gate, runtime
from stages.answers import ask, told
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts import words
from stages.contracts.specs import ExportSpec
from stages.export_weights import write_weights
from stages.gate_report import write_json
from stages.megatron_export import check_megatron, write_megatron
from stages.model_files import LICENCE_FILES
from stages.outcomes import BadInput, GateFailed
from stages.stored_dtypes import listed, other_dtypes
from stages.tokenizer_files import write_tokenizer

MODEL_FOLDER = "model"
COMPARISON = "comparison.json"
SAMPLES = "samples.json"
SAME = ("norm_eps", "activation", "sliding_window", "rope_theta", "rope_scaling", "max_position_embeddings")  # with the base


def run(spec: ExportSpec, ctx: Context) -> a.ExportArtifact:
    """Write the folder, prove that it computes what was trained, and let it speak.

    Raises:
        BadInput: the inputs do not belong together.
        GateFailed: what transformers computes from the folder is not what our model computes.
    """
    base, base_folder = ctx.input("model", a.ModelArtifact, is_checked_meanwhile=True)
    weights, weights_folder = ctx.input("weights", a.WeightsArtifact, is_checked_meanwhile=True)
    dataset, dataset_folder = ctx.input("dataset", a.DatasetArtifact)
    checkpoint = ctx.facts("checkpoint", a.CheckpointArtifact)
    _check_inputs(base, weights, dataset, checkpoint)
    check_megatron(spec.settings.megatron_llm, weights.model)

    folder = ctx.scratch / MODEL_FOLDER
    folder.mkdir()
    _check_dtype(spec, weights, weights_folder)
    written = write_weights(weights_folder, weights.model, folder, ctx, limit=spec.settings.shard_size)
    write_config(base_folder / "files" / "config.json", folder / "config.json", weights.model)
    copy_files(base_folder / "files", folder)
    _check_tokenizer(base_folder / "files", dataset)
    write_tokenizer(
        base, base_folder / "files", dataset, dataset_folder, folder,
        vocab_size=weights.model.vocab_size, override=spec.settings.override_special_tokens, warn=ctx.warn,
    )  # fmt: skip
    if dataset.end_of_answer is not None:
        stop_at(folder, dataset.end_of_answer)
    write_megatron(ctx, spec.settings.megatron_llm, weights.model, weights_folder, tokenizer=folder)

    verdict = gate.check_gate(
        ctx,
        spec.verify,
        model=weights.model,
        weights=weights_folder,
        layout=Layout(),
        reference=folder,
        dataset=dataset,
        data=dataset_folder,
    )
    verdict.write(ctx.scratch / COMPARISON, "The model that was trained, and the exported folder as transformers loads it")
    samples = make_samples(spec, ctx, weights.model, before=base_folder / "files", after=folder)
    write_json(ctx.scratch / SAMPLES, samples)
    right = ask(ctx, spec, dataset, dataset_folder, checkpoint, {"before": base_folder / "files", "after": folder})
    mean_error = verdict.comparison.mean_error
    return ctx.artifact(
        a.ExportArtifact,
        figure=f"Hugging Face folder, {words.size(written.bytes)} · logits equal to training's (mean |Δ| {mean_error:.1e})"
        + told(right),
        digests={f"{MODEL_FOLDER}/{name}": digest for name, digest in written.digests.items()},
        metrics={"samples": samples, "comparison": verdict.metrics, "answers": right},
        model=weights.model,
        loss_before=checkpoint.loss_before,
        loss_after=checkpoint.loss_after,
        mean_error=mean_error,
        license=base.license,
        source=base.source,
        source_revision=base.revision,
    )


def _check_inputs(
    base: a.ModelArtifact, weights: a.WeightsArtifact, dataset: a.DatasetArtifact, checkpoint: a.CheckpointArtifact
) -> None:
    """Refuse inputs that are not of one run.

    Raises:
        BadInput: naming the field and both values.
    """
    gate.check_model(weights.model, base.model, also=SAME)
    gate.check_model(weights.model, checkpoint.model, has_grown=False)
    gate.check_tokenizer(dataset, weights.model)
    if weights.trained_steps != checkpoint.step:
        raise BadInput(
            f"inputs: trained_steps={weights.trained_steps} of the weights is not step={checkpoint.step} of the checkpoint: "
            "take the weights that were merged from this checkpoint"
        )
    if dataset.tokenizer != checkpoint.tokenizer:
        raise BadInput(
            f"inputs: tokenizer {_identity(dataset.tokenizer)} of the data is not the {_identity(checkpoint.tokenizer)} of the "
            "checkpoint: take the data that it was trained on"
        )


def _check_dtype(spec: ExportSpec, weights: a.WeightsArtifact, folder: Path) -> None:
    """Refuse weights that are not in the precision that is to be published: merge rounds, once, and nothing does after it.

    Raises:
        BadInput: naming both, or a tensor that is not what the weights' artifact says.
    """
    wanted, dtype = spec.settings.dtype, weights.model.dtype
    if wanted not in (None, dtype):
        raise BadInput(f"export.dtype={wanted}, and the merged weights are {dtype}: merge the checkpoint with dtype={wanted}")
    try:
        reader = open_weights(folder)
    except ValueError as error:
        raise BadInput(f"inputs.weights: {error}") from error
    if others := other_dtypes(reader, reader.names, dtype):
        raise BadInput(f"inputs.weights: the artifact says dtype={dtype}, but {listed(others)} are stored: merge again")


def _identity(tokenizer: a.TokenizerFacts) -> str:
    return f"{tokenizer.fingerprint[:12]} ({tokenizer.kind}, vocab_size={tokenizer.vocab_size})"


# ── The folder ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_config(source: Path, target: Path, model: a.ModelFacts) -> None:
    """Write config.json: the base model's own, with the fields corrected in which the exported weights differ from it.

    Raises:
        GateFailed: what it then describes is not the model that was trained.
    """
    config = read_json(source)
    dtype = "dtype" if "dtype" in config else "torch_dtype"  # 5.x and 4.x of transformers
    changed = {"vocab_size": model.vocab_size, **({dtype: model.dtype} if dtype in config else {})}
    if all(config.get(key) == value for key, value in changed.items()):
        shutil.copyfile(source, target)
    else:
        target.write_text(json.dumps({**config, **changed}, indent=2, ensure_ascii=False) + "\n")
    described = families.config_from_hf({**config, **changed})
    in_file = families.family_of(described).hf_fields
    for field, value in model.config_fields().items():
        if (says := getattr(described, field)) != value:
            name = in_file.get(field, field)
            raise GateFailed(f"config.json says {name}={says}, the trained model has {name}={value}")


def copy_files(source: Path, target: Path) -> None:
    """Copy the generation settings and the licence's texts as they came."""
    for path in source.iterdir():
        if path.name == "generation_config.json" or LICENCE_FILES.fullmatch(path.name):
            shutil.copyfile(path, target / path.name)


def stop_at(folder: Path, token: int) -> None:
    """Let generation end at a token, besides those where it did. Without it an answer is followed by another question."""
    file = folder / "generation_config.json"
    config = read_json(folder / "config.json")
    defaults = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config.get(key) is not None}
    settings = read_json(file) if file.exists() else defaults
    ends = settings.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if token not in ends:
        file.write_text(json.dumps({**settings, "eos_token_id": [*ends, token]}, indent=2) + "\n")


def _check_tokenizer(folder: Path, dataset: a.DatasetArtifact) -> None:
    """The exported tokenizer must be the one that made the data.

    Raises:
        BadInput: it is not.
    """
    tokenizer = load_tokenizer(folder, dataset.tokenizer.kind, added_tokens=tuple(dataset.tokenizer.added_tokens))
    if tokenizer.fingerprint != dataset.tokenizer.fingerprint:
        raise BadInput(
            f"inputs: tokenizer {tokenizer.fingerprint[:12]} of the model is not the {_identity(dataset.tokenizer)} of the "
            "data: take the model whose tokenizer made the data"
        )


# ── Samples ─────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def make_samples(spec: ExportSpec, ctx: Context, facts: a.ModelFacts, *, before: Path, after: Path) -> list[dict[str, str]]:
    """What each model writes after each prompt, the most likely token each time: [{"prompt", "before", "after"}].

    Both read with the tokenizer of the trained one, which knows the added tokens.
    """
    if not spec.settings.prompts:
        return []
    tokenizer = both_models.quiet_transformers().AutoTokenizer.from_pretrained(after, local_files_only=True)
    samples = [{"prompt": prompt, "before": "", "after": ""} for prompt in spec.settings.prompts]
    for when, folder in (("before", before), ("after", after)):
        ctx.log(f"sampling from the model {when} training")
        model = both_models.load_transformers(
            folder, spec.verify.precision, vocab_size=facts.vocab_size, new_rows=facts.new_rows or "mean"
        ).module
        for sample in samples:
            sample[when] = _continue(model, tokenizer, sample["prompt"], spec.settings.max_new_tokens)
        del model
        gc.collect()  # two models of 7B do not fit everywhere
    return samples


@torch.no_grad()
def _continue(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int) -> str:
    """The continuation of a prompt, without the prompt. A prompt too long for the model loses its beginning."""
    context = model.config.max_position_embeddings
    new = min(max_new_tokens, context - 1)
    tokens = tokenizer(prompt, return_tensors="pt").input_ids[:, new - context :].to(model.device)  # [1, S]
    if tokens.shape[1] == 0:
        return ""  # nothing to continue: an empty prompt, and a tokenizer that begins texts with nothing
    eos = model.generation_config.eos_token_id
    pad = eos[0] if isinstance(eos, list) else eos
    written = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new, pad_token_id=pad
    )[0]  # [S + new]
    read, all_of_it = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (tokens[0], written))
    if all_of_it.startswith(read):
        return str(all_of_it[len(read) :])  # decoded together: SentencePiece drops the space before a first word
    return str(tokenizer.decode(written[tokens.shape[1] :], skip_special_tokens=True))


if __name__ == "__main__":
    runtime.main("export", run, __doc__)
