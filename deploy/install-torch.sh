#!/bin/sh
# Install the locked PyTorch in the build that fits this machine.
#
#   deploy/install-torch.sh PYTHON        PYTHON: the virtual environment's python
#
# A CPU machine must not download gigabytes of CUDA, and a GPU machine must not end on the CPU:
#   1. the locked version is there already: nothing to do;
#   2. macOS, or an NVIDIA driver that answers: the ordinary build;
#   3. otherwise the CPU build, first from wherever pip looks already (such as a hospital's own
#      wheelhouse), then from PyTorch's public index of CPU builds.
# MEDFL_TORCH=gpu or MEDFL_TORCH=cpu decides instead, for images built where they will not run.
set -eu

python=$1
version=$(sed -n 's/^torch==//p' "$(dirname "$0")/../requirements-torch.lock")
cpu_index=https://download.pytorch.org/whl/cpu

say() { printf 'torch: %s\n' "$*"; }

installed() {
    "$python" -c 'from importlib.metadata import version; print(version("torch").partition("+")[0])' \
        2>/dev/null || true
}

kind() {
    if [ -n "${MEDFL_TORCH:-}" ]; then
        echo "$MEDFL_TORCH"
    elif [ "$(uname -s)" = Darwin ] || nvidia-smi >/dev/null 2>&1; then
        echo gpu
    else
        echo cpu
    fi
}

if [ "$(installed)" = "$version" ]; then
    say "$version is installed"
    exit 0
fi

case $(kind) in
gpu)
    say "installing $version, the ordinary build for this system"
    "$python" -m pip install --quiet "torch==$version"
    ;;
cpu)
    say "no NVIDIA driver answers: installing the CPU build of $version"
    # The build's own dependencies are in requirements.lock.
    if ! "$python" -m pip install --quiet --no-deps "torch==$version+cpu" 2>/dev/null; then
        say "pip's own sources have no CPU build; taking it from $cpu_index"
        "$python" -m pip install --quiet --no-deps --index-url "$cpu_index" "torch==$version"
    fi
    ;;
*)
    say "MEDFL_TORCH is '$MEDFL_TORCH'; set it to cpu or gpu, or leave it out" >&2
    exit 2
    ;;
esac
say "installed $("$python" -c 'from importlib.metadata import version; print(version("torch"))')"
