# shellcheck shell=bash disable=SC2034 # `run` reads what is counted here.
# Steps: each has a header, a time limit, a log, and adds to what passed and what failed.
# Sourced by `run`, which sets $WORK and $DEADLINE (in bash's SECONDS).
passed=0
failed=0
running=
unfinished=

# within SECONDS COMMAND...: a command in a process group of its own that ends with its time, or with ours.
within() {
    local limit=$1 left=$((DEADLINE - SECONDS)) status=0
    shift
    ((limit < left)) || limit=$left
    ((limit > 0)) || { echo "no time left for: $*"; return 124; }
    # In the background, because bash hears a signal only while it waits.
    timeout --kill-after=10 "$limit" "$@" </dev/null &
    running=$!
    wait "$running" || status=$?
    running=
    [ "$status" != 124 ] || echo "ended after its $limit s: $*"
    return "$status"
}

# report NAME STATUS PASSED FAILED STARTED: adds up, and shows the log of what went wrong.
report() {
    unfinished=
    passed=$((passed + $3))
    failed=$((failed + $4))
    if [ "$4" -gt 0 ]; then
        tail -n 200 "$WORK/step.log"
        echo "--- FAILED: $1 ($3 passed, $4 failed, exit $2, $((SECONDS - $5)) s)"
    else
        echo "--- ok: $1 ($3 passed, $((SECONDS - $5)) s)"
    fi
}

# step NAME SECONDS COMMAND...: one pass or one failure.
step() {
    local name=$1 limit=$2 started=$SECONDS status=0
    shift 2
    unfinished=$name
    echo "=== $name"
    within "$limit" "$@" >"$WORK/step.log" 2>&1 || status=$?
    if [ "$status" = 0 ]; then
        report "$name" 0 1 0 "$started"
    else
        report "$name" "$status" 0 1 "$started"
    fi
    return "$status"
}

# start NAME FUNCTION: a step in this shell, so that what it exports stays; it bounds its own waiting.
start() {
    local started=$SECONDS status=0
    unfinished=$1
    echo "=== $1"
    "$2" >"$WORK/step.log" 2>&1 || status=$?
    report "$1" "$status" $((status == 0)) $((status != 0)) "$started"
    return "$status"
}

# tests NAME SECONDS COMMAND...: `cargo test`, counted by the lines in which it counts itself.
# A run that tested nothing, or broke off, is a failure too.
tests() {
    local name=$1 limit=$2 started=$SECONDS status=0 ran broke
    shift 2
    unfinished=$name
    echo "=== $name"
    within "$limit" "$@" >"$WORK/step.log" 2>&1 || status=$?
    grep -E '^(test result:|     Running |   Doc-tests )' "$WORK/step.log"
    read -r ran broke < <(awk '/^test result:/ { for (i = 2; i <= NF; i++) { if ($i == "passed;") p += $(i - 1); if ($i == "failed;") f += $(i - 1) } }
        END { print p + 0, f + 0 }' "$WORK/step.log")
    if [ "$broke" = 0 ] && { [ "$status" != 0 ] || [ "$ran" = 0 ]; }; then
        broke=1
    fi
    report "$name" "$status" "$ran" "$broke" "$started"
}
