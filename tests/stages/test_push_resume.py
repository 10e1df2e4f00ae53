"""A push that is killed, stopped, or whose Hub goes away: it goes on, sends nothing twice, and keeps the token to itself."""

import json
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hub_server import Drop, HubServer, Refusal
from huggingface_hub import HfApi
from push_inputs import FILES, TOKEN, done, push_inputs, push_spec, refused, run, sha256, started

from stages import hub_upload
from stages.context import Context
from stages.contracts.specs import Ref
from stages.hub_upload import Push

BIG = 17 << 20  # bytes: such a file is sent by itself
SHARDS = {f"model-0000{n}-of-00003.safetensors": np.random.default_rng(n).bytes(BIG + n) for n in (1, 2, 3)}
SIZES = {sha256(content): len(content) for content in SHARDS.values()}
FIRST, SECOND, THIRD = SIZES
MODEL = {name: content for name, content in FILES.items() if name != "model.safetensors"} | SHARDS


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Ref]:
    return push_inputs(tmp_path / "ws", MODEL)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub").running() as server:
        server.users[TOKEN] = "ada"
        yield server


class Killer:
    """Ends a push, once, and the connection with it: what is still on its way does not arrive."""

    def __init__(self, number: signal.Signals = signal.SIGKILL) -> None:
        self.number = number
        self.process: subprocess.Popen[str] | None = None

    def __call__(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(self.number)
            process.wait()
            raise Drop


@pytest.mark.parametrize("part_size", [None, 5 << 20], ids=["whole", "parts"])
def test_killed_in_the_middle_of_a_file(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer, part_size: int | None) -> None:
    spec = push_spec(tmp_path, inputs, to="hub", repo="ada/fine", tag="v1")
    kill, hub.part_size = Killer(), part_size

    def at_the_middle_of_the_second(digest: str, received: int) -> None:
        if digest == SECOND and hub.received[SECOND] > 6 << 20:
            kill()

    hub.on_receive = at_the_middle_of_the_second
    with started(spec, hub, TOKEN) as process:
        kill.process = process
        out, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, out + err
    repo = hub.repos["models", "ada/fine"]
    assert set(repo.head) == {".gitattributes"}, "a reader sees nothing of it yet"
    assert set(hub.uploads) >= {FIRST}
    assert not {SECOND, THIRD} & set(hub.uploads)

    cut = hub.received[SECOND]
    assert 6 << 20 < cut < SIZES[SECOND]
    artifact = done(spec, hub, TOKEN)
    assert hub.received[FIRST] == SIZES[FIRST], "what was there is not sent again"
    assert hub.received[THIRD] == SIZES[THIRD]
    assert hub.received[SECOND] == cut + SIZES[SECOND], "only the file that was cut"
    assert len(repo.commits) == 2
    assert repo.tags == {"v1": artifact.commit}
    assert set(repo.head) == {*MODEL, ".gitattributes"}


def stored(hub: HubServer) -> dict[str, tuple[int, int]]:
    """The blocks that Xet's storage holds: size and time of each."""
    blocks = [path for path in (hub.folder / "xet").rglob("xorbs/default.*") if path.is_file()]
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in blocks}


