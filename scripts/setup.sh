#!/usr/bin/env bash
# Installs what Wrenn needs on this machine, and nothing when all of it is there.
#
#   scripts/setup.sh [--for up|test|bench]
#
# Every requirement is checked first, by what it provides (a command, a header), not by package names, so
# that software from other sources counts. Only then is apt asked, once, for what is missing, after a list
# that says what and why. Running it again after a failure goes on where it stopped.
set -euo pipefail

say()  { printf '%s\n' "$*" >&2; }
fail() { say "setup: $1"; say "  Remedy: $2"; exit 1; }
have() { command -v "$1" >/dev/null 2>&1; }

purpose=up
while [ $# -gt 0 ]; do
  case "$1" in
    --for)   purpose=${2:-}; shift; [ $# -eq 0 ] || shift ;;
    --for=*) purpose=${1#--for=}; shift ;;
    -h|--help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "unknown argument '$1'" "use --for up, --for test or --for bench" ;;
  esac
done
case "$purpose" in
  up|test|bench) ;;
  *) fail "unknown purpose '$purpose'" "use --for up, --for test or --for bench" ;;
esac

[ "$(uname -s)" = Linux ] || fail "Wrenn runs on Linux; this is $(uname -s)" "use a Linux machine or virtual machine"
[ "$(uname -m)" = x86_64 ] || fail "Wrenn runs on x86_64 for now; this machine is $(uname -m)" "use an x86_64 machine"

# System tools live in sbin, which an ordinary user's PATH may lack; rustup puts cargo into the home.
PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin:${CARGO_HOME:-${HOME:-/root}/.cargo}/bin"
export PATH
minimum_cargo=1.95
minimum_qemu=7.2
preferred_qemu=10

# at_least WANTED FOUND: whether version FOUND is WANTED or newer (major.minor).
at_least() {
  local wa wb fa fb
  IFS=. read -r wa wb _ <<<"$1"
  IFS=. read -r fa fb _ <<<"$2"
  [ "${fa:-0}" -gt "$wa" ] || { [ "${fa:-0}" -eq "$wa" ] && [ "${fb:-0}" -ge "${wb:-0}" ]; }
}

# The version as major.minor, or nothing when QEMU is missing or cannot run.
qemu_version() {
  local text
  text=$(qemu-system-x86_64 --version 2>/dev/null) || return 0
  [[ $text =~ version\ ([0-9]+\.[0-9]+) ]] && printf '%s' "${BASH_REMATCH[1]}"
  return 0
}

cargo_version() {
  local text
  text=$(cargo --version 2>/dev/null) || return 0
  [[ $text =~ ^cargo\ ([0-9]+\.[0-9]+) ]] && printf '%s' "${BASH_REMATCH[1]}"
  return 0
}

# The folder of PostgreSQL's server programs, or nothing. Debian keeps them out of the PATH.
postgres() {
  local found
  found=$(compgen -G '/usr/lib/postgresql/*/bin/initdb' | sort -V | tail -n 1) || true
  [ -n "$found" ] || found=$(command -v initdb) || return 0
  printf '%s' "${found%/initdb}"
}

# ---------------------------------------------------------------- what is missing
packages=()
reasons=()
need() { packages+=("$1"); reasons+=("$2"); }

qemu=$(qemu_version)
want_qemu=""
if [ -z "$qemu" ] || ! at_least $preferred_qemu "$qemu"; then want_qemu=yes; fi
# The unpacked file system of a template is made and checked with these.
have qemu-img   || need qemu-utils  "disk images of templates and sandboxes (qemu-img)"
have mmdebstrap || need mmdebstrap  "builds the root file system of the templates"
have mke2fs     || need e2fsprogs   "makes the ext4 disks of the templates (mke2fs)"
have dpkg-deb   || need dpkg        "unpacks the guest kernel's package (dpkg-deb)"
have curl       || need curl        "fetches the guest kernel's package; also used in the examples"
[ -s /etc/ssl/certs/ca-certificates.crt ] || need ca-certificates "certificates for downloads over TLS"
if [ "$(id -u)" -ne 0 ]; then
  have newuidmap || need uidmap "builds templates without root (newuidmap)"
fi
have make || need make "runs the Makefile"
have cc || have gcc || need gcc "links the Rust programs"
{ [ -e /usr/include/stdio.h ] && compgen -G '/usr/lib/x86_64-linux-gnu/crt1.o' >/dev/null; } || [ -e /usr/lib64/crt1.o ] || [ -e /usr/lib/crt1.o ] ||
  need libc6-dev "the C library's start files, for linking"
