#!/bin/sh
# Writes common/pb from proto/. `proto/generate.sh DIR` writes there instead (CI compares the two).
set -eu
cd "$(dirname "$0")/.."
out="${1:-common/pb}"
mkdir -p "$out"
python="${PYTHON:-python3}"
"$python" -m grpc_tools.protoc -I proto --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" proto/*.proto
# protoc writes top-level imports; these modules live in the package common.pb.
sed -i -E 's/^import ([a-z]+_pb2) as/from common.pb import \1 as/' "$out"/*_pb2_grpc.py
