#!/bin/sh
# install.sh EXTRA...: install the dependencies in pyproject.toml, with these extras, into /venv, in the versions and with
# the hashes of requirements.lock. uv, used as it is several times faster than pip, is removed afterwards.
set -eu
cd "$(dirname "$0")"
locked() { sed -n "/^$1==/,/^[^ ]/{/^$1==/p;/^    --hash/p}" requirements.lock; }

python -m venv /tools
locked uv > /tools/uv.lock
locked setuptools > /tools/setuptools.lock
/tools/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r /tools/uv.lock

export UV_NO_CACHE=1 UV_PYTHON=/venv/bin/python UV_COMPILE_BYTECODE=1
python -m venv --without-pip /venv
# Build source distributions with the locked setuptools, not the newest one.
/tools/bin/uv pip install --require-hashes -r /tools/setuptools.lock
/tools/bin/uv pip install --require-hashes --no-build-isolation -c requirements.lock -r pyproject.toml \
  $(printf -- '--extra %s ' "$@")
/tools/bin/uv pip check
rm -rf /tools
