# shellcheck shell=bash disable=SC2034 # Read by the scripts that source this.
# The versions of the tools and servers of CI, and their directories.
LFS_CI_TOOLS=${LFS_CI_TOOLS:-${XDG_CACHE_HOME:-$HOME/.cache}/lfs-broker-ci}

KAFKA_VERSION=4.3.1 # The same version is in pom.xml.
MINIO_VERSION=v0.0.0-20260212201848-7aac2a2c5b7c # The last version: the repository is archived.
MC_VERSION=v0.0.0-20250313080218-cf909e1063a9 # The client of MinIO, for the benchmark.
VERSITYGW_VERSION=v1.8.0
OPENAPI_VERSION=0.9.0
LINT_VERSION=redocly-2.77.0-spectral-6.16.3 # And in openapi/package.json.
SCHEMATHESIS_VERSION=4.32.5
DENY_VERSION=0.20.2
CYCLONEDX_VERSION=0.5.9
TOXIPROXY_VERSION=v2.5.0

KAFKA_HOME=$LFS_CI_TOOLS/kafka-$KAFKA_VERSION
MINIO_HOME=$LFS_CI_TOOLS/minio-$MINIO_VERSION
MC_HOME=$LFS_CI_TOOLS/mc-$MC_VERSION
VERSITYGW_HOME=$LFS_CI_TOOLS/versitygw-$VERSITYGW_VERSION
TOXIPROXY_HOME=$LFS_CI_TOOLS/toxiproxy-$TOXIPROXY_VERSION
OPENAPI_HOME=$LFS_CI_TOOLS/openapi-spec-validator-$OPENAPI_VERSION
LINT_HOME=$LFS_CI_TOOLS/openapi-lint-$LINT_VERSION
SCHEMATHESIS_HOME=$LFS_CI_TOOLS/schemathesis-$SCHEMATHESIS_VERSION
DENY_HOME=$LFS_CI_TOOLS/cargo-deny-$DENY_VERSION
CYCLONEDX_HOME=$LFS_CI_TOOLS/cargo-cyclonedx-$CYCLONEDX_VERSION

# Prints the directory of PostgreSQL's server programs.
postgres_bin() {
    local program
    for program in /usr/lib/postgresql/*/bin/postgres "$(command -v postgres)"; do
        [ ! -x "$program" ] || { dirname "$program"; return; }
    done
    return 1
}
