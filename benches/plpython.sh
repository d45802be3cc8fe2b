# Sourced by the benchmarks that compare with PL/Python, after scripts/common.sh: installs PL/Python and the extension into the
# private server, and says in $packages where the server's Python finds its packages.

"$ROOT/scripts/setup-plpython"
"$ROOT/scripts/install-extension" 15

# PL/Python runs on Debian's python3, as the private environment does when it can.
"$PYTHON" -c 'import sys; sys.exit(sys.base_prefix != "/usr")' ||
    die "target/venv is not made with Debian's python3, so PL/Python cannot use its packages: install python3-venv, make clean"
packages=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
