"""A web server on this machine that fails as it is asked to, for the tests of downloads."""

import http.server
from email.message import Message


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves the bytes in content, and fails as these attributes demand:

    statuses       errors (503, 404, ...) for the next requests, one each
    cuts           numbers of bytes after which to cut the next answers, one each
    knows_ranges   False: ignore the Range header and send everything
    etag           None: send no ETag
    extra_length   bytes to announce in addition to those that are sent
    headers        headers that replace those of the next responses
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content: dict[str, bytes] = {}  # by the name in the URL
        self.requests: list[Message] = []  # the headers of all requests so far
        self.statuses: list[int] = []
        self.cuts: list[int] = []
        self.knows_ranges = True
        self.etag: str | None = '"one"'
        self.extra_length = 0
        self.headers: dict[str, str] = {}

    def url(self, name: str) -> str:
        """The URL of content[name]."""
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one GET request of FaultyServer."""

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(self.headers)
        content = server.content.get(self.path.removeprefix("/"))
        if server.statuses or content is None:
            self.send_error(server.statuses.pop(0) if server.statuses else 404)
            return
        start = self.requested_start()
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        headers = {"Content-Length": str(len(content) - start + server.extra_length)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if server.etag:
            headers["ETag"] = server.etag
        for name, value in (headers | server.headers).items():
            self.send_header(name, value)
        self.end_headers()
        stop = start + server.cuts.pop(0) if server.cuts else len(content)
        self.wfile.write(content[start:stop])

    def requested_start(self) -> int:
        """The first byte that the Range header asks for, or 0. As in Go's server, an empty If-Range
        is the same as none."""
        unchanged = self.headers["If-Range"] in (None, "", self.server.etag)
        if not (self.server.knows_ranges and "Range" in self.headers and unchanged):
            return 0
        return int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))

    def log_message(self, *args: object) -> None:
        """Keep the log off standard error."""
