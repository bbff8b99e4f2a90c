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

# take_out_of FOLDER PACKAGE...: their files into the folder, for programs that are only tried. So no user, no service of the
# system's and nothing that they merely recommend or show (promtool's package: 12 of JavaScript) comes with them.
take_out_of() {
    folder=$1
    shift
    echo "fetching $*"
    rm -rf "$folder"
    mkdir -p "$folder/packages"
    [ "$(id -u)" != 0 ] || apt-get -qq update
    (cd "$folder/packages" && apt-get -qq -o APT::Sandbox::User=root download "$@")
    for archive in "$folder"/packages/*.deb; do
        dpkg-deb -x "$archive" "$folder"
    done
    rm -rf "$folder/packages"
}
