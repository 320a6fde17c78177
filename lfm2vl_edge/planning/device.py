"""The device profile: what `tune` measured for one model on one machine, stored for later runs.

It is valid for one processor, one build of the engine and one language file. It affects speed, and how sure the
probabilities of `choose` are, but no answer: a damaged profile is a warning in the log `lfm2vl_edge.planning.device`,
never an error.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final, Literal

from lfm2vl_edge.config import is_finite, is_integer
from lfm2vl_edge.errors import ConfigError, ModelNotFound, shorten
from lfm2vl_edge.host import available_cpus, cache_folder, cpu_name, llama_folders, llama_libraries, write_whole
from lfm2vl_edge.planning.costs import Costs, line_through

VERSION: Final = 1
"""Version of the file format; a file of another version is not used."""
_HEAD_BYTES: Final = 1 << 20
"""Start of a language file that is hashed to identify it, with its size: metadata and start of the vocabulary."""
_MAX_FILE_BYTES: Final = 1 << 20
_LOG: Final = logging.getLogger(__name__)

ProfileState = Literal["present", "stale", "damaged", "none"]
"""`stale`: only measured with the same model on another processor or with another build of the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileKey:
    """What a profile is valid for."""

    cpu: str
    """Name of the processor."""
    engine: str
    """Names and sizes of the engine's native libraries."""
    model: str
    """SHA-256 of the size and the start of the language file."""
    device: str
    """`cpu`, or `gpu` with the number of layers on it and its name."""

    @property
    def path(self) -> Path:
        """Path of the profile's file."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()
        return cache_folder() / "devices" / f"{digest[:32]}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What was measured.

    Raises:
        ConfigError: a value is not valid.
    """

    threads: int
    """Number of threads that was fastest, used for all other measurements."""
    mmproj: str
    """Type of the mmproj file that was fastest."""
    encode: Mapping[str, Mapping[int, float]]
    """Type of the mmproj file -> image tokens of a view -> seconds."""
    prefill_speed: float
    """Tokens of a prompt per second."""
    decode_speed: float
    """Tokens of an answer per second."""
    memory_bytes: int
    """Largest resident memory after an answer about one view, with `DEFAULT_N_CTX` tokens of context."""
    measured: str
    """Date and time, ISO 8601."""
    choice_temperature: float | None = None
    """Temperature of the probabilities of `choose` that `eval --fit` found, above 0; None if it was not fitted."""
    repacked: tuple[str, ...] = ()
    """Types of mmproj files whose weights are rearranged when they are read: they were faster so."""

    def __post_init__(self) -> None:
        for name in ("threads", "memory_bytes"):
            if not is_integer(getattr(self, name), 1):
                raise ConfigError(f"{name} is {shorten(getattr(self, name))}; it must be an integer, 1 or more")
        if self.threads > len(available_cpus()):
            raise ConfigError(f"threads is {self.threads}; this process may use {len(available_cpus())} processors")
        if not isinstance(self.measured, str):
            raise ConfigError(f"measured is {shorten(self.measured)}; it must be a date")
        views = [pair for points in self.encode.values() for pair in points.items()]
        speeds = [self.prefill_speed, self.decode_speed, *(seconds for _, seconds in views)]
        if not all(is_finite(value) and value > 0 for value in speeds) or not all(self.encode.values()):
            raise ConfigError("a speed or time is not a finite number above 0")
        if self.mmproj not in self.encode or not all(is_integer(tokens, 1) for tokens, _ in views):
            raise ConfigError("the times of the encoder contradict each other")
        if not isinstance(self.repacked, tuple) or not all(
            isinstance(kind, str) and kind in self.encode for kind in self.repacked
        ):
            raise ConfigError("repacked is not a list of measured types")
        temperature = 1.0 if self.choice_temperature is None else self.choice_temperature
        if not is_finite(temperature) or temperature <= 0:
            raise ConfigError("choice_temperature is not a finite number above 0")

    def costs(self, mmproj_type: str, context_bytes: float) -> Costs | None:
        """Return the costs with a type of mmproj file, or None if it was not measured.

        Args:
            mmproj_type: type of the mmproj file, such as F16.
            context_bytes: memory per token of context.
        """
        if mmproj_type not in self.encode:
            return None
        view_seconds, token_seconds = line_through(list(self.encode[mmproj_type].items()))
        return Costs(
            view_seconds=view_seconds,
            token_seconds=token_seconds,
            prefill_seconds=1 / self.prefill_speed,
            decode_seconds=1 / self.decode_speed,
            memory_bytes=self.memory_bytes,
            context_bytes=context_bytes,
            is_measured=True,
            source=f"measured here, {self.measured[:10]}, threads: {self.threads}",
        )


