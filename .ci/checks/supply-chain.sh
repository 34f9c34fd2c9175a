#!/usr/bin/env bash
# What the program is made of: licences, sources, one TLS stack, a list of it all, and nothing of the tests in it.
set -euo pipefail
cd "$(dirname "$0")/../.."
. .ci/versions.sh
bash .ci/tools.sh deny
"$DENY_HOME/bin/cargo-deny" check --hide-inclusion-graph licenses bans sources
sbom=$(mktemp)
trap 'rm -f "$sbom"' EXIT
.ci/sbom "$sbom"
jq -e '[.components[].name] | index("s3s")' "$sbom" >/dev/null
# The production image has no `dev`.
.ci/sbom "$sbom" --no-default-features
jq -e '[.components[].name] | index("s3s") == null and index("lfs-broker-embedded") == null' "$sbom" >/dev/null
# A program that is not there has no failpoints either.
test -x "${LFS_CI_BROKER:?the release binary}"
# What a failpoint says when it is reached would be there if failpoints were.
if grep -aq 'reached failpoint' "$LFS_CI_BROKER"; then
    echo "the release has failpoints"
    exit 1
fi
echo "the release has no failpoints"
