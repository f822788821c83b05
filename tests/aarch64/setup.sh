#!/bin/sh
# Set up an aarch64 Python under QEMU, with the packages of edgeprune's device half: setup.sh FOLDER PYTHON
#
# FOLDER gets root/ (QEMU and Debian's Python for arm64, unpacked), site/ (wheels for aarch64) and the program `python`.
# Everything stays in FOLDER: nothing is installed on this machine, and no root is needed, only apt-get with a
# distribution that has arm64 packages at the same address. PYTHON has pip and msgspec.
# Where something cannot be downloaded, FOLDER/missing says what, the tests are skipped, and the exit code is 0;
# pins that have no wheel for aarch64 are an error.
set -eu
folder=$(mkdir -p "$1" && cd "$1" && pwd)
python=$2
checkout=$(cd "$(dirname "$0")/../.." && pwd)
ORT=1.23.2 # 1.32 crashes when it is imported under QEMU 7.2

rm -rf "$folder"/*
missing() {
  echo "$1" >"$folder/missing"
  echo "$1: the tests on an emulated aarch64 are skipped (delete $folder.stamp to try again)"
  exit 0
}

for program in apt-get dpkg dpkg-deb; do
  command -v "$program" >/dev/null || missing "no $program here"
done

# apt with lists and a state of its own, in which no package is installed; its sources are those of this machine.
state=$folder/apt
mkdir -p "$state/lists/partial" "$state/archives/partial" "$folder/root/usr/lib"
touch "$state/status"
cat >"$state/apt.conf" <<CONF
APT::Architecture "arm64";
APT::Architectures { "arm64"; "$(dpkg --print-architecture)"; };
APT::Sandbox::User "";
Dir::State "$state";
Dir::State::status "$state/status";
Dir::Cache "$state";
CONF
export APT_CONFIG="$state/apt.conf"
apt-get update -qq 2>"$state/log" || true # where one of several sources fails, the others may do
apt-get install -qq --download-only --no-install-recommends \
  python3 libstdc++6 "qemu-user-static:$(dpkg --print-architecture)" >>"$state/log" 2>&1 \
  || missing "apt-get cannot download Python for arm64 and qemu-user-static (see $state/log)"
ln -s usr/lib "$folder/root/lib" # programs name their loader /lib/ld-linux-aarch64.so.1, wherever libc6 has it
for package in "$state"/archives/*.deb; do
  dpkg-deb --extract "$package" "$folder/root"
done
find "$folder/root/usr/bin" -name 'qemu-*' ! -name 'qemu-aarch64*' -delete # 400 MB

# The wheels that pip would choose on a Jetson with this version of Python.
"$python" -c 'import msgspec, sys
print(*msgspec.toml.decode(open(sys.argv[1], "rb").read())["project"]["dependencies"], sep="\n")' \
  "$checkout/pyproject.toml" >"$folder/requirements.txt"
grep -v ^onnxruntime "$checkout/constraints.txt" >"$folder/constraints.txt"
version=$(readlink "$folder/root/usr/bin/python3")
case $version in python3.1[0-3]) ;; *) missing "edgeprune does not support $version, which this distribution has" ;; esac
"$python" -m pip install --quiet --no-compile --disable-pip-version-check --target "$folder/site" --only-binary=:all: \
  --implementation cp --python-version "${version#python}" \
  --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
  --platform manylinux2014_aarch64 -c "$folder/constraints.txt" -r "$folder/requirements.txt" "onnxruntime==$ORT" \
  2>"$state/log" || {
  cat "$state/log"
  grep -qE 'NewConnectionError|Retrying \(|Connect(ion)?Error|Timeout|name resolution' "$state/log" || exit 1
  missing "pip reaches no package registry"
}
rm -rf "$state"

# Compiled here where the versions are the same, because that takes ten times as long under QEMU.
if "$python" -c 'import sys; sys.exit(sys.argv[1] != "python%d.%d" % sys.version_info[:2])' "$version"; then
  "$python" -m compileall -q "$folder/root/usr/lib/$version" "$folder/site" \
    -x '/(tests?|f2py|backend|reference|sympy|mpmath|lexers|styles|transformers|quantization|tools)/' || true
fi

cat >"$folder/python.tmp" <<PROGRAM
#!/bin/sh
PYTHONPATH="$folder/site\${PYTHONPATH:+:\$PYTHONPATH}" \\
  exec "$folder/root/usr/bin/qemu-aarch64-static" -cpu cortex-a76 -L "$folder/root" \\
  "$folder/root/usr/bin/$version" "\$@"
PROGRAM
chmod +x "$folder/python.tmp"
mv "$folder/python.tmp" "$folder/python"
