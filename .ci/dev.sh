# shellcheck shell=bash
# A broker of a check's own, and a directory that ends with it. Sourced by the checks, which `run` gives $LFS_CI_BROKER.
: "${LFS_CI_BROKER:?the path of lfs-broker}"
WORK=$(mktemp -d "${TMPDIR:-/tmp}/lfs-broker-check.XXXXXX") || exit
chmod 711 "$WORK"
dev=
export NO_PROXY=127.0.0.1,localhost no_proxy=127.0.0.1,localhost

# Ends `dev`, then what $also_end names: a check that starts more sets it.
also_end=:
end_dev() {
    local status=$?
    trap - EXIT
    if [ -n "$dev" ]; then
        kill -TERM "$dev" 2>/dev/null || true
        for _ in {1..300}; do
            kill -0 "$dev" 2>/dev/null || break
            sleep 0.1
        done
        if kill -KILL "$dev" 2>/dev/null; then
            echo "dev did not end within 30 s of SIGTERM"
            status=1
        fi
        [ "$status" = 0 ] || tail -n 40 "$WORK/dev.log"
    fi
    "$also_end"
    rm -rf "$WORK"
    exit "$status"
}
trap end_dev EXIT
trap 'exit 143' INT TERM HUP

# `dev` on free ports, with what $dev_options says; exports where it is.
dev_options=()
start_dev() {
    "$LFS_CI_BROKER" dev --ephemeral --listen 127.0.0.1:0 --data-dir "$WORK/dev" "${dev_options[@]}" >"$WORK/dev.log" 2>&1 </dev/null &
    dev=$!
    for _ in {1..600}; do
        [ ! -s "$WORK/dev/dev.json" ] || break
        kill -0 "$dev" 2>/dev/null || { echo "dev ended before it answered"; return 1; }
        sleep 0.1
    done
    LFS_BROKER_URL=$(jq -re .broker_url "$WORK/dev/dev.json") || { echo "no dev.json after 60 s"; return 1; }
    KAFKA_BOOTSTRAP_SERVERS=$(jq -r .kafka_bootstrap "$WORK/dev/dev.json")
    AWS_ENDPOINT_URL_S3=$(jq -r .s3_endpoint "$WORK/dev/dev.json")
    AWS_REGION=$(jq -r .s3_region "$WORK/dev/dev.json")
    AWS_ACCESS_KEY_ID=$(jq -r .s3_access_key_id "$WORK/dev/dev.json")
    AWS_SECRET_ACCESS_KEY=$(jq -r .s3_secret_access_key "$WORK/dev/dev.json")
    export LFS_BROKER_URL KAFKA_BOOTSTRAP_SERVERS AWS_ENDPOINT_URL_S3 AWS_REGION AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
}
