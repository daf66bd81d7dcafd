"""Error rates of the statistics by simulation: false alarms without a difference, power with one.

The world of the simulations: rows differ in difficulty, which all arms share; an arm likes some rows better than others
whatever its seed (`taste`); a seed moves the arm's accuracy (by `deviation` points) and tips single rows (`whim`).
taste without whim is seeds that agree row by row, whim without taste is rows that are drawn anew for each seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from heft_engine.studies.intervals import half_width, row_variance, seed_variance
from heft_engine.studies.power import Noise, power, seeds_needed

BASE = 0.8
#: Simulations of each world: in the fast suite, and in the slow one.
FEW, MANY = 400, 2_000


@dataclass(frozen=True, kw_only=True)
class World:
    deviation: float
    taste: float
    whim: float
    rows: int = 500

    def differences(self, rng: np.random.Generator, runs: int, seeds: int, effect: float = 0.0) -> np.ndarray:
        """(runs, seeds, rows) of -1, 0 and 1: arm a, better by `effect`, minus arm b."""
        shape = (runs, seeds, self.rows)
        difficulty = rng.standard_normal((runs, 1, self.rows), dtype=np.float32)
        scale = (1 + self.taste**2 + self.whim**2) ** 0.5
        arms = []
        for gain in (effect, 0.0):
            latent = difficulty + self.taste * rng.standard_normal((runs, 1, self.rows), dtype=np.float32)
            if self.whim:
                latent = latent + self.whim * rng.standard_normal(shape, dtype=np.float32)
            accuracy = BASE + gain + self.deviation * rng.standard_normal((runs, seeds, 1))
            arms.append(latent < scale * stats.norm.ppf(np.clip(accuracy, 0.01, 0.99)))
        return arms[0].astype(np.float32) - arms[1]


def called_different(differences: np.ndarray) -> np.ndarray:
    """Returns, for each run, whether the comparison of methods calls them different at 5 %."""
    seeds = differences.shape[-2]
    of_rows = row_variance(differences.mean(axis=-2))
    half = half_width(seed_variance(differences), of_rows, seeds, differences.shape[-1])
    return np.abs(differences.mean(axis=(-2, -1))) > half


def rate(world: World, runs: int, seeds: int, effect: float = 0.0, seed: int = 0) -> float:
    rng = np.random.default_rng(seed)
    parts = [world.differences(rng, 100, seeds, effect) for _ in range(runs // 100)]
    return float(np.concatenate([called_different(part) for part in parts]).mean())


def most(runs: int) -> float:
    """Returns the bound that a rate of exactly 5 % stays under in 99 of 100 such simulations."""
    return float(stats.binom.ppf(0.99, runs, 0.05)) / runs


WORLDS = [
    pytest.param(World(deviation=deviation, taste=taste, whim=whim), id=f"{deviation:.0%}-{name}")
    for deviation in (0.0, 0.01, 0.02)
    for name, taste, whim in (("rows-agree", 0.5, 0.0), ("both", 0.5, 0.5), ("rows-anew", 0.0, 1.0))
]


@pytest.mark.parametrize("world", WORLDS)
def test_equal_methods_are_called_different_in_5_of_100_at_most(world: World) -> None:
    assert rate(world, FEW, 3) <= most(FEW)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("world", WORLDS)
def test_equal_methods_are_called_different_in_5_of_100_at_most_many_times(world: World, seeds: int) -> None:
    false_alarms = rate(world, MANY, seeds)
    print(f"{world} {seeds} seeds: {false_alarms:.2%} of {MANY}")
    assert false_alarms <= most(MANY)


def test_the_t_test_alone_takes_equal_seeds_for_certain() -> None:
    """The interval must therefore include the noise of the rows."""
    differences = World(deviation=0.0, taste=0.5, whim=0.1).differences(np.random.default_rng(0), FEW, 3)
    alone = np.abs(differences.mean(axis=(-2, -1))) > half_width(seed_variance(differences), 0, 3, np.inf)
    assert alone.mean() > 0.3


def test_mcnemar_over_pooled_seeds_is_no_test_of_methods() -> None:
    """Rows are therefore not pooled over seeds."""
    differences = World(deviation=0.02, taste=0.0, whim=1.0).differences(np.random.default_rng(0), 200, 3)
    pooled = differences.reshape(200, -1)
    tables = [[[0, int((row > 0).sum())], [int((row < 0).sum()), 0]] for row in pooled]
    assert np.mean([mcnemar(table, exact=False, correction=False).pvalue < 0.05 for table in tables]) > 0.12


def average_noise(world: World, seeds: int) -> Noise:
    """Returns the noise of such a comparison, averaged over 100 of them."""
    noises = [
        Noise.of(differences) for differences in world.differences(np.random.default_rng(1), 100, seeds)
    ]
    mean = {
        name: float(np.mean([getattr(noise, name) for noise in noises]))
        for name in ("seed", "row", "residual")
    }
    return Noise(rows=world.rows, **mean)


POWERED = [
    pytest.param(World(deviation=0.01, taste=0.3, whim=0.5, rows=1_000), 0.04, id="1%"),
    pytest.param(World(deviation=0.02, taste=0.0, whim=1.0, rows=1_000), 0.05, id="2%"),
]


def check_power(world: World, effect: float, runs: int, slack: float) -> None:
    noise = average_noise(world, 5)
    needed = seeds_needed(effect, noise)
    assert needed is not None
    stated = power(effect, noise, needed)
    reached = rate(world, runs, needed, effect, seed=2)
    print(
        f"{world} effect {effect:.0%}: {needed} seeds, stated {stated:.1%}, reached {reached:.1%} of {runs}"
    )
    assert stated >= 0.8
    assert reached == pytest.approx(stated, abs=slack)


@pytest.mark.parametrize(("world", "effect"), POWERED)
def test_the_stated_power_is_reached(world: World, effect: float) -> None:
    check_power(world, effect, 200, slack=0.09)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "effect"), POWERED)
def test_the_stated_power_is_reached_many_times(world: World, effect: float) -> None:
    check_power(world, effect, MANY, slack=0.04)
