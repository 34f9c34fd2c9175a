#!/usr/bin/env bash
# Generates a Go client from openapi/openapi.json with openapi-generator, compiles it, and uploads with it to a running broker.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. .ci/dev.sh

cp -r .ci/sdk/go-openapi-generator "$WORK/client"
cp openapi/openapi.json "$WORK/client"
cd "$WORK/client"
mvn -q -B generate-sources >"$WORK/maven.log" 2>&1 || { tail -n 60 "$WORK/maven.log"; exit 1; }
go vet ./...
go build -o upload .
start_dev
timeout 300 ./upload
