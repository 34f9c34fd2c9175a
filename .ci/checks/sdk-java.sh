#!/usr/bin/env bash
# Generates a Java client from openapi/openapi.json, compiles it, and uploads with it to a running broker.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. .ci/dev.sh

cp -r .ci/sdk/java "$WORK/client"
cp openapi/openapi.json "$WORK/client"
cd "$WORK/client"
mvn -q -B compile >"$WORK/maven.log" 2>&1 || { tail -n 60 "$WORK/maven.log"; exit 1; }
start_dev
mvn -q -B exec:java
