# shellcheck shell=bash disable=SC2034 # `run` reads these counters.
# Steps: each step has a header, a time limit and a log, and adds to the counters `passed` and `failed`.
# `run` sources this file and sets $WORK and $DEADLINE (in bash's SECONDS).
passed=0
failed=0
running_pid=
current_step=

# with_timeout SECONDS COMMAND...: runs a command in its own process group, at most until $DEADLINE.
with_timeout() {
    local limit=$1 remaining=$((DEADLINE - SECONDS)) status=0
    shift
    ((limit < remaining)) || limit=$remaining
    ((limit > 0)) || { echo "not started, because the deadline of the whole run has passed: $*"; return 124; }
    # In the background, because bash handles a signal only during `wait`, not while a foreground command runs.
    timeout --kill-after=10 "$limit" "$@" </dev/null &
    running_pid=$!
    wait "$running_pid" || status=$?
    running_pid=
    [ "$status" != 124 ] || echo "timed out after $limit s: $*"
    return "$status"
}

# report NAME STATUS PASSED FAILED STARTED: adds to the counters, and prints the log of a failed step.
report() {
    current_step=
    passed=$((passed + $3))
    failed=$((failed + $4))
    if [ "$4" -gt 0 ]; then
        tail -n 200 "$WORK/step.log"
        echo "--- FAILED: $1 ($3 passed, $4 failed, exit $2, $((SECONDS - $5)) s)"
    else
        echo "--- ok: $1 ($3 passed, $((SECONDS - $5)) s)"
    fi
}

# step NAME SECONDS COMMAND...: runs a command, which counts as one pass or one failure.
step() {
    local name=$1 limit=$2 started=$SECONDS status=0
    shift 2
    current_step=$name
    echo "=== $name"
    with_timeout "$limit" "$@" >"$WORK/step.log" 2>&1 || status=$?
    if [ "$status" = 0 ]; then
        report "$name" 0 1 0 "$started"
    else
        report "$name" "$status" 0 1 "$started"
    fi
    return "$status"
}

# start NAME FUNCTION: a step in this shell, so that its exports remain. The function must have its own time limits.
start() {
    local started=$SECONDS status=0
    current_step=$1
    echo "=== $1"
    "$2" >"$WORK/step.log" 2>&1 || status=$?
    report "$1" "$status" $((status == 0)) $((status != 0)) "$started"
    return "$status"
}

# tests NAME SECONDS COMMAND...: runs `cargo test`, and adds the counts of its `test result:` lines.
# A run without any test, or with an error but no failed test, counts as one failure.
tests() {
    local name=$1 limit=$2 started=$SECONDS status=0 tests_passed tests_failed
    shift 2
    current_step=$name
    echo "=== $name"
    with_timeout "$limit" "$@" >"$WORK/step.log" 2>&1 || status=$?
    grep -E '^(test result:|     Running |   Doc-tests )' "$WORK/step.log"
    read -r tests_passed tests_failed < <(awk '/^test result:/ { for (i = 2; i <= NF; i++) { if ($i == "passed;") p += $(i - 1); if ($i == "failed;") f += $(i - 1) } }
        END { print p + 0, f + 0 }' "$WORK/step.log")
    if [ "$tests_failed" = 0 ] && { [ "$status" != 0 ] || [ "$tests_passed" = 0 ]; }; then
        tests_failed=1
    fi
    report "$name" "$status" "$tests_passed" "$tests_failed" "$started"
}
