# Sourced by run and test: a virtual environment in the checkout, made once, and again when pyproject.toml changes.
# usage: environment DIRECTORY EXTRAS
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

environment() {
  local directory=$1 extras=$2 wanted
  wanted="$extras $(sha256sum < pyproject.toml)"
  if [ "$(cat "$directory/.installed" 2>/dev/null)" != "$wanted" ]; then
    echo "· installing into $directory (a few minutes, once)" >&2
    [ -x "$directory/bin/python" ] || "${PYTHON:-python3}" -m venv "$directory"
    install "$directory" "$extras"
    echo "$wanted" > "$directory/.installed"
  fi
  # shellcheck source=/dev/null
  . "$directory/bin/activate"
}

install() {
  local directory=$1 extras=$2
  # torch comes first and by itself: with a range pip would fetch the newest CUDA build, several GB, even where
  # there is no GPU. TORCH names another build to install, such as TORCH="torch==2.11.0".
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
