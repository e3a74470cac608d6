#!/bin/sh
# Builds the TensorRT engine on the GPU that will serve; mio verify --server is then its proof.
set -eu
cd "$(dirname "$0")"
docker run --rm --gpus all -v "$PWD:/repository" -w /repository \
    nvcr.io/nvidia/tensorrt:{{ release }}-py3 \
    trtexec --onnx=engine/model.onnx --saveEngine=models/{{ name }}_encode/1/model.plan \
    --stronglyTyped --noTF32 \
    --minShapes=images:1x{{ shape | join("x") }} --optShapes=images:{{ [32, max_batch] | min }}x{{ shape | join("x") }} --maxShapes=images:{{ max_batch }}x{{ shape | join("x") }}
