#!/usr/bin/env bash
# TypeScript types made of openapi/openapi.json leave nothing to guess, and a client of them uploads to a running broker.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. .ci/dev.sh

cp -r .ci/sdk/typescript "$WORK/client"
cp openapi/openapi.json "$WORK/client"
cd "$WORK/client"
npm ci --no-audit --no-fund --loglevel=error
npx openapi-typescript openapi.json -o contract.ts --default-non-nullable=false
# `[name: string]: unknown` are headers; nothing else may be unknown, or any, or never anything.
# shellcheck disable=SC2016 # `$defs` is a name.
if grep -nE ': (any|unknown)\b|Record<string, never>' contract.ts | grep -vE '\[name: string\]: unknown|export type (webhooks|\$defs) ='; then
    echo "the contract leaves these types open"
    exit 1
fi
npx tsc
start_dev
node built/upload.js
