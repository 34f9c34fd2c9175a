# shellcheck shell=bash
# Starts a broker and creates a work directory for one check; removes both at exit. The checks source this file.
# `run` sets $LFS_CI_BROKER for them.
: "${LFS_CI_BROKER:?the path of lfs-broker}"
WORK=$(mktemp -d "${TMPDIR:-/tmp}/lfs-broker-check.XXXXXX") || exit
chmod 711 "$WORK"
dev_pid=
export NO_PROXY=127.0.0.1,localhost no_proxy=127.0.0.1,localhost

# Stops `dev`, then calls the function $extra_cleanup. A check that starts other processes sets it.
extra_cleanup=:
clean_up() {
    local status=$?
    trap - EXIT
    if [ -n "$dev_pid" ]; then
        kill -TERM "$dev_pid" 2>/dev/null || true
        for _ in {1..300}; do
            kill -0 "$dev_pid" 2>/dev/null || break
            sleep 0.1
        done
        if kill -KILL "$dev_pid" 2>/dev/null; then
            echo "dev did not exit within 30 s after SIGTERM; killed it"
            status=1
        fi
        [ "$status" = 0 ] || tail -n 40 "$WORK/dev.log"
    fi
    "$extra_cleanup"
    rm -rf "$WORK"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 143' INT TERM HUP

# Starts `dev` on free ports with $dev_options, and exports its addresses and credentials.
dev_options=()
start_dev() {
    "$LFS_CI_BROKER" dev --ephemeral --listen 127.0.0.1:0 --data-dir "$WORK/dev" "${dev_options[@]}" >"$WORK/dev.log" 2>&1 </dev/null &
    dev_pid=$!
    for _ in {1..600}; do
        [ ! -s "$WORK/dev/dev.json" ] || break
        kill -0 "$dev_pid" 2>/dev/null || { echo "dev exited before it wrote dev.json"; return 1; }
        sleep 0.1
    done
    LFS_BROKER_URL=$(jq -re .broker_url "$WORK/dev/dev.json") || { echo "$WORK/dev/dev.json has no broker_url after 60 s"; return 1; }
    KAFKA_BOOTSTRAP_SERVERS=$(jq -r .kafka_bootstrap "$WORK/dev/dev.json")
    AWS_ENDPOINT_URL_S3=$(jq -r .s3_endpoint "$WORK/dev/dev.json")
    AWS_REGION=$(jq -r .s3_region "$WORK/dev/dev.json")
    AWS_ACCESS_KEY_ID=$(jq -r .s3_access_key_id "$WORK/dev/dev.json")
    AWS_SECRET_ACCESS_KEY=$(jq -r .s3_secret_access_key "$WORK/dev/dev.json")
    export LFS_BROKER_URL KAFKA_BOOTSTRAP_SERVERS AWS_ENDPOINT_URL_S3 AWS_REGION AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
}
