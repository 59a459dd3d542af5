"""Measures with their uncertainty: judges (AUC, threshold), proportions, differences, variety."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from trace_ray.errors import DataError
from trace_ray.types import Interval


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Return the area under the ROC curve: P(score of a positive > score of a negative).

    Args:
        labels: [N] of 0 / 1 (1 = positive, e.g. violates).
        scores: [N], higher for positives; ties count one half.

    Raises:
        DataError: the labels hold one class only.
    """
    from sklearn.metrics import roc_auc_score  # as in the functions below: a slow import

    return float(roc_auc_score(_two_classes(labels), _finite(scores)))


def auc_interval(labels: ArrayLike, scores: ArrayLike, confidence: float = 0.95) -> Interval:
    """Return the AUC with its score interval (Newcombe 2006, method 5).

        |AUC - a| = z sqrt(V(a)),  V(a) = a (1 - a) / (P N) * (1 + M ((1 - a) / (2 - a) + a / (1 + a)))

    P and N: positives and negatives; M = (P + N) / 2 - 1. Perfect separation doesn't make it falsely
    exact. Items count as independent.

    Args:
        labels: [N] of 0 / 1.
        scores: [N], higher for positives.
        confidence: of the two-sided interval.

    Raises:
        DataError: the labels hold one class only.
    """
    truth, value = _two_classes(labels), auc(labels, scores)
    positives, n = int(truth.sum()), truth.size
    z = float(stats.norm.ppf(0.5 + confidence / 2))

    def excess(a: float) -> float:
        shape = 1 + (n / 2 - 1) * ((1 - a) / (2 - a) + a / (1 + a))
        return (value - a) ** 2 - z * z * a * (1 - a) * shape / (positives * (n - positives))

    def end(bracket: tuple[float, float]) -> float:
        return float(optimize.root_scalar(excess, bracket=bracket, method="brentq").root)

    # The ends 0 and 1 solve the equation of an AUC of 0 and 1 as well: look just inside them.
    low = end((0.0, min(value, 1 - 1e-12))) if value > 0 else 0.0
    high = end((max(value, 1e-12), 1.0)) if value < 1 else 1.0
    return Interval(value, low, high, n)


def accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Return the share of predictions that equal their label, both [N] of 0 / 1."""
    truth = np.asarray(labels).astype(bool)
    if truth.size == 0:
        raise DataError("accuracy needs at least one label (got none)")
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(truth, np.asarray(predictions).astype(bool)))


def best_threshold(labels: ArrayLike, scores: ArrayLike) -> float:
    """Return the threshold t for which ``score >= t`` has the best balanced accuracy.

        balanced accuracy = (true positive rate + true negative rate) / 2

    t lies midway between the two neighbouring scores that it parts; the first of equally good
    places is taken, from the highest score down.

    Args:
        labels: [N] of 0 / 1.
        scores: [N], higher for positives.

    Raises:
        DataError: the labels hold one class only.
    """
    truth, values = _two_classes(labels), _finite(scores)
    from sklearn.metrics import roc_curve

    false_rate, true_rate, cuts = roc_curve(truth, values, drop_intermediate=False)
    # Place 0 calls nothing positive (its cut is infinite); the last one, as good, calls all so.
    best = 1 + int(np.argmax((true_rate - false_rate)[1:]))
    cut = float(cuts[best])
    if best + 1 == len(cuts):
        return cut
    below = float(cuts[best + 1])
    middle = below + (cut - below) / 2
    return middle if middle > below else cut


def expected_calibration_error(labels: ArrayLike, scores: ArrayLike, n_bins: int = 10) -> float:
    """Return the expected calibration error (arXiv 1706.04599, eq. 3), for the positive class.

        ECE = sum over bins b of (n_b / N) * |mean label in b - mean score in b|

    Bins are equally wide over [0, 1], open at the left; a score of 0 is in the first.

    Args:
        labels: [N] of 0 / 1.
        scores: [N] in [0, 1]: the probability of 1.
        n_bins: number of bins.

    Raises:
        DataError: no values, as many labels as scores not given, or a score outside [0, 1].
    """
    truth, p = _finite(labels), _finite(scores)
    if len(truth) != len(p) or p.min() < 0 or p.max() > 1:
        raise DataError("calibration needs as many labels as scores, and scores in [0, 1]")
    bins = np.clip(np.ceil(p * n_bins).astype(int) - 1, 0, n_bins - 1)
    gaps = np.bincount(bins, weights=truth - p, minlength=n_bins)
    return float(np.abs(gaps).sum() / len(p))


def cohen_kappa(first: ArrayLike, second: ArrayLike) -> float | None:
    """Return Cohen's kappa: agreement of two raters beyond chance.

        kappa = (p_o - p_e) / (1 - p_e)

    p_o: share of items they agree on; p_e: the share expected of raters with these margins.

    Args:
        first: [N] of 0 / 1.
        second: [N] of 0 / 1, the same items.

    Returns:
        In [-1, 1]; None where both always say the same one thing (p_e = 1: nothing to learn from).

    Raises:
        DataError: no items, or not as many of one as of the other.
    """
    a, b = np.asarray(first).astype(bool), np.asarray(second).astype(bool)
    if a.size == 0 or a.shape != b.shape:
        raise DataError(f"two raters must rate the same items ({a.size} and {b.size})")
    observed = float((a == b).mean())
    chance = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    return None if chance == 1 else (observed - chance) / (1 - chance)


def kappa_interval(
    first: ArrayLike, second: ArrayLike, confidence: float = 0.95
) -> Interval | None:
    """Return Cohen's kappa with an interval; None where kappa is undefined.

        (l - p_e) / (1 - p_e),  l: each end of the Wilson interval of the observed agreement

    This is Cohen's own interval (Educ. Psychol. Meas. 20, 1960), which takes p_e as known, with Wilson's
    in the place of the normal interval: perfect agreement on few items is not falsely exact.

    Args:
        first: [N] of 0 / 1.
        second: [N] of 0 / 1, the same items.
        confidence: of the two-sided interval.

    Raises:
        DataError: no items, or not as many of one as of the other.
    """
    kappa = cohen_kappa(first, second)
    if kappa is None:
        return None
    a, b = np.asarray(first).astype(bool), np.asarray(second).astype(bool)
    chance = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    seen = share_interval(int((a == b).sum()), a.size, confidence)
    low, high = ((end - chance) / (1 - chance) for end in (seen.ci_low, seen.ci_high))
    return Interval(kappa, max(low, -1.0), min(high, 1.0), a.size)


def bootstrap_interval(
    values: ArrayLike, seed: int, n_resamples: int = 2000, confidence: float = 0.95
) -> Interval:
    """Return the mean of ``values`` with its percentile bootstrap interval.

    Values that are all equal have no spread to resample: all 0 or all 1 are read as a proportion
    and get the Wilson score interval; any other v gets [v, v].

    Args:
        values: [N] floats, N >= 1; one per independent item.
        seed: of the resampling.
        n_resamples: bootstrap samples.
        confidence: of the two-sided interval.

    Raises:
        DataError: no values, or one is NaN or infinite.
    """
    sample = _finite(values)
    return _interval(sample, seed, n_resamples, confidence, support=(0.0, 1.0))


def share_interval(count: int, n: int, confidence: float = 0.95) -> Interval:
    """Return a share with its Wilson interval (Wilson 1927), right also for few or no hits.

    Args:
        count: hits.
        n: items looked at, at least one.
        confidence: of the interval.
    """
    found = stats.binomtest(count, n).proportion_ci(confidence, method="wilson")
    return Interval(count / n, float(found.low), float(found.high), n)


def paired_difference_interval(
    before: ArrayLike,
    after: ArrayLike,
    seed: int = 0,
    n_resamples: int = 2000,
    confidence: float = 0.95,
    *,
    shares: bool = False,
) -> Interval:
    """Return the mean of ``after - before``, items resampled in pairs.

    Where all differences are equal and both sides are 0 / 1 (or ``shares``), the interval allows for
    the share of items that might differ (the Wilson bound on 0 of N), so it isn't falsely exact.

    Args:
        before: [N] floats.
        after: [N] floats of the same items in the same order.
        seed: of the resampling.
        n_resamples: bootstrap samples.
        confidence: of the two-sided interval.
        shares: each value is a share, anywhere in [0, 1].

    Raises:
        DataError: the two differ in length, are empty, or hold NaN or infinite values.
    """
    first, second = _finite(before), _finite(after)
    if len(first) != len(second):
        raise DataError(f"paired values must be as many: {len(first)} before, {len(second)} after")
    binary = bool(np.isin(np.concatenate([first, second]), (0.0, 1.0)).all())
    support = (-1.0, 0.0, 1.0) if binary or shares else ()
    return _interval(second - first, seed, n_resamples, confidence, support)


def distinct_n(texts: Iterable[str], n: int = 2) -> float:
    """Return distinct n-grams / all n-grams over all texts (arXiv 1510.03055, distinct-n).

    Args:
        texts: split at white space and lowercased; one shorter than n tokens has no n-gram.
        n: length of the n-grams.

    Returns:
        In (0, 1]; 0 where no text has an n-gram.
    """
    seen: set[tuple[str, ...]] = set()
    total = 0
    for text in texts:
        tokens: Sequence[str] = text.lower().split()
        grams = list(zip(*(tokens[i:] for i in range(n)), strict=False))
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def _interval(
    sample: NDArray[np.float64],
    seed: int,
    n_resamples: int,
    confidence: float,
    support: tuple[float, ...],
) -> Interval:
    """Return the bootstrap interval of the mean.

    Where all values are the same member of ``support`` (the values an item can have, ascending),
    the share of items that differ is at most ``unseen``, each as far off as the support goes.
    """
    n, value = len(sample), float(sample.mean())
    if np.all(sample == sample[0]):
        value = float(sample[0])
        if value not in support:
            return Interval(value, value, value, n)
        unseen = float(stats.binomtest(0, n).proportion_ci(confidence, method="wilson").high)
        low = value - unseen * (value - support[0])
        return Interval(value, low, value + unseen * (support[-1] - value), n)
    result = stats.bootstrap(
        (sample,),
        np.mean,
        n_resamples=n_resamples,
        batch=max(1, 2_000_000 // n),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return Interval(value, float(low), float(high), n)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    """Return a non-empty vector of finite floats."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise DataError(f"a measure needs a vector of at least one value (got shape {array.shape})")
    if not np.isfinite(array).all():
        raise DataError(f"{int((~np.isfinite(array)).sum())} of {array.size} values are not finite")
    return array


def _two_classes(labels: ArrayLike) -> NDArray[np.bool_]:
    """Return the labels as booleans, both classes present."""
    truth = np.asarray(labels).astype(bool)
    if truth.size == 0 or truth.all() or not truth.any():
        raise DataError(
            f"labels need both classes (got {int(truth.sum())} positive of {truth.size})"
        )
    return truth
