#!/bin/sh
# Make the ordinary user, with subordinate ids, as which the tests run boxes without root. Needs root; does nothing the second time.
set -eu
user=hutch-test
id "$user" >/dev/null 2>&1 || useradd --create-home --shell /bin/sh "$user"
for file in /etc/subuid /etc/subgid; do
    grep -q "^$user:" "$file" 2>/dev/null || echo "$user:1000000:65536" >>"$file"
done
