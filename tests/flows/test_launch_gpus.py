"""Whether there are GPUs enough for stages that are processes of this machine: told before anything starts."""

from pathlib import Path

import pytest
from test_launch_docker import config

from flows.launch import choose, doctor

TOO_FEW = (
    "layout has 4 processes (at once: dp × tp × pp of train, or tp × pp of verify), each on a GPU of its own, and they see {}. "
    "Lower layout.dp, tp or pp, or compute on the CPU: launch.gpus: none"
)


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
    monkeypatch.setattr(choose, "gpus_of_machine", lambda: of_machine)
    monkeypatch.setattr(choose, "machine_has_gpus", lambda: of_machine != 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    asked = config(tmp_path, {"by": "process", "gpus": gpus}, layout={"tp": 2, "dp": 2})
    expected = None if told is None else TOO_FEW.format(told)
    assert choose.in_the_way(asked) == expected
    problems = [finding for finding in doctor.examine(asked, {}) if finding.subject == "gpus" and finding.mend]
    assert [f"{finding.text}. {finding.mend}" for finding in problems] == ([] if expected is None else [expected])
