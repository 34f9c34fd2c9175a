"""Uploads a file through lfs-broker and downloads it again, with the standard library only: lfs.py FILE TOPIC [KEY]

LFS_BROKER_URL is the broker (http://127.0.0.1:8080 by default). LFS_BROKER_TOKEN is the token, if the broker requires one.
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
    """Sends a request to the broker. An error response raises an HTTPError, whose body has the reason."""
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {TOKEN}"} if TOKEN else {})
    data = json.dumps(body).encode() if body is not None else None
    with urlopen(Request(BROKER + path, data, headers, method=method), timeout=60) as answer:
        return json.load(answer)


def put(signed: Any, value: bytes) -> None:
    """Sends bytes directly to S3. The headers are signed, so all of them must be sent."""
    urlopen(Request(signed["url"], value, signed["headers"], method=signed["method"]), timeout=600).close()


def upload(file: BinaryIO, topic: str, key: str | None = None) -> Any:
    """Uploads a file and returns its pointer: the value of the record in Kafka."""
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    declared = {"topic": topic, "size": file.tell(), "sha256": sha256} | ({"key": key} if key else {})
    opened = broker("POST", "/lfs/uploads", declared)
    path = f"/lfs/uploads/{opened['id']}"
    file.seek(0)
    if opened["mode"] == "single":
        put(opened["upload"], file.read())
    else:
        for number in range(1, opened["part_count"] + 1):
            # Each part is signed just before it is sent, because a URL expires during a long upload.
            part = broker("POST", f"{path}/parts", {"part_numbers": [number]})["parts"][0]
            put(part, file.read(part["size"]))
    done = broker("POST", f"{path}/complete")
    while "pointer" not in done:
        if done["state"] == "completing":
            done = broker("GET", f"{path}?wait=30")
        elif done["state"] == "open":
            # The completion ended without a result. Complete again to continue, or to get the reason.
            done = broker("POST", f"{path}/complete")
        else:
            raise RuntimeError(done)
    return done["pointer"]


def fetch(pointer: Any, into: BinaryIO, topic: str | None = None) -> None:
    """Downloads the object of a pointer, and compares its size and its sha256 with the pointer.

    A pointer has no sha256 if the topic allows another checksum. Then only the size is compared.
    """
    # With the topic of the record, the broker refuses a pointer that was copied from another topic.
    resolved = broker("POST", "/lfs/resolve" + (f"?topic={topic}" if topic else ""), pointer)
    with urlopen(resolved["url"], timeout=600) as answer:
        shutil.copyfileobj(answer, into)
    if into.tell() != pointer["size"]:
        raise RuntimeError(f"declared {pointer['size']} bytes, found {into.tell()}")
    into.seek(0)
    found = hashlib.file_digest(into, "sha256").hexdigest()
    declared = pointer.get("sha256") or found
    if found != declared.lower():
        raise RuntimeError(f"declared {declared}, found {found}")


if __name__ == "__main__":
    with open(sys.argv[1], "rb") as source:
        sent = upload(source, *sys.argv[2:4])
    print(json.dumps(sent))
    with tempfile.TemporaryFile() as back:
        fetch(sent, back, sys.argv[2])
