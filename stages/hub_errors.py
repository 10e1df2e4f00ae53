"""What the Hub's refusals mean for the person, and the token's secrecy. No client of the Hub in here.

Every client ends a failed call with an exception that has the answer of the server somewhere in its chain, or none when no
answer came. The Hub's status and its header `X-Error-Code` say what is wrong
(https://huggingface.co/docs/hub/api); `explained` turns them into a sentence that says what to do.
"""

import errno
import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from stages.model_files import listed
from stages.outcomes import BadInput, StageError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT}
UNREACHABLE = {
    "TransportError",
    "ConnectionError",
    "OfflineModeIsEnabled",
    "TimeoutError",
    "gaierror",
}  # of the clients, and Python's
PASSING = {408, 429, 500, 502, 503, 504}  # statuses of a server that may answer otherwise a little later
OF_STORAGE = re.compile(r"HTTP status client error \((\d{3}) ([\w ]+)\)")  # hf_xet's words for a refusal
# An address: who asks, where, and a signature.
SIGNED = re.compile(r"(https?://)(?:[^\s/@]+@)?([^\s?()'\"]+)(?:\?[^\s()'\"]*[^\s()'\".,:;])?")


def endpoint() -> str:
    """Address of the Hub: HF_ENDPOINT, or the public one. For people: `address`."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def address() -> str:
    """The same without a password that may stand in it."""
    return redacted(endpoint())


def hub_token() -> str | Literal[False]:
    """The token of the environment variable HF_TOKEN. False where there is none, which tells the clients to look no further.

    Raises:
        BadInput: it cannot be a token.
    """
    token = os.environ.get("HF_TOKEN", "").strip()
    if not all("!" <= character <= "~" for character in token):
        raise BadInput("HF_TOKEN holds characters that no token has, such as a space or a quote from elsewhere: copy it again")
    return token or False


def redacted(text: str) -> str:
    """The text without the token, and without what lets anybody in who has an address: a password, a signature."""
    token = os.environ.get("HF_TOKEN", "").strip()
    text = SIGNED.sub(r"\1\2", text)
    return text.replace(token, "***") if token else text


@dataclass(frozen=True)
class Repo:
    """What is asked of the Hub, for the sentence."""

    kind: Literal["model", "dataset"]
    id: str
    setting: str  # the key that names it, e.g. "model.source"
    instead: str  # what the person can do without the Hub
    revision: str | None = None
    revisions: Callable[[], str] = lambda: ""  # names of those that exist, asked for when the one named does not
    kept: str = "files that are complete are not fetched twice"  # what is not lost when a call failed

    @property
    def page(self) -> str:
        return f"{address()}/{'datasets/' if self.kind == 'dataset' else ''}{self.id}"


@dataclass(frozen=True)
class Answer:
    """What the Hub's storage answered, as far as its client tells."""

    status_code: int
    reason_phrase: str
    headers: dict[str, str] = field(default_factory=dict)


@contextmanager
def told(repo: Repo) -> Iterator[None]:
    """Turn what goes wrong between the Hub and here into an error that says what to do.

    Raises:
        BadInput: the Hub refused, or could not be reached.
        OSError: the disk is full.
    """
    try:
        yield
    except StageError:
        raise
    except Exception as error:
        chain = list(_chain(error))
        for link in chain:
            if isinstance(link, OSError) and link.errno in NO_ROOM:
                raise OSError(link.errno, link.strerror, link.filename) from None
        message = explained(chain, repo)
        if message is not None:
            raise BadInput(redacted(message)) from None
        whole = "".join(traceback.format_exception(error))
        if redacted(whole) != whole:  # never print a traceback that shows the token
            raise RuntimeError(redacted(f"{type(error).__name__}: {error}")) from None
        raise


def explained(chain: list[BaseException], repo: Repo) -> str | None:
    """The sentence for a failed call, None when the Hub has nothing to do with it."""
    answer = _answer(chain)
    if answer is not None:
        return _refused(answer, repo)
    for error in reversed(chain):
        if type(error).__name__ == "HFValidationError":
            return f"{repo.setting}: {error}"
        if _no_answer(error):
            offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE")
            reason = (
                "HF_HUB_OFFLINE forbids it: unset it" if offline else f"{_first_line(error)}. Check the network and the proxy"
            )
            return (
                f"cannot reach the Hub at {address()} for {repo.id}: {reason}, then run again: {repo.kept}. Or {repo.instead}"
            )
    return None


