"""Rows that are equal, and rows that are nearly equal, in bounded memory.

Of every row the smallest hashes of its character 5-grams are kept (Broder 1997). Dealt to bins by their last bits, the
smallest in each bin are a MinHash of one permutation (Li, Owen, Zhang 2012, arXiv:1208.1259), where empty bins borrow
from the next (Shrivastava and Li 2014, arXiv:1406.4784). Rows that agree in a band of bins are compared (Leskovec,
Rajaraman, Ullman, Mining of Massive Datasets, chapter 3): at a Jaccard similarity of 0.8 one pair in 20,000 does not.

Shapes: N rows, K bins, P pairs, S values of a sketch.
"""

from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from lit_llama.device import cores
from lit_llama.text.inspect.characters import code_points

SHINGLE = 5  # characters
SIMILARITY = 0.8
BYTES = 1700
"""Memory for each of them at the most: sketch, minima, and what is sorted in the end."""
_BINS, _BANDS, _PER_BAND = 128, 25, 5
_SKETCH = 256  # smallest hashes kept of a row; a row with fewer shingles is kept whole
_LIKELY = 0.6  # of equal bins, five standard deviations below SIMILARITY
_NEIGHBOURS = 8  # compared in one bucket; buckets of templated rows would cost the square of their size
_BUCKET = 4 * _NEIGHBOURS  # rows that a new one is compared with in one bucket
_RECENT = 4096  # rows of a NearIndex between two merges
_BLOCK = 1024  # rows or pairs at a time: what is made of them stays in the processor's cache
_NONE = np.uint32(0xFFFFFFFF)
_MIX = np.uint64(0x9E3779B97F4A7C15)

Keys = npt.NDArray[np.uint64]
Rows = npt.NDArray[np.int64]
Pairs = tuple[Rows, Rows, npt.NDArray[np.float64]]


def earliest(keys: Keys) -> Rows:
    """Find the first row with the same key, (N,) indices; a row that repeats none has its own."""
    order = np.argsort(keys, kind="stable")  # np.unique would take twice the memory
    ranked = keys[order]
    starts = np.flatnonzero(np.append(True, ranked[1:] != ranked[:-1])[: len(keys)])
    first = np.empty(len(keys), np.int64)
    first[order] = np.repeat(order[starts], np.diff(np.append(starts, len(keys))))
    return first


def partners(keys: Keys, sought: npt.NDArray[np.bool_], among: npt.NDArray[np.bool_]) -> Rows:
    """Find for each `sought` row the first row of `among` with the same key: (N,), -1 where there is none."""
    found = np.full(len(keys), -1, np.int64)
    rows = np.flatnonzero(among)
    distinct, first = np.unique(keys[rows], return_index=True)
    if not len(distinct):
        return found
    wanted = np.flatnonzero(sought)
    place = np.minimum(np.searchsorted(distinct, keys[wanted]), len(distinct) - 1)
    hit = distinct[place] == keys[wanted]
    found[wanted[hit]] = rows[first[place[hit]]]
    return found


