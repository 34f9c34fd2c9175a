#!/usr/bin/env bash
# Checks that the parser of `docker compose` accepts docker-compose.yaml. It must reject the file
# without its secret, with a misspelt setting, and with a missing service.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
file=$PWD/../../docker-compose.yaml
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
go build -o "$work/load" .

load() { LFS_BROKER_JWT_HS256_SECRET=${2-checked-only} "$work/load" "$1"; }
must_reject() {
    if load "$@" 2>&1; then
        echo "the compose parser accepted $1, but it must reject this file"
        exit 1
    fi
}

load "$file"
must_reject "$file" ''
sed 's/healthcheck:/healthchek:/' "$file" >"$work/misspelt.yaml"
must_reject "$work/misspelt.yaml"
sed 's/^  bucket:$/  buckett:/' "$file" >"$work/missing.yaml"
must_reject "$work/missing.yaml"
