#!/usr/bin/env bash
# Checks the dependencies: licences, sources, one TLS stack, and the SBOM. Checks that the release contains no failpoints.
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
# Without this check, a missing program would pass the next one.
test -x "${LFS_CI_BROKER:?the release binary}"
# A program with failpoints contains the text that a failpoint logs.
if grep -aq 'reached failpoint' "$LFS_CI_BROKER"; then
    echo "the release contains failpoints"
    exit 1
fi
echo "the release contains no failpoints"
