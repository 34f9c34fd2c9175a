#!/usr/bin/env bash
# docker-compose.yaml loads in the parser of `docker compose`, which must refuse it
# without its secret, with a misspelt setting, and with a neighbour missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
file=$PWD/../../docker-compose.yaml
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
go build -o "$work/load" .

loads() { LFS_BROKER_JWT_HS256_SECRET=${2-checked-only} "$work/load" "$1"; }
refused() {
    if loads "$@" 2>&1; then
        echo "not refused: $1"
        exit 1
    fi
}

loads "$file"
refused "$file" ''
sed 's/healthcheck:/healthchek:/' "$file" >"$work/misspelt.yaml"
refused "$work/misspelt.yaml"
sed 's/^  bucket:$/  buckett:/' "$file" >"$work/missing.yaml"
refused "$work/missing.yaml"
