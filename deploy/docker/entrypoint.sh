#!/bin/sh
# entrypoint.sh SERVICE [flags]: runs `python -m services.SERVICE` in this process' place.
# Peers reach a container by its address, which is known only now.
set -eu
service=$1
shift
section=$(echo "$service" | tr '[:lower:]' '[:upper:]')
if [ "$service" != router ]; then
    eval "advertised=\${PENSTOCK_${section}_ADVERTISE_HOST:-}"
    [ -n "$advertised" ] || export "PENSTOCK_${section}_ADVERTISE_HOST=$(hostname -i | cut -d' ' -f1)"
fi
exec python -m "services.$service" "$@"
