"""A model hub on loopback: the few endpoints that huggingface_hub asks, over files in memory."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "c0ffee" * 6 + "c0ff"


class FakeHub:
    """One repository, `owner/name`, at one commit; `requests` lists the weights and other files given out.

    Files called `*.safetensors` are large files, whose SHA-256 the hub tells.
    """

    def __init__(self, repository: str, files: Mapping[str, bytes]):
        self.repository = repository
        self.files = dict(files)
        self.asked = 0
        self.requests: list[str] = []
        self.is_up = True
        self.url = ""

    def metadata(self) -> dict[str, Any]:
        return {
            "id": self.repository,
            "sha": COMMIT,
            "siblings": [
                {"rfilename": name, "size": len(data), "blobId": _git_id(data)} | _lfs(name, data)
                for name, data in self.files.items()
            ],
        }


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _lfs(name: str, data: bytes) -> dict[str, Any]:
    if not name.endswith(".safetensors"):
        return {}
    return {"lfs": {"sha256": _sha256(data), "size": len(data), "pointerSize": 130}}


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # a body would wait for the receipt of its headers

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, *, with_body: bool) -> None:
            path = self.path.partition("?")[0]
            if not hub.is_up:
                return self.give(503, b"down", {}, with_body)
            if re.fullmatch(rf"/api/models/{hub.repository}/revision/(main|{COMMIT})", path):
                hub.asked += 1
                return self.give(200, json.dumps(hub.metadata()).encode(), {}, with_body)
            name = path.removeprefix(f"/{hub.repository}/resolve/{COMMIT}/")
            if name not in hub.files:
                missing = "EntryNotFound" if path.startswith(f"/{hub.repository}/") else "RepoNotFound"
                return self.give(404, b"", {"X-Error-Code": missing}, with_body)
            data = hub.files[name]
            if with_body:
                hub.requests.append(name)
            etag = _sha256(data) if name.endswith(".safetensors") else _git_id(data)
            return self.give(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, with_body)

        def give(self, status: int, body: bytes, headers: Mapping[str, str], with_body: bool) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.002})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
