#!/usr/bin/env bash
# The broker does what the OpenAPI document says: valid and invalid requests are generated from it, and every answer is
# compared with it, error codes too. The broker runs with tokens, beside the embedded parts of `dev`. About a minute.
# $LFS_CI_BROKER is the broker; an argument is where the reports go.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. .ci/versions.sh
bash .ci/tools.sh schemathesis
broker=$(realpath "${LFS_CI_BROKER:?the broker}")
config=$PWD/.ci/schemathesis.toml
repository=$PWD
work=$(mktemp -d)
running=()

finish() {
    for process in "${running[@]}"; do
        kill "$process" 2>/dev/null || true
        wait "$process" 2>/dev/null || true
    done
    rm -rf "$work"
}
trap finish EXIT

# eventually SECONDS COMMAND...: until it succeeds, or its time is over.
eventually() {
    local left=$(($1 * 10))
    shift
    until "$@" >"$work/found" 2>/dev/null; do
        ((left-- > 0)) || { echo "never: $*"; tail -n 50 "$work"/*.log; return 1; } >&2
        sleep 0.1
    done
    cat "$work/found"
}

"$broker" dev --ephemeral --listen 127.0.0.1:0 --data-dir "$work/data" >"$work/dev.log" 2>&1 &
running+=($!)
eventually 60 test -s "$work/data/dev.json"
place() { jq -r ".$1" "$work/data/dev.json"; }
# The topic of the document's examples, which only `dev` makes.
curl -sf -o "$work/opened" "$(place broker_url)/lfs/uploads" -H 'content-type: application/json' -d '{"topic":"videos","size":0}'

DATABASE_URL=$(place database_url)
KAFKA_BOOTSTRAP_SERVERS=$(place kafka_bootstrap)
AWS_ENDPOINT_URL_S3=$(place s3_endpoint)
AWS_REGION=$(place s3_region)
AWS_ACCESS_KEY_ID=$(place s3_access_key_id)
AWS_SECRET_ACCESS_KEY=$(place s3_secret_access_key)
LFS_BROKER_S3_BUCKET=$(place bucket)
LFS_BROKER_JWT_HS256_SECRET=$(head -c 32 /dev/urandom | base64)
export DATABASE_URL KAFKA_BOOTSTRAP_SERVERS AWS_ENDPOINT_URL_S3 AWS_REGION AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
export LFS_BROKER_S3_BUCKET LFS_BROKER_JWT_HS256_SECRET
export LFS_BROKER_JWT_ISSUER=ci LFS_BROKER_JWT_AUDIENCE=ci LFS_BROKER_TOPICS_DEFAULT_ENABLED=true
export LFS_BROKER_LISTEN=127.0.0.1:0 LFS_BROKER_S3_ALLOW_COPY_SOURCE=true LFS_BROKER_DELIVERY=at_least_once
# Tokens that are not valid are what it sends most.
export LFS_BROKER_FAILED_LOGINS_PER_MINUTE=0
touch "$work/serve.started"
"$broker" serve >"$work/serve.log" 2>&1 &
running+=($!)
url=$(eventually 60 grep -oE 'http://127\.0\.0\.1:[0-9]+' "$work/serve.log" | head -n 1)
LFS_CI_TOKEN=$("$broker" token --tenant acme --scope 'lfs:write lfs:read lfs:admin' --topic '*' --ttl 1h)
export LFS_CI_TOKEN

report=$(realpath -m "${1:-$work/report}")
# Elsewhere it would keep what failed, and begin with that the next time.
cd "$work"
PYTHONPATH=$SCHEMATHESIS_HOME timeout 240 python3 -m schemathesis.cli --config-file "$config" run "$url/openapi.json" \
    --report ndjson --report-dir "$report"
curl -sSf -o "$work/openapi.json" "$url/openapi.json"
python3 "$repository/.ci/documented_codes.py" "$work/openapi.json" "$(find "$report" -name '*.ndjson' -newer "$work/serve.started")"
! grep -E 'panicked|answered internal' "$work/serve.log"
