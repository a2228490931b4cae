"""A store of objects that speaks as much of Cloud Storage's JSON interface as its clients here use
(gcsfs, TensorStore, google-cloud-storage), in memory, with faults on request."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import itertools
import json
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c

BUCKET = "bucket"
_OBJECT = re.compile(r"(?:/storage/v1|/download/storage/v1)?/b/([^/]+)/o/([^/]+)")
_LIST = re.compile(r"(?:/storage/v1)?/b/([^/]+)/o/?")
_BUCKET = re.compile(r"(?:/storage/v1)?/b/([^/]+)/?")
_UPLOAD = re.compile(r"/upload/storage/v1/b/([^/]+)/o")
_REWRITE = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/rewriteTo/b/([^/]+)/o/([^/]+)")


@dataclasses.dataclass
class Object:
    """An object's bytes and the number of its version."""

    data: bytes
    generation: int
    updated: str


class Store:
    """Buckets of objects behind http://localhost:PORT; `fault` may answer a request in its place:
    called with (method, path), it returns an HTTP status or None."""

    def __init__(self) -> None:
        self.buckets: dict[str, dict[str, Object]] = {BUCKET: {}}
        self.requests: list[tuple[str, str]] = []
        self.fault: Callable[[str, str], int | None] = lambda method, path: None
        self.lock, self._count = threading.Lock(), 0
        self.tokens = itertools.count()
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        handler = type("Handler", (_Handler,), {"store": self})
        self._server = ThreadingHTTPServer(("localhost", 0), handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # a client that was killed
        self.address = f"http://localhost:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stops answering."""
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """Variables that send the clients here."""
        return {"STORAGE_EMULATOR_HOST": self.address, "TENSORSTORE_GCS_HTTP_URL": self.address}

    def names(self, prefix: str = "") -> list[str]:
        """Names of the bucket's objects below a prefix, which is left out."""
        with self.lock:
            found = [n for n in self.buckets.get(BUCKET, {}) if n.startswith(prefix)]
        return sorted(name.removeprefix(prefix) for name in found)

    def put(self, bucket: str, name: str, data: bytes) -> Object:
        """Stores a new version."""
        with self.lock:
            self._count += 1
            at = f"2026-01-01T{self._count // 3600 % 24:02d}:{self._count // 60 % 60:02d}:"
            at += f"{self._count % 60:02d}.000Z"
            made = self.buckets[bucket][name] = Object(bytes(data), 1000 + self._count, at)
        return made


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body together: apart, each answer waits for an acknowledgement
    store: Store

    def log_message(self, *_) -> None:
        pass

    def _answer(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        if isinstance(body, dict):
            body = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def _route(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        url = urlsplit(self.path)
        query = {key: value[0] for key, value in parse_qs(url.query).items()}
        self.store.requests.append((self.command, unquote(url.path)))
        if status := self.store.fault(self.command, unquote(url.path)):
            self._answer(status, {"error": {"code": status, "message": f"fault {status}"}})
            return
        for pattern, method, name in (
            (_REWRITE, "POST", "rewrite"),
            (_UPLOAD, "POST", "upload"),
            (_UPLOAD, "PUT", "resume"),
            (_OBJECT, "GET", "get"),
            (_OBJECT, "DELETE", "delete"),
            (_LIST, "GET", "list"),
            (_BUCKET, "GET", "bucket"),
        ):
            found = pattern.fullmatch(url.path)
            if found and method == self.command:
                parts = [unquote(part) for part in found.groups()]
                if any(bucket not in self.store.buckets for bucket in parts[::2]):
                    return self._answer(404, {"error": {"code": 404, "message": "no such bucket"}})
                return getattr(self, f"_{name}")(*parts, query=query, body=body)
        self._answer(501, {"error": {"code": 501, "message": f"{self.command} {self.path}"}})

    do_GET = do_POST = do_PUT = do_DELETE = _route

    def _resource(self, bucket: str, name: str, found: Object) -> dict:
        crc = google_crc32c.Checksum(found.data).digest()
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(found.data)),
            "generation": str(found.generation),
            "metageneration": "1",
            "crc32c": base64.b64encode(crc).decode(),
            "etag": f"{zlib.crc32(found.data):x}",
            "timeCreated": found.updated,
            "updated": found.updated,
            "storageClass": "STANDARD",
        }

    def _find(self, bucket: str, name: str) -> Object | None:
        found = self.store.buckets[bucket].get(name)
        if found is None:
            self._answer(404, {"error": {"code": 404, "message": f"no such object: {name}"}})
        return found

    def _bucket(self, bucket: str, query, body) -> None:
        self._answer(200, {"kind": "storage#bucket", "name": bucket, "location": "US"})

    def _get(self, bucket: str, name: str, query, body) -> None:
        found = self._find(bucket, name)
        if found is None:
            return
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == (
            found.generation
        ):
            return self._answer(304)
        if query.get("alt") != "media":
            return self._answer(200, self._resource(bucket, name, found))
        data, status, headers = found.data, 200, {"x_goog_generation": str(found.generation)}
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or ""):
            size = len(data)
            start = int(wanted[1]) if wanted[1] else max(size - int(wanted[2]), 0)
            end = min(int(wanted[2]) + 1, size) if wanted[1] and wanted[2] else size
            if start >= size:
                return self._answer(416, Content_Range=f"bytes */{size}", **headers)
            data, status = data[start:end], 206
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{size}"
        self._answer(status, data, **headers)

    def _list(self, bucket: str, query, body) -> None:
        known = {"prefix", "delimiter", "startOffset", "endOffset", "maxResults", "projection"}
        if unknown := query.keys() - known - {"fields", "alt", "prettyPrint", "versions"}:
            return self._answer(501, {"error": {"code": 501, "message": f"list by {unknown}"}})
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        start, end = query.get("startOffset", ""), query.get("endOffset")
        items, prefixes = [], set()
        with self.store.lock:
            objects = sorted(self.store.buckets[bucket].items())
        for name, found in objects:
            if not name.startswith(prefix) or name < start or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self._resource(bucket, name, found))
        answer = {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}
        self._answer(200, {key: value for key, value in answer.items() if value})

    def _conditions(self, bucket: str, name: str, query) -> bool:
        wanted = query.get("ifGenerationMatch")
        found = self.store.buckets[bucket].get(name)
        if wanted is not None and int(wanted) != (found.generation if found else 0):
            self._answer(412, {"error": {"code": 412, "message": "another generation"}})
            return False
        return True

    def _upload(self, bucket: str, query, body) -> None:
        kind, name = query.get("uploadType"), query.get("name")
        if kind == "multipart":
            boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            first, second = body.split(b"--" + boundary)[1:3]
            name = json.loads(first.replace(b"\r", b"").partition(b"\n\n")[2])["name"]
            split = re.search(rb"\r?\n\r?\n", second).end()
            body = second[split:].removesuffix(b"\n").removesuffix(b"\r")
        if kind == "resumable":
            token = str(next(self.store.tokens))
            self.store.uploads[token] = (bucket, name, bytearray())
            where = f"{self.store.address}/upload/storage/v1/b/{bucket}/o?upload_id={token}"
            return self._answer(200, {}, Location=where)
        if "upload_id" in query:
            return self._resume(bucket, query, body)
        if self._conditions(bucket, name, query):
            made = self.store.put(bucket, name, body)
            self._answer(200, self._resource(bucket, name, made))

    def _resume(self, bucket: str, query, body) -> None:
        bucket, name, held = self.store.uploads[query["upload_id"]]
        held += body
        total = (self.headers.get("Content-Range") or "/").rpartition("/")[2]
        if total == "*":
            return self._answer(308, Range=f"bytes=0-{len(held) - 1}")
        made = self.store.put(bucket, name, held)
        self._answer(200, self._resource(bucket, name, made))

    def _rewrite(self, bucket: str, name: str, to: str, new: str, query, body) -> None:
        found = self._find(bucket, name)
        if found is not None:
            made = self.store.put(to, new, found.data)
            self._answer(200, {"done": True, "resource": self._resource(to, new, made)})

    def _delete(self, bucket: str, name: str, query, body) -> None:
        if self._find(bucket, name) is not None and self._conditions(bucket, name, query):
            with self.store.lock:
                self.store.buckets[bucket].pop(name, None)
            self._answer(204)


@contextlib.contextmanager
def serving() -> Iterator[Store]:
    """A store that this process's clients, and those of its children, go to."""
    store = Store()
    os.environ.update(store.environment())
    try:
        yield store
    finally:
        for name in store.environment():
            del os.environ[name]
        store.close()


if __name__ == "__main__":  # for trying by hand: prints the variables
    held = Store()
    print("export " + " ".join(f"{k}={v}" for k, v in held.environment().items()), flush=True)
    threading.Event().wait()