def test_killed_between_files_over_xet(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    """Each file is a transaction of the storage: what it has of the first one is not written again."""
    hub.xet, kill = True, Killer()
    spec = push_spec(tmp_path, inputs, to="hub", repo="ada/fine")

    def at_the_third_file(method: str, path: str) -> None:
        if "/preupload/" in path and len(hub.asked("POST", "/preupload/")) == 3:
            kill()

    hub.on_request = at_the_third_file
    with started(spec, hub, TOKEN, xet=True) as process:
        kill.process = process
        out, err = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, out + err
    assert (tmp_path / "ws/.cache/push" / spec.key).is_dir(), "the client's record of what it sent outlives the machine's home"
    before = stored(hub)
    assert sum(size for size, _ in before.values()) > 2 * BIG, "two files are there"
    done(spec, hub, TOKEN, xet=True)
    assert not (tmp_path / "ws/.cache/push" / spec.key).exists()
    after = stored(hub)
    assert {name: after[name] for name in before} == before
    assert sum(size for size, _ in after.values()) < 3 * BIG + (1 << 20), "nothing is there twice"
    assert len(hub.repos["models", "ada/fine"].commits) == 2


def test_killed_after_the_commit(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    """The tag is all that is left to do."""
    spec, kill = push_spec(tmp_path, inputs, to="hub", repo="ada/fine", tag="v1"), Killer()
    hub.on_request = lambda method, path: kill() if "/tag/" in path else None
    with started(spec, hub, TOKEN) as process:
        kill.process = process
        process.communicate(timeout=120)
    repo = hub.repos["models", "ada/fine"]
    assert len(repo.commits) == 2
    assert not repo.tags
    artifact = done(spec, hub, TOKEN)
    assert len(repo.commits) == 2
    assert repo.tags == {"v1": artifact.commit}
    assert all(hub.received[digest] == size for digest, size in SIZES.items())


def test_stopped_at_once_by_a_signal(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    spec, stop = push_spec(tmp_path, inputs, to="hub", repo="ada/fine"), Killer(signal.SIGTERM)
    hub.on_receive = lambda digest, received: stop() if digest == SECOND else None
    with started(spec, hub, TOKEN) as process:
        stop.process = process
        out, err = process.communicate(timeout=120)
    assert process.returncode == 4, out + err
    assert err.strip().splitlines()[-1] == "error: push: stopped by SIGTERM; run it again to go on"
    assert hub.received[SECOND] < SIZES[SECOND], "it did not wait for the file"
    done(spec, hub, TOKEN)
    assert hub.received[FIRST] == SIZES[FIRST]


def fail(times: int, requests: Sequence[tuple[str, str]], error: Callable[[], Exception]) -> Callable[[str, str], None]:
    """The first requests of each kind fail: method, and what is in the path."""
    left = dict.fromkeys(requests, times)

    def on_request(verb: str, path: str) -> None:
        for method, part in requests:
            if verb == method and part in path and left[method, part]:
                left[method, part] -= 1
                raise error()

    return on_request


def overloaded() -> Exception:
    return Refusal(503, None, "Service Unavailable")


@pytest.mark.parametrize("error", [overloaded, Drop], ids=["overloaded", "dropped"])
def test_a_hub_that_is_away_for_a_while(tmp_path: Path, hub: HubServer, error: Callable[[], Exception]) -> None:
    steps = [("POST", "/preupload/"), ("PUT", "/upload/"), ("POST", "/commit/"), ("GET", "/tree/"), ("POST", "/tag/")]
    hub.on_request = fail(2, steps, error)
    spec = push_spec(tmp_path, push_inputs(tmp_path / "ws"), to="hub", repo="ada/fine", tag="v1")
    artifact = done(spec, hub, TOKEN)
    repo = hub.repos["models", "ada/fine"]
    assert len(repo.commits) == 2
    assert repo.tags == {"v1": artifact.commit}
    for method, part in steps:
        assert len([r for r in hub.asked(method, part) if r.status in (0, 503)]) == 2, f"the failures of {part} took place"


def test_an_answer_that_is_lost_makes_no_second_commit(tmp_path: Path, hub: HubServer) -> None:
    spec = push_spec(tmp_path, push_inputs(tmp_path / "ws"), to="hub", repo="ada/fine")
    hub.loses = lambda method, path: "/commit/" in path
    artifact = done(spec, hub, TOKEN)
    repo = hub.repos["models", "ada/fine"]
    assert len(hub.asked("POST", "/commit/")) == 1
    assert hub.asked("POST", "/commit/")[0].status == 0, "the answer was lost"
    assert len(repo.commits) == 2
    assert artifact.commit == repo.branches["main"]


def test_a_hub_that_stays_away(tmp_path: Path, inputs: dict[str, Ref], hub: HubServer) -> None:
    spec = push_spec(tmp_path, inputs, to="hub", repo="ada/fine")
    for error, told in (
        (Drop, f"cannot reach the Hub at {hub.url} for ada/fine"),
        (overloaded, "the Hub answers ada/fine with status 503: Service Unavailable. Run again later"),
    ):
        hub.on_request = fail(10**6, [("PUT", SECOND)], error)
        message = refused(spec, hub, TOKEN)
        assert told in message
        assert "what has arrived is not sent again, and nothing is published before all of it has" in message
        assert "signature" not in message
    hub.on_request = lambda method, path: None
    done(spec, hub, TOKEN)
    assert all(hub.received[digest] == size for digest, size in SIZES.items())


def test_a_long_transfer_tells_that_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its errors arrive."""
    told = threading.Event()

    class Listener(Context):
        def progress(self, done: float, total: float, text: str) -> None:
            assert text.startswith("sending big.bin, for ")
            told.set()

    spec = push_spec(tmp_path, {})
    push = Push(HfApi(), spec.settings, "ada/fine", {}, {}, Listener(spec, tmp_path))
    monkeypatch.setattr(hub_upload, "HEARTBEAT", 0.01)
    assert hub_upload._beside(push, lambda: told.wait(20), "sending big.bin", 0.5)
    with pytest.raises(ZeroDivisionError):
        hub_upload._beside(push, lambda: 1 // 0, "", 0.5)


def leftovers(tmp_path: Path) -> str:
    """All that a push has left: workspace, home of the client, whatever lies beside them."""
    kept = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(tmp_path / "hub")]
    return "\n".join(f"{path} {path.read_bytes().decode(errors='replace')}" for path in kept)


@pytest.mark.parametrize("xet", [False, True], ids=["http", "xet"])
@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_the_token_is_left_nowhere(tmp_path: Path, hub: HubServer, xet: bool, fails: bool) -> None:
    """Not in the output, a file, or the list of processes, and neither is the signature of an address."""
    hub.xet = xet
    spec = push_spec(tmp_path, push_inputs(tmp_path / "ws"), to="hub", repo="ada/fine", tag="v1")
    processes: list[str] = []

    def look(method: str, path: str) -> None:
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                try:
                    processes.append((folder / "cmdline").read_bytes().decode(errors="replace"))
                except OSError:
                    continue
        if fails and "/commit/" in path:
            raise Refusal(500, None, f"we could not store what {TOKEN} sent to https://store/x?X-Amz-Signature=SECRET")
        if method == "PUT" and not hub.asked("PUT", "/upload/"):
            raise Refusal(503, None, "a moment")  # the client warns of it, with the address

    hub.on_request = look
    code, out, err = run(spec, hub, TOKEN, xet=xet, STAGE_EVENTS="1")
    assert code == (2 if fails else 0), out + err
    left = leftovers(tmp_path)
    assert f"{spec.folder / 'artifact.json'} " in left or fails
    assert any("stages.push" in line for line in processes)
    for text in (out, err, left, "\n".join(processes)):
        assert TOKEN not in text
        assert "SECRET" not in text
        assert "signature=" not in text
    if fails:
        assert "we could not store what *** sent to https://store/x. Run again later" in err
    else:
        assert json.loads((spec.folder / "receipt.json").read_text())["target"] == f"{hub.url}/ada/fine"
        assert len(FILES) == len(json.loads((spec.folder / "receipt.json").read_text())["files"])


def test_a_password_in_the_address_is_not_told(tmp_path: Path, hub: HubServer) -> None:
    spec = push_spec(tmp_path, push_inputs(tmp_path / "ws"), to="hub", repo="ada/fine")
    error = refused(spec, hub, TOKEN, HF_ENDPOINT=hub.url.replace("http://", "http://ada:SECRETpassword@"))
    assert f"a token from {hub.url}/settings/tokens" in error
