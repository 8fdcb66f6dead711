"""Bake weights: fetch, convert, merge LoRAs, write with a manifest. The worker itself never downloads.

python download_weights.py --profiles sdxl,wan21_i2v_480p     into weights/baked
python download_weights.py --profiles wan22_i2v_svi --precision fp8   half the size, beside a bf16 bake if there is one
python download_weights.py --tiny --output weights/tiny        tiny twins, offline, in seconds
python download_weights.py --verify                            compare every sha256
python download_weights.py --dry-run                           bytes against the budget
python download_weights.py --lock                              look up commits and hashes (online)
"""

import argparse
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from engine.hub import BakeFailed, HuggingFaceHub, Lock, look_up
from engine.profile import PRECISIONS, Profile
from engine.profiles import BAKES, BUDGET_BYTES, PROFILES
from engine.settings import ROOT, Settings
from engine.weights import IMAGE, find
from schemas.errors import WeightsMissing, WorkerError

LOCK = ROOT / "builder" / "weights.lock.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    profiles = [profile.baked_in(options.precision) for profile in options.profiles]
    try:
        if options.dry_run:
            return dry_run(profiles)
        if options.verify:
            return verify(profiles, options.output)
        if options.lock:
            return lock(profiles, HuggingFaceHub(endpoint=options.endpoint), options.lock_file)
        if options.tiny:
            return tiny(profiles, options.output)
        pins = Lock.read(options.lock_file)
        hub = HuggingFaceHub(pins, options.endpoint, options.require_lock)
        return bake(profiles, hub, options.output, options.keep_loras)
    except (BakeFailed, WorkerError) as error:
        print(f"download_weights: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, above all
        print(f"download_weights: {error}; what is finished stays, run again", file=sys.stderr)
        return 1


def bake(profiles: Sequence[Profile], hub: HuggingFaceHub, output: Path, keep_loras: bool) -> int:
    """Fetch from the hub and bake; refuses before the first byte when the budget is passed."""
    from engine.bake import bake as bake_profile

    if dry_run(profiles):
        return 1
    for profile in profiles:
        print(bake_profile(profile, hub, output, keep_loras=keep_loras))
    return 0


def tiny(profiles: Sequence[Profile], output: Path) -> int:
    """Write tiny repositories into a temporary folder and bake them by the same code."""
    from engine.bake import bake as bake_profile
    from engine.hub import FolderHub
    from engine.twins import write_upstream

    with tempfile.TemporaryDirectory() as folder:
        for profile in profiles:
            write_upstream(profile, Path(folder))
            print(bake_profile(profile, FolderHub(Path(folder)), output, twin=True, keep_loras=True))
    return 0


def verify(profiles: Sequence[Profile], output: Path) -> int:
    """Compare every file of these bakes with their manifests.

    Raises:
        WeightsMissing: one is not baked, or not in this precision. WeightsCorrupt: a file differs.
    """
    for profile in profiles:
        baked = find([profile], Settings(weights_dir=output))
        if baked is None:
            raise WeightsMissing(f"the weights of {profile.folder} are not there; bake them first")
        baked.verify()
        print(f"{baked.profile.name}, {baked.profile.precision}: {len(baked.files)} files are whole")
    return 0


def lock(profiles: Sequence[Profile], hub: HuggingFaceHub, lock_file: Path) -> int:
    """Ask the hub for commits and hashes and write them down. Online; commit the file that it writes."""
    from engine.bake import needed_folders

    look_up(hub, needed_folders(profiles)).write(lock_file)
    print(lock_file)
    return 0


def dry_run(profiles: Sequence[Profile]) -> int:
    """Print the bytes of each profile and of all together, shared components once; 1 if over the budget."""
    folders = {part.folder: part.size_bytes for profile in profiles for part in profile.components}
    for profile in profiles:
        print(f"{profile.folder:24}{profile.size_bytes / 1e9:8.1f} GB, {profile.precision}")
    total = sum(folders.values())
    fits = total <= BUDGET_BYTES
    verdict = "within" if fits else "OVER"
    print(f"{'together':24}{total / 1e9:8.1f} GB, {verdict} the {BUDGET_BYTES / 1e9:.0f} GB budget")
    return 0 if fits else 1


def _profiles(text: str) -> list[Profile]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in BAKES]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such profile: {', '.join(unknown)}; there are {', '.join(BAKES)}")
    return [PROFILES[name] for name in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--profiles", type=_profiles, default=",".join(BAKES), help="names with commas between; default: all")
    add("--precision", choices=PRECISIONS, default="bf16", help="of the video models; SDXL is fp16 in each")
    add("--output", type=Path, default=IMAGE.path, help="the weights folder; default: weights/baked")
    add("--lock-file", type=Path, default=LOCK, help="default: builder/weights.lock.json")
    add("--require-lock", action="store_true", help="refuse repositories that the lock file does not name")
    add("--keep-loras", action="store_true", help="for requests' own strengths: 1.2 GB a file, not counted")
    add("--endpoint", help="another hub with Hugging Face's API; default: HF_ENDPOINT or huggingface.co")
    doing = parser.add_mutually_exclusive_group()
    doing.add_argument("--tiny", action="store_true", help="bake tiny twins, offline")
    doing.add_argument("--verify", action="store_true", help="read every file and compare its sha256")
    doing.add_argument("--lock", action="store_true", help="look up commits and hashes online, write the lock")
    doing.add_argument("--dry-run", action="store_true", help="only print the bytes; exit 1 over the budget")
    return parser


if __name__ == "__main__":
    sys.exit(main())
