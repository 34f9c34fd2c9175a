#!/usr/bin/env bash
# Runs the examples without changes: curl, Python, TypeScript in node and in a browser. (java-client.sh runs the Java example.)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. .ci/dev.sh
repository=$PWD

cp -r examples/typescript "$WORK/typescript"
rm -rf "$WORK/typescript/node_modules" "$WORK/typescript/built"
cd "$WORK/typescript"
npm ci --no-audit --no-fund --loglevel=error
npx tsc

# The web server of the pages starts before the broker, because the broker must allow the pages' origin.
mkfifo "$WORK/broker"
node "$repository/.ci/sdk/browser/run.mjs" "$WORK/typescript" "$WORK/origin" <"$WORK/broker" >"$WORK/browser.log" 2>&1 &
browser_pid=$!
exec 4>"$WORK/broker"
extra_cleanup() {
    exec 4>&-
    kill "$browser_pid" 2>/dev/null || true
}
extra_cleanup=extra_cleanup
for _ in {1..100}; do
    [ ! -s "$WORK/origin" ] || break
    sleep 0.1
done
dev_options=(--cors-origins "$(<"$WORK/origin")")
start_dev

head -c 5000 /dev/urandom >"$WORK/small"
head -c 70000001 /dev/urandom >"$WORK/large"
cd "$repository"
for size in small large; do
    examples/curl/upload.sh "$WORK/$size" examples "curl-$size"
    python3 examples/python/lfs.py "$WORK/$size" examples "python-$size"
    node "$WORK/typescript/built/node.js" "$WORK/$size" examples "node-$size"
done
# curl, sha256sum and a shell would misread this name if the script did not quote it.
cd "$WORK"
special='-report[1]{a,b}\.pdf'
cp small "./$special"
"$repository/examples/curl/upload.sh" "$special" examples curl-special
cd "$repository"
published=$(curl -sf "$LFS_BROKER_URL/lfs/uploads?topic=examples&state=published" | jq '.items | length')
[ "$published" = 7 ] || { echo "$published of 7 uploads are published"; exit 1; }

# The script prints the broker's error response.
! examples/curl/upload.sh "$WORK/small" 'no/topic' >"$WORK/error" 2>&1 || { echo "an invalid topic was accepted"; exit 1; }
grep -q '"code":"validation-failed"' "$WORK/error" || { cat "$WORK/error"; exit 1; }

# A pointer without a sha256, from a topic whose policy allows it.
call() { curl -sSf -H 'content-type: application/json' "$LFS_BROKER_URL$1" "${@:2}"; }
call /lfs/topics/no-checksum -X PUT -d '{"checksums":["none"],"min_integrity":"size"}' >"$WORK/policy"
call /lfs/uploads -d '{"topic":"no-checksum","size":5000,"checksum_alg":"none"}' >"$WORK/no-checksum"
jq -r '.upload.headers | to_entries[] | "header = \"\(.key): \(.value)\""' "$WORK/no-checksum" >"$WORK/headers"
curl -sSf -o /dev/null -K "$WORK/headers" -T "$WORK/small" "$(jq -r .upload.url "$WORK/no-checksum")"
call "/lfs/uploads/$(jq -r .id "$WORK/no-checksum")/complete" -X POST | jq -c .pointer >"$WORK/pointer"
jq -e 'has("sha256") | not' "$WORK/pointer" >/dev/null
PYTHONPATH=examples/python python3 .ci/sdk/fetch.py "$WORK/pointer" "$WORK/small"
node .ci/sdk/fetch.mjs "$WORK/typescript" "$WORK/pointer" "$WORK/small"

node .ci/sdk/browser/adapter.mjs "$WORK/typescript"
echo "$LFS_BROKER_URL" >&4
status=0
wait "$browser_pid" || status=$?
cat "$WORK/browser.log"
[ "$status" = 0 ] || exit "$status"
echo "examples: curl, Python, node, a page and Uppy uploaded in one PUT and in parts"
