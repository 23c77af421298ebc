#!/usr/bin/env bash
# What one sees: a chat completion with the five prompt tokens its answer came from most; the same for
# a text that already exists; and an attribution that is fetched later by its id.
#
#   examples/curl.sh [BASE_URL]      (needs curl; with --api-key: OPENAI_API_KEY=... examples/curl.sh)
set -euo pipefail

base="${1:-${FLASHTRACE_BASE_URL:-http://127.0.0.1:8000}}/v1"
ask() { # ask METHOD PATH [BODY]
  curl --silent --show-error --fail-with-body --request "$1" "$base/$2" \
    --header "Authorization: Bearer ${OPENAI_API_KEY:-none}" \
    --header 'Content-Type: application/json' ${3:+--data "$3"}
  echo
}
value() { sed -n "s/.*\"$1\":\"\([^\"]*\)\".*/\1/p" | head -n 1; }

model="${MODEL:-$(ask GET models | sed 's/.*"data":\[{"id":"\([^"]*\)".*/\1/')}"
question="The lift is out of order. The secret access code for the Lisbon office is 7306. What is the secret access code for the Lisbon office? Answer with the code."

echo "--- a completion with its attribution"
ask POST chat/completions "{
  \"model\": \"$model\", \"temperature\": 0, \"max_tokens\": 24,
  \"messages\": [{\"role\": \"user\", \"content\": \"$question\"}],
  \"flashtrace\": {\"top_k\": 5}
}"

echo "--- a text that exists already, one number in it as the target"
ask POST attributions "{
  \"model\": \"$model\", \"prompt\": \"$question\", \"completion\": \" It is 7306.\",
  \"flashtrace\": {\"target\": {\"text\": \"7306\"}, \"top_k\": 5}
}"

echo "--- deferred: the answer has an id, the attribution comes later"
id="$(ask POST attributions "{
  \"model\": \"$model\", \"prompt\": \"$question\", \"completion\": \" It is 7306.\",
  \"flashtrace\": {\"mode\": \"deferred\", \"top_k\": 5}
}" | tee /dev/stderr | value id)"
for _ in $(seq 100); do
  answer="$(ask GET "attributions/$id")"
  status="$(value status <<<"$answer")"
  [[ "$status" == completed || "$status" == failed || "$status" == skipped ]] && break
  sleep 0.1
done
echo "$answer"
ask DELETE "attributions/$id"