class NearDuplicates:
    """Sketches of every row, at most 1 kB each, and the pairs among them in the end.

    Args:
        limit: Rows up to which it runs; with one more it forgets everything.

    Attributes:
        rows: Rows seen.
        active: Not more than `limit` so far.
    """

    def __init__(self, limit: int) -> None:
        self.rows = 0
        self._limit = limit
        # Arrays that grow in place: joining parts in the end would hold everything twice.
        self._sketches, self._lengths = array("I"), array("q")

    @property
    def active(self) -> bool:
        """Whether pairs can be found."""
        return self.rows <= self._limit

    def add(self, texts: Sequence[str]) -> None:
        """Take in the next rows, some hundred kB at a time for speed."""
        self.rows += len(texts)
        if not self.active:
            self._sketches, self._lengths = array("I"), array("q")
            return
        values, lengths = _sketches(texts)
        self._sketches.frombytes(values.tobytes())
        self._lengths.frombytes(lengths.tobytes())

    def pairs(self, among: npt.NDArray[np.bool_]) -> Pairs:
        """Return the pairs of rows with a Jaccard similarity of SIMILARITY or more; no row can be added after this.

        Exact for rows of up to 256 different 5-grams, else an estimate from 256 of them (standard deviation 0.025).
        Where a hundred rows are alike, not every pair of them is compared, but each row with many others.

        Args:
            among: (N,) the rows to compare; of rows with equal text one is enough.

        Returns:
            (P,) first and second row, first < second, ordered; and their similarity.
        """
        assert self.active and len(among) == self.rows
        rows = np.flatnonzero(among)
        if len(rows) < 2:
            return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
        self._sketches.frombytes(np.full(_SKETCH, _NONE).tobytes())  # for a view of the last row as long as any
        values, lengths = np.frombuffer(self._sketches, np.uint32), np.frombuffer(self._lengths, np.int64)
        starts = np.cumsum(lengths) - lengths
        minima = _minima(values, starts, lengths)
        with ThreadPoolExecutor(cores()) as pool:  # numpy leaves Python's lock alone
            codes = _distinct(list(pool.map(lambda band: _candidates(minima, rows, band), range(_BANDS))))
            first, second = codes // self.rows, codes % self.rows
            blocks = [slice(at, at + _BLOCK) for at in range(0, len(codes), _BLOCK)]
            jaccard = pool.map(lambda block: _jaccard(values, starts, lengths, first[block], second[block]), blocks)
            similarity = np.concatenate([np.zeros(0), *jaccard])
        alike = similarity >= SIMILARITY
        return first[alike], second[alike], similarity[alike]


class NearIndex:
    """Rows that come one after another, each compared with all before it: as NearDuplicates, without an end.

    A row costs some 0.3 ms and at most 2 kB, however many there are.
    """

    def __init__(self) -> None:
        self._sketches, self._ends, self._minima = array("I"), array("q", [0]), array("I")
        # By the key of a band: rows that are merged, in the order of their keys, and those that came since.
        self._merged = [(np.zeros(0, np.uint64), np.zeros(0, np.int32)) for _ in range(_BANDS)]
        self._recent: list[dict[int, list[int]]] = [{} for _ in range(_BANDS)]
        self._since = 0

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, text: str) -> None:
        """Take in a row."""
        sketch, minima = self._hashed(text)
        for recent, key in zip(self._recent, _keys(minima).tolist(), strict=True):
            recent.setdefault(key, []).append(len(self))
        self._sketches.frombytes(sketch.tobytes())
        self._minima.frombytes(minima.tobytes())
        self._ends.append(len(self._sketches))
        self._since += 1
        if self._since == _RECENT:
            self._merge()

    def _merge(self) -> None:
        """Move what came lately from dictionaries to arrays, which take a tenth of the memory."""
        for band, recent in enumerate(self._recent):
            keys, rows = self._merged[band]
            keys = np.append(keys, np.repeat(np.fromiter(recent, np.uint64), [len(found) for found in recent.values()]))
            rows = np.append(rows, np.fromiter((row for found in recent.values() for row in found), np.int32))
            order = np.argsort(keys, kind="stable")  # rows of one key stay in their order
            self._merged[band] = keys[order], rows[order]
            recent.clear()
        self._since = 0

    def nearest(self, text: str) -> tuple[int, float] | None:
        """Return the most similar row of those with a Jaccard similarity of SIMILARITY or more, and that; None without
        any.
        """
        sketch, minima = self._hashed(text)
        rows = np.fromiter(self._found(_keys(minima)), np.int64)
        known = np.frombuffer(self._minima, np.uint32).reshape(-1, _BINS)[rows]
        likely = rows[np.count_nonzero(known == minima, axis=1) >= _LIKELY * _BINS]
        best = max(((_alike(sketch, self._sketch(row)), -row) for row in likely.tolist()), default=(0.0, 0))
        return (-best[1], best[0]) if best[0] >= SIMILARITY else None

    def _found(self, sought: Keys) -> set[int]:
        """Rows that share a band: of each the first ones, as buckets of templated rows would make every row slower."""
        found: set[int] = set()
        for (keys, rows), recent, key in zip(self._merged, self._recent, sought, strict=True):
            start = int(np.searchsorted(keys, key))
            if start < len(keys) and keys[start] == key:
                end = min(int(np.searchsorted(keys, key, "right")), start + _BUCKET)
                found.update(rows[start:end].tolist())
                start = end - start
            else:
                start = 0
            found.update(recent.get(int(key), ())[: _BUCKET - start])
        return found

    def _sketch(self, row: int) -> npt.NDArray[np.uint32]:
        # A copy: what is looked at in place cannot grow.
        return np.array(self._sketches[self._ends[row] : self._ends[row + 1]], np.uint32)

    @staticmethod
    def _hashed(text: str) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
        values, lengths = _sketches([text])
        return values, _minima(values, np.zeros(1, np.int64), lengths)[0]


