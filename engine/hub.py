"""Where published files come from: the Hugging Face hub, or a folder of that shape. For the bake only."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from engine.profile import Source
from engine.weights import sha256


class BakeFailed(Exception):
    """A bake that cannot go on. The sentence names the file or repository and what to do."""


class RemoteFile(NamedTuple):
    """One published file. Large files are known by their sha256, small ones by git's SHA-1."""

    path: str
    """Inside the repository, with forward slashes."""
    size_bytes: int
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


class Hub(Protocol):
    """A source of published files. Every method may raise BakeFailed."""

    def commit(self, source: Source) -> str:
        """The commit that this bake uses of the repository."""

    def files(self, source: Source, folder: str) -> list[RemoteFile]:
        """The files directly inside `folder` ('' is the root) at that commit."""

    def fetch(self, source: Source, file: RemoteFile, target: Path) -> None:
        """Leave the file at `target`, whole and checked. A cut fetch goes on where it stopped."""


@dataclass(frozen=True)
class FolderHub:
    """Repositories as folders: <root>/<owner>/<name>/..."""

    root: Path

    def commit(self, source: Source) -> str:
        """A hash of everything in the repository's folder, so that a changed file is a changed commit."""
        base = self.root / source.repo
        digest = hashlib.sha256()
        for path in sorted(path for path in base.rglob("*") if path.is_file()):
            digest.update(f"{path.relative_to(base).as_posix()} {sha256(path)}\n".encode())
        return digest.hexdigest()[:40]

    def files(self, source: Source, folder: str) -> list[RemoteFile]:
        base = self.root / source.repo
        found = sorted(path for path in (base / folder).iterdir() if path.is_file())
        return [RemoteFile(path.relative_to(base).as_posix(), path.stat().st_size) for path in found]

    def fetch(self, source: Source, file: RemoteFile, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.root / source.repo / file.path, target)


@dataclass(frozen=True)
class Lock:
    """Commits and files that somebody online has looked up: repository -> its commit and the files we use."""

    commits: Mapping[str, str] = field(default_factory=dict)
    listings: Mapping[str, tuple[RemoteFile, ...]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Lock":
        """The lock in `path`; an empty one if there is no such file.

        Raises:
            BakeFailed: the file is no lock.
        """
        try:
            repos = json.loads(path.read_bytes())
            return cls(
                {repo: entry["commit"] for repo, entry in repos.items()},
                {repo: tuple(RemoteFile(**file) for file in entry["files"]) for repo, entry in repos.items()},
            )
        except FileNotFoundError:
            return cls()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BakeFailed(f"{path.name} is not a lock file; write it again with --lock") from error

    def write(self, path: Path) -> None:
        """Replace the file in one step."""
        repos = {
            repo: {"commit": commit, "files": [file._asdict() for file in self.listings[repo]]}
            for repo, commit in sorted(self.commits.items())
        }
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(repos, indent=2) + "\n")
        partial.replace(path)


@dataclass(frozen=True)
class HuggingFaceHub:
    """The hub itself, through its own client. A locked repository is never asked about, only fetched from."""

    lock: Lock = field(default_factory=Lock)
    endpoint: str | None = None
    """None: what the client uses, that is huggingface.co or HF_ENDPOINT."""
    require_lock: bool = False
    _commits: dict[str, str] = field(default_factory=dict)

    def commit(self, source: Source) -> str:
        if source.repo in self.lock.commits:
            return self.lock.commits[source.repo]
        if self.require_lock:
            raise BakeFailed(f"{source.repo} is not in the lock file; write it with --lock")
        if source.repo not in self._commits:  # one commit for the whole bake, also when main moves meanwhile
            with _explained(source.repo):
                info = self._api().repo_info(source.repo, revision=source.revision)
            self._commits[source.repo] = str(info.sha)
        return self._commits[source.repo]

    def files(self, source: Source, folder: str) -> list[RemoteFile]:
        if source.repo in self.lock.listings:
            found = [file for file in self.lock.listings[source.repo] if file.path.rpartition("/")[0] == folder]
        else:
            with _explained(source.repo):
                tree = self._api().list_repo_tree(source.repo, folder or None, revision=self.commit(source))
                found = [_remote_file(entry) for entry in tree if hasattr(entry, "blob_id")]
        if not found:
            raise BakeFailed(f"{source.repo} has no files in {folder or 'its root'} at {self.commit(source)}")
        return found

    def fetch(self, source: Source, file: RemoteFile, target: Path) -> None:
        if target.is_file():
            if _is_whole(target, file):
                return
            target.unlink()  # of another commit: an earlier bake was cut, and the repository has moved on
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(target.name + ".partial")
        with partial.open("ab") as stream:
            if stream.tell() > file.size_bytes:
                stream.truncate(0)
                stream.seek(0)
            with _explained(f"{source.repo}/{file.path}"):
                self._download(source, file, stream)
        if not _is_whole(partial, file):
            partial.unlink()
            raise BakeFailed(f"{source.repo}/{file.path} came with wrong bytes; run again to fetch it anew")
        partial.replace(target)

    def _download(self, source: Source, file: RemoteFile, stream: BinaryIO) -> None:
        """Append what is missing. The client's own hf_hub_download starts from zero in a new process."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(source.repo, file.path, revision=self.commit(source), endpoint=self.endpoint)
        http_get(
            url,
            stream,
            resume_size=stream.tell(),
            headers=build_hf_headers(),
            expected_size=file.size_bytes,
            displayed_filename=file.name,
        )

    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint)


def look_up(hub: HuggingFaceHub, folders: Mapping[Source, list[str]]) -> Lock:
    """Ask the hub for the newest commit and the files of every repository in `folders`."""
    return Lock(
        {source.repo: hub.commit(source) for source in folders},
        {
            source.repo: tuple(file for folder in names for file in hub.files(source, folder))
            for source, names in folders.items()
        },
    )


def _remote_file(entry: Any) -> RemoteFile:
    if entry.lfs is not None:
        return RemoteFile(entry.path, entry.lfs.size, sha256=entry.lfs.sha256)
    return RemoteFile(entry.path, entry.size, git_sha1=entry.blob_id)


def _is_whole(path: Path, file: RemoteFile) -> bool:
    if path.stat().st_size != file.size_bytes:
        return False
    if file.sha256 is not None:
        return sha256(path) == file.sha256
    if file.git_sha1 is not None:
        blob = b"blob %d\0" % file.size_bytes + path.read_bytes()
        return hashlib.sha1(blob, usedforsecurity=False).hexdigest() == file.git_sha1
    return True


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn the client's errors into one sentence each."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise BakeFailed(f"{what} is gated: accept its terms on the hub with your account, and set HF_TOKEN") from error
    except errors.RevisionNotFoundError as error:
        raise BakeFailed(f"{what} has no such commit any more; write the lock again with --lock") from error
    except errors.EntryNotFoundError as error:
        raise BakeFailed(f"{what} is not there (404); the repository may have changed") from error
    except errors.RepositoryNotFoundError as error:
        raise BakeFailed(f"{what} does not exist, or HF_TOKEN may not read it") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no"
        if status in (401, 403):
            raise BakeFailed(f"{what}: access denied ({status}); check HF_TOKEN") from error
        raise BakeFailed(f"{what}: the hub answered {status}; run again") from error
    except (OSError, errors.OfflineModeIsEnabled) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__  # a full disk is named
        raise BakeFailed(f"{what} could not be fetched ({reason}); run again, it goes on") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
            raise
        raise BakeFailed(f"{what} could not be fetched ({type(error).__name__}); run again, it goes on") from error
