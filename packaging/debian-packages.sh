# Which of Debian's packages are missing, and their installation: for the scripts beside it, which read it in.

# missing_of PACKAGE...: those that are not installed, in one line.
missing_of() {
    missing=
    for package in "$@"; do
        status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
        [ "$status" = installed ] || missing="$missing $package"
    done
    echo "$missing"
}

# install_all PACKAGE...: as root.
install_all() {
    echo "installing $*"
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" >/dev/null
}
