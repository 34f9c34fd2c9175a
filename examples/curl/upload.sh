#!/usr/bin/env bash
# Uploads a file with curl, in one PUT or in parts, and fetches it back: upload.sh FILE TOPIC [KEY]
# LFS_BROKER_URL and, where the broker asks for one, LFS_BROKER_TOKEN say where and who.
set -euo pipefail
file=$1 topic=$2 key=${3:-}
# Neither an option nor, as `-`, standard input.
[[ $file = /* ]] || file=./$file
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# broker PATH [OPTION...]: asks the broker. What it refuses goes to standard error, with its reason.
broker() {
    local path=$1 status=0
    shift
    : >"$work/answer"
    curl -sS --fail-with-body "${LFS_BROKER_URL:-http://127.0.0.1:8080}$path" -H 'content-type: application/json' \
        ${LFS_BROKER_TOKEN:+-H "authorization: Bearer $LFS_BROKER_TOKEN"} -o "$work/answer" "$@" || status=$?
    [ "$status" = 0 ] || { cat "$work/answer" >&2; return "$status"; }
    cat "$work/answer"
}

# put FILE: sends it by the signed request in $work/request; its headers are signed, so all of them are sent.
put() {
    jq -r '.headers | to_entries[] | "header = \"\(.key): \(.value)\""' "$work/request" >"$work/headers"
    # -g: brackets and braces in a name are its own.
    curl -gsS --fail -o /dev/null -K "$work/headers" -T "$1" "$(jq -r .url "$work/request")"
}

# By its bytes alone: before a name with a backslash sha256sum writes one more.
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

# 200: in Kafka. 202: not yet; until the bytes are proved there is no pointer.
broker "/lfs/uploads/$id/complete" -X POST >"$work/done"
while ! jq -e .pointer "$work/done" >/dev/null; do
    broker "/lfs/uploads/$id?wait=30" >"$work/done"
    # Open again: the completion ended without a verdict, and complete goes on, or says why it cannot.
    ! jq -e '.state == "open"' "$work/done" >/dev/null || broker "/lfs/uploads/$id/complete" -X POST >"$work/done"
    jq -e '.pointer or .state == "completing"' "$work/done" >/dev/null || { cat "$work/done" >&2; exit 1; }
done
jq -c .pointer "$work/done"

# What a consumer does with the record's value. With the topic a pointer that was copied from another one is refused.
jq -c .pointer "$work/done" | broker "/lfs/resolve?topic=$topic" -d @- | jq -r .url | xargs curl -sS --fail -o "$work/back"
echo "$sha256  $work/back" | sha256sum --check --quiet
