"""A model hub on this machine: folders, answered as the Hugging Face hub answers."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

#: The one revision that a repository here has, under any name.
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = r"(?P<name>[\w.-]+/[\w.-]+)"
API = re.compile(
    rf"/api/(?P<kind>models|datasets)/{NAME}"
    r"(?:/(?P<part>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?"
)
FILE = re.compile(rf"/(?:(?P<kind>datasets)/)?{NAME}/resolve/[^/]+/(?P<path>.+)")


class Handler(BaseHTTPRequestHandler):
    """Answers about the repositories ``models/ORG/NAME`` and ``datasets/ORG/NAME``."""

    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """Keep stderr for the tests."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if found := FILE.fullmatch(path):
            folder = self.server.root / (found["kind"] or "models") / found["name"]
            self.send_file(folder, folder / found["path"])
        elif found := API.fullmatch(path):
            self.send_facts(found)
        else:
            self.send(404)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def send_file(self, folder: Path, file: Path) -> None:
        if not folder.is_dir():
            self.send(404, error="RepoNotFound")
        elif not file.is_file():
            self.send(404, error="EntryNotFound")
        else:
            data = file.read_bytes()
            self.send(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"')

    def send_facts(self, asked: re.Match[str]) -> None:
        folder = self.server.root / asked["kind"] / asked["name"]
        if not folder.is_dir():
            self.send(404, error="RepoNotFound")
            return
        files = [describe(file) for file in sorted(folder.iterdir())]
        names = [{"rfilename": file["path"]} for file in files]
        facts: object = {"id": asked["name"], "sha": COMMIT, "siblings": names}
        if asked["part"] == "tree":
            if asked["path"]:  # there are no folders inside
                self.send(404, error="EntryNotFound")
                return
            facts = files
        elif asked["part"] == "paths-info":
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            wanted = parse_qs(body)["paths"]
            facts = [file for file in files if file["path"] in wanted]
        self.send(
            200, json.dumps(facts).encode(), **{"Content-Type": "application/json"}
        )

    def send(
        self, code: int, data: bytes = b"", error: str = "", **headers: str
    ) -> None:
        self.send_response(code)
        headers |= {"Content-Length": str(len(data)), "X-Repo-Commit": COMMIT}
        headers |= {"X-Error-Code": error} if error else {}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def describe(file: Path) -> dict[str, object]:
    """A file as the hub's listings have it."""
    data = file.read_bytes()
    oid = hashlib.sha1(data, usedforsecurity=False).hexdigest()
    return {"type": "file", "path": file.name, "size": len(data), "oid": oid}


class Hub(ThreadingHTTPServer):
    """A server on a free port of this machine.

    Attributes
    ----------
    root : Path
        Folder of ``models`` and ``datasets``.
    asked : list of str
        Paths of the requests so far.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.asked = root, []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextlib.contextmanager
def serving(root: Path) -> Iterator[Hub]:
    """Run a hub in a thread; afterwards its port refuses connections."""
    with Hub(root) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
