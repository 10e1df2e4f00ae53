"""verify: our model must compute what transformers computes, on real tokens, or the run ends here.

Both models are loaded in the precision asked for, ours from the converted weights and transformers' from the original Hugging
Face folder, and compared on the same batches of the preprocessed data: mean and largest error of the logits, loss, best next
token, and every hidden state on the way, so that a failure names the layer. And the tokenizer that the trained model would be
published with must give transformers the ids of the data. Nothing is trained on what fails.

    python -m stages.verify SPEC.json

The result is verification.json: all figures, the gates, and a line for every module.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from stages import gate, runtime
from stages.contracts import artifacts as a
from stages.contracts.specs import VerifySpec
from stages.tokenizer_files import write_tokenizer

REPORT = "verification.json"


def run(spec: VerifySpec, ctx: runtime.Context) -> a.VerificationArtifact:
    """Compare, and write the report.

    Raises:
        BadInput: the inputs do not fit each other or the settings.
        GateFailed: the models differ by more than is allowed.
    """
    model, model_folder = ctx.input("model", a.ModelArtifact)
    weights, weights_folder = ctx.input("weights", a.WeightsArtifact)
    dataset, dataset_folder = ctx.input("dataset", a.DatasetArtifact)
    gate.check_model(weights.model, model.model)
    with TemporaryDirectory(dir=ctx.scratch) as published:  # as export will: what cannot be published need not be trained
        shutil.copyfile(model_folder / "files" / "config.json", Path(published) / "config.json")  # it decides the class, too
        write_tokenizer(model, model_folder / "files", dataset, dataset_folder, Path(published))
    verdict = gate.check_gate(
        ctx,
        spec.settings,
        model=weights.model,
        weights=weights_folder,
        reference=model_folder / "files",
        dataset=dataset,
        data=dataset_folder,
    )
    gate.write_json(ctx.scratch / REPORT, verdict.report)
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
    )


if __name__ == "__main__":
    runtime.main("verify", run, __doc__)
