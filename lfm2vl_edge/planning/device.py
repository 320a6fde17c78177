"""The device profile: what `tune` measured of one model on one machine, kept for later runs.

It belongs to a processor, a build of the engine and a language file; a profile of anything else is not used. It
changes how fast an answer comes, never whether it does: a damaged one is a warning in the log `lfm2vl_edge.planning.device`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from lfm2vl_edge.errors import ConfigError, ModelNotFound
from lfm2vl_edge.host import available_cpus, cache_folder, cpu_name, write_whole
from lfm2vl_edge.planning.costs import Costs, line_through

VERSION: Final = 1
"""Of the file's form; a file of another one is not used."""
_ENGINE: Final = "llama_cpp"
_HEAD_BYTES: Final = 1 << 20
"""How much of a language file tells it from others, with its size: its metadata and the start of its vocabulary."""
_MAX_FILE_BYTES: Final = 1 << 20
_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileKey:
    """What a profile belongs to."""

    cpu: str
    """The processor."""
    engine: str
    """Names and sizes of the files of native code."""
    model: str
    """Digest that tells the language file from others."""
    device: str
    """`cpu`, or the layers that a GPU takes and its name."""

    @property
    def path(self) -> Path:
        """Where its profile lies."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()
        return cache_folder() / "devices" / f"{digest[:32]}.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """What was measured.

    Raises:
        ConfigError: a figure is none.
    """

    threads: int
    """Threads that were fastest, and with which the rest was measured."""
    mmproj: str
    """Type of the mmproj file that was fastest."""
    encode: Mapping[str, Mapping[int, float]]
    """Type of the mmproj file -> image tokens of a view -> seconds."""
    prefill_speed: float
    """Tokens of a prompt per second."""
    decode_speed: float
    """Tokens of an answer per second."""
    memory_bytes: int
    """Largest resident memory after an answer about one view, context as in `costs.CONTEXT_TOKENS`."""
    measured: str
    """Date and time, ISO 8601."""

    def __post_init__(self) -> None:
        for name in ("threads", "memory_bytes"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be a whole number, 1 or more")
        if self.threads > len(available_cpus()):
            raise ConfigError(f"threads is {self.threads}; this process may use {len(available_cpus())} processors")
        if not isinstance(self.measured, str):
            raise ConfigError(f"measured is {self.measured!r}; it must be a date")
        views = [pair for points in self.encode.values() for pair in points.items()]
        speeds = [self.prefill_speed, self.decode_speed, *(seconds for _, seconds in views)]
        if not all(_is_positive(figure) for figure in speeds) or not all(self.encode.values()):
            raise ConfigError("a speed or time is no finite number above 0")
        if self.mmproj not in self.encode or any(type(tokens) is not int or tokens < 1 for tokens, _ in views):
            raise ConfigError("the times of the encoder do not belong together")

    def costs(self, mmproj_type: str, context_bytes: float) -> Costs | None:
        """Return the costs with a type of mmproj file; None if it was not measured.

        Args:
            mmproj_type: such as F16.
            context_bytes: of one token in the context.
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


def _is_positive(figure: object) -> bool:
    return isinstance(figure, (int, float)) and not isinstance(figure, bool) and 0 < figure < math.inf


def profile_key(model: Path, n_gpu_layers: int = 0, device: str | None = None) -> ProfileKey:
    """Return what a profile of a language file belongs to, on this machine.

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
    """Return what tells the installed engine from other builds, without loading it."""
    spec = importlib.util.find_spec(_ENGINE)
    if spec is None or spec.origin is None:
        return "none"
    libraries = (path for path in (Path(spec.origin).parent / "lib").glob("*") if path.is_file())
    return " ".join(sorted(f"{path.name}:{path.stat().st_size}" for path in libraries if not path.is_symlink()))


def save_profile(profile: Profile, place: ProfileKey) -> Path:
    """Write a profile for later runs and return where it lies.

    Raises:
        ConfigError: it cannot be written.
    """
    content = {"version": VERSION, "place": asdict(place), "profile": asdict(profile)}
    try:
        write_whole(place.path, [json.dumps(content, indent=1).encode() + b"\n"])
    except OSError as error:
        where = place.path.parent
        raise ConfigError(f"cannot write to {where}: {error.strerror or error}; set LFM2VL_CACHE") from error
    return place.path


def load_profile(place: ProfileKey) -> Profile | None:
    """Return the profile of a place; None if there is none, or none that can be used, which is a warning."""
    try:
        with place.path.open("rb") as file:
            content = json.loads(file.read(_MAX_FILE_BYTES))
        return _profile(content, place)
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, RecursionError):
        reason = "it is no JSON"
    except ConfigError as error:
        reason = str(error)
    _LOG.warning("the device profile %s is not used: %s; run `lfm2vl-edge tune` again", place.path, reason)
    return None


ProfileState = Literal["present", "stale", "damaged", "none"]
"""`stale`: measured with the same model, on another processor or with another build of the engine."""


def profile_state(place: ProfileKey) -> ProfileState:
    """Tell whether a place has a profile that is used, without a warning."""
    try:
        _profile(json.loads(place.path.read_bytes()[:_MAX_FILE_BYTES]), place)
    except FileNotFoundError:
        return "stale" if _was_measured_elsewhere(place) else "none"
    except (OSError, ValueError, RecursionError, ConfigError):
        return "damaged"
    return "present"


def _was_measured_elsewhere(place: ProfileKey) -> bool:
    for path in place.path.parent.glob("*.json"):
        try:
            other = json.loads(path.read_bytes()[:_MAX_FILE_BYTES])["place"]
            if (other["model"], other["device"]) == (place.model, place.device):
                return True
        except (OSError, LookupError, TypeError, ValueError, RecursionError):  # what is damaged is not ours to judge
            continue
    return False


def _profile(content: Any, place: ProfileKey) -> Profile:
    if not isinstance(content, dict) or not isinstance(content.get("profile"), dict):
        raise ConfigError("it has another form")
    if content.get("version") != VERSION:
        raise ConfigError(f"it has version {content.get('version')!r}, not {VERSION}")
    if content.get("place") != asdict(place):
        raise ConfigError("it belongs to another machine, engine or model")
    try:
        fields = dict(content["profile"])
        encode = {
            str(kind): {int(tokens): seconds for tokens, seconds in points.items()}
            for kind, points in fields.pop("encode").items()
        }
        return Profile(**fields, encode=encode)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise ConfigError("its figures are incomplete") from error
