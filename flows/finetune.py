"""The flow `finetune-llama2`, from a base model and text to a published model.

    finetune run configs/demo.yaml                       from a terminal, with a server of its own if need be
    finetune ui                                          server and runner; then in the browser, or:
    prefect deployment run 'finetune-llama2/demo'        on the runner

Every node is a task (`tasks.py`) that runs one stage in a process of its own (`launch/`). A finished stage is not run again:
not when the flow is retried, nor when it runs anew with the same configuration. Flow-level retries are off on purpose: they
would start everything from the top unasked.
"""

from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from flows.asked.graph import WHOLE
from flows.asked.parameters import what_is_asked
from flows.records.run_record import RUN_NAME
from flows.running.run import name_of_run, open_run
from flows.running.settle import settle
from flows.tasks import (
    convert,
    download_data,
    download_model,
    export,
    merge,
    preprocess,
    push,
    shard,
    train,
    verify,
)
from stages.contracts.config import PipelineConfig

Node = Literal[
    "download-model", "download-data", "preprocess", "convert", "shard", "verify", "train", "merge", "export", "push"
]  # fmt: skip
RunName = Annotated[str, Field(pattern=RUN_NAME)]


# Parameters are checked by us, so that what is wrong is told as `finetune run` tells it.
@flow(
    name=WHOLE,
    flow_run_name=name_of_run,
    validate_parameters=False,
    on_crashed=[settle],
    on_cancellation=[settle],
)
def finetune(
    config: PipelineConfig,
    overrides: list[str] = [],  # noqa: B006 (Prefect copies it)
    run_name: RunName | None = None,
    refresh: list[Node] = [],  # noqa: B006
    fresh: bool = False,
    start_from: list[str] = [],  # noqa: B006
) -> None:
    """Fine-tune a model. The result is `<workspace>/runs/<run>/export/model`.

    Args:
        config: What to do: the same keys as in configs/*.yaml.
        overrides: Changes to it, each as after --set of finetune run, e.g. train.lr=1e-4
        run_name: Name of the run, and of its folder in <workspace>/runs. Default: the flow run's own.
        refresh: Stages to do again although their results are there; what depends on them is done again, too.
        fresh: With refresh: an interrupted training does not go on from its last checkpoint, it begins anew.
        start_from: Results to start from, each a folder in the workspace such as train/0123456789abcdef, or a stage of a run
            such as brisk-otter/train. They, and what they were made from, are taken as they are.
    """
    asked = what_is_asked(config, overrides=overrides, refresh=refresh, fresh=fresh, start_from=start_from)
    with open_run(asked, run_name) as run:
        model = run.start(download_model)
        data = run.start(download_data)

        dataset = run.start(preprocess, data, model)
        weights = run.start(convert, model)
        shards = run.start(shard, weights)

        verification = run.start(verify, model, shards, dataset)
        checkpoint = run.start(train, shards, dataset, after=[verification])
        trained = run.start(merge, checkpoint)

        exported = run.start(export, model, trained, dataset, checkpoint)
        run.start(push, exported, checkpoint, dataset, data, verification)
