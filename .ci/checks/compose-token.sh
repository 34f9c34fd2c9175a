#!/usr/bin/env bash
# Checks the commands in docker-compose.yaml and docs/operations.md that get a token and use it. They run without containers,
# with the environment of the compose file's broker and with the PostgreSQL, Kafka and S3 server of `dev`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. .ci/dev.sh
program=$(realpath "$LFS_CI_BROKER")
(cd .ci/compose && go build -o "$WORK/load" .)
secret=$(openssl rand -hex 32)
mapfile -t environment < <(LFS_BROKER_JWT_HS256_SECRET=$secret "$WORK/load" docker-compose.yaml broker)
[ ${#environment[@]} -gt 10 ]

# Both documents have the same two commands.
mapfile -t commands < <(grep -E '^#   (TOKEN=|curl )' docker-compose.yaml | sed 's/^#   //')
[ ${#commands[@]} = 2 ]
for command in "${commands[@]}"; do
    grep -qxF "$command" docs/operations.md || { echo "docs/operations.md lacks: $command"; exit 1; }
done

start_dev
# `dev` creates a topic at the first upload. In the compose file the third command creates it.
curl -sSf -o "$WORK/opened" "$LFS_BROKER_URL/lfs/uploads" -H 'content-type: application/json' -d '{"topic":"videos","size":0}'
# The addresses in the compose file exist only in the containers' network, so the addresses of `dev` replace them. The S3 server
# of `dev` accepts an unsigned copy source, so the broker needs the setting that allows it.
environment+=(
    "DATABASE_URL=$(jq -r .database_url "$WORK/dev/dev.json")" "KAFKA_BOOTSTRAP_SERVERS=$KAFKA_BOOTSTRAP_SERVERS"
    "AWS_ENDPOINT_URL_S3=$AWS_ENDPOINT_URL_S3" "LFS_BROKER_S3_PUBLIC_ENDPOINT=$AWS_ENDPOINT_URL_S3"
    "AWS_REGION=$AWS_REGION" "AWS_ACCESS_KEY_ID=$AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY=$AWS_SECRET_ACCESS_KEY"
    "LFS_BROKER_S3_BUCKET=$(jq -r .bucket "$WORK/dev/dev.json")" LFS_BROKER_S3_ALLOW_COPY_SOURCE=true
    LFS_BROKER_DELIVERY=at_least_once LFS_BROKER_LISTEN=127.0.0.1:0
)
env -i PATH="$PATH" "${environment[@]}" "$program" serve >"$WORK/serve.log" 2>&1 </dev/null &
serve=$!
stop_serve() { kill "$serve" 2>/dev/null || true; wait "$serve" || true; }
extra_cleanup=stop_serve
for _ in {1..600}; do
    url=$(grep -oEm1 'http://127\.0\.0\.1:[0-9]+' "$WORK/serve.log") && break
    kill -0 "$serve" || { cat "$WORK/serve.log"; exit 1; }
    sleep 0.1
done
: "${url:?the broker did not start within 60 s}"

# `docker compose exec -T broker lfs-broker ARGUMENTS` runs the program in the container's environment.
docker() {
    [ "${*:1:5}" = "compose exec -T broker lfs-broker" ] || { echo "the check does not emulate this command: docker $*" >&2; return 1; }
    env -i PATH="$PATH" "${environment[@]}" "$program" "${@:6}"
}
eval "${commands[0]}"
page=$(eval "${commands[1]/http:\/\/127.0.0.1:8080/$url} -sSf")
jq -e '.items == []' <<<"$page"
status() { curl -s -o "$WORK/response" -w '%{http_code}' "$url/lfs/uploads" -H 'content-type: application/json' "$@"; }
[ "$(status)" = 401 ]
"$LFS_CI_BROKER" put README.md --topic videos --broker "$url" --token "$TOKEN" >"$WORK/put.json" || { tail "$WORK/serve.log"; exit 1; }
[ "$(status -H "authorization: Bearer $TOKEN" -d '{"topic":"others","size":0}')" = 403 ]
echo "compose: the token from the command in docker-compose.yaml can list and upload, and only for its topic"
