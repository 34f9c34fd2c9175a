"""Uploads a file through lfs-broker and fetches it back, with nothing but Python: lfs.py FILE TOPIC [KEY]

LFS_BROKER_URL and, where the broker asks for one, LFS_BROKER_TOKEN say where and who.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from typing import Any, BinaryIO
from urllib.request import Request, urlopen

BROKER = os.environ.get("LFS_BROKER_URL", "http://127.0.0.1:8080")
TOKEN = os.environ.get("LFS_BROKER_TOKEN")


def broker(method: str, path: str, body: Any = None) -> Any:
    """Asks the broker. What it refuses is an HTTPError, whose body says why."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {TOKEN}"} if TOKEN else {})
    data = json.dumps(body).encode() if body is not None else None
    with urlopen(Request(BROKER + path, data, headers, method=method), timeout=60) as answer:
        return json.load(answer)


def put(signed: Any, value: bytes) -> None:
    """Sends bytes straight to S3. The headers are signed, so all of them are sent."""
    urlopen(Request(signed["url"], value, signed["headers"], method=signed["method"]), timeout=600).close()


def upload(file: BinaryIO, topic: str, key: str | None = None) -> Any:
    """Uploads a file and gives its pointer: the value that a consumer of the topic reads."""
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    promise = {"topic": topic, "size": file.tell(), "sha256": sha256} | ({"key": key} if key else {})
    opened = broker("POST", "/lfs/uploads", promise)
    place = f"/lfs/uploads/{opened['id']}"
    file.seek(0)
    if opened["mode"] == "single":
        put(opened["upload"], file.read())
    else:
        for number in range(1, opened["part_count"] + 1):
            # Signed when it is needed: a URL does not outlive a long upload.
            part = broker("POST", f"{place}/parts", {"part_numbers": [number]})["parts"][0]
            put(part, file.read(part["size"]))
    done = broker("POST", f"{place}/complete")
    while "pointer" not in done:
        if done["state"] == "completing":
            done = broker("GET", f"{place}?wait=30")
        elif done["state"] == "open":
            # The completion ended without a verdict: complete goes on, or says why it cannot.
            done = broker("POST", f"{place}/complete")
        else:
            raise RuntimeError(done)
    return done["pointer"]


def fetch(pointer: Any, into: BinaryIO, topic: str | None = None) -> None:
    """Writes the bytes behind a pointer, and says so if they are not the promised ones.

    They are held against the sha256; a pointer has none where the topic allows another checksum, and then only its size counts here.
    """
    # With the topic that it was read from, a pointer that was copied from another one is refused.
    resolved = broker("POST", "/lfs/resolve" + (f"?topic={topic}" if topic else ""), pointer)
    with urlopen(resolved["url"], timeout=600) as answer:
        shutil.copyfileobj(answer, into)
    if into.tell() != pointer["size"]:
        raise RuntimeError(f"promised {pointer['size']} bytes, found {into.tell()}")
    into.seek(0)
    found = hashlib.file_digest(into, "sha256").hexdigest()
    promised = pointer.get("sha256") or found
    if found != promised.lower():
        raise RuntimeError(f"promised {promised}, found {found}")


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as source:
        sent = upload(source, *sys.argv[2:4])
    print(json.dumps(sent))
    with tempfile.TemporaryFile() as back:
        fetch(sent, back, sys.argv[2])
