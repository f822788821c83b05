"""Commands that bring bundles to devices: ship, pack, unpack."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgeprune.cli import output
from edgeprune.cli.app import app
from edgeprune.cli.options import AsJson, HostProgram
from edgeprune.errors import HostError


@app.command()
def ship(
    bundle: Annotated[Path | None, typer.Argument(help="folder that `edgeprune build` or `compile` wrote")] = None,
    to: Annotated[str | None, typer.Argument(help="USER@HOST:DIR")] = None,
    all_: Annotated[Path | None, typer.Option("--all", help="hosts.toml: several destinations at once")] = None,
    roll_back: Annotated[
        bool, typer.Option("--roll-back", help="switch back to the previous version instead")
    ] = False,
    canary: Annotated[
        int | None,
        typer.Option(help="with --all: number of hosts that get it first; if one fails, they are rolled back", min=1),
    ] = None,
    wait: Annotated[
        float | None,
        typer.Option(help="seconds until canaries are verified again; default 60", min=0, max=604800),
    ] = None,
    fail_slower: Annotated[
        float | None, typer.Option(help="maximum slowdown of a canary against the previous version, percent", min=0)
    ] = None,
    host_program: HostProgram = "edgeprune",
    as_json: AsJson = False,
) -> None:
    """Copy a bundle to devices over ssh, verify it there, and switch DIR/current to it."""
    from edgeprune.bundles import ship as shipping
    from edgeprune.bundles.canary import Canary, ship_with_canary
    from edgeprune.cli.tables import ship_table

    if to is None and roll_back and bundle is not None:  # `ship --roll-back USER@HOST:DIR`
        bundle, to = None, str(bundle)
    if (to is None) == (all_ is None) or (bundle is None) != roll_back:
        raise typer.BadParameter("pass BUNDLE and USER@HOST:DIR, or --all hosts.toml; --roll-back takes no bundle")
    if canary is None and (wait is not None or fail_slower is not None):
        raise typer.BadParameter("--wait and --fail-slower are for a canary: pass --canary N too")
    if canary is not None and (all_ is None or bundle is None):
        raise typer.BadParameter("--canary is for a bundle and several hosts: pass --all hosts.toml")
    where = shipping.fleet(all_) if all_ else (shipping.destination(to or "", host_program),)
    with output.progress() as progress:
        if bundle is None:
            results = shipping.each(shipping.roll_back, where, progress)
        elif canary is not None:
            how = Canary(canary, 60.0 if wait is None else wait, fail_slower)
            results = ship_with_canary(bundle, where, how, progress)
        else:
            results = shipping.ship_all(bundle, where, progress)
    output.show(ship_table(results), as_json)
    if as_json:
        output.json_line({"rows": [result._asdict() for result in results]})
    failed = [result for result in results if result.state == "failed"]
    if failed:
        untouched = sum(result.state == "untouched" for result in results)
        rest = f", {untouched} untouched" if untouched else ""
        raise HostError(f"{len(failed)} of {len(results)} failed{rest}: {failed[0].to}: {failed[0].detail}")


@app.command()
def pack(
    bundle: Annotated[Path, typer.Argument(help="folder that `edgeprune build` or `compile` wrote")],
    out: Annotated[Path, typer.Argument(metavar="OUT.tar.zst", help="file to write")],
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY", help="OpenSSH private key; the signature goes to OUT.tar.zst.sig")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Pack a bundle into one file, optionally signed, for deployment tools."""
    from edgeprune.bundles.pack import pack as run

    with output.progress() as progress:
        packed = run(bundle, out, sign, progress)
    signed = f", signed in {packed.signature}" if packed.signature else ", not signed"
    output.tell(f"packed: {out}, {packed.size_bytes / 1e6:.1f} MB, sha256 {packed.sha256}{signed}", as_json)
    if as_json:
        places = {"path": str(out), "signature": str(packed.signature) if packed.signature else None}
        output.json_line(packed._asdict() | places)


@app.command()
def unpack(
    file: Annotated[Path, typer.Argument(help="file that `edgeprune pack` wrote")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="output folder; must be empty or not exist")],
    allowed_signers: Annotated[
        Path | None,
        typer.Option(help="allowed_signers file (ssh-keygen(1)) with the names and public keys to accept"),
    ] = None,
    signer: Annotated[str | None, typer.Option(help="accept only the signature of this name in that file")] = None,
    unsigned: Annotated[bool, typer.Option("--unsigned", help="skip the signature check")] = False,
    as_json: AsJson = False,
) -> None:
    """Check the signature of a packed bundle, unpack it, and check the hashes of its files."""
    from edgeprune.bundles.pack import unpack as run

    with output.progress() as progress:
        done = run(file, folder, allowed_signers, signer, unsigned, progress)
    signed = f"signed by {done.signer}" if done.signer else "signature not checked"
    output.tell(f"unpacked: {folder}, {done.version}, {signed}", as_json)
    if as_json:
        output.json_line({"path": str(folder), "version": done.version, "signer": done.signer})
