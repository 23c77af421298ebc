#!/usr/bin/env bash
# What one sees: a chat completion with the five prompt tokens its answer came from most; the same for
# a text that already exists; and an attribution that is fetched later by its id.
#
#   examples/curl.sh [BASE_URL]      (needs curl and python3, which prints the JSON; with --api-key:
#                                     OPENAI_API_KEY=... examples/curl.sh)
set -euo pipefail

url="${1:-${FLASHTRACE_BASE_URL:-http://127.0.0.1:8000}}"
needed='Start a server with

    vllm-flashtrace serve "$(vllm-flashtrace demo --model-path)" --max-model-len 2048'

ask() { # ask METHOD PATH [BODY]
  local answer
  answer="$(curl --silent --fail-with-body --request "$1" "$url/v1/$2" \
    --header "Authorization: Bearer ${OPENAI_API_KEY:-none}" \
    --header 'Content-Type: application/json' ${3:+--data "$3"})" && echo "$answer" && return
  if [[ -n "$answer" ]]; then
    printf 'The server refuses the request: %s\n\n%s\n' "$answer" "$needed" >&2
  else
    printf 'No server answers at %s. %s\n' "$url" "$needed" >&2
  fi
  return 1
}
pretty() { python3 -m json.tool --no-ensure-ascii; }
value() { python3 -c "import json, sys; print(json.load(sys.stdin)$1)"; }

models="$(ask GET models)"
model="${MODEL:-$(value '["data"][0]["id"]' <<<"$models")}"
question="The lift is out of order. The secret access code for the Lisbon office is 7306. What is the secret access code for the Lisbon office? Answer with the code."

echo "--- a completion with its attribution"
answer="$(ask POST chat/completions "{
  \"model\": \"$model\", \"temperature\": 0, \"max_tokens\": 24,
  \"messages\": [{\"role\": \"user\", \"content\": \"$question\"}],
  \"flashtrace\": {\"top_k\": 5}
}")"
pretty <<<"$answer"

echo "--- a text that exists already, one number in it as the target"
answer="$(ask POST attributions "{
  \"model\": \"$model\", \"prompt\": \"$question\", \"completion\": \" It is 7306.\",
  \"flashtrace\": {\"target\": {\"text\": \"7306\"}, \"top_k\": 5}
}")"
pretty <<<"$answer"

echo "--- deferred: the answer has an id, the attribution comes later"
answer="$(ask POST attributions "{
  \"model\": \"$model\", \"prompt\": \"$question\", \"completion\": \" It is 7306.\",
  \"flashtrace\": {\"mode\": \"deferred\", \"top_k\": 5}
}")"
pretty <<<"$answer" >&2
id="$(value '["id"]' <<<"$answer")"
for _ in $(seq 100); do
  answer="$(ask GET "attributions/$id")"
  status="$(value '["status"]' <<<"$answer")"
  [[ "$status" == completed || "$status" == failed || "$status" == skipped ]] && break
  sleep 0.1
done
pretty <<<"$answer"
answer="$(ask DELETE "attributions/$id")"
pretty <<<"$answer"
