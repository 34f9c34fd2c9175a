"""Downloads a pointer that has no sha256 with the Python example, and compares the bytes: fetch.py POINTER FILE"""

import json
import sys
import tempfile

import lfs

pointer = json.load(open(sys.argv[1]))
with tempfile.TemporaryFile() as downloaded:
    lfs.fetch(pointer, downloaded)
    downloaded.seek(0)
    assert downloaded.read() == open(sys.argv[2], "rb").read()
