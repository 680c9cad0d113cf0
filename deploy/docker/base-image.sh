#!/bin/sh
# Makes the base image from Debian's packages alone: no registry of images is asked.
#
#   deploy/docker/base-image.sh [TAG]        default penstock-base:bookworm; MIRROR overrides Debian's mirror
#
# Debian bookworm with python3 (3.11), its venv module, CA certificates, and nothing that only a person at
# a terminal would need. The same packages give the same bytes: times are clamped to SOURCE_DATE_EPOCH, and
# what differs from run to run (logs, caches, machine id) is left out. A base that exists is kept;
# remove the image to make it anew. Needs mmdebstrap and, unless user namespaces are allowed, root.
set -eu

TAG=${1:-penstock-base:bookworm}
SUITE=bookworm
PACKAGES=python3-minimal,libpython3-stdlib,python3-venv,ca-certificates
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-1735689600} # 2025-01-01; any fixed second does
export SOURCE_DATE_EPOCH

docker image inspect "$TAG" >/dev/null 2>&1 && exit 0
command -v mmdebstrap >/dev/null || {
    echo "mmdebstrap isn't installed (apt-get install mmdebstrap); or build on an image of your own: make docker-build BASE_IMAGE=..." >&2
    exit 75
}
mode=auto
[ "$(id -u)" = 0 ] && mode=root

# Docs, manuals and translations are most of a small Debian; the copyright files stay. apt stays for images made
# on top. Bytecode is checked against nothing (unchecked-hash), because clamping changes the sources' times.
mmdebstrap --mode=$mode --variant=apt --include=$PACKAGES --quiet --format=tar \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
    --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' --dpkgopt='path-exclude=/usr/share/i18n/*' \
    --dpkgopt='path-exclude=/usr/share/lintian/*' \
    --aptopt='Acquire::Retries "3"' --aptopt='APT::Install-Recommends "false"' \
    --customize-hook='find "$1"/usr/lib -name __pycache__ -prune -exec rm -rf {} +' \
    --customize-hook='chroot "$1" python3 -m compileall -q --invalidation-mode unchecked-hash /usr/lib/python3.11 /usr/lib/python3' \
    --customize-hook='rm -rf "$1"/var/log/* "$1"/var/cache/* "$1"/var/lib/apt/lists/* "$1"/etc/machine-id' \
    --customize-hook='mkdir -p "$1"/var/lib/apt/lists/partial "$1"/var/cache/apt/archives/partial' \
    "$SUITE" - ${MIRROR:+"$MIRROR"} |
    docker import --change 'ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' \
        --change 'ENV LANG=C.UTF-8' --change 'CMD ["python3"]' \
        --change 'LABEL org.opencontainers.image.title=penstock-base' - "$TAG"
