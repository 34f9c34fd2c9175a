#!/usr/bin/env bash
# Generates TypeScript types from openapi/openapi.json, checks that none is `any` or `unknown`, and uploads with a client that uses
# them to a running broker.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. .ci/dev.sh

cp -r .ci/sdk/typescript "$WORK/client"
cp openapi/openapi.json "$WORK/client"
cd "$WORK/client"
npm ci --no-audit --no-fund --loglevel=error
npx openapi-typescript openapi.json -o contract.ts --default-non-nullable=false
# `[name: string]: unknown` stands for response headers. No other type may be `unknown`, `any` or an empty record.
# shellcheck disable=SC2016 # `$defs` is a name.
if grep -nE ': (any|unknown)\b|Record<string, never>' contract.ts | grep -vE '\[name: string\]: unknown|export type (webhooks|\$defs) ='; then
    echo "openapi/openapi.json does not define these types"
    exit 1
fi
npx tsc
start_dev
node built/upload.js
