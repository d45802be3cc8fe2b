# Sourced by the benchmarks that compare with PL/Python, after scripts/common.sh: installs PL/Python and the extension into the
# private server, and says in $packages where the server's Python finds its packages.

# PL/Python, for this only: from Debian, then copied to the private server.
system=/usr/lib/postgresql/15/lib/plpython3.so
if [ ! -e "$system" ]; then
    version=$(dpkg-query -W -f '${Version}' postgresql-15)
    package=postgresql-plpython3-15=$version
    sudo=()
    if [ "$(id -u)" != 0 ]; then
        sudo -n true 2>/dev/null || die "the benchmark needs PL/Python; as root:  apt-get install --no-install-recommends $package"
        sudo=(sudo -n)
    fi
    say "installing $package"
    "${sudo[@]}" apt-get install -y -q --no-install-recommends "$package" ||
        "${sudo[@]}" apt-get install -y -q --no-install-recommends postgresql-15 postgresql-plpython3-15
    "$ROOT/scripts/setup-servers"
fi
cp "$system" "$(pg_dir 15 pkglibdir)/"
cp /usr/share/postgresql/15/extension/plpython3u* "$(pg_dir 15 sharedir)/extension/"
"$ROOT/scripts/install-extension" 15

# PL/Python runs on Debian's python3, as the private environment does when it can.
"$PYTHON" -c 'import sys; sys.exit(sys.base_prefix != "/usr")' ||
    die "target/venv is not made with Debian's python3, so PL/Python cannot use its packages: install python3-venv, make clean"
packages=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
