#!/usr/bin/env bash
# The examples run as they stand: curl, Python, TypeScript in node and in a browser. (Java's runs in java-client.sh.)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. .ci/dev.sh
repository=$PWD

cp -r examples/typescript "$WORK/typescript"
rm -rf "$WORK/typescript/node_modules" "$WORK/typescript/built"
cd "$WORK/typescript"
npm ci --no-audit --no-fund --loglevel=error
npx tsc

# The pages have an origin before the broker starts, which allows it.
mkfifo "$WORK/broker"
node "$repository/.ci/sdk/browser/drive.mjs" "$WORK/typescript" "$WORK/origin" <"$WORK/broker" >"$WORK/browser.log" 2>&1 &
pages=$!
exec 4>"$WORK/broker"
extra_cleanup() {
    exec 4>&-
    kill "$pages" 2>/dev/null || true
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
# A name that curl, sha256sum or a shell would read otherwise than as a name.
cd "$WORK"
special='-report[1]{a,b}\.pdf'
cp small "./$special"
"$repository/examples/curl/upload.sh" "$special" examples curl-special
cd "$repository"
published=$(curl -sf "$LFS_BROKER_URL/lfs/uploads?topic=examples&state=published" | jq '.items | length')
[ "$published" = 7 ] || { echo "$published of 7 uploads are published"; exit 1; }

# What the broker refuses says why.
! examples/curl/upload.sh "$WORK/small" 'no/topic' >"$WORK/refused" 2>&1 || { echo "an invalid topic was accepted"; exit 1; }
grep -q '"code":"validation-failed"' "$WORK/refused" || { cat "$WORK/refused"; exit 1; }

# A pointer without a sha256, from a topic that allows it: with the right size, and with another one.
ask() { curl -sSf -H 'content-type: application/json' "$LFS_BROKER_URL$1" "${@:2}"; }
ask /lfs/topics/unproved -X PUT -d '{"checksums":["none"],"min_integrity":"size"}' >"$WORK/policy"
ask /lfs/uploads -d '{"topic":"unproved","size":5000,"checksum_alg":"none"}' >"$WORK/unproved"
jq -r '.upload.headers | to_entries[] | "header = \"\(.key): \(.value)\""' "$WORK/unproved" >"$WORK/headers"
curl -sSf -o /dev/null -K "$WORK/headers" -T "$WORK/small" "$(jq -r .upload.url "$WORK/unproved")"
ask "/lfs/uploads/$(jq -r .id "$WORK/unproved")/complete" -X POST | jq -c .pointer >"$WORK/pointer"
jq -e 'has("sha256") | not' "$WORK/pointer" >/dev/null
PYTHONPATH=examples/python python3 .ci/sdk/fetch.py "$WORK/pointer" "$WORK/small"
node .ci/sdk/fetch.mjs "$WORK/typescript" "$WORK/pointer" "$WORK/small"

node .ci/sdk/browser/adapter.mjs "$WORK/typescript"
echo "$LFS_BROKER_URL" >&4
status=0
wait "$pages" || status=$?
cat "$WORK/browser.log"
[ "$status" = 0 ] || exit "$status"
echo "examples: curl, Python, node, a page and Uppy uploaded in one PUT and in parts"
