"""Damaged and unusual files, made from real ones by one stated damage each, and what reading them must come to."""

import contextlib
import signal
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

LIMIT_S = 10  # of computing, for one file
READ, REFUSED, UNSEEN = "read right", "refused with a reason", "read, damage not to be seen"


class Case(NamedTuple):
    """One file. `expected` is computed without the reader under test."""

    kind: str  # the class in docs/reliability.md
    name: str
    data: bytes | None  # None: a folder of that name
    may: tuple[str, ...]  # the outcomes that are right: of READ, REFUSED and UNSEEN
    expected: np.ndarray | None = None  # uint8 (height, width): what a picture that was "read right" must equal
    atol: int = 0  # grey levels that it may differ by, where two decoders or two formulas round


class Hang(BaseException):
    """A reader that did not come back in time; no Exception, so that no reader can take it for a damage."""


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise `Hang` where the block computes longer, or takes ten times as long; in the main thread alone."""

    def stop(*_):
        raise Hang(f"{what}: more than {seconds} s")

    # A machine that others use as well stretches the time on the clock, but not that of computing.
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, seconds), signal.SIGALRM: (signal.ITIMER_REAL, 10 * seconds)}
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, limit in timers.values():
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])


def write(cases: list[Case], folder: Path) -> None:
    """Write the files of a corpus; each name once."""
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        path = folder / case.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if case.data is None else path.write_bytes(case.data)


def judge(case: Case, result: np.ndarray | Exception, refusals: tuple[type[Exception], ...]) -> str:
    """Say which outcome a result is, after checking that the case allows it."""
    if isinstance(result, Exception):
        assert isinstance(result, refusals) and str(result), f"{case.kind}, {case.name}: {result!r}"
        outcome = REFUSED
    else:
        assert result.dtype == np.uint8 and result.ndim == 2 and result.size, f"{case.name}: {result.shape}"
        outcome = READ if case.expected is not None and _equal(result, case) else UNSEEN
    assert outcome in case.may, (
        f"{case.kind}, {case.name}: {outcome} ({_told(result, case)}), where {case.may} is right"
    )
    return outcome


def _equal(picture, case) -> bool:
    if picture.shape != case.expected.shape:
        return False
    return int(np.abs(picture.astype(int) - case.expected.astype(int)).max()) <= case.atol


def _told(result, case) -> str:
    if isinstance(result, Exception) or case.expected is None:
        return str(result)
    if result.shape != case.expected.shape:
        return f"shape {result.shape}, expected {case.expected.shape}"
    return f"differs by up to {np.abs(result.astype(int) - case.expected.astype(int)).max()}"


def by_range(values: np.ndarray) -> np.ndarray:
    """What deep pixels must become: their minimum 0 and their maximum 255, in double precision."""
    values = values.astype(np.float64)
    low, high = values.min(), values.max()
    return np.rint((values - low) / (high - low) * 255).astype(np.uint8) if high > low else np.zeros(values.shape, "u1")


def luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601 grey of an RGB array (H, W, 3) of 0 to 255."""
    return np.rint(rgb.astype(np.float64) @ (0.299, 0.587, 0.114)).astype(np.uint8)


# --- damages ---------------------------------------------------------------------------------------------------------


def cut(data: bytes, rng) -> bytes:
    """Leave the first bytes, at least one and not all."""
    return data[: int(rng.integers(1, len(data)))]


def flip(start: float, stop: float, bits: int) -> Callable[[bytes, np.random.Generator], bytes]:
    """Damage that flips some bits between two shares of a file."""

    def damage(data, rng):
        array = np.frombuffer(data, np.uint8).copy()
        first, last = int(len(data) * start), max(int(len(data) * stop), int(len(data) * start) + 1)
        for at in rng.integers(first, last, bits):
            array[at] ^= 1 << rng.integers(8)
        return array.tobytes()

    return damage


def lose(data: bytes, rng) -> bytes:
    """Take up to 200 bytes out of the middle half."""
    at = int(rng.integers(len(data) // 4, 3 * len(data) // 4))
    return data[:at] + data[at + int(rng.integers(2, 200)) :]


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: tuple[int, int], bits: int, colour: int, raw: bytes, extra: bytes = b"", interlaced: int = 0) -> bytes:
    """A PNG of raw rows, each with its filter byte, `size` = (height, width); `extra` chunks before the pixels."""
    header = struct.pack(">IIBBBBB", size[1], size[0], bits, colour, 0, 0, interlaced)
    pixels = png_chunk(b"IDAT", zlib.compress(raw, 9))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra + pixels + png_chunk(b"IEND", b"")


def tiff(pixels: np.ndarray, *, photometric: int = 1, sample_format: int = 1, orientation: int = 1) -> bytes:
    """An uncompressed TIFF of one strip, in the byte order of `pixels`, (H, W) or (H, W, 3)."""
    order = ">" if pixels.dtype.byteorder == ">" else "<"
    samples, bits = (pixels.shape[2] if pixels.ndim == 3 else 1), 8 * pixels.itemsize
    count, data = 11, pixels.tobytes()
    at = 8 + 2 + 12 * count + 4  # where the numbers of bits lie, and behind them the pixels
    shorts = {259: 1, 262: photometric, 274: orientation, 277: samples, 284: 1, 339: sample_format}
    longs = {256: pixels.shape[1], 257: pixels.shape[0], 273: at + 2 * samples, 278: pixels.shape[0], 279: len(data)}
    entries = {tag: struct.pack(order + "HHIHH", tag, 3, 1, value, 0) for tag, value in shorts.items()}
    entries |= {tag: struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in longs.items()}
    del entries[284]
    inline = struct.pack(order + "HHIHH", 258, 3, 1, bits, 0)
    entries[258] = inline if samples == 1 else struct.pack(order + "HHII", 258, 3, samples, at)
    start = (b"MM\0*" if order == ">" else b"II*\0") + struct.pack(order + "IH", 8, count)
    directory = b"".join(entries[tag] for tag in sorted(entries))
    return start + directory + struct.pack(order + "I", 0) + struct.pack(f"{order}{samples}H", *[bits] * samples) + data
