#!/usr/bin/env bash
# Installs the named tools into $LFS_CI_TOOLS. Skips tools that are already installed.
#   bash .ci/tools.sh debian|kafka|minio|mc|versitygw|toxiproxy|openapi|lint|schemathesis|deny|cyclonedx ...
# Each tool's directory name contains the version. The directory is renamed into place last, so it is never incomplete.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=.ci/versions.sh
. "$here/versions.sh"

# Installs Debian packages, only if CI=true: then this script may change the machine.
install_debian() {
    local missing=()
    command -v shellcheck >/dev/null || missing+=(shellcheck)
    postgres_bin >/dev/null || missing+=(postgresql)
    command -v jq >/dev/null || missing+=(jq)
    command -v curl >/dev/null || missing+=(curl)
    command -v chromium >/dev/null || missing+=(chromium)
    [ ${#missing[@]} -gt 0 ] || return 0
    if [ "${CI:-}" != true ] || [ "$(id -u)" != 0 ]; then
        echo "missing packages: ${missing[*]}; install them, or run as root with CI=true" >&2
        return 1
    fi
    # Without this setting the package starts its own server on the default port.
    mkdir -p /etc/postgresql-common
    [ -e /etc/postgresql-common/createcluster.conf ] || echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

# go_install DIRECTORY MODULE@VERSION
go_install() {
    [ ! -d "$1" ] || return 0
    rm -rf "$1.part"
    GOBIN="$1.part" go install "$2"
    mv "$1.part" "$1"
}

install_minio() { go_install "$MINIO_HOME" "github.com/minio/minio@$MINIO_VERSION"; }
install_mc() { go_install "$MC_HOME" "github.com/minio/mc@$MC_VERSION"; }
install_versitygw() { go_install "$VERSITYGW_HOME" "github.com/versity/versitygw/cmd/versitygw@$VERSITYGW_VERSION"; }
install_toxiproxy() { go_install "$TOXIPROXY_HOME" "github.com/Shopify/toxiproxy/v2/cmd/server@$TOXIPROXY_VERSION"; }

install_kafka() {
    [ ! -d "$KAFKA_HOME" ] || return 0
    rm -rf "$KAFKA_HOME.part"
    mvn -q -B -f "$here/pom.xml" dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory="$KAFKA_HOME.part"
    mv "$KAFKA_HOME.part" "$KAFKA_HOME"
}

# pip_install DIRECTORY PACKAGE==VERSION
pip_install() {
    [ ! -d "$1" ] || return 0
    rm -rf "$1.part"
    python3 -m pip install -q --target "$1.part" "$2"
    mv "$1.part" "$1"
}

install_openapi() { pip_install "$OPENAPI_HOME" "openapi-spec-validator==$OPENAPI_VERSION"; }

install_lint() {
    [ ! -d "$LINT_HOME" ] || return 0
    rm -rf "$LINT_HOME.part"
    mkdir "$LINT_HOME.part"
    cp "$here"/openapi/package*.json "$LINT_HOME.part"
    npm --prefix "$LINT_HOME.part" ci --no-audit --no-fund --loglevel=error
    mv "$LINT_HOME.part" "$LINT_HOME"
}

install_schemathesis() { pip_install "$SCHEMATHESIS_HOME" "schemathesis==$SCHEMATHESIS_VERSION"; }

# cargo_install DIRECTORY CRATE VERSION
cargo_install() {
    [ ! -d "$1" ] || return 0
    rm -rf "$1.part"
    CARGO_TARGET_DIR=$1.build cargo install --quiet --locked --root "$1.part" --version "$3" "$2"
    rm -rf "$1.build"
    mv "$1.part" "$1"
}

install_deny() { cargo_install "$DENY_HOME" cargo-deny "$DENY_VERSION"; }
install_cyclonedx() { cargo_install "$CYCLONEDX_HOME" cargo-cyclonedx "$CYCLONEDX_VERSION"; }

mkdir -p "$LFS_CI_TOOLS"
for tool in "$@"; do
    echo "$tool: $(date +%T)"
    "install_$tool"
done
