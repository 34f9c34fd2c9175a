#!/usr/bin/env bash
# Checks that openapi/openapi.json is a valid OpenAPI 3.1 document without errors or warnings from redocly and spectral.
# Each of the three must also reject a broken copy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. .ci/versions.sh
bash .ci/tools.sh openapi lint
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export REDOCLY_TELEMETRY=off REDOCLY_SUPPRESS_UPDATE_NOTICE=true

valid() { PYTHONPATH=$OPENAPI_HOME python3 -m openapi_spec_validator --schema 3.1 "$1"; }
redocly() { "$LINT_HOME/node_modules/.bin/redocly" lint --extends recommended-strict "$1"; }
spectral() { "$LINT_HOME/node_modules/.bin/spectral" lint --ruleset .ci/openapi/spectral.yaml --fail-severity warn "$1"; }

# check COMMAND FILTER: COMMAND must accept the document, and must reject a copy that jq's FILTER has broken.
check() {
    "$1" openapi/openapi.json
    jq "$2" openapi/openapi.json >"$work/broken.json"
    if "$1" "$work/broken.json" >"$work/log" 2>&1; then
        echo "$1 accepted a broken copy: $2"
        exit 1
    fi
}
check valid 'del(.info)'
check redocly 'del(.servers)'
check spectral 'del(.info.contact)'
