#!/bin/sh
# Install a packed bundle on this device: unpack, verify, then switch DIR/current to it, in the layout of `edgeprune ship`.
#
#   install.sh ARCHIVE DIR --allowed-signers FILE [--signer NAME]
#   install.sh ARCHIVE DIR --unsigned
#
# What follows DIR goes to `edgeprune unpack`. EDGEPRUNE is the path of edgeprune, where it is not in PATH. Prints
# "switched VERSION", "current VERSION" where that was current already, or "mended VERSION" where files of it were
# damaged and have been replaced. If anything fails, the link DIR/current is unchanged, and a second run begins anew. Needs a
# POSIX shell, coreutils, flock and the OpenSSH client.
set -eu
[ $# -ge 3 ] || { echo "usage: install.sh ARCHIVE DIR --allowed-signers FILE | --unsigned" >&2; exit 2; }
program=${EDGEPRUNE:-edgeprune}
archive=$1 dir=$2
shift 2

mkdir -p -- "$dir"
exec 9>"$dir/.ship.lock"
flock -n 9 || { echo "$dir: another installation is running: wait for it" >&2; exit 75; }
rm -rf -- "$dir/.incoming" "$dir"/..incoming.*.tmp # of a run that was cut off
said=$("$program" unpack "$archive" "$dir/.incoming" "$@" --json)
version=$(printf '%s\n' "$said" | sed -n 's/.*"version": "\([^"/]*\)".*/\1/p')
[ -n "$version" ] || { echo "unpack named no version: install the same edgeprune here" >&2; exit 1; }

old=$(readlink "$dir/current" || true)
if [ "$old" = "$version" ] && [ -d "$dir/$version" ]; then
  state=current
  for new in "$dir"/.incoming/*; do # each file is replaced in one step: a reader never sees part of one
    file=$dir/$version/${new##*/}
    if [ -L "$file" ] || [ ! -f "$file" ] || [ "$(sha256sum <"$file")" != "$(sha256sum <"$new")" ]; then
      mv -fT -- "$new" "$file"
      state=mended
    fi
  done
  rm -rf -- "$dir/.incoming"
  "$program" verify "$dir/$version" >/dev/null
else
  "$program" verify "$dir/.incoming" >/dev/null
  rm -rf -- "${dir:?}/$version"
  mv -- "$dir/.incoming" "$dir/$version"
  if [ -n "$old" ] && [ "$old" != "$version" ]; then
    rm -f -- "$dir/.previous.new"
    ln -s -- "$old" "$dir/.previous.new"
    mv -fT -- "$dir/.previous.new" "$dir/previous"
  fi
  rm -f -- "$dir/.current.new"
  ln -s -- "$version" "$dir/.current.new"
  mv -fT -- "$dir/.current.new" "$dir/current"
  state=switched
fi
sha256=$(sha256sum <"$archive")
echo "${sha256%% *} $version" >"$dir/.installed.new" # tells the role that this archive need not be sent again
mv -fT -- "$dir/.installed.new" "$dir/.installed"
sync

previous=$(readlink "$dir/previous" || true)
for one in "$dir"/*-[0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f][0-9a-f]; do
  name=${one##*/} # versions before the previous one
  [ "$name" = "$version" ] || [ "$name" = "$previous" ] || [ ! -f "$one/manifest.json" ] || rm -rf -- "$one"
done
echo "$state $version"
