#!/usr/bin/env bash
# The name under which older documents know the script of llama3.
exec bash "$(dirname -- "${BASH_SOURCE[0]}")/../llama3/run_pa.sh" "$@"
