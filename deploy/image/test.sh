#!/usr/bin/env bash
# Builds the image and uses it, on a machine without a Docker engine: `make image-test`.
#
# Needs root, buildah, debootstrap and curl. Where the store of buildah has no image of the base's name, one is made
# by debootstrap from this machine's own package source. The build sees this machine's pip configuration and
# certificates. What is shown: the image builds; its command converts a checkpoint; the service runs as user 10001 on a
# read-only root file system with the image's own environment and command, with two HTTP processes before the one that
# computes, becomes healthy by the image's own health check, answers a prediction, and ends with 0 on SIGTERM.
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-.venv/bin/python}
base=docker.io/library/python:3.11-slim
image=localhost/foldserve:image-test
export BUILDAH_ISOLATION=chroot
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { printf '\n== %s\n' "$*"; }

for tool in buildah debootstrap curl unshare chroot; do
    command -v "$tool" >/dev/null || { echo "$tool is missing: apt-get install buildah debootstrap curl util-linux" >&2; exit 1; }
done

if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
    say "a base of the name $base, by debootstrap"
    mirror=${DEBIAN_MIRROR:-$(sed -n 's/^URIs: *//p' /etc/apt/sources.list.d/*.sources 2>/dev/null | head -n 1)}
    debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/base" ${mirror:+"$mirror"} >/dev/null
    container=$(buildah from scratch)
    tar -C "$work/base" -c . | tar -C "$(buildah mount "$container")" -x
    buildah config --cmd python3 "$container"
    buildah commit --quiet --rm "$container" "$base" >/dev/null
    rm -rf "$work/base"
fi

say "build"
# What pip is told on this machine, as options for the build, and the places that those name.
configured() { "$python" -m pip config list | sed -n "s/^[^.]*\.$1='\(.*\)'$/\1/p" | tr ' ' '\n' | sort -u; }
pip_options=${PIP_OPTIONS-$(for key in index-url extra-index-url find-links; do configured $key | sed "s/^/--$key /"; done | tr '\n' ' ')}
# A folder that is an index is mounted with what lies beside it, since that is where its files are.
places=$(tr ' ' '\n' <<<"$pip_options" | sed -n -e 's#^file://\(.*\)/[^/]*$#\1#p' -e 's#^\(/.*\)$#\1#p')
mounts=()
for place in /etc/ssl/certs /etc/pip.conf /etc/xdg/pip $places; do
    [ -e "$place" ] && mounts+=(-v "$place:$place:ro")
done
built=$(date +%s)
buildah bud --quiet --format docker --pull-never --network=host "${mounts[@]}" --build-arg TORCH_INDEX="${TORCH_INDEX-}" \
    --build-arg PIP_OPTIONS="$pip_options" --target "${TARGET:-cpu}" -t "$image" .
echo "built in $(($(date +%s) - built)) s, $(buildah images --format '{{.Size}}' "$image")"

say "convert a checkpoint with the image's command"
data=$work/data
mkdir -m 0755 "$data"
"$python" - "$data" <<'PYTHON'
import sys
from pathlib import Path

import torch

from service.demo.files import photograph, save_checkpoint
from service.networks import RepVGG

folder = Path(sys.argv[1])
torch.manual_seed(0)
save_checkpoint(RepVGG([1, 1, 1, 1], [8, 8, 16, 32], num_classes=12), folder / "train.pth")
(folder / "photograph.jpg").write_bytes(photograph())
PYTHON
chown -R 10001:10001 "$data"
container=$(buildah from --pull-never "$image")
trap 'kill "${server:-}" 2>/dev/null || true; buildah rm "$container" >/dev/null; rm -rf "$work"' EXIT
buildah run -v "$data:/mnt" --user 10001:10001 "$container" foldserve convert /mnt/train.pth -o /mnt/deploy.safetensors
test -s "$data/deploy.safetensors"

say "serve from a read-only root file system"
root=$(buildah mount "$container")
mapfile -t environment < <(buildah inspect --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$container" | grep .)
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
environment+=("FOLDSERVE_HOST=127.0.0.1" "FOLDSERVE_PORT=$port")
# Ends as the command itself, so that a background `inside` is the service's own process.
inside() {
    exec unshare --mount bash -euc '
        root=$1 data=$2; shift 2
        mount --bind "$root" "$root" && mount -o remount,bind,ro "$root"
        mount --rbind /dev "$root/dev" && mount -t proc proc "$root/proc" && mount --bind "$data" "$root/data"
        cd "$root"
        exec chroot --userspec=10001:10001 . /usr/bin/env -i -C /data "$@"
    ' inside "$root" "$data" "${environment[@]}" "$@"
}
if (inside sh -c 'touch /opt/venv/x') 2>/dev/null; then
    echo "the root file system can be written: this check could not see anything" >&2
    exit 1
fi
inside foldserve serve --model tiny=/data/train.pth --http-processes 2 2>"$work/log" &
server=$!
for _ in $(seq 600); do
    [ "$(curl -s -o /dev/null -w '%{http_code}' "http://127.0.0.1:$port/health/ready")" = 200 ] && break
    kill -0 "$server" || { cat "$work/log" >&2; exit 1; }
    sleep 0.2
done
mapfile -t check < <(buildah inspect --format '{{range .Docker.Config.Healthcheck.Test}}{{println .}}{{end}}' "$container" | grep . | tail -n +2)
(inside "${check[@]}")
echo "the image's health check passes"
curl -sS --fail-with-body --data-binary @"$data/photograph.jpg" -H 'Content-Type: image/jpeg' \
    "http://127.0.0.1:$port/v1/models/tiny/predict?top_k=2"
echo
mapfile -t users < <(ps -o uid= --pid "$server" --ppid "$server" | tr -d ' ')
test "${#users[@]}" -ge 3 # the process that computes and its two HTTP processes
test "$(sort -u <<<"$(printf '%s\n' "${users[@]}")")" = 10001
echo "its ${#users[@]} processes run as user 10001"
kill -TERM "$server"
wait "$server" && echo "SIGTERM: exit 0"
server=
say "the image works"
