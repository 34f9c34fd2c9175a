#!/usr/bin/env bash
# Uploads a file with curl, in one PUT or in parts, and downloads it again: upload.sh FILE TOPIC [KEY]
# LFS_BROKER_URL is the broker (http://127.0.0.1:8080 by default). LFS_BROKER_TOKEN is the token, if the broker requires one.
set -euo pipefail
file=$1 topic=$2 key=${3:-}
# So that curl reads the name neither as an option nor, if it is `-`, as standard input.
[[ $file = /* ]] || file=./$file
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# broker PATH [OPTION...]: sends a request to the broker. An error response goes to standard error.
broker() {
    local path=$1 status=0
    shift
    : >"$work/answer"
    curl -sS --fail-with-body "${LFS_BROKER_URL:-http://127.0.0.1:8080}$path" -H 'content-type: application/json' \
        ${LFS_BROKER_TOKEN:+-H "authorization: Bearer $LFS_BROKER_TOKEN"} -o "$work/answer" "$@" || status=$?
    [ "$status" = 0 ] || { cat "$work/answer" >&2; return "$status"; }
    cat "$work/answer"
}

# put FILE: sends it with the presigned request in $work/request. The headers are signed, so all of them must be sent.
put() {
    jq -r '.headers | to_entries[] | "header = \"\(.key): \(.value)\""' "$work/request" >"$work/headers"
    # -g: brackets and braces in the name are no patterns.
    curl -gsS --fail -o /dev/null -K "$work/headers" -T "$1" "$(jq -r .url "$work/request")"
}

# From standard input: sha256sum adds a backslash to the output if the name has one.
sha256=$(sha256sum <"$file" | cut -d' ' -f1)
jq -n --arg topic "$topic" --arg key "$key" --argjson size "$(stat -c %s "$file")" --arg sha256 "$sha256" \
    '{$topic, $size, $sha256} + if $key == "" then {} else {$key} end' | broker /lfs/uploads -d @- >"$work/upload"
id=$(jq -r .id "$work/upload")

if [ "$(jq -r .mode "$work/upload")" = single ]; then
    jq .upload "$work/upload" >"$work/request"
    put "$file"
else
    for number in $(seq "$(jq .part_count "$work/upload")"); do
        broker "/lfs/uploads/$id/parts" -d "{\"part_numbers\":[$number]}" | jq '.parts[0]' >"$work/request"
        dd if="$file" iflag=skip_bytes,count_bytes bs=1M status=none \
            skip="$(jq .offset "$work/request")" count="$(jq .size "$work/request")" of="$work/part"
        put "$work/part"
    done
fi

# 200: the pointer is in Kafka. 202: not yet. There is no pointer until the bytes are verified.
broker "/lfs/uploads/$id/complete" -X POST >"$work/done"
while ! jq -e .pointer "$work/done" >/dev/null; do
    broker "/lfs/uploads/$id?wait=30" >"$work/done"
    # Open again: the completion ended without a result. Complete again to continue, or to get the reason.
    ! jq -e '.state == "open"' "$work/done" >/dev/null || broker "/lfs/uploads/$id/complete" -X POST >"$work/done"
    jq -e '.pointer or .state == "completing"' "$work/done" >/dev/null || { cat "$work/done" >&2; exit 1; }
done
jq -c .pointer "$work/done"

# What a consumer does with the record's value. With the topic, the broker refuses a pointer that was copied from another topic.
jq -c .pointer "$work/done" | broker "/lfs/resolve?topic=$topic" -d @- | jq -r .url | xargs curl -sS --fail -o "$work/back"
echo "$sha256  $work/back" | sha256sum --check --quiet
