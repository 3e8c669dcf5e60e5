#!/bin/sh
# Install what the benchmarks compare with, where it is absent. Needs root and the machine's own apt sources.
# No daemon is started: the benchmarks start and stop their own.
set -eu

missing=
need() { # command, package
    command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || missing="$missing $2"
}
need crun crun
need runc runc
need podman podman
need dockerd docker.io
need skopeo skopeo
need umoci umoci
need slirp4netns slirp4netns
need docker-registry docker-registry
need mmdebstrap mmdebstrap
need busybox busybox-static
[ -n "$missing" ] || exit 0

policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    # Packages ask this file whether they may start their daemon: 101 is "no".
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
# shellcheck disable=SC2086  # a list of words
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing
