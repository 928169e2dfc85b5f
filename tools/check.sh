#!/usr/bin/env bash
# Lint, format and types: tools/check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
# mypy sees the package as it is installed: callbacks/ as sdft.callbacks.
tree=build/types
rm -rf "$tree" && mkdir -p "$tree"
cp -r sdft "$tree/sdft" && cp -r callbacks "$tree/sdft/callbacks"
cd "$tree"
mypy --config-file ../../pyproject.toml -p sdft
