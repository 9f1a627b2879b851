"""A stand-in for Google Cloud Storage: the part of its JSON API that gcsfs, TensorStore and google-cloud-storage use.

Objects in memory: written whole or not at all, each write with a new generation; no directories, no append, no rename.
"""

from __future__ import annotations

import base64
import datetime
import email
import email.policy
import hashlib
import itertools
import json
import re
import sys
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Callable, NamedTuple

import google_crc32c


class Stored(NamedTuple):
    """One object."""

    data: bytes
    generation: int
    updated: str


class Failure(Exception):
    """An answer other than success."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class GcsServer:
    """`with GcsServer("bucket") as gcs`: what gcs.environment() tells a process makes gs://bucket this server's.

    Args:
      buckets: the buckets there are.

    Attributes:
      objects: what is stored now, by "bucket/name".
      refuses: methods that are answered with 403, as where the right to write is missing.
      before_upload: called with "bucket/name" before an upload is stored.
    """

    def __init__(self, *buckets: str) -> None:
        self.buckets = set(buckets)
        self.objects: dict[str, Stored] = {}
        self.refuses: set[str] = set()
        self.before_upload: Callable[[str], None] = lambda key: None
        self._lock, self._generations = threading.RLock(), itertools.count(1)
        self._resumable: dict[str, tuple[str, dict[str, str], bytearray]] = {}
        self._http = _Http(("127.0.0.1", 0), type("Handler", (_Handler,), {"gcs": self}))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def environment(self) -> dict[str, str]:
        """Environment variables for the clients."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "nobody",  # else TensorStore looks for a metadata server
            "GOOGLE_CLOUD_PROJECT": "nothing",
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks for the kind of a bucket over gRPC
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def __enter__(self) -> GcsServer:
        threading.Thread(
            target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        ).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def names(self, prefix: str) -> list[str]:
        """The names below "bucket/prefix", without it."""
        with self._lock:
            return sorted(
                name.removeprefix(prefix) for name in self.objects if name.startswith(prefix)
            )

    def check_match(self, key: str, query: dict[str, str]) -> None:
        """Generation preconditions."""
        found = self.objects[key].generation if key in self.objects else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != found:
            raise Failure(412, f"{key}: generation {found}")
        if "ifGenerationNotMatch" in query and int(query["ifGenerationNotMatch"]) == found:
            raise Failure(304, "")
        if "generation" in query and int(query["generation"]) != found:
            raise Failure(404, f"{key}: no such generation")

    def put(self, key: str, data: bytes, query: dict[str, str]) -> dict[str, Any]:
        """Stores an object; its metadata."""
        self.before_upload(key)
        with self._lock:
            self.check_match(key, query)
            now = (
                datetime.datetime.now(datetime.UTC)
                .isoformat(timespec="milliseconds")
                .replace("+00:00", "Z")
            )
            self.objects[key] = Stored(data, next(self._generations), now)
            return self.describe(key)

    def describe(self, key: str) -> dict[str, Any]:
        """An object's metadata."""
        bucket, _, name = key.partition("/")
        stored = self.objects[key]
        return {
            "kind": "storage#object", "bucket": bucket, "name": name, "id": f"{key}/{stored.generation}",
            "size": str(len(stored.data)), "generation": str(stored.generation), "metageneration": "1",
            "updated": stored.updated, "timeCreated": stored.updated, "storageClass": "STANDARD",
            "contentType": "application/octet-stream",
            "md5Hash": base64.b64encode(hashlib.md5(stored.data).digest()).decode(),
            "crc32c": base64.b64encode(google_crc32c.Checksum(stored.data).digest()).decode(),
        }  # fmt: skip

    def list(self, bucket: str, query: dict[str, str]) -> dict[str, Any]:
        """One page of a listing."""
        prefix, delimiter, page = (
            query.get("prefix", ""),
            query.get("delimiter"),
            int(query.get("maxResults") or 1000),
        )
        entries: dict[str, bool] = {}  # name or common prefix: whether an object
        for name in self.names(f"{bucket}/"):
            inside = (
                name.startswith(prefix)
                and name >= query.get("startOffset", "")
                and name > query.get("pageToken", "")
            )
            if not inside or ("endOffset" in query and name >= query["endOffset"]):
                continue
            head, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if cut and prefix + head + cut > query.get("pageToken", ""):
                entries[prefix + head + cut] = False
            if not cut:
                entries[name] = True
        names = sorted(entries)[:page]
        with self._lock:
            items = [
                self.describe(f"{bucket}/{n}")
                for n in names
                if entries[n] and f"{bucket}/{n}" in self.objects
            ]
        found = {
            "kind": "storage#objects",
            "items": items,
            "prefixes": [n for n in names if not entries[n]],
        }
        return found | ({"nextPageToken": names[-1]} if len(entries) > len(names) else {})

    def upload(
        self, bucket: str, query: dict[str, str], headers: Any, body: bytes
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and answer of an upload request of any of the three kinds."""
        if "upload_id" in query:
            return self._resume(query["upload_id"], headers["Content-Range"], body)
        if query["uploadType"] == "media":
            return 200, {}, self.put(f"{bucket}/{query['name']}", body, query)
        if query["uploadType"] == "multipart":
            text = b"Content-Type: " + headers["Content-Type"].encode() + b"\n\n" + body
            about, data = _parts(text)
            return 200, {}, self.put(f"{bucket}/{about['name']}", data, query)
        name = query.get("name") or json.loads(body)["name"]
        upload = f"{len(self._resumable) + 1}"
        self._resumable[upload] = f"{bucket}/{name}", query, bytearray()
        return (
            200,
            {"Location": f"{self.url}/upload/storage/v1/b/{bucket}/o?upload_id={upload}"},
            {},
        )

    def _resume(
        self, upload: str, content_range: str, body: bytes
    ) -> tuple[int, dict[str, str], Any]:
        key, query, received = self._resumable[upload]
        first, total = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", content_range).groups()
        if first is not None:
            del received[int(first) :]
            received += body
        if total != "*" and len(received) == int(total):
            return 200, {}, self.put(key, bytes(received), query)
        return 308, {"Range": f"bytes=0-{len(received) - 1}"} if received else {}, {}


def _parts(text: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON and the bytes of a multipart/related body; by hand, as the mail parser mends line ends."""
    boundary = (
        b"--"
        + email.message_from_bytes(text.partition(b"\n\n")[0], policy=email.policy.HTTP)
        .get_boundary()
        .encode()
    )
    _, about, data, _ = text.partition(b"\n\n")[2].split(boundary)
    head = re.compile(rb"\r?\n\r?\n")
    return json.loads(head.split(about, 1)[1]), re.sub(rb"\r?\n\Z", b"", head.split(data, 1)[1])


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients get killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    gcs: GcsServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        try:
            if self.command in self.gcs.refuses:
                raise Failure(403, "the caller does not have the right to do that")
            status, headers, answer = self._route(parts, query, body)
        except Failure as failure:
            answer = {"error": {"code": failure.code, "message": str(failure)}}
            status, headers = failure.code, {}
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        if status in (204, 304):
            data = b""
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = _handle

    def _route(
        self, parts: list[str], query: dict[str, str], body: bytes
    ) -> tuple[int, dict[str, str], Any]:
        gcs, kind = self.gcs, parts.pop(0) if parts[0] in ("upload", "download") else "plain"
        if parts[:3] != ["storage", "v1", "b"] or len(parts) < 4:
            raise Failure(405, f"{self.command} {self.path}: the stand-in does not know this")
        bucket, rest = parts[3], parts[5:]
        if bucket not in gcs.buckets:
            raise Failure(404, f"{bucket}: no such bucket")
        if kind == "upload":
            return gcs.upload(bucket, query, self.headers, body)
        if len(parts) == 4 and self.command == "GET":
            return (
                200,
                {},
                {
                    "kind": "storage#bucket",
                    "name": bucket,
                    "id": bucket,
                    "location": "HERE",
                    "metageneration": "1",
                },
            )
        if not rest and self.command == "GET":
            return 200, {}, gcs.list(bucket, query)
        key = f"{bucket}/{rest[0]}" if rest else ""
        with gcs._lock:
            if key not in gcs.objects:
                raise Failure(404, f"{key}: no such object")
            gcs.check_match(key, query)
            if self.command == "DELETE" and len(rest) == 1:
                del gcs.objects[key]
                return 204, {}, {}
            if self.command == "GET" and len(rest) == 1:
                return (
                    self._media(gcs.objects[key])
                    if query.get("alt") == "media"
                    else (200, {}, gcs.describe(key))
                )
            if self.command == "POST" and rest[1:2] in (["rewriteTo"], ["copyTo"]):
                copied = gcs.put(f"{rest[3]}/{rest[5]}", gcs.objects[key].data, {})
                whole = {"kind": "storage#rewriteResponse", "done": True, "resource": copied}
                return 200, {}, whole if rest[1] == "rewriteTo" else copied
        raise Failure(405, f"{self.command} {self.path}: the stand-in does not know this")

    def _media(self, stored: Stored) -> tuple[int, dict[str, str], bytes]:
        data, headers = stored.data, {
            "Content-Type": "application/octet-stream",
            "x-goog-generation": str(stored.generation),
            "x-goog-stored-content-length": str(len(stored.data)),
        }  # fmt: skip
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return 200, headers, data
        first, last = wanted.groups()
        start = int(first) if first else max(len(data) - int(last), 0)
        end = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            raise Failure(416, f"{start}: beyond the end")
        return (
            206,
            {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(data)}"},
            data[start:end],
        )
