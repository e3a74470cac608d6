#!/bin/sh
# Starts Triton on the models at $MODELS or /models; what is given to this script is given to Triton.
set -u
# what would let a client change the server, write files or reach its memory needs a key that nobody is told
key="mio-key=$(od -An -N 16 -t x1 /dev/urandom | tr -d ' \n')"
closed="logging,trace,shared-memory,model-repository:$key"
tritonserver \
    --model-repository="${MODELS:-/models}" \
    --disable-auto-complete-config \
    --strict-readiness=true \
    --http-restricted-api="$closed" \
    --grpc-restricted-protocol="$closed" \
    --exit-timeout-secs=30 \
    "$@" &
server=$!
ending=no
trap 'ending=yes; kill -TERM $server' TERM INT

# Triton goes on saying that it is ready when the process of a Python model has died, and answers nothing any more: it is
# ended here, for the container to start again
most=0
while [ $ending = no ] && kill -0 $server 2>/dev/null; do
    alive=$(cat /proc/[0-9]*/status 2>/dev/null |
        awk -v server=$server '/^State:/ {state = $2} /^PPid:/ {n += $2 == server && state != "Z"} END {print n + 0}')
    if [ "$alive" -lt "$most" ] && [ $ending = no ]; then
        echo "start.sh: $((most - alive)) of $most Python models died; the server is ended" >&2
        kill -TERM $server
        sleep 2
        kill -KILL $server 2>/dev/null
        exit 1
    fi
    most=$alive
    sleep 1 &
    wait $!
done
while kill -0 $server 2>/dev/null; do # a signal ends a wait, not the server
    wait $server
done
wait $server
