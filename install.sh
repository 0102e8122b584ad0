#!/bin/sh
# install.sh PYTHON VENV TARGET: makes a virtual environment and installs this project into it.
# llama.cpp is compiled on the way, which takes minutes and says nothing; this says that it is alive.
set -eu
python=$1 venv=$2 target=$3

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "Headwater needs Python 3.11 or newer; '$python' is not. Try: make PYTHON=/path/to/python3.12" >&2
    exit 1
fi
if ! command -v cc >/dev/null && ! command -v gcc >/dev/null && ! command -v clang >/dev/null; then
    echo "Headwater compiles llama.cpp and needs a C and C++ compiler (Debian: apt install build-essential)" >&2
    exit 1
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"

"$venv/bin/python" -c 'import llama_cpp' 2>/dev/null ||
    echo "Installing. The first time compiles llama.cpp, which takes 4 to 8 minutes on two cores."
log=$venv/install.log
"$venv/bin/python" -m pip install --disable-pip-version-check --editable "$target" >"$log" 2>&1 &
pip=$!
start=$(date +%s)
while kill -0 "$pip" 2>/dev/null; do
    sleep 1
    elapsed=$(($(date +%s) - start))
    if [ $((elapsed % 10)) -eq 0 ] && [ "$elapsed" -gt 0 ]; then
        echo "  ${elapsed} s: $(tail -n 1 "$log" | cut -c 1-100)"
    fi
done
if ! wait "$pip"; then
    echo "The installation failed; its last words, of $log:" >&2
    tail -n 30 "$log" >&2
    exit 1
fi
