#!/usr/bin/env bash
# openapi/openapi.json is a valid OpenAPI 3.1 document, and the validator would say so if it were not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. .ci/versions.sh
bash .ci/tools.sh openapi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

valid() { PYTHONPATH=$OPENAPI_HOME python3 -m openapi_spec_validator --schema 3.1 "$1"; }
valid openapi/openapi.json
jq 'del(.info)' openapi/openapi.json >"$work/broken.json"
if valid "$work/broken.json" >"$work/log" 2>&1; then
    echo "a broken copy was not refused"
    exit 1
fi
