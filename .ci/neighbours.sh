#!/usr/bin/env bash
# Starts real servers of PostgreSQL, Kafka and S3 for the tests, each on a free port of 127.0.0.1.
# `run` and the checks source this file. A developer can call it directly:
#   bash .ci/neighbours.sh up DIRECTORY postgres kafka minio|versitygw   (then: . DIRECTORY/env)
#   bash .ci/neighbours.sh stop|start DIRECTORY kafka                     (start: again, with the same port and data)
#   bash .ci/neighbours.sh down DIRECTORY
# $NEIGHBOURS holds the data, log and pid file of each server. $NEIGHBOURS/env exports the variables by which the tests find them.
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=.ci/versions.sh
. "$here/versions.sh"

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# export_env NAME VALUE: exports a variable in this shell, and writes the export to $NEIGHBOURS/env.
export_env() {
    export "$1=$2"
    printf 'export %s=%q\n' "$1" "$2" >>"$NEIGHBOURS/env"
}

# start_server NAME COMMAND...: starts a server in its own session, and writes its log and its pid file.
start_server() {
    local name=$1
    shift
    setsid "$@" >"$NEIGHBOURS/$name.log" 2>&1 </dev/null &
    echo $! >"$NEIGHBOURS/$name.pid"
}

# wait_until_ready NAME SECONDS COMMAND...: repeats the command until it succeeds. Fails early if the server has exited.
wait_until_ready() {
    local name=$1 seconds=$2 deadline=$((SECONDS + $2)) pid
    shift 2
    pid=$(<"$NEIGHBOURS/$name.pid")
    until timeout 20 "$@" >/dev/null 2>&1; do
        if ! kill -0 "$pid" 2>/dev/null || ((SECONDS >= deadline)); then
            echo "$name exited or was not ready within $seconds s; the last lines of its log:" >&2
            tail -n 30 "$NEIGHBOURS/$name.log" >&2
            return 1
        fi
        sleep 0.2
    done
    echo "$name is ready (pid $pid)"
}

# fsync is off for speed: a test need not survive a power loss. The benchmark sets other options.
POSTGRES_OPTIONS=(-c fsync=off -c full_page_writes=off)

# PostgreSQL refuses to run as root. So as root, start it as the user postgres or nobody.
start_postgres() {
    local bin data=$NEIGHBOURS/postgres port run_as=()
    bin=$(postgres_bin) && port=${LFS_CI_POSTGRES_PORT:-$(free_port)} || return
    mkdir -p "$data"
    if [ "$(id -u)" = 0 ]; then
        local owner=nobody
        ! id postgres >/dev/null 2>&1 || owner=postgres
        chmod 711 "$NEIGHBOURS" && chown "$owner" "$data" || return
        run_as=(setpriv "--reuid=$owner" "--regid=$(id -g "$owner")" --clear-groups)
    fi
    echo lfs >"$data/password"
    (cd "$data" && "${run_as[@]}" "$bin/initdb" -D "$data/data" -U lfs -A scram-sha-256 --pwfile=password -E UTF8 --no-locale) \
        >"$NEIGHBOURS/initdb.log" 2>&1 || { tail -n 20 "$NEIGHBOURS/initdb.log" >&2; return 1; }
    start_server postgres "${run_as[@]}" "$bin/postgres" -D "$data/data" -c listen_addresses=127.0.0.1 -c "port=$port" \
        -c "unix_socket_directories=$data" -c max_connections=400 "${POSTGRES_OPTIONS[@]}"
    wait_until_ready postgres 30 "$bin/pg_isready" -h 127.0.0.1 -p "$port" || return
    export_env LFS_TEST_DATABASE_URL "postgres://lfs:lfs@127.0.0.1:$port/postgres"
}

# A small heap and a quick start: the tests need little of Kafka.
JAVA=(java -Xmx320m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -cp "$KAFKA_HOME/*")

# One node that is broker and controller. It does not create topics automatically, as in most clusters. On a second port the
# user `limited` may do everything except write to topics whose name begins with `refused-`.
start_kafka() {
    local data=$NEIGHBOURS/kafka port controller_port limited_port config
    port=${LFS_CI_KAFKA_PORT:-$(free_port)} && controller_port=$(free_port) && limited_port=$(free_port) || return
    mkdir -p "$data" && config=$data/server.properties
    cat >"$config" <<PROPERTIES
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:$controller_port
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:$port,SASL_PLAINTEXT://127.0.0.1:$limited_port,CONTROLLER://127.0.0.1:$controller_port
advertised.listeners=PLAINTEXT://127.0.0.1:$port,SASL_PLAINTEXT://127.0.0.1:$limited_port
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,CONTROLLER:PLAINTEXT
sasl.enabled.mechanisms=PLAIN
listener.name.sasl_plaintext.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required user_limited="limited";
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
allow.everyone.if.no.acl.found=true
log.dirs=$data/log
auto.create.topics.enable=false
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
PROPERTIES
    "${JAVA[@]}" kafka.tools.StorageTool format -t AAAAAAAAAAAAAAAAAAAAAQ -c "$config" \
        >"$NEIGHBOURS/kafka-format.log" 2>&1 || { tail -n 20 "$NEIGHBOURS/kafka-format.log" >&2; return 1; }
    start_kafka_again || return
    export_env LFS_TEST_KAFKA "127.0.0.1:$port"
    export_env LFS_TEST_KAFKA_LIMITED "127.0.0.1:$limited_port"
}