def is_unreachable(error: BaseException) -> bool:
    """Whether a call failed for lack of a connection."""
    return _answer(list(_chain(error))) is None and any(_no_answer(link) for link in _chain(error))


def is_passing(error: BaseException) -> bool:
    """Whether a call that failed may succeed a little later."""
    answer = _answer(list(_chain(error)))
    return is_unreachable(error) if answer is None else int(answer.status_code) in PASSING


def is_of_hub(error: BaseException) -> bool:
    """Whether a call failed between here and the Hub."""
    return _answer(list(_chain(error))) is not None or is_unreachable(error)


def _answer(chain: list[BaseException]) -> Any:
    """The server's answer that made a call fail, None where there was none."""
    answers = (getattr(error, "response", None) for error in chain)
    answer = next((answer for answer in answers if hasattr(answer, "status_code")), None)
    if answer is None:
        refusals = (OF_STORAGE.search(str(error)) for error in chain if _no_answer(error))
        answer = next((Answer(int(refusal[1]), refusal[2]) for refusal in refusals if refusal), None)
    return answer


def _no_answer(error: BaseException) -> bool:
    return bool(UNREACHABLE & {base.__name__ for base in type(error).__mro__})


def _refused(response: Any, repo: Repo) -> str:
    status, code = int(response.status_code), response.headers.get("X-Error-Code")
    login = f"set the environment variable HF_TOKEN to a token from {address()}/settings/tokens"
    has_token = bool(hub_token())
    if code == "GatedRepo":
        account = f"the account of this token{'' if has_token else f', after you {login}'}"
        return (
            f"the Hub refuses {repo.id} ({status}, gated). Accept its licence at {repo.page} with {account}, or {repo.instead}"
        )
    if code == "RevisionNotFound":
        known = repo.revisions()
        return (
            f"{repo.id} has no revision {repo.revision!r} ({status}). Check {repo.setting.split('.')[0]}.revision"
            f"{f'; there are: {known}' if known else f'; {repo.page} lists them'}"
        )
    if code == "EntryNotFound":
        return f"{repo.id} lacks a file that it should have ({status}): {_message(response)}. Check {repo.page}"
    if status == 401 and has_token and code != "RepoNotFound":
        return f"the Hub does not accept this token (401): it is wrong, expired or revoked. Log in anew: {login}"
    if code == "RepoNotFound" or status == 404:
        why = (
            "check its name, and that the account of this token may see it"
            if has_token
            else f"check its name, or, if it is private, {login}"
        )
        return (
            f"the Hub shows no {repo.kind} {repo.id} ({status}): {why}. If {repo.setting} is meant as a path, it does not exist"
        )
    if status == 401:
        return f"the Hub wants to know who asks for {repo.id} (401): {login}"
    if status == 403:
        return (
            f"the account of this token may not do that with {repo.id} (403): {_message(response)}. "
            f"Use a token with the right to (role write, to publish), {login}, or {repo.instead}"
        )
    if status == 429:
        faster = "" if has_token else f", or {login}"
        return f"the Hub asks for patience (429, too many requests). Run again in a few minutes{faster}"
    if status == 412:
        return f"somebody else has changed {repo.id} in the meantime (412): look at {repo.page}, then run again: {repo.kept}"
    return (
        f"the Hub answers {repo.id} with status {status}: {_message(response)}. Run again later: {repo.kept}. Or {repo.instead}"
    )


def _message(response: Any) -> str:
    return str(response.headers.get("X-Error-Message") or getattr(response, "reason_phrase", "") or "no reason given")


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and what caused it, the outermost first."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def names_of_revisions(api: Any, repo_id: str, kind: str) -> str:
    """Names of a repo's branches and tags, for a person. `api`: a client of the Hub."""
    try:
        refs = api.list_repo_refs(repo_id, repo_type=kind)
    except Exception:  # it only completes a message
        return ""
    return listed({ref.name for ref in [*refs.branches, *refs.tags]})