def _keys(minima: npt.NDArray[np.uint32]) -> Keys:
    """What each band of a row is found by."""
    bands = minima[: _BANDS * _PER_BAND].reshape(_BANDS, _PER_BAND).astype(np.uint64)
    key = np.zeros(_BANDS, np.uint64)
    for column in range(_PER_BAND):
        key = (key ^ bands[:, column]) * _MIX
        key ^= key >> np.uint64(29)
    return key


def _alike(one: npt.NDArray[np.uint32], other: npt.NDArray[np.uint32]) -> float:
    """Similarity of two sketches, of which one that was cut says nothing above the largest hash that it holds."""
    known = min(int(side[-1]) if len(side) == _SKETCH else int(_NONE) for side in (one, other))
    one, other = one[one <= known], other[other <= known]
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _sketches(texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], Rows]:
    """The smallest distinct hashes of each text's 5-grams, sorted and laid end to end, and how many are of each."""
    texts = [text.ljust(SHINGLE) for text in texts]
    lengths = np.array([len(text) for text in texts])
    points = code_points(texts)
    hashes = _hashes(points)
    owner = np.repeat(np.arange(len(texts), dtype=np.uint64), lengths)[: len(hashes)]
    ends = np.repeat(np.cumsum(lengths), lengths)[: len(hashes)]
    inside = np.arange(len(hashes)) + SHINGLE <= ends  # a 5-gram across two texts is nobody's
    keys = np.sort((owner[inside] << np.uint64(32)) | hashes[inside])
    keys = keys[np.append(True, keys[1:] != keys[:-1])]
    counts = np.bincount((keys >> np.uint64(32)).astype(np.int64), minlength=len(texts))
    position = np.arange(len(keys)) - np.repeat(np.cumsum(counts) - counts, counts)
    return keys[position < _SKETCH].astype(np.uint32), np.minimum(counts, _SKETCH)


