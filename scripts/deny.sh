#!/usr/bin/env bash
# Checks the dependencies against deny.toml: licences, sources, banned crates, and known vulnerabilities
# where their database can be reached. Installs cargo-deny when it is missing.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! cargo deny --version >/dev/null 2>&1; then
  echo "check: installing cargo-deny (checks licences, sources and known vulnerabilities)" >&2
  cargo install --locked cargo-deny || {
    echo "check: cargo-deny could not be installed (see above)" >&2
    echo "  Remedy: check the network, or install it by hand, then run this again" >&2
    exit 1
  }
fi

echo "cargo deny check bans licenses sources"
cargo deny check bans licenses sources

# A database that cannot be fetched says nothing about the dependencies; everything else counts.
if cargo deny fetch db >/dev/null 2>&1; then
  echo "cargo deny check advisories"
  cargo deny check --disable-fetch advisories
else
  echo "check: the database of known vulnerabilities cannot be reached; that part is left out" >&2
fi
