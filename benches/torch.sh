# Sourced by the benchmark of model sets, after scripts/common.sh: unpacks Debian's PyTorch for Debian's python3 under target/torch, and sets
# $torch to the command that runs a script with it, or to nothing if it cannot be had. Nothing is installed. (PyPI's PyTorch wants gigabytes
# of GPU libraries.)
torch=''
debian=$TARGET/torch
if [ ! -e "$debian/.unpacked" ]; then
    say "unpacking Debian's PyTorch (150 MB) to $(short "$debian")"
    rm -rf "${debian:?}"
    mkdir -p "$debian/packages" "$debian/tree"
    if (cd "$debian/packages" && apt-get install -s -q --no-install-recommends python3-torch 2>/dev/null | awk '/^Inst/ {print $2}' | xargs -r apt-get download -q >/dev/null 2>&1) &&
        compgen -G "$debian/packages/*.deb" >/dev/null; then
        for package in "$debian"/packages/*.deb; do dpkg -x "$package" "$debian/tree"; done
        rm -r "$debian/packages"
        touch "$debian/.unpacked"
    fi
fi
libraries=$debian/tree/usr/lib/x86_64-linux-gnu
with_torch=(env "LD_LIBRARY_PATH=$debian/tree/usr/lib:$debian/tree/lib/x86_64-linux-gnu:$libraries:$libraries/blas:$libraries/lapack"
    "PYTHONPATH=$debian/tree/usr/lib/python3/dist-packages" /usr/bin/python3)
if "${with_torch[@]}" -c 'import torch' 2>/dev/null; then torch=${with_torch[*]}; fi