# Starts Kafka with the port and the data that start_kafka has configured.
start_kafka_again() {
    local config=$NEIGHBOURS/kafka/server.properties address
    address=$(sed -n 's|^advertised.listeners=PLAINTEXT://\([^,]*\),.*|\1|p' "$config")
    start_server kafka "${JAVA[@]}" kafka.Kafka "$config"
    wait_until_ready kafka 60 "${JAVA[@]}" org.apache.kafka.tools.AclCommand --bootstrap-server "$address" --add \
        --allow-principal User:limited --operation Describe --topic refused- --resource-pattern-type prefixed
}

# export_s3_env FLAVOUR PORT ACCESS_KEY SECRET
export_s3_env() {
    export_env LFS_TEST_S3_FLAVOUR "$1"
    export_env LFS_TEST_S3_ENDPOINT "http://127.0.0.1:$2"
    export_env LFS_TEST_S3_ACCESS_KEY_ID "$3"
    export_env LFS_TEST_S3_SECRET_ACCESS_KEY "$4"
}

start_minio() {
    local port
    port=${LFS_CI_MINIO_PORT:-$(free_port)} || return
    mkdir -p "$NEIGHBOURS/minio"
    MINIO_ROOT_USER=minio-test MINIO_ROOT_PASSWORD=minio-test-secret MINIO_BROWSER=off MINIO_UPDATE=off \
        start_server minio "$MINIO_HOME/minio" server --address "127.0.0.1:$port" "$NEIGHBOURS/minio"
    wait_until_ready minio 60 curl -sf --noproxy '*' "http://127.0.0.1:$port/minio/health/ready" || return
    export_s3_env minio "$port" minio-test minio-test-secret
}

# VersityGW stores S3 metadata in extended attributes of the files, or in a sidecar directory if the file system has none.
start_versitygw() {
    local data=$NEIGHBOURS/versitygw port metadata_options=()
    port=${LFS_CI_VERSITYGW_PORT:-$(free_port)} || return
    mkdir -p "$data/objects" "$data/versions"
    if ! python3 -c 'import os, sys; os.setxattr(sys.argv[1], "user.probe", b"1")' "$data/objects" 2>/dev/null; then
        mkdir -p "$data/attributes"
        metadata_options=(--sidecar "$data/attributes")
    fi
    start_server versitygw "$VERSITYGW_HOME/versitygw" --port "127.0.0.1:$port" --access versity-test --secret versity-test-secret \
        --health /health posix "${metadata_options[@]}" --versioning-dir "$data/versions" "$data/objects"
    wait_until_ready versitygw 60 curl -sf --noproxy '*' "http://127.0.0.1:$port/health" || return
    export_s3_env versitygw "$port" versity-test versity-test-secret
}

# Sends the signal to stop: TERM, or INT for a fast shutdown of PostgreSQL.
signal_server() {
    local signal=TERM
    [ "$1" != postgres ] || signal=INT
    kill "-$signal" "$(<"$NEIGHBOURS/$1.pid")" 2>/dev/null || true
}

# Stops a server by its pid, and kills it after 10 s.
stop_server() {
    local pid
    signal_server "$1"
    pid=$(<"$NEIGHBOURS/$1.pid")
    for _ in {1..100}; do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
    rm -f "$NEIGHBOURS/$1.pid"
}

# Stops all started servers: first signals all, because they stop at the same time.
stop_all() {
    local file
    for file in "$NEIGHBOURS"/*.pid; do
        [ ! -e "$file" ] || signal_server "$(basename "$file" .pid)"
    done
    for file in "$NEIGHBOURS"/*.pid; do
        [ ! -e "$file" ] || stop_server "$(basename "$file" .pid)"
    done
    return 0
}

main() {
    local command=${1:?up, stop, start or down} server
    NEIGHBOURS=$(mkdir -p "${2:?a directory}" && cd "$2" && pwd) || exit
    shift 2
    case $command in
        down) stop_all; exit ;;
        stop) stop_server "${1:?a server}"; exit ;;
        start) "start_${1:?kafka}_again"; exit ;;
    esac
    for server in "$@"; do
        [ "$server" = postgres ] || bash "$here/tools.sh" "$server" || exit
        "start_$server" || exit
    done
    echo ". $NEIGHBOURS/env"
}
[ "${BASH_SOURCE[0]}" != "$0" ] || main "$@"
