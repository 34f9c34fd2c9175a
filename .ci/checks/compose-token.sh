#!/usr/bin/env bash
# The commands that get a token in docker-compose.yaml and docs/operations.md work: they run with the environment of the
# compose file's broker, without containers. Its PostgreSQL, Kafka and S3 server are those of `dev`.
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
# `dev` creates a topic on first use, as the third command of the compose file does.
curl -sSf -o "$WORK/opened" "$LFS_BROKER_URL/lfs/uploads" -H 'content-type: application/json' -d '{"topic":"videos","size":0}'
# What only the network of the containers can reach comes from `dev`, whose S3 server accepts what the compose file's refuses.
environment+=(
    "DATABASE_URL=$(jq -r .database_url "$WORK/dev/dev.json")" "KAFKA_BOOTSTRAP_SERVERS=$KAFKA_BOOTSTRAP_SERVERS"
    "AWS_ENDPOINT_URL_S3=$AWS_ENDPOINT_URL_S3" "LFS_BROKER_S3_PUBLIC_ENDPOINT=$AWS_ENDPOINT_URL_S3"
    "AWS_REGION=$AWS_REGION" "AWS_ACCESS_KEY_ID=$AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY=$AWS_SECRET_ACCESS_KEY"
    "LFS_BROKER_S3_BUCKET=$(jq -r .bucket "$WORK/dev/dev.json")" LFS_BROKER_S3_ALLOW_COPY_SOURCE=true
    LFS_BROKER_DELIVERY=at_least_once LFS_BROKER_LISTEN=127.0.0.1:0
)
env -i PATH="$PATH" "${environment[@]}" "$program" serve >"$WORK/serve.log" 2>&1 </dev/null &
serve=$!
end_serve() { kill "$serve" 2>/dev/null || true; wait "$serve" || true; }
extra_cleanup=end_serve
for _ in {1..600}; do
    url=$(grep -oEm1 'http://127\.0\.0\.1:[0-9]+' "$WORK/serve.log") && break
    kill -0 "$serve" || { cat "$WORK/serve.log"; exit 1; }
    sleep 0.1
done
: "${url:?the broker does not serve after 60 s}"

# `docker compose exec -T broker lfs-broker ARGUMENTS` runs the program in the container's environment.
docker() {
    [ "${*:1:5}" = "compose exec -T broker lfs-broker" ] || { echo "another command: docker $*" >&2; return 1; }
    env -i PATH="$PATH" "${environment[@]}" "$program" "${@:6}"
}
eval "${commands[0]}"
page=$(eval "${commands[1]/http:\/\/127.0.0.1:8080/$url} -sSf")
jq -e '.items == []' <<<"$page"
status() { curl -s -o "$WORK/answer" -w '%{http_code}' "$url/lfs/uploads" -H 'content-type: application/json' "$@"; }
[ "$(status)" = 401 ]
"$LFS_CI_BROKER" put README.md --topic videos --broker "$url" --token "$TOKEN" >"$WORK/put.json" || { tail "$WORK/serve.log"; exit 1; }
[ "$(status -H "authorization: Bearer $TOKEN" -d '{"topic":"others","size":0}')" = 403 ]
echo "compose: the token of docker-compose.yaml's command lists and uploads, and is for its topic only"
