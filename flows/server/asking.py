"""What Prefect servers answer: whether they are there, whose they are, whether they know a run, whether they let us in."""

import contextlib
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Answer:
    """What a server said."""

    status: int  # of HTTP
    body: bytes = b""


def answers(api: str) -> bool:
    """Whether a server is there and works."""
    return _has(_ask(api, "health"))


def is_here(api: str) -> bool:
    """Whether an address is this machine's own, where no proxy leads."""
    return urllib.parse.urlsplit(api).hostname in ("127.0.0.1", "localhost")


def is_of(api: str, home: Path, login: str | None = None) -> bool:
    """Whether the server that answers is the one with this folder: two that start at once may have chosen the same port.

    Args:
        login: its user:password, where it has one.
    """
    settings = _ask(api, "admin/settings", login)
    return settings is not None and _has(settings) and json.loads(settings.body)["home"] == str(home)


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


def lets_us_in(api: str) -> bool:
    """Whether a server that is there takes the login of Prefect's settings, where it wants one."""
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY

    login = {"auth_string": PREFECT_API_AUTH_STRING.value(), "api_key": PREFECT_API_KEY.value()}
    with contextlib.suppress(PrefectHTTPStatusError), SyncPrefectClient(api, **login) as client:
        client.request("GET", "/admin/version")
        return True
    return False


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
    except (OSError, ValueError):
        return None
