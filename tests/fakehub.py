"""A Hugging Face hub in a thread: local folders served over the endpoints that the real client libraries use.

Those read the address once, on import, so that they run in a process of their own::

    with FakeHub(models={"org/m": folder}, tokens={"org/m": "hf_secret"}) as hub:
        subprocess.run([...], env=hub.environment(home))

Covered: info, revision, tree, paths-info and refs of models and datasets; ``resolve`` with HEAD, GET and byte ranges;
missing repositories, revisions and files; repositories that need a token.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

_LFS_SUFFIXES = frozenset({".bin", ".gguf", ".parquet", ".pt", ".safetensors"})
_CREATED = "2024-01-01T00:00:00.000Z"


class Request(NamedTuple):
    """One request the hub answered; ``path`` without the query."""

    method: str
    path: str
    status: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    path: str
    local: Path
    size: int
    oid: str
    sha256: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def entry(self) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.sha256, "size": self.size, "pointerSize": 134}} if self.sha256 else {}
        return {"type": "file", "path": self.path, "size": self.size, "oid": self.oid, **lfs}


def _file(root: Path, path: Path) -> _File:
    content = path.read_bytes()
    return _File(
        path=path.relative_to(root).as_posix(),
        local=path,
        size=len(content),
        oid=hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
        sha256=hashlib.sha256(content).hexdigest() if path.suffix in _LFS_SUFFIXES else None,
    )


@dataclass(frozen=True)
class _Snapshot:
    """The files of one revision, as they were when the hub started."""

    files: Mapping[str, _File]

    @classmethod
    def of(cls, root: Path) -> "_Snapshot":
        if not root.is_dir():
            raise NotADirectoryError(root)
        found = (_file(root, path) for path in sorted(root.rglob("*")) if path.is_file())
        return cls({file.path: file for file in found})

    @cached_property
    def commit(self) -> str:
        return hashlib.sha1("".join(file.path + file.oid for file in self.files.values()).encode()).hexdigest()

    def folder(self, path: str) -> dict[str, Any]:
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}

    def folders(self) -> list[str]:
        return sorted({parent.as_posix() for path in self.files for parent in Path(path).parents} - {"."})

    def info(self, repo_id: str, *, private: bool) -> dict[str, Any]:
        return {
            "_id": self.commit[:24],
            "id": repo_id,
            "author": repo_id.partition("/")[0],
            "sha": self.commit,
            "createdAt": _CREATED,
            "lastModified": _CREATED,
            "private": private,
            "gated": "manual" if private else False,
            "disabled": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [
                {"rfilename": file.path, "size": file.size, "blobId": file.oid} for file in self.files.values()
            ],
        }

    def tree(self, under: str, *, recursive: bool) -> list[dict[str, Any]] | None:
        """Entries below a folder; None if there is no such folder."""
        prefix = f"{under}/" if under else ""
        entries = [self.folder(path) for path in self.folders()] + [file.entry() for file in self.files.values()]
        below = [entry for entry in entries if entry["path"].startswith(prefix)]
        if under and not below:
            return None
        return [entry for entry in below if recursive or "/" not in entry["path"].removeprefix(prefix)]

    def paths_info(self, paths: list[str]) -> list[dict[str, Any]]:
        cleaned = [path.strip("/") for path in paths]
        found = [self.files[path].entry() for path in cleaned if path in self.files]
        return found + [self.folder(path) for path in cleaned if path in self.folders()]


_Repos = Mapping[tuple[str, str], Mapping[str, _Snapshot]]


def _snapshots(kind: str, folders: Mapping[str, str | os.PathLike[str]]) -> dict[tuple[str, str], dict[str, _Snapshot]]:
    """Repositories by kind and id, each with its snapshots by branch; ``org/name@branch`` names another branch."""
    repos: dict[tuple[str, str], dict[str, _Snapshot]] = {}
    for name, folder in folders.items():
        repo_id, _, branch = name.partition("@")
        repos.setdefault((kind, repo_id), {})[branch or "main"] = _Snapshot.of(Path(folder))
    return repos


class FakeHub:
    """Serves folders as hub repositories on a free local port while the ``with`` block runs.

    Args:
        models: folder of every model repository by id; ``org/name@branch`` adds a branch beside ``main``.
        datasets: the same for dataset repositories.
        tokens: the token that a repository asks for; those not named are public.

    Attributes:
        requests: what was asked so far, in order of arrival.
    """

    def __init__(
        self,
        *,
        models: Mapping[str, str | os.PathLike[str]] | None = None,
        datasets: Mapping[str, str | os.PathLike[str]] | None = None,
        tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.requests: list[Request] = []
        repos = {**_snapshots("models", models or {}), **_snapshots("datasets", datasets or {})}
        self._server = _Server(repos, tokens or {}, self.requests)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "FakeHub":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """The address to put in HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: str | os.PathLike[str], *, token: str | None = None) -> dict[str, str]:
        """Return the environment of a process that uses this hub, with its caches in ``home``."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        return {
            **inherited,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            **({} if token is None else {"HF_TOKEN": token}),
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, repos: _Repos, tokens: Mapping[str, str], requests: list[Request]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.tokens, self.requests = repos, tokens, requests


class _Refused(Exception):
    """Ends a request with an error status and the hub's code for it."""

    def __init__(self, status: HTTPStatus, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed; ``FakeHub.requests`` has it all."""

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        segments = [unquote(segment) for segment in url.path.strip("/").split("/")]
        try:
            if segments[0] == "api":
                self._api(segments[1:], parse_qs(url.query), body.decode())
            else:
                kind = "datasets" if segments[0] == "datasets" else "models"
                self._resolve(kind, segments[1:] if kind == "datasets" else segments)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.code}
            self._send(refused.status, json.dumps({"error": refused.code}).encode(), headers)

    def _find(self, kind: str, segments: list[str]) -> tuple[str, list[str]]:
        """The repository's id and the segments after it."""
        for size in (2, 1):
            repo_id = "/".join(segments[:size])
            if (kind, repo_id) in self.server.repos:
                token = self.server.tokens.get(repo_id)
                if token is not None and self.headers.get("Authorization") != f"Bearer {token}":
                    raise _Refused(HTTPStatus.UNAUTHORIZED, "GatedRepo")
                return repo_id, segments[size:]
        raise _Refused(HTTPStatus.NOT_FOUND, "RepoNotFound")

    def _snapshot(self, kind: str, repo_id: str, revision: str) -> _Snapshot:
        branches = self.server.repos[kind, repo_id]
        by_commit = {snapshot.commit: snapshot for snapshot in branches.values()}
        snapshot = branches.get(revision) or by_commit.get(revision)
        if snapshot is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        return snapshot

    def _api(self, segments: list[str], query: Mapping[str, list[str]], body: str) -> None:
        kind = segments[0]
        repo_id, rest = self._find(kind, segments[1:])
        action, revision = rest[0] if rest else "revision", rest[1] if len(rest) > 1 else "main"
        snapshot = self._snapshot(kind, repo_id, revision)
        if action == "revision":
            self._json(snapshot.info(repo_id, private=repo_id in self.server.tokens))
        elif action == "tree":
            entries = snapshot.tree("/".join(rest[2:]), recursive=query.get("recursive") in (["True"], ["true"]))
            if entries is None:
                raise _Refused(HTTPStatus.NOT_FOUND, "EntryNotFound")
            self._json(entries)
        elif action == "paths-info":
            is_json = "json" in self.headers.get("Content-Type", "")
            self._json(snapshot.paths_info(json.loads(body)["paths"] if is_json else parse_qs(body)["paths"]))
        elif action == "refs":
            branches = self.server.repos[kind, repo_id].items()
            refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": at.commit} for name, at in branches]
            self._json({"branches": refs, "converts": [], "tags": []})
        else:
            raise _Refused(HTTPStatus.NOT_FOUND, "NotFound")

    def _resolve(self, kind: str, segments: list[str]) -> None:
        repo_id, rest = self._find(kind, segments)
        if len(rest) < 3 or rest[0] != "resolve":
            raise _Refused(HTTPStatus.NOT_FOUND, "NotFound")
        snapshot = self._snapshot(kind, repo_id, rest[1])
        file = snapshot.files.get("/".join(rest[2:]))
        if file is None:
            raise _Refused(HTTPStatus.NOT_FOUND, "EntryNotFound")
        headers = {"ETag": f'"{file.etag}"', "X-Repo-Commit": snapshot.commit, "Accept-Ranges": "bytes"}
        if file.sha256:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
        self._send_range(file.local.read_bytes(), headers)

    def _send_range(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked is None or asked.groups() == ("", ""):
            self._send(HTTPStatus.OK, content, headers)
            return
        first, last = asked.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        stop = min(len(content), int(last) + 1) if first and last else len(content)
        if start >= stop:
            headers["Content-Range"] = f"bytes */{len(content)}"
            self._send(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, b"", headers)
        else:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            self._send(HTTPStatus.PARTIAL_CONTENT, content[start:stop], headers)

    def _json(self, value: object) -> None:
        self._send(HTTPStatus.OK, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: HTTPStatus, content: bytes, headers: Mapping[str, str]) -> None:
        self.server.requests.append(Request(self.command, urlsplit(self.path).path, status.value))
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