def profile_key(model: Path, n_gpu_layers: int = 0, device: str | None = None) -> ProfileKey:
    """Return the key of the profile of a language file on this machine.

    Args:
        model: path of the language file.
        n_gpu_layers: layers on a GPU; -1 means all.
        device: name of the GPU; None means any.

    Raises:
        ModelNotFound: the file cannot be read.
    """
    try:
        with model.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        size = model.stat().st_size
    except OSError as error:
        raise ModelNotFound(f"cannot read {model}: {error.strerror or error}; check the path") from error
    return ProfileKey(
        cpu=cpu_name(),
        engine=_engine_build(),
        model=hashlib.sha256(size.to_bytes(8, "little") + head).hexdigest(),
        device=f"gpu {n_gpu_layers} {device or ''}".strip() if n_gpu_layers else "cpu",
    )


def _engine_build() -> str:
    """Return a text that differs between builds of the engine, without loading it; `none` if it is not installed."""
    folders = llama_folders()
    libraries = llama_libraries(*folders) if folders else ()
    return " ".join(sorted(f"{path.name}:{path.stat().st_size}" for path in libraries)) or "none"


def save_profile(profile: Profile, key: ProfileKey) -> Path:
    """Write a profile for later runs and return the path of its file.

    Raises:
        ConfigError: it cannot be written.
    """
    content = {"version": VERSION, "place": asdict(key), "profile": asdict(profile)}
    try:
        write_whole(key.path, [json.dumps(content, indent=1).encode() + b"\n"])
    except OSError as error:
        folder = key.path.parent
        raise ConfigError(f"cannot write to {folder}: {error.strerror or error}; set LFM2VL_CACHE") from error
    return key.path


def keep_temperature(profile: Profile, key: ProfileKey) -> Profile:
    """Return a new profile with the temperature of `choose` that the stored one has, if there is a stored one."""
    try:
        return replace(profile, choice_temperature=_read(key).choice_temperature)
    except (OSError, ConfigError):
        return profile


def load_profile(key: ProfileKey) -> Profile | None:
    """Return the stored profile, or None if it is missing, or cannot be used, which is logged as a warning."""
    try:
        return _read(key)
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = error.strerror or str(error)
    except ConfigError as error:
        reason = str(error)
    _LOG.warning("the device profile %s is not used: %s; run `lfm2vl-edge tune` again", key.path, reason)
    return None


def profile_state(key: ProfileKey) -> ProfileState:
    """Return whether there is a usable profile, without a warning."""
    try:
        _read(key)
    except FileNotFoundError:
        return "stale" if _is_stale(key) else "none"
    except (OSError, ConfigError):
        return "damaged"
    return "present"


def _is_stale(key: ProfileKey) -> bool:
    """Return whether there is a profile of the same model and device under another key."""
    for path in key.path.parent.glob("*.json"):
        try:
            other = json.loads(path.read_bytes()[:_MAX_FILE_BYTES])["place"]
            if (other["model"], other["device"]) == (key.model, key.device):
                return True
        except (OSError, LookupError, TypeError, ValueError, RecursionError):  # damaged, and of an unknown model
            continue
    return False


def _read(key: ProfileKey) -> Profile:
    """Return the stored profile.

    Raises:
        OSError: the file is missing (FileNotFoundError) or cannot be read.
        ConfigError: the file is not a valid profile for this key.
    """
    with key.path.open("rb") as file:
        data = file.read(_MAX_FILE_BYTES)
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError("it is not valid JSON") from error
    if not isinstance(content, dict) or not isinstance(content.get("profile"), dict):
        raise ConfigError("it is not a device profile")
    if content.get("version") != VERSION:
        raise ConfigError(f"it has version {shorten(content.get('version'))}, not {VERSION}")
    if content.get("place") != asdict(key):
        raise ConfigError("it belongs to another machine, engine or model")
    try:
        fields = dict(content["profile"])
        encode = {
            str(kind): {int(tokens): seconds for tokens, seconds in points.items()}
            for kind, points in fields.pop("encode").items()
        }
        repacked = fields.pop("repacked", [])  # a profile of an earlier version has none
        return Profile(**fields, encode=encode, repacked=tuple(repacked) if isinstance(repacked, list) else repacked)
    except (TypeError, KeyError, ValueError, AttributeError, OverflowError) as error:
        raise ConfigError("a value is missing or not valid") from error
