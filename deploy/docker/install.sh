#!/bin/sh
# install.sh IMAGE: an environment in /opt/penstock with what IMAGE needs, and no pip in it.
# Wheels that `make docker-wheels` put into the build context are used alone; without them pip asks its index.
set -eu
PY=/opt/penstock/bin/python
python3 -m venv /opt/penstock
python3 requirements.py "$1" >"wanted-$1.txt"
if ls wheels/*.whl >/dev/null 2>&1; then
    set -- "$1" --no-index --find-links wheels
fi
image=$1
shift
$PY -m pip install --disable-pip-version-check --no-cache-dir --no-compile --quiet -c wheels/requirements.lock -r "wanted-$image.txt" "$@"
$PY -m pip uninstall --disable-pip-version-check --quiet --yes setuptools pip
# What packages bring for their own tests and for compiling against them.
find /opt/penstock/lib -type d \( -name tests -o -path '*/torch/include' -o -path '*/torch/share' \) -prune -exec rm -rf {} +
# Bytecode now, because the root is read-only later; of transformers' hundreds of models a process loads one.
$PY -m compileall -q -j 0 -x 'transformers/models/(?!auto)' /opt/penstock/lib
