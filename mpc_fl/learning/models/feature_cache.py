"""What a network that is not trained makes of records, kept from one training run to the next on the hospital's own disk, sealed.

That is features of images (`feature_extractor`), or what the trained layers of a network read (`training.frozen_part`). Either says
much about the image, so it is never on the disk as it is. Each value is a file of its own (`crypto.sealed_file`) below
DIR/<settings>/, under the HMAC-SHA256 of the record that it is made of with a key of the site: who has the directory and not
the key can neither read a value nor tell whether a certain record is among them. The name is authenticated with the content, so no
entry stands for another. `settings` is the digest of all that values follow from besides the record: the network, its weights,
the version of torch, the device (`settings_digest` has that of features).

An entry that cannot be opened is computed anew and said. Nothing depends on the cache but time: where it cannot be written, one
line of the log says why, and the run goes on. The oldest entries make room for new ones.

The key comes from the private key of the site's certificate (`sealing_key`), so a new private key begins a new cache. In a
simulation, where these live for one run, DIR holds a key beside its entries (`KEY_FILE`): all data are on that disk anyway.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
import os
import re
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from mpc_fl.config.config import Config
from mpc_fl.config.data import FEATURE_CONSTANT
from mpc_fl.crypto.identity_files import read_private, sealing_key
from mpc_fl.crypto.sealed_file import TAG_BYTES, seal, sealed_size, unseal
from mpc_fl.crypto.stream_cipher import Seed
from mpc_fl.errors import BrokenSealError, DataError, MpcFlError
from mpc_fl.files import written_whole
from mpc_fl.learning.device import device_of

log = logging.getLogger(__name__)

KEY_FILE = "simulation.key"
LARGEST_BYTES = 4 << 30
_MAGIC = b"mpc-fl features 1\n"
_SUFFIX = ".sealed"
_FOLDER, _ENTRY = re.compile(r"[0-9a-f]{16}"), re.compile(r"[0-9a-f]{64}\.sealed|\.[0-9a-f]{64}\.sealed\..*\.partial")
_SHOWN = 16  # digits of the settings' digest in the name of their folder

Progress = Callable[[int, int], None]


def settings_digest(config: Config) -> str:
    """SHA-256 of what features follow from besides the image, as hex; `config.data.features` is set. Raises `ConfigError`."""
    assert config.data.features is not None
    where = {"torch": str(torch.__version__), "device": device_of(config).exact.words}  # others round otherwise
    said = {"features": config.data.features.described(), "constant": FEATURE_CONSTANT, **where}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


class FeatureCache:
    """A cache in `directory`; its files have `largest_bytes` at most, whatever settings they are of."""

    def __init__(self, directory: Path, key: Seed, largest_bytes: int = LARGEST_BYTES) -> None:
        self.directory, self._largest = directory, largest_bytes
        self.names = key.derive("names of features").reveal_for_transport()
        self._key = key.derive("features")
        self._files = deque(_oldest_first(directory))
        self._bytes = sum(size for _, size in self._files)
        self._writes = True

    def values_of(self, settings: str, shape: tuple[int, ...]) -> CachedValues:
        """What it has with `settings`, a digest as hex, each value float32 of this shape."""
        return CachedValues(self, settings, shape)

    def read(self, path: Path, size: int) -> np.ndarray | None:
        """The content of an entry, uint8 (size,); None where there is none. Raises `BrokenSealError` or `OSError` for one that
        cannot be used."""
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != sealed_size(_MAGIC, size):
                    raise BrokenSealError("it is no entry of this size")
                return unseal(file, _MAGIC, self._key.again(), path.stem.encode())[1]
        except FileNotFoundError:
            return None

    def write(self, path: Path, content: np.ndarray) -> None:
        """Keep an entry, uint8; where that cannot be, say so once and keep no more."""
        if not self._writes:
            return
        size = sealed_size(_MAGIC, len(content))
        try:
            while self._files and self._bytes + size > self._largest:
                oldest, freed = self._files.popleft()
                oldest.unlink(missing_ok=True)
                self._bytes -= freed
            with written_whole(path) as temporary, temporary.open("wb") as file:
                seal(file, _MAGIC, self._key.again(), path.stem.encode(), bytes(TAG_BYTES), content)
        except (MpcFlError, OSError) as error:
            self._writes = False
            what = error.what if isinstance(error, MpcFlError) else f"cannot make room in {self.directory}"
            log.warning("%s; features are computed and not kept", what)
            return
        self._files.append((path, size))
        self._bytes += size


class CachedValues:
    """Entries with the same settings: values float32 of one shape, each under the record that it was made of."""

    def __init__(self, cache: FeatureCache, settings: str, shape: tuple[int, ...]) -> None:
        self._cache, self._settings, self._shape = cache, settings, shape
        self._size, self._damaged = 4 * math.prod(shape), 0

    def value(self, record: torch.Tensor) -> torch.Tensor | None:
        """What was kept of a record float32 (...); None where nothing was, or nothing that can be used."""
        try:
            content = self._cache.read(self._path(record), self._size)
        except (BrokenSealError, OSError):
            self._damaged += 1
            return None
        return (
            None if content is None else torch.from_numpy(content.view("<f4").astype(np.float32)).reshape(self._shape)
        )

    def keep(self, record: torch.Tensor, value: torch.Tensor) -> None:
        """Keep what was made of a record, where that can be."""
        content = value.detach().contiguous().numpy().astype("<f4").reshape(-1).view(np.uint8)
        self._cache.write(self._path(record), content)

    def say_damaged(self) -> None:
        """Say how many entries could not be used since it was last said, if any."""
        if self._damaged:
            where = self._cache.directory
            log.warning("%d entries of the feature cache %s were damaged: computed anew", self._damaged, where)
        self._damaged = 0

    def records(
        self, images: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor], progress: Progress | None = None
    ) -> torch.Tensor:
        """Values float32 (N, ...) of images float32 (N, C, H, W): of the cache, or by `compute`, one image at a time."""
        records, found = torch.empty(len(images), *self._shape), 0
        for row, image in enumerate(images):
            kept = self.value(image)
            if kept is None:
                kept = compute(image[None])[0]
                self.keep(image, kept)
            else:
                found += 1
            records[row] = kept
            if progress is not None:
                progress(row + 1, len(images))
        self.say_damaged()
        log.info("features of %d of %d images are of the cache %s", found, len(images), self._cache.directory)
        return records

    def _path(self, record: torch.Tensor) -> Path:
        content = np.ascontiguousarray(record.numpy())
        said = json.dumps([self._settings, str(content.dtype), list(content.shape)]).encode()
        name = hmac.new(self._cache.names, said + content.tobytes(), hashlib.sha256).hexdigest()
        return self._cache.directory / self._settings[:_SHOWN] / f"{name}{_SUFFIX}"


def _oldest_first(directory: Path) -> list[tuple[Path, int]]:
    """The files of a cache and their sizes, those of a crash among them, and nothing else that lies in the directory."""
    found = []
    for path in directory.glob("*/*"):
        if _FOLDER.fullmatch(path.parent.name) and _ENTRY.fullmatch(path.name):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # another run made room
            found.append((status.st_mtime, path, status.st_size))
    return [(path, size) for _, path, size in sorted(found)]


def make_simulation_key(directory: Path) -> None:
    """Give a party of a simulation a key that outlives the run, unless it has one. Raises `MpcFlError`."""
    path = directory / KEY_FILE
    if not path.exists():
        with written_whole(path, durable=True, once=True) as temporary:
            temporary.write_bytes(Seed.from_system().reveal_for_transport())


def open_feature_cache(config: Config, name: str) -> FeatureCache | None:
    """The cache of this party, as `site.feature_cache` says; None where what it would hold is kept in memory alone.

    Raises `IdentityError` for a key that others can read, `DataError` for one that is no key, `MpcFlError` for a directory that
    cannot be used.
    """
    directory = config.site.feature_cache
    if directory == "memory":
        return None
    own = directory / KEY_FILE
    try:
        if own.exists():
            key = Seed(read_private(own))
        else:
            assert config.site.identity is not None  # `connect` came first
            key = sealing_key(config.site.identity, name, "feature cache")
        return FeatureCache(directory, key)
    except ValueError:
        raise DataError(f"{own} is no key", "remove it, and features are computed anew") from None
    except OSError as error:
        raise DataError(
            f"cannot use the feature cache {directory}: {error.strerror}", "check site.feature_cache"
        ) from None


def about_features(config: Config) -> str | None:
    """Whether features, or what the trained layers read, will be computed or read, in words; None where there is neither.

    Counts entries of features with these settings, also below folders of single parties (a simulation); whether they open, and
    whose images they are, shows only in the run.
    """
    directory = config.site.feature_cache
    if config.data.features is None:
        if not config.training.computes_frozen_part_once:
            return None
        kept = (
            "in memory for the run (site.feature_cache: memory)" if directory == "memory" else f"in {directory}, sealed"
        )
        return f"What the trained layers read of a record is computed once, and kept {kept}."
    if directory == "memory":
        return "Features are computed anew in this run (site.feature_cache: memory)."
    folder = settings_digest(config)[:_SHOWN]
    count = sum(1 for depth in ("", "*/") for _ in directory.glob(f"{depth}{folder}/*{_SUFFIX}"))
    return (
        f"Features are read from {directory}, which has {count} records with these settings; of other images they are computed "
        "and kept there, sealed."
    )
