#!/usr/bin/env bash
# Counts the statements on PostgreSQL and the requests to Kafka of an open, a complete and an idle minute, on real servers.
# Fails if a count is above its limit in bench/src/budgets.rs.
set -euo pipefail
: "${LFS_CI_BROKER:?the path of lfs-broker}"
cd "$(dirname "$0")/../.."
exec .ci/bench --guard
