#!/bin/sh
# install.sh EXTRA...: into /venv what pyproject.toml beside this file names, with these extras, in the versions and with
# the hashes of requirements.lock. uv, from the lock too, is gone at the end: it installs in a minute where pip takes several.
set -eu
cd "$(dirname "$0")"
locked() { sed -n "/^$1==/,/^[^ ]/{/^$1==/p;/^    --hash/p}" requirements.lock; }

python -m venv /tools
locked uv > /tools/uv.lock
locked setuptools > /tools/setuptools.lock
/tools/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes -r /tools/uv.lock

# The files get one time, and bytecode has none: the same lock makes the same layer, where no cache knows it too.
export UV_NO_CACHE=1 UV_PYTHON=/venv/bin/python UV_COMPILE_BYTECODE=1 PYC_INVALIDATION_MODE=UNCHECKED_HASH
python -m venv --without-pip /venv
# what comes as source is built by this setuptools, not by today's
/tools/bin/uv pip install --require-hashes -r /tools/setuptools.lock
/tools/bin/uv pip install --require-hashes --no-build-isolation -c requirements.lock -r pyproject.toml \
  $(printf -- '--extra %s ' "$@")
/tools/bin/uv pip check
find /venv -exec touch --no-dereference --date=@0 {} +
rm -rf /tools
