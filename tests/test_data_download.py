"""What `data.download` promises, against a server on this machine: mirrors, digests, resuming, one line."""

import hashlib
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import data
from data import amat, cifar, download, idx

CONTENT = bytes(range(256)) * 5000  # more than one chunk
DIGEST = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT below /good/; other folders answer in the ways that servers fail."""

    def do_GET(self):
        folder = self.path.split("/")[1]
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.server.asked.append((folder, wanted and int(wanted[1])))
        body, start = (CONTENT[::-1] if folder == "changed" else CONTENT), 0
        if folder == "missing":
            return self.answer(404, b"")
        if wanted and folder != "whole":  # "whole" knows no ranges
            start = int(wanted[1])
            if start >= len(body):
                return self.answer(416, b"")
            return self.answer(206, body[start:], **{"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"})
        if folder == "breaks":  # in the middle, having promised all
            return self.answer(200, body[: len(body) // 2], **{"Content-Length": str(len(body))})
        return self.answer(200, body)

    def answer(self, status, body, **headers):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """A running server: .base(folder) is an address, .asked lists (folder, first byte) of every request."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    server.base = lambda folder: f"http://127.0.0.1:{server.server_port}/{folder}/"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(server, where, *folders, digest=DIGEST):
    download.fetch(where, [server.base(folder) for folder in folders], {"file.bin": digest})
    return (where / "file.bin").read_bytes()


@pytest.mark.parametrize("digest", [DIGEST, f"md5:{hashlib.md5(CONTENT).hexdigest()}"])
def test_file_is_fetched_checked_and_left_alone_afterwards(server, tmp_path, digest):
    where = tmp_path / "new" / "name"
    assert fetch(server, where, "good", digest=digest) == CONTENT
    assert fetch(server, where, "good", digest=digest) == CONTENT
    assert server.asked == [("good", None)]
    assert {path.name for path in where.iterdir()} == {".lock", "file.bin"}


def test_file_in_place_is_used_without_network_and_digest(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"packed anew by its owner")
    assert fetch(server, tmp_path, "good") == b"packed anew by its owner"
    assert server.asked == []


def test_download_resumes_where_it_broke_off(server, tmp_path):
    with pytest.raises(FileNotFoundError, match="ended after 640,000 of 1,280,000 bytes"):
        fetch(server, tmp_path, "breaks")
    assert not (tmp_path / "file.bin").exists()
    assert fetch(server, tmp_path, "good") == CONTENT
    assert server.asked == [("breaks", None), ("good", 640_000)]


def test_break_is_resumed_from_the_next_mirror(server, tmp_path):
    assert fetch(server, tmp_path, "breaks", "good") == CONTENT
    assert server.asked == [("breaks", None), ("good", 640_000)]


def test_server_without_ranges_starts_anew(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    assert fetch(server, tmp_path, "whole") == CONTENT
    assert server.asked == [("whole", 1000)]


def test_part_that_is_complete_is_taken(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    assert fetch(server, tmp_path, "good") == CONTENT
    assert server.asked == [("good", len(CONTENT))]


@pytest.mark.parametrize("part", [b"of another file", CONTENT + b"too long"])
def test_wrong_part_is_thrown_away(server, tmp_path, part):
    (tmp_path / "file.bin.part").write_bytes(part)
    assert fetch(server, tmp_path, "good") == CONTENT
    assert server.asked == [("good", len(part)), ("good", None)]


def test_wrong_digest_is_said_and_the_next_mirror_tried(server, tmp_path, capsys):
    assert fetch(server, tmp_path, "changed", "good") == CONTENT
    assert server.asked == [("changed", None), ("good", None)]
    line = capsys.readouterr().err
    assert server.base("changed") + "file.bin" in line and "sha256" in line and line.count("\n") == 1


def test_all_mirrors_failing_is_one_line_with_files_folder_and_addresses(server, tmp_path):
    bases = [server.base("missing"), server.base("changed"), "http://127.0.0.1:1/"]
    (tmp_path / "b.bin").touch()
    with pytest.raises(FileNotFoundError) as error:
        download.fetch(tmp_path, bases, {"a.bin": DIGEST, "b.bin": DIGEST, "c.bin": DIGEST})
    text = str(error.value)
    assert "\n" not in text and f"put a.bin, c.bin from there into {tmp_path}" in text
    assert all(base in text for base in bases)
    assert "HTTP 404" in text and "wrong digest" in text and "refused" in text
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "b.bin"}


def test_processes_that_start_together_fetch_once(server, tmp_path):
    threads = [threading.Thread(target=fetch, args=(server, tmp_path, "good")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.asked == [("good", None)] and (tmp_path / "file.bin").read_bytes() == CONTENT


def test_progress_is_silent_without_a_terminal(server, tmp_path, capsys):
    fetch(server, tmp_path, "good")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("mnist", idx.MNIST_FILES),
        ("fashion_mnist", idx.FASHION_FILES),
        ("binary_mnist", amat.FILES),
        ("cifar10", [cifar.ARCHIVE]),
    ],
)
def test_offline_build_says_what_to_put_where(monkeypatch, tmp_path, name, files):
    def no_network(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(download.urllib.request, "urlopen", no_network)
    with pytest.raises(FileNotFoundError) as error:
        data.build({"name": name, "root": tmp_path})
    text = str(error.value)
    assert "\n" not in text and all(file in text for file in files) and str(tmp_path / name) in text
