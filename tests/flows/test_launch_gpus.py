"""Whether there are GPUs enough for stages that are processes of this machine: told before anything starts."""

from pathlib import Path

import pytest
from fake_stages import changed, make_results

from flows.asked.load_config import BadConfig
from flows.asked.parameters import Asked
from flows.launch import choose, doctor
from flows.launch.gpus import processes_on
from flows.launch.problems import Problem
from flows.running.ready import nodes_to_do, refuse_what_cannot_run
from stages.contracts import launch_settings
from stages.contracts.specs import SPECS
from stages.contracts.words import counted

TOO_FEW = (
    "layout has 4 processes on one machine (dp × tp × pp of train, or tp × pp of verify, all on the first), each of which "
    "needs a GPU of its own, and they see {}"
)
MEND = "lower layout.dp, tp or pp, or compute on the CPU: launch.gpus: none"


@pytest.mark.parametrize(
    ("of_machine", "visible", "gpus", "told"),
    [
        (1, None, "auto", 1),
        (4, None, "auto", None),
        (8, "0,1", "auto", 2),
        (8, None, "3", 3),
        (2, None, "4", 2),  # more are asked for than there are
        (None, None, "auto", None),  # WSL does not tell
        (None, "0", "auto", 1),
        (1, None, "none", None),
        (1, "", "auto", None),
        (0, None, "auto", None),
    ],
)
def test_a_gpu_for_every_process(
    of_machine: int | None, visible: str | None, gpus: str, told: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_settings, "gpus_of_machine", lambda: of_machine)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    asked = changed(tmp_path, launch={"by": "process", "gpus": gpus}, layout={"tp": 2, "dp": 2})
    expected = [] if told is None else [Problem(TOO_FEW.format(counted(told, "GPU")), MEND)]
    assert list(choose.in_the_way(asked)) == expected
    found = [finding for finding in doctor.examine(asked, {}) if finding.subject == "gpus" and finding.mend]
    assert [Problem(finding.text, str(finding.mend)) for finding in found] == expected


@pytest.mark.parametrize(
    ("stages", "processes"), [(["push"], 0), (["export", "push"], 1), (["verify"], 2), (["verify", "train", "export"], 4)]
)
def test_what_is_not_done_needs_no_gpus(
    stages: list[str], processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was trained on many is exported, and published, on one."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    asked = changed(tmp_path, launch={"by": "process"}, layout={"tp": 2, "dp": 2})
    assert processes_on(asked, stages) == processes
    for of_machine in (1, 2, 4):
        monkeypatch.setattr(launch_settings, "gpus_of_machine", lambda number=of_machine: number)
        assert bool(choose.in_the_way(asked, stages)) == (of_machine < processes)


def test_a_run_needs_gpus_for_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_settings, "gpus_of_machine", lambda: 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    asked = changed(tmp_path, layout={"tp": 2}, launch={"by": "process"})
    assert nodes_to_do(Asked(asked)) == frozenset(SPECS)
    with pytest.raises(BadConfig, match=r"^launch: layout has 2 processes on .*, and they see 1 GPU\. To mend it: lower"):
        refuse_what_cannot_run(Asked(asked))
    made = make_results(asked, until="train")
    assert nodes_to_do(Asked(asked)) == {"merge", "export", "push"}
    refuse_what_cannot_run(Asked(asked))
    assert nodes_to_do(Asked(asked, refresh=frozenset(["train"]))) == {"train", "merge", "export", "push"}
    other = asked.model_copy(update={"train": asked.train.model_copy(update={"lr": 0.5})})  # what --from takes as it is
    assert nodes_to_do(Asked(other, given=made)) == {"merge", "export", "push"}
    refuse_what_cannot_run(Asked(other, given=made))
    refuse_what_cannot_run(Asked(asked, stage="export"))
    with pytest.raises(BadConfig, match="layout has 2 processes"):
        refuse_what_cannot_run(Asked(asked, stage="train"))


def test_the_gpus_that_a_machine_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As its kernel says: NVIDIA's driver, or WSL, which does not tell how many."""
    driver, wsl = tmp_path / "gpus", tmp_path / "dxg"
    monkeypatch.setattr(launch_settings, "DRIVER", driver)
    monkeypatch.setattr(launch_settings, "WSL", wsl)
    assert (launch_settings.gpus_of_machine(), launch_settings.machine_has_gpus()) == (0, False)
    wsl.touch()
    assert (launch_settings.gpus_of_machine(), launch_settings.machine_has_gpus()) == (None, True)
    for address in ("0000:01:00.0", "0000:02:00.0"):
        (driver / address).mkdir(parents=True)
    assert (launch_settings.gpus_of_machine(), launch_settings.machine_has_gpus()) == (2, True)
