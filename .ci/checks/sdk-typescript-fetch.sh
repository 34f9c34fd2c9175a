#!/usr/bin/env bash
# Generates a TypeScript client from openapi/openapi.json (openapi-generator, typescript-fetch), compiles it, and uploads with it
# to a running broker.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. .ci/dev.sh

cp -r .ci/sdk/typescript-fetch "$WORK/client"
cp openapi/openapi.json "$WORK/client"
cd "$WORK/client"
mvn -q -B generate-sources >"$WORK/maven.log" 2>&1 || { tail -n 60 "$WORK/maven.log"; exit 1; }
npm ci --no-audit --no-fund --loglevel=error
npx tsc
start_dev
timeout 300 node built/upload.js