def _hashes(points: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """A hash below _NONE of every five characters."""
    count = len(points) - SHINGLE + 1
    hashes = points[:count].astype(np.uint64)
    for offset in range(1, SHINGLE):
        hashes *= _MIX
        hashes += points[offset : offset + count]
    hashes ^= hashes >> np.uint64(32)
    hashes *= _MIX
    hashes >>= np.uint64(32)
    return np.minimum(hashes, np.uint64(_NONE - 1)).astype(np.uint32)


def _minima(values: npt.NDArray[np.uint32], starts: Rows, lengths: Rows) -> npt.NDArray[np.uint32]:
    """(N, K) the smallest hash in each bin, of rows laid end to end."""
    minima = np.full((len(lengths), _BINS), _NONE)
    bins = np.arange(_BINS, dtype=np.int16)
    for at in range(0, len(lengths), _BLOCK):
        block = minima[at : at + _BLOCK]
        counts = lengths[at : at + _BLOCK]
        row = np.repeat(np.arange(len(counts)), counts)
        inside = values[starts[at] : starts[at] + counts.sum()]
        np.minimum.at(block.reshape(-1), row * _BINS + (inside & np.uint32(_BINS - 1)), inside)
        # An empty bin takes the value of the next one that is not, marked with the way to it.
        given = block != _NONE
        following = np.minimum.accumulate(np.where(given, bins, np.int16(2 * _BINS))[:, ::-1], axis=1)[:, ::-1]
        following = np.where(following < 2 * _BINS, following, following[:, :1] + np.int16(_BINS))  # once around
        row, empty = np.nonzero(~given)
        source = following[row, empty].astype(np.int64)
        block[row, empty] = block[row, source % _BINS] + (source - empty).astype(np.uint32) * np.uint32(0x9E3779B1)
    return minima


def _candidates(minima: npt.NDArray[np.uint32], rows: Rows, band: int) -> Rows:
    """Pairs i < j of `rows` as i * N + j that share a band and seem alike."""
    key = np.zeros(len(rows), np.uint64)
    for column in range(band * _PER_BAND, (band + 1) * _PER_BAND):
        key = (key ^ minima[rows, column]) * _MIX
        key ^= key >> np.uint64(29)
    # Most rows are alone with their key; only the others have to be sorted.
    bits = len(rows).bit_length() + 3
    slot = (key >> np.uint64(64 - bits)).astype(np.int64)
    shared = np.flatnonzero(np.bincount(slot, minlength=1 << bits)[slot] > 1)
    # Within a bucket another order each time, so that in a large one every row meets many others.
    shared = np.random.Generator(np.random.PCG64([7, band])).permutation(shared)
    shared = shared[np.argsort(key[shared], kind="stable")]
    key, order = key[shared], rows[shared]
    found = [np.zeros(0, np.int64)]
    for distance in range(1, min(_NEIGHBOURS, len(order) - 1) + 1):
        same = np.flatnonzero(key[:-distance] == key[distance:])
        if not len(same):
            break
        first, second = np.sort([order[same], order[same + distance]], axis=0)
        for at in range(0, len(same), _BLOCK):
            i, j = first[at : at + _BLOCK], second[at : at + _BLOCK]
            likely = np.count_nonzero(minima[i] == minima[j], axis=1) >= _LIKELY * _BINS
            found.append(i[likely] * len(minima) + j[likely])
    return np.concatenate(found)


def _distinct(codes: list[Rows]) -> Rows:
    """Each once, in order."""
    ordered = np.sort(np.concatenate(codes))  # np.unique takes longer
    return ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]]


def _jaccard(
    values: npt.NDArray[np.uint32], starts: Rows, lengths: Rows, first: Rows, second: Rows
) -> npt.NDArray[np.float64]:
    """(P,) similarity from the sketches of two rows each.

    Of a row cut to its smallest hashes nothing is known above the largest kept, so both are compared below it.
    """
    sketches = np.lib.stride_tricks.sliding_window_view(values, _SKETCH)  # one begins at every value
    both = np.empty((len(first), 2, _SKETCH), np.uint32)  # (P, 2, S)
    for side, rows in enumerate((first, second)):
        both[:, side] = sketches[starts[rows]]
        both[:, side][np.arange(_SKETCH) >= lengths[rows, None]] = _NONE
    known = both[:, :, -1].min(axis=1)  # _NONE where both rows are whole
    both[both > known[:, None, None]] = _NONE
    merged = np.sort(both.reshape(len(first), -1), axis=1)
    given = np.count_nonzero(merged != _NONE, axis=1)
    shared = np.count_nonzero((merged[:, 1:] == merged[:, :-1]) & (merged[:, 1:] != _NONE), axis=1)
    return shared / (given - shared)
