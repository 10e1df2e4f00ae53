"""What Prefect servers answer: whether they are there, whose they are, whether they know a run, whether they let us in."""

import http.client
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path

ANSWER_SECONDS = 10.0  # a server that works answers within these


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int  # of HTTP
    body: bytes = b""


def answers(api: str) -> bool:
    """Whether a Prefect server is there and works."""
    answer = _ask(api, "health")
    return answer is not None and _has(answer) and answer.body.strip() == b"true"


def is_here(api: str) -> bool:
    """Whether an address is this machine's own, where no proxy leads."""
    try:
        return urllib.parse.urlsplit(api).hostname in ("127.0.0.1", "localhost")
    except ValueError:  # it is no address
        return False


def is_of(api: str, home: Path, login: str | None = None) -> bool:
    """Whether the server that answers is the one with this folder: two that start at once may have chosen the same port.

    Args:
        login: its user:password, where it has one.
    """
    settings = _ask(api, "admin/settings", login)
    if settings is None or not _has(settings):
        return False
    try:
        return bool(json.loads(settings.body)["home"] == str(home))
    except (ValueError, LookupError, TypeError):  # another program has the port
        return False


def keeps_out(api: str, login: str | None) -> bool:
    """Whether a server is there and wants another login."""
    return _is_closed(_ask(api, "admin/settings", login))


def page_is_lost(page: str | None, flow_run_id: str | None) -> bool:
    """Whether a run's page was on a server of this machine that does not show it any more.

    Only loopback is asked, which answers or refuses at once; servers elsewhere do not end with a run. A server that wants a
    password may well know the run.
    """
    at = re.match(r"http://(127\.0\.0\.1|localhost):\d+", page or "")
    answer = _ask(f"{at[0]}/api", f"flow_runs/{flow_run_id}") if at is not None else None
    return at is not None and not _has(answer) and not _is_closed(answer)


def what_is_wrong_with(api: str) -> str | None:
    """Why a server that somebody named is of no use to us: asked as Prefect's own client asks, with the login, the certificates
    and the proxies of its settings, but once: its retries take minutes. None: nothing.
    """
    import httpx
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    login = {"auth_string": PREFECT_API_AUTH_STRING.value(), "api_key": PREFECT_API_KEY.value()}
    timeout = httpx.Timeout(ANSWER_SECONDS, connect=ANSWER_SECONDS / 4)  # Prefect's client connects four times
    patience = {"timeout": timeout, "trust_env": not is_here(api)}
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            SyncPrefectClient(api, **login, httpx_settings=patience) as client,
        ):
            if client.request("GET", "/health").json() is True:
                client.request("GET", "/admin/version")
                return None
    except PrefectHTTPStatusError as error:
        if error.response.status_code in (401, 403):
            return (
                f"the Prefect server at PREFECT_API_URL={api} refuses this login: set PREFECT_API_AUTH_STRING to its "
                "user:password"
            )
        told = f"status {error.response.status_code}"
    except httpx.TimeoutException:
        return (
            f"PREFECT_API_URL={api} does not answer within {ANSWER_SECONDS:.0f} s. See what is there, start it anew, or unset "
            "PREFECT_API_URL to use a server in the workspace"
        )
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        return (
            f"PREFECT_API_URL={api} is no address ({error}): set it to one such as http://127.0.0.1:4200/api, or unset it "
            "to use a server in the workspace"
        )
    except httpx.HTTPError as error:
        return (
            f"no Prefect server answers at PREFECT_API_URL={api} ({str(error) or type(error).__name__}). "
            "Start it (prefect server start), or unset PREFECT_API_URL to use one in the workspace"
        )
    except ValueError:
        told = "no JSON"
    else:
        told = "something else"
    return f"PREFECT_API_URL={api} answers with {told}: no Prefect server is there, whose address ends in /api as a rule"


def _has(answer: Answer | None) -> bool:
    return answer is not None and answer.status == 200


def _is_closed(answer: Answer | None) -> bool:
    return answer is not None and answer.status in (401, 403)


def _ask(api: str, path: str, login: str | None = None) -> Answer | None:
    """What a server answers, or None where nobody does."""
    headers = {"Authorization": f"Basic {b64encode(login.encode()).decode()}"} if login else {}
    try:
        opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_here(api) else []))
        with opener.open(urllib.request.Request(f"{api.rstrip('/')}/{path}", headers=headers), timeout=5) as response:
            return Answer(response.status, bytes(response.read()))
    except urllib.error.HTTPError as error:
        return Answer(error.code)
    except (OSError, ValueError, http.client.HTTPException):  # the last: the port is that of a program that speaks otherwise
        return None
