#!/usr/bin/env bash
# The program without `dev`, as the production image contains it: no embedded server, and none of the crates that only they need.
set -euo pipefail
cd "$(dirname "$0")/.."
tree=$(cargo tree --locked --package lfs-broker --no-default-features --edges normal --prefix none --format '{p}')
# Without this check, an empty tree would pass the next one.
grep -q '^lfs-broker v' <<<"$tree"
grep -q '^rdkafka v' <<<"$tree"
if grep -E '^(s3s|lfs-broker-embedded) v' <<<"$tree"; then
    echo "the program without dev contains an embedded server"
    exit 1
fi
echo "$(sort -u <<<"$tree" | wc -l) crates, none of an embedded server"
