#!/usr/bin/env bash
# Generates a Go client from openapi/openapi.json with oapi-codegen, compiles it, and uploads with it to a running broker.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. .ci/dev.sh

cp -r .ci/sdk/go "$WORK/client"
mkdir "$WORK/client/contract"
cp openapi/openapi.json "$WORK/client"
cd "$WORK/client"
# A warning means that the generator does not support a part of the contract.
go tool oapi-codegen -config oapi-codegen.yaml openapi.json 2>&1 | tee "$WORK/generator.log"
[ ! -s "$WORK/generator.log" ]
go vet ./...
go build -o upload .
start_dev
timeout 300 ./upload
