# Sourced by run and test: a virtual environment in the checkout, made once, and again when pyproject.toml or
# what the CPU kernels are compiled from changes, since an editable install compiles them into the checkout.
# usage: environment DIRECTORY EXTRAS
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment() {
  local directory=$1 extras=$2 wanted
  wanted="$extras $(cat pyproject.toml scripts/build_hook.py moeflow/kernels/cpp_build.py moeflow/kernels/cpp/* | sha256sum)"
  if [ "$(cat "$directory/.installed" 2>/dev/null)" != "$wanted" ]; then
    local python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      { echo "error: moeflow needs Python 3.11 or newer, $python is $("$python" -V); set PYTHON to one" >&2; exit 1; }
    echo "· installing into $directory (once; torch's CUDA build is over 2 GB, see TORCH in README)" >&2
    [ -x "$directory/bin/python" ] || "$python" -m venv "$directory"
    install "$directory" "$extras"
    echo "$wanted" > "$directory/.installed"
  fi
  # shellcheck source=/dev/null
  . "$directory/bin/activate"
}

install() {
  local directory=$1 extras=$2
  # torch comes first and by itself, so that TORCH can name another build, with pip's options:
  # TORCH="torch==2.11.0", or the CPU build that pytorch.org offers, which is a tenth of the size of the CUDA build.
  if ! "$directory/bin/python" -c "import torch" 2>/dev/null; then
    "$directory/bin/pip" install --quiet $(torch_package)
  fi
  # hqq is a source distribution whose CUDA extension moeflow does not use
  DISABLE_CUDA=1 "$directory/bin/pip" install --quiet --editable ".$extras"
}

torch_package() {
  if [ -n "${TORCH:-}" ]; then
    echo "$TORCH"
  elif command -v nvidia-smi >/dev/null 2>&1; then
    echo "torch>=2.11"
  else
    echo "torch==2.13.0"
  fi
}