if [ "$purpose" = test ]; then
  have python3 || need python3 "runs the tests that use the Python SDKs"
  # Debian splits this part off; a Python from elsewhere brings it along.
  case "$(command -v python3 || printf /usr/bin/python3)" in
    /usr/bin/python3) compgen -G '/usr/lib/python3*/ensurepip/__init__.py' >/dev/null ||
      need python3-venv "isolates the Python SDKs for the tests" ;;
  esac
  have redis-server || need redis-server "the control plane's tests run several instances over Redis"
fi
# Tests and the bench start servers of their own, in folders of their own.
if [ "$purpose" != up ]; then
  [ -n "$(postgres)" ] || need postgresql "the control plane is tested and measured on PostgreSQL too (initdb, postgres)"
fi
cargo=$(cargo_version)
want_cargo=""
if [ -z "$cargo" ] || ! at_least $minimum_cargo "$cargo"; then want_cargo=yes; fi

# QEMU that is merely older than preferred is no reason to act twice: what was found out is remembered by
# what apt offers, which costs a query, and only on machines in that state.
if [ -z "${packages[*]}" ] && [ -z "$want_qemu" ] && [ -z "$want_cargo" ]; then
  say "setup: nothing to install (QEMU $qemu, cargo $cargo)"
  exit 0
fi

# ---------------------------------------------------------------- apt
apt_ready=""
if have apt-get && have dpkg-query; then apt_ready=yes; fi

