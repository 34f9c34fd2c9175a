#!/usr/bin/env bash
# Generates a Python client from openapi/openapi.json, checks its types, and uploads with it to a running broker.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. .ci/dev.sh

python3 -m venv "$WORK/venv"
"$WORK/venv/bin/pip" install -q --disable-pip-version-check -r .ci/sdk/python/requirements.txt
PATH=$WORK/venv/bin:$PATH
# A warning means that the generator does not support a part of the contract.
openapi-python-client generate --path openapi/openapi.json --output-path "$WORK/client" --fail-on-warning
export PYTHONPATH=$WORK/client MYPY_CACHE_DIR=$WORK/mypy
mypy --strict .ci/sdk/python/upload.py
start_dev
python3 .ci/sdk/python/upload.py
