# Sourced by the other scripts, from the root of the repository.
#
#     . scripts/_venv.sh
#     ensure_venv demo
#
# creates .venv if there is none, installs this package into it with the given extra,
# and puts its programs first on the PATH. `PYTHON` names the interpreter that .venv is
# created with (python3 if unset); it has to be Python 3.11 or newer.

ensure_venv() {
    _extra=$1
    _python=${PYTHON:-python3}
    _stamp=.venv/.installed-$_extra

    if [ ! -x .venv/bin/python ]; then
        _check_python "$_python" || return 1
        echo "==> Creating .venv with $_python"
        "$_python" -m venv .venv || { rm -rf .venv; return 1; }
    fi
    # The stamp holds what was installed, so an edit of the dependencies reinstalls.
    if ! cmp -s pyproject.toml "$_stamp"; then
        echo "==> Installing nodegrad and what '$_extra' needs into .venv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check \
            --editable ".[$_extra]" || return 1
        cp pyproject.toml "$_stamp"
    fi
    PATH=$PWD/.venv/bin:$PATH
    export PATH
}

_check_python() {
    if ! "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "nodegrad needs Python 3.11 or newer, and '$1' is not: set PYTHON to one." >&2
        return 1
    fi
}
