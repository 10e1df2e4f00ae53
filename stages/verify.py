"""verify: our model must compute what transformers computes, on real tokens, or nothing is trained on it.

The weights are those that training loads, and run on the ranks that training has: the topology is a fact of the weights. The
reference is transformers' model from the original Hugging Face folder. Every tensor is compared bit for bit; and on the same
batches of the preprocessed data, and on probes, the logits, the loss, the best next token, and every hidden state on the way,
so that a failure names the layer (`gate`). And the tokenizer that the trained model would be published with must give
transformers the ids of the data.

    python -m stages.verify SPEC.json

The result is verification.json: all figures, the gates, and a line for every module; and verification.md, the same to read.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_core_impl.config import Layout
from stages import gate, runtime
from stages.context import Context
from stages.contracts import artifacts as a
from stages.contracts.specs import VerifySpec
from stages.megatron_export import check_megatron
from stages.tokenizer_files import write_tokenizer

REPORT = "verification.json"


def run(spec: VerifySpec, ctx: Context) -> a.VerificationArtifact:
    """Compare, and write the report.

    Raises:
        BadInput: the inputs do not fit each other or the settings.
        GateFailed: the models differ by more than is allowed.
    """
    model, model_folder = ctx.input("model", a.ModelArtifact)
    weights, weights_folder = ctx.input("weights", a.WeightsArtifact)
    dataset, dataset_folder = ctx.input("dataset", a.DatasetArtifact)
    gate.check_model(weights.model, model.model)
    check_megatron(spec.megatron_llm, weights.model)
    with TemporaryDirectory(dir=ctx.scratch) as published:  # as export will: what cannot be published need not be trained
        shutil.copyfile(model_folder / "files" / "config.json", Path(published) / "config.json")  # it decides the class, too
        write_tokenizer(
            model, model_folder / "files", dataset, dataset_folder, Path(published),
            vocab_size=weights.model.vocab_size, override=spec.override_special_tokens, warn=ctx.warn,
        )  # fmt: skip
    verdict = gate.check_gate(
        ctx,
        spec.settings,
        model=weights.model,
        weights=weights_folder,
        layout=Layout(tp=weights.tp, pp=weights.pp, vpp=weights.vpp),
        reference=model_folder / "files",
        dataset=dataset,
        data=dataset_folder,
    )
    verdict.write(ctx.scratch / REPORT, f"The model that is trained, and transformers' {model.source}")
    comparison = verdict.comparison
    return ctx.artifact(
        a.VerificationArtifact,
        figure=verdict.figure,
        metrics=verdict.metrics,
        mean_error=comparison.mean_error,
        max_error=comparison.max_error,
        loss_difference=comparison.loss_difference,
        argmax_agreement=comparison.argmax_agreement,
        allowed_mean_error=verdict.gates[0].allowed,
        precision=spec.settings.precision,
        tp=weights.tp,
        pp=weights.pp,
        vpp=weights.vpp,
    )


if __name__ == "__main__":
    runtime.main("verify", run, __doc__)
