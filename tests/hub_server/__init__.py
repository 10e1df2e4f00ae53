"""A small Hub of the tests' own: an HTTP server on loopback that speaks as much of the Hub's API as the real clients use.

Models and datasets with branches, tags, private and gated repos, tokens; large files through a redirect to another host name,
as the Hub's LFS storage is, with ranges, and connections that break in the middle; creating repos and branches, uploading in
one piece or several, committing; and Xet, whose storage is a local folder that the real `hf_xet` reads and writes itself.

Every answer carries the headers and error codes of the real one. `requests` is what arrived and `received` how many bytes of
each upload, for tests to look at; `on_request` and `on_receive` let a test do something at that very moment.
"""

from hub_server.content import Blob, Repo
from hub_server.server import HubServer
from hub_server.state import Drop, Refusal

__all__ = ["Blob", "Drop", "HubServer", "Refusal", "Repo"]
