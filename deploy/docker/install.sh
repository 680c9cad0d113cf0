#!/bin/sh
# install.sh IMAGE: puts what IMAGE needs into the environment /opt/penstock, which has no pip of its own.
# Wheels that `make docker-wheels` put into the build context are used alone; without them pip asks its index.
set -eu
[ -d /opt/penstock ] || python3 -m venv --without-pip /opt/penstock
[ -d /build/pip ] || python3 -m venv /build/pip
source=
if ls wheels/*.whl >/dev/null 2>&1; then
    source='--no-index --find-links wheels'
fi
# shellcheck disable=SC2086
/build/pip/bin/python -m pip --python /opt/penstock/bin/python install --disable-pip-version-check --no-cache-dir --no-compile \
    --quiet -c wheels/requirements.lock -r "wanted/$1.txt" $source
# What packages bring for their own tests and for compiling against them.
cd /opt/penstock/lib/python3.*/site-packages
find . -type d \( -name tests -o -path ./torch/test -o -path ./torch/include -o -path ./torch/share \) -prune -exec rm -rf {} +
[ ! -d torch/bin ] || find torch/bin -type f ! -name torch_shm_manager -delete
# Bytecode now, because the root is read-only later; of transformers' hundreds of models a process loads one.
/opt/penstock/bin/python -m compileall -q -j 0 -x 'torch/testing|transformers/models/(?!auto)' /opt/penstock/lib
