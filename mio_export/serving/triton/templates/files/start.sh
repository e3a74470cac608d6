#!/bin/sh
# Starts Triton on the models here or at $MODELS; what is given to this script is given to Triton.
set -eu
# what would let a client change the server, write files or reach its memory needs a key that nobody is told
key="mio-key=$(od -An -N 16 -t x1 /dev/urandom | tr -d ' \n')"
closed="logging,trace,shared-memory,model-repository:$key"
exec tritonserver \
    --model-repository="${MODELS:-/models}" \
    --disable-auto-complete-config \
    --strict-readiness=true \
    --http-restricted-api="$closed" \
    --grpc-restricted-protocol="$closed" \
    --exit-timeout-secs=30 \
    "$@"