as_root=()
if [ "$(id -u)" -ne 0 ]; then as_root=(sudo); fi
need_root() {
  [ "$(id -u)" -eq 0 ] && return
  have sudo || fail "installing packages needs root, and sudo is not installed" \
    "run this once as root: apt-get install sudo, or install by hand: ${packages[*]}"
  # Ask for the password only when a person is there to type it.
  sudo -n true 2>/dev/null && return
  [ -t 0 ] || fail "installing packages needs root, and sudo asks for a password that nobody can type here" \
    "run scripts/setup.sh from a terminal, or as root"
  sudo -v || fail "sudo did not accept you" "ask an administrator to install: ${packages[*]}"
}
apt() {
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1 \
    apt-get -o DPkg::Lock::Timeout=300 -o APT::Color=0 -qq "$@"
}
refreshed=""
refresh() {
  [ -z "$refreshed" ] || return 0
  need_root
  say "setup: reading the package lists"
  apt update >&2 || fail "the package lists could not be read (see above)" \
    "check the network and the entries in /etc/apt, then run this again"
  refreshed=yes
}
# candidates PACKAGE: every version apt offers, newest first, as 'version suite-line'.
candidates() { apt-cache madison "$1" 2>/dev/null | awk -F'|' '{gsub(/ /, "", $2); print $2 "|" $3}'; }
upstream() { local v=${1#*:}; v=${v%%[+~-]*}; printf '%s' "$v"; }

codename=""
# shellcheck disable=SC1091
if [ -r /etc/os-release ]; then codename=$(. /etc/os-release; if [ "${ID:-}" = debian ]; then printf '%s' "${VERSION_CODENAME:-}"; fi); fi

# own_mirror: URI, components and keyring of the source that serves this release itself.
own_mirror() {
  awk -v suite="$codename" '
    function flush() { if (uri != "" && found && !done) { print uri "|" comps "|" key; done = 1 } uri = comps = key = ""; found = 0 }
    FILENAME ~ /\.sources$/ {
      if (FNR == 1) flush()
      if ($0 ~ /^[[:space:]]*$/) { flush(); next }
      if (tolower($1) == "enabled:" && tolower($2) == "no") found = -99
      if (tolower($1) == "uris:") uri = $2
      if (tolower($1) == "suites:") for (i = 2; i <= NF; i++) if ($i == suite) found++
      if (tolower($1) == "components:") { comps = $2; for (i = 3; i <= NF; i++) comps = comps " " $i }
      if (tolower($1) == "signed-by:") key = $2
      if (found < 0) found = -99
      next
    }
    $1 == "deb" && !done {
      line = $0; opts = ""
      if (match(line, /\[[^]]*\]/)) { opts = substr(line, RSTART + 1, RLENGTH - 2); line = substr(line, 1, RSTART - 1) substr(line, RSTART + RLENGTH) }
      n = split(line, f, /[[:space:]]+/)
      if (f[3] == suite) {
        k = ""; if (match(opts, /signed-by=[^ ]+/)) k = substr(opts, RSTART + 10, RLENGTH - 10)
        c = f[4]; for (i = 5; i <= n; i++) if (f[i] != "") c = c " " f[i]
        print f[2] "|" c "|" k; done = 1
      }
    }
    END { flush() }
  ' "$@" 2>/dev/null | head -n 1
}

# Debian 12's own QEMU is 7.2; its backports have 10, which restores memory faster.
add_backports() {
  local list=/etc/apt/sources.list.d/wrenn-backports.sources files=() f mirror uri comps key
  for f in /etc/apt/sources.list.d/*.sources /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    [ -r "$f" ] && files+=("$f")
  done
  [ ${#files[@]} -gt 0 ] || return 1
  mirror=$(own_mirror "${files[@]}")
  [ -n "$mirror" ] || return 1
  IFS='|' read -r uri comps key <<<"$mirror"
  say "setup: adding $codename-backports from $uri ($list), for QEMU $preferred_qemu"
  need_root
  {
    printf '# Written by Wrenn for a newer QEMU; remove it together with that.\n'
    printf 'Types: deb\nURIs: %s\nSuites: %s-backports\nComponents: %s\n' "$uri" "$codename" "${comps:-main}"
    # A suite whose key is not named is checked against the system's keys.
    if [ -n "$key" ]; then printf 'Signed-By: %s\n' "$key"; fi
  } | "${as_root[@]}" tee "$list" >/dev/null || fail "could not write $list" "check that /etc/apt is writable for root"
  refreshed=""
}

# Whether root is there without asking anybody.
root_now() { [ "$(id -u)" -eq 0 ] || { have sudo && sudo -n true 2>/dev/null; }; }

# offered_qemu: 'version|source' of the best QEMU that apt knows of, if it is as new as preferred.
offered_qemu() {
  local version rest
  while IFS='|' read -r version rest; do
    if at_least $preferred_qemu "$(upstream "$version")"; then printf '%s|%s' "$version" "$rest"; return; fi
  done < <(candidates qemu-system-x86)
}

# The suite to take QEMU and what it depends on from, when it is not the release itself.
qemu_suite=""

# Puts QEMU on the list. An old but sufficient one is only replaced where that takes no password.
choose_qemu() {
  local offer sufficient="" backports="$codename-backports"
  if [ -n "$qemu" ] && at_least $minimum_qemu "$qemu"; then sufficient=yes; fi
  if [ -n "$sufficient" ] && ! root_now; then return 0; fi
  # A fresh image has no package lists, so nothing seems to be offered.
  [ -n "$(candidates qemu-system-x86)" ] || refresh
  offer=$(offered_qemu)
  if [ -z "$offer" ] && [ "$codename" = bookworm ]; then
    if ! grep -rqsE "^[^#]*$backports" /etc/apt/sources.list /etc/apt/sources.list.d --include='*.list' --include='*.sources'; then
      add_backports || say "setup: no source of $codename itself found in /etc/apt, so its backports are not added"
    fi
    compgen -G "/var/lib/apt/lists/*$backports*" >/dev/null || refresh
    offer=$(offered_qemu)
  fi
  if [ -n "$offer" ]; then
    case "$offer" in *" $backports/"*) qemu_suite=$backports ;; esac
    need qemu-system-x86 "runs the sandboxes${qemu:+ (QEMU $qemu is here; $preferred_qemu restores memory faster)}"
  elif [ -n "$sufficient" ]; then
    say "setup: QEMU $qemu stays; no source here offers $preferred_qemu"
  else
    need qemu-system-x86 "runs the sandboxes${qemu:+ (QEMU $qemu is too old; $minimum_qemu is the least)}"
  fi
}

# keep_idle: Debian's packages of PostgreSQL and Redis would each start a server on its usual port, which
# nobody here asked for. PostgreSQL's is not even made; Redis' is kept from starting by the usual policy-rc.d.
idle=""
keep_idle() {
  case " ${packages[*]} " in *" postgresql "*)
    local conf=/etc/postgresql-common/createcluster.d/wrenn.conf
    "${as_root[@]}" mkdir -p "${conf%/*}"
    printf '# Written by Wrenn: its tests and its bench start servers of their own, so no cluster is made here.\ncreate_main_cluster = false\n' |
      "${as_root[@]}" tee "$conf" >/dev/null ;;
  esac
  case " ${packages[*]} " in *" redis-server "*) ;; *) return 0 ;; esac
  # A policy that is there already was somebody's decision.
  [ ! -e /usr/sbin/policy-rc.d ] || return 0
  printf '#!/bin/sh\nexit 101\n' | "${as_root[@]}" tee /usr/sbin/policy-rc.d >/dev/null
  "${as_root[@]}" chmod 0755 /usr/sbin/policy-rc.d
  idle=yes
  trap end_idle EXIT
}
# Services may start again; Redis stays off at the next boot too, where systemd would start it.
end_idle() {
  [ -n "$idle" ] || return 0
  idle=""
  "${as_root[@]}" rm -f /usr/sbin/policy-rc.d
  if [ -d /run/systemd/system ]; then "${as_root[@]}" systemctl disable --quiet redis-server.service >/dev/null 2>&1 || true; fi
}

# Installs the list. Packages of QEMU go by themselves when they come from backports, so that nothing
# else is taken from there but what they depend on.
install_all() {
  local rest=() newer=() p
  for p in "${packages[@]}"; do
    case "$p" in qemu-*) newer+=("$p") ;; *) rest+=("$p") ;; esac
  done
  if [ -z "$qemu_suite" ]; then
    apt install --yes --no-install-recommends "${packages[@]}" >&2
    return
  fi
  [ ${#rest[@]} -eq 0 ] || apt install --yes --no-install-recommends "${rest[@]}" >&2 || return
  [ ${#newer[@]} -eq 0 ] || apt install --yes --no-install-recommends -t "$qemu_suite" "${newer[@]}" >&2
}

if [ -n "$apt_ready" ]; then
  if [ -n "$want_qemu" ]; then choose_qemu; fi
  if [ -n "$want_cargo" ] && ! have rustup; then
    [ -n "$(candidates rustup)" ] || [ -n "$refreshed" ] || refresh
    if [ -n "$(candidates rustup)" ]; then need rustup "installs Rust $minimum_cargo or newer (${cargo:+cargo $cargo is here}${cargo:-none is here})"; fi
  fi
  if [ ${#packages[@]} -gt 0 ]; then
    say "setup: to be installed with apt:"
    for i in "${!packages[@]}"; do printf '  %-34s %s\n' "${packages[$i]}" "${reasons[$i]}" >&2; done
    need_root
    keep_idle
    # The lists may be older than the archive; only a failure is worth the download of new ones.
    if ! install_all; then
      advice="repair what apt names (often: sudo dpkg --configure -a; sudo apt-get --fix-broken install), then run this again"
      [ -z "$refreshed" ] || fail "apt could not install the packages (see above)" "$advice"
      refresh
      install_all || fail "apt could not install the packages (see above)" "$advice"
    fi
    end_idle
  fi
else
  if [ -n "$want_qemu" ] && { [ -z "$qemu" ] || ! at_least $minimum_qemu "$qemu"; }; then need qemu-system-x86 "runs the sandboxes ($minimum_qemu or newer)"; fi
  if [ ${#packages[@]} -gt 0 ]; then
    say "setup: this machine has no apt; install what provides these (names are Debian's):"
    for i in "${!packages[@]}"; do printf '  %-34s %s\n' "${packages[$i]}" "${reasons[$i]}" >&2; done
    fail "${#packages[@]} requirements are missing" "install them with this system's package manager, then run this again"
  fi
fi

# ---------------------------------------------------------------- Rust
if [ -n "$want_cargo" ]; then
  if have rustup; then
    say "setup: fetching the stable Rust toolchain with rustup"
    rustup toolchain install stable --profile default --no-self-update >&2 ||
      fail "rustup could not fetch the toolchain (see above)" "check the network, then run this again"
    rustup default stable >&2 || fail "rustup could not select the toolchain" "run: rustup default stable"
    hash -r
    cargo=$(cargo_version)
  fi
  [ -n "$cargo" ] || fail "cargo is not installed, and this release has no rustup package" \
    "install Rust from https://rustup.rs, open a new shell, then run this again"
  at_least $minimum_cargo "$cargo" || fail "cargo $cargo is too old; $minimum_cargo is needed" \
    "run 'rustup update stable' (or install rustup from https://rustup.rs), then run this again"
fi

# ---------------------------------------------------------------- proof
hash -r
qemu=$(qemu_version)
[ -n "$qemu" ] || fail "qemu-system-x86_64 does not run" "run it by hand with --version to see why"
at_least $minimum_qemu "$qemu" || fail "QEMU $qemu is too old; $minimum_qemu is the least" "install a newer qemu-system-x86"
for tool in qemu-img mmdebstrap mke2fs dpkg-deb curl make cc; do
  have "$tool" || fail "'$tool' is still missing" "install the package that provides it, then run this again"
done
if [ "$purpose" = test ]; then
  have redis-server || fail "'redis-server' is still missing" "install the package that provides it, then run this again"
fi
if [ "$purpose" != up ]; then
  [ -n "$(postgres)" ] || fail "PostgreSQL's initdb is still missing" "install PostgreSQL 15 or newer, then run this again"
fi
if [ ${#packages[@]} -gt 0 ]; then
  say "setup: ready (QEMU $qemu, cargo $cargo; installed ${#packages[@]} packages)"
else
  say "setup: ready (QEMU $qemu, cargo $cargo)"
fi
