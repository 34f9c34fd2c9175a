#!/usr/bin/env bash
# Compares the broker with its OpenAPI document: schemathesis generates valid and invalid requests, and every response,
# error codes included, must be documented. The broker uses tokens, and the embedded servers of `dev`. Takes about a minute.
# $LFS_CI_BROKER is the broker. The optional argument is the directory for the reports.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. .ci/versions.sh
bash .ci/tools.sh schemathesis
broker=$(realpath "${LFS_CI_BROKER:?the broker}")
config=$PWD/.ci/schemathesis.toml
repository=$PWD
work=$(mktemp -d)
pids=()

clean_up() {
    for pid in "${pids[@]}"; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
    rm -rf "$work"
}
trap clean_up EXIT

# retry_for SECONDS COMMAND...: repeats the command until it succeeds, and prints its output. Fails after the time.
retry_for() {
    local seconds=$1 attempts_left=$(($1 * 10))
    shift
    until "$@" >"$work/output" 2>/dev/null; do
        ((attempts_left-- > 0)) || { echo "did not succeed within $seconds s: $*"; tail -n 50 "$work"/*.log; return 1; } >&2
        sleep 0.1
    done
    cat "$work/output"
}

"$broker" dev --ephemeral --listen 127.0.0.1:0 --data-dir "$work/data" >"$work/dev.log" 2>&1 &
pids+=($!)
retry_for 60 test -s "$work/data/dev.json"
dev_value() { jq -r ".$1" "$work/data/dev.json"; }
# The examples in the document use this topic. `dev` creates it at the first upload; `serve` does not.
curl -sf -o "$work/opened" "$(dev_value broker_url)/lfs/uploads" -H 'content-type: application/json' -d '{"topic":"videos","size":0}'

DATABASE_URL=$(dev_value database_url)
KAFKA_BOOTSTRAP_SERVERS=$(dev_value kafka_bootstrap)
AWS_ENDPOINT_URL_S3=$(dev_value s3_endpoint)
AWS_REGION=$(dev_value s3_region)
AWS_ACCESS_KEY_ID=$(dev_value s3_access_key_id)
AWS_SECRET_ACCESS_KEY=$(dev_value s3_secret_access_key)
LFS_BROKER_S3_BUCKET=$(dev_value bucket)
LFS_BROKER_JWT_HS256_SECRET=$(head -c 32 /dev/urandom | base64)
export DATABASE_URL KAFKA_BOOTSTRAP_SERVERS AWS_ENDPOINT_URL_S3 AWS_REGION AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
export LFS_BROKER_S3_BUCKET LFS_BROKER_JWT_HS256_SECRET
export LFS_BROKER_JWT_ISSUER=ci LFS_BROKER_JWT_AUDIENCE=ci LFS_BROKER_TOPICS_DEFAULT_ENABLED=true
export LFS_BROKER_LISTEN=127.0.0.1:0 LFS_BROKER_S3_ALLOW_COPY_SOURCE=true LFS_BROKER_DELIVERY=at_least_once
# schemathesis sends many invalid tokens, so this limit must be off.
export LFS_BROKER_FAILED_LOGINS_PER_MINUTE=0
touch "$work/serve.started"
"$broker" serve >"$work/serve.log" 2>&1 &
pids+=($!)
url=$(retry_for 60 grep -oE 'http://127\.0\.0\.1:[0-9]+' "$work/serve.log" | head -n 1)
LFS_CI_TOKEN=$("$broker" token --tenant acme --scope 'lfs:write lfs:read lfs:admin' --topic '*' --ttl 1h)
export LFS_CI_TOKEN

report=$(realpath -m "${1:-$work/report}")
# schemathesis stores failed requests in the working directory, and would repeat them in the next run.
cd "$work"
PYTHONPATH=$SCHEMATHESIS_HOME timeout 240 python3 -m schemathesis.cli --config-file "$config" run "$url/openapi.json" \
    --report ndjson --report-dir "$report"
curl -sSf -o "$work/openapi.json" "$url/openapi.json"
python3 "$repository/.ci/documented_codes.py" "$work/openapi.json" "$(find "$report" -name '*.ndjson' -newer "$work/serve.started")"
! grep -E 'panicked|answered internal' "$work/serve.log"
