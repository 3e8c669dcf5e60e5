#!/bin/sh
# Install what the given make target needs, from Debian's packages; nothing is downloaded when all of it is there.
# usage: setup.sh PACKAGE...
set -eu

missing=
for package in "$@"; do
    [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null)" = "ii " ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

run=
if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || { echo "setup: as root, run: apt-get install$missing" >&2; exit 1; }
    run=sudo
fi
echo "setup: installing$missing" >&2
$run apt-get update -qq
# shellcheck disable=SC2086  # a list of words
DEBIAN_FRONTEND=noninteractive $run apt-get install -y -qq --no-install-recommends $missing >/dev/null
