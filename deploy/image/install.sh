#!/bin/sh
# The two steps of the image's build stages, in this order so that a change of code installs no dependency again:
#
#   install.sh needs EXTRAS [pip options]   what the lock says: torch first and by its exact version
#   install.sh code                         the project itself, then away with what only building needs
set -eu

venv=/opt/venv
lock=requirements.lock
pip="$venv/bin/pip --no-cache-dir --disable-pip-version-check"

pin() { grep "^$1==" "$lock"; }

needs() {
    extras=$1
    shift
    python3 -m venv "$venv"
    # shellcheck disable=SC2086
    $pip install "$@" -c "$lock" "$(pin torch)" "$(pin setuptools)"
    $pip install "$@" -c "$lock" --no-build-isolation ".[$extras]"
}

code() {
    $pip install --no-index --no-deps --no-build-isolation --force-reinstall .
    site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # Headers and static libraries serve those who compile against PyTorch, tests those who write it.
    rm -rf "$site/torch/include" "$site/torch/share/cmake"
    find "$site" -name '*.a' -delete
    find "$site" -type d -name tests -not -path "$site/torch/*" -prune -exec rm -rf {} +
    $pip uninstall --yes pip
}

"$@"
