"""Features of images kept from one training run to the next, on the hospital's own disk, sealed.

An image's features say much about the image, so they are never on the disk as they are. Each record is a file of its own
(`crypto.sealed_file`) below DIR/<settings>/, under the HMAC-SHA256 of the image with a key of the site: who has the directory and
not the key can neither read a record nor tell whether a certain image is among them. The name is authenticated with the content,
so no entry stands for another. `settings` is the digest of all that features follow from besides the image: extractor, its
weights, stages, mirror, the version of torch, and the device.

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
    """Records of one configuration's features, float32 (F + 1,), in `directory`; its files have `largest_bytes` at most."""

    def __init__(self, directory: Path, key: Seed, config: Config, largest_bytes: int = LARGEST_BYTES) -> None:
        self._directory, self._largest = directory, largest_bytes
        self._settings = settings_digest(config)
        self._size = config.data.input_shape[0]
        self._names = key.derive("names of features").reveal_for_transport()
        self._key = key.derive("features")
        self._files = deque(_oldest_first(directory))
        self._bytes = sum(size for _, size in self._files)
        self._writes = True

    def records(
        self, images: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor], progress: Progress | None = None
    ) -> torch.Tensor:
        """Records float32 (N, F + 1) of images float32 (N, C, H, W): of the cache, or by `compute`, one image at a time."""
        records, found, damaged = torch.empty(len(images), self._size), 0, 0
        for row, image in enumerate(images):
            name = self._name(image)
            try:
                kept = self._read(name)
            except (BrokenSealError, OSError):
                kept, damaged = None, damaged + 1
            if kept is None:
                kept = compute(image[None])[0]
                self._write(name, kept)
            else:
                found += 1
            records[row] = kept
            if progress is not None:
                progress(row + 1, len(images))
        if damaged:
            log.warning("%d entries of the feature cache %s were damaged: computed anew", damaged, self._directory)
        log.info("features of %d of %d images are of the cache %s", found, len(images), self._directory)
        return records

    def _name(self, image: torch.Tensor) -> str:
        content = np.ascontiguousarray(image.numpy())
        said = json.dumps([self._settings, str(content.dtype), list(content.shape)]).encode()
        return hmac.new(self._names, said + content.tobytes(), hashlib.sha256).hexdigest()

    def _path(self, name: str) -> Path:
        return self._directory / self._settings[:_SHOWN] / f"{name}{_SUFFIX}"

    def _read(self, name: str) -> torch.Tensor | None:
        """An entry; None where there is none. Raises `BrokenSealError` or `OSError` for one that cannot be used."""
        try:
            with self._path(name).open("rb") as file:
                if os.fstat(file.fileno()).st_size != sealed_size(_MAGIC, 4 * self._size):
                    raise BrokenSealError("it is no entry of this size")
                _, content = unseal(file, _MAGIC, self._key.again(), name.encode())
        except FileNotFoundError:
            return None
        return torch.from_numpy(content.view("<f4"))

    def _write(self, name: str, record: torch.Tensor) -> None:
        """Keep an entry; where that cannot be, say so once and keep no more."""
        if not self._writes:
            return
        path, content = self._path(name), record.numpy().astype("<f4").view(np.uint8)
        size = sealed_size(_MAGIC, len(content))
        try:
            while self._files and self._bytes + size > self._largest:
                oldest, freed = self._files.popleft()
                oldest.unlink(missing_ok=True)
                self._bytes -= freed
            with written_whole(path) as temporary, temporary.open("wb") as file:
                seal(file, _MAGIC, self._key.again(), name.encode(), bytes(TAG_BYTES), content)
        except (MpcFlError, OSError) as error:
            self._writes = False
            what = error.what if isinstance(error, MpcFlError) else f"cannot make room in {self._directory}"
            log.warning("%s; features are computed and not kept", what)
            return
        self._files.append((path, size))
        self._bytes += size


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
    """The cache of this party, as `site.feature_cache` says; None where features are kept in memory alone.

    Raises `IdentityError` for a key that others can read, `DataError` for one that is no key, `MpcFlError` for a directory that
    cannot be used.
    """
    directory = config.site.feature_cache
    if directory == "memory" or config.data.features is None:
        return None
    own = directory / KEY_FILE
    try:
        if own.exists():
            key = Seed(read_private(own))
        else:
            assert config.site.identity is not None  # `connect` came first
            key = sealing_key(config.site.identity, name, "feature cache")
        return FeatureCache(directory, key, config)
    except ValueError:
        raise DataError(f"{own} is no key", "remove it, and features are computed anew") from None
    except OSError as error:
        raise DataError(
            f"cannot use the feature cache {directory}: {error.strerror}", "check site.feature_cache"
        ) from None


def about_features(config: Config) -> str | None:
    """Whether features will be computed or read, in words; None where records are no features.

    Counts entries with these settings, also below folders of single parties (a simulation); whether they open, and whose images
    they are, shows only in the run.
    """
    directory = config.site.feature_cache
    if config.data.features is None:
        return None
    if directory == "memory":
        return "Features are computed anew in this run (site.feature_cache: memory)."
    folder = settings_digest(config)[:_SHOWN]
    count = sum(1 for depth in ("", "*/") for _ in directory.glob(f"{depth}{folder}/*{_SUFFIX}"))
    return (
        f"Features are read from {directory}, which has {count} records with these settings; of other images they are computed "
        "and kept there, sealed."
    )
