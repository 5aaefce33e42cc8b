#!/usr/bin/env bash
# Check what lies in deploy/ as far as that goes without a container engine, a cluster or systemd as
# process 1.   deploy/lint.sh PYTHON      PYTHON: of an environment with requirements-dev.lock
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(dirname "$1")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

say() { printf 'lint-deploy: %s\n' "$*"; }

say 'shell scripts (shellcheck)'
shellcheck deploy/*.sh .ci/run

say 'units (systemd-analyze verify and security)'
for unit in deploy/systemd/*.service; do
    # The commands are not installed here, and a missing one is all that may be complained of.
    sed 's#^ExecStart=/opt/medfl/bin/medfl[a-z-]*#ExecStart=/bin/true#' "$unit" >"$scratch/$(basename "$unit")"
done
for unit in "$scratch"/*.service; do
    # An unknown key is a line on stderr and no failure, so that any line fails here.
    told=$(systemd-analyze verify "$unit" 2>&1) || true
    if [ -n "$told" ]; then
        echo "$told"
        exit 1
    fi
    # 1.5 of 10; 0 is a service that can do nothing.
    systemd-analyze security --offline=true --threshold=15 "$unit" | tail -n 1
done
systemd-sysusers --dry-run "$PWD/deploy/systemd/medfl.sysusers" >/dev/null 2>&1

say 'image (hadolint)'
# DL3059: consecutive RUNs are layers that change apart from each other.
"$bin/hadolint" --failure-threshold info deploy/container/Containerfile

say 'compose file (the compose specification, by check-jsonschema)'
"$bin/check-jsonschema" --builtin-schema vendor.compose-spec deploy/container/compose.yaml

say 'chart (rendered by Go templates, checked by kubernetes-validate)'
python="$bin/python"
"$python" deploy/render_chart.py >/dev/null
"$python" deploy/render_chart.py role=site >/dev/null
"$python" deploy/render_chart.py role=site gpu=1 proxy=http://proxy:3128 storage.class=fast \
    coordinator.address=203.0.113.7/32 idle=true >/dev/null

say 'reverse proxy (nginx -t)'
mkdir "$scratch/nginx"
sed 's#^load_module modules/#load_module /usr/lib/nginx/modules/#' deploy/proxy/nginx.conf >"$scratch/nginx/nginx.conf"
nginx -q -t -p "$scratch/nginx" -c nginx.conf
say 'all well'
