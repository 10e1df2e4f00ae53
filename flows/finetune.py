"""The flow `finetune-llama2`, from a base model and text to a published model.

    finetune run configs/demo.yaml                       from a terminal, with a server of its own if need be

Every node is a task (`tasks.py`) that runs one stage in a process of its own (`launch/`). A finished stage is not run again:
not when the flow is retried, nor when it runs anew with the same configuration. Flow-level retries are off on purpose: they
would start everything from the top unasked.
"""

from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from flows.run import open_run
from flows.settle import settle
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
RunName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="name of the run: its folder below runs/")]
Refresh = Annotated[list[Node], Field(description="nodes to do again although their results are there")]


@flow(name="finetune-llama2", flow_run_name="{run_name}", on_crashed=[settle], on_cancellation=[settle])
def finetune(config: PipelineConfig, run_name: RunName, refresh: Refresh = []) -> None:  # noqa: B006 (Prefect copies it)
    """Fine-tune a model. The result is `<workspace>/runs/<run_name>/export/model`."""
    with open_run(config, run_name, refresh) as run:
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
