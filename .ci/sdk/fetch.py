"""The Python example with a pointer that has no sha256: fetch.py POINTER BYTES"""

import json
import sys
import tempfile

import lfs

pointer = json.load(open(sys.argv[1]))
with tempfile.TemporaryFile() as back:
    lfs.fetch(pointer, back)
    back.seek(0)
    assert back.read() == open(sys.argv[2], "rb").read()
