"""Where the peers of a simulated swarm live, and how far from each other they are.

The model. A peer lives near one of the world's large cities, drawn by its inhabitants, scattered around it.
A packet goes the great circle in fibre, at two thirds of the speed of light, on a way half as long again; and
at both ends through a last mile, whose time is log-normal. So distances keep the triangle inequality. London
and New York are 42 ms from each other one way, London and Sydney 127 ms, besides the last miles.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float64]

CITIES = (
    ("Tokyo", 35.7, 139.7, 37),
    ("Delhi", 28.6, 77.2, 33),
    ("Shanghai", 31.2, 121.5, 29),
    ("São Paulo", -23.6, -46.6, 23),
    ("Mexico City", 19.4, -99.1, 22),
    ("Cairo", 30.0, 31.2, 22),
    ("Mumbai", 19.1, 72.9, 21),
    ("Beijing", 39.9, 116.4, 22),
    ("New York", 40.7, -74.0, 19),
    ("Buenos Aires", -34.6, -58.4, 15),
    ("Istanbul", 41.0, 29.0, 16),
    ("Lagos", 6.5, 3.4, 16),
    ("Los Angeles", 34.1, -118.2, 13),
    ("Moscow", 55.8, 37.6, 13),
    ("Paris", 48.9, 2.4, 11),
    ("Bangkok", 13.8, 100.5, 11),
    ("Seoul", 37.6, 127.0, 10),
    ("London", 51.5, -0.1, 10),
    ("Chicago", 41.9, -87.6, 9),
    ("Johannesburg", -26.2, 28.0, 8),
    ("Madrid", 40.4, -3.7, 7),
    ("Toronto", 43.7, -79.4, 6),
    ("Singapore", 1.4, 103.8, 6),
    ("Frankfurt", 50.1, 8.7, 6),
    ("Sydney", -33.9, 151.2, 5),
    ("San Francisco", 37.8, -122.4, 5),
)
"""Name, latitude and longitude in degrees, millions of inhabitants."""

EARTH_RADIUS = 6371.0
SCATTER = 200.0
"""Both in kilometres; the second is the standard deviation of how far from its city a peer lives."""

FIBRE = 200_000.0
"""Kilometres a second."""

DETOUR = 1.5
LAST_MILE, LAST_MILE_SPREAD = 0.004, 0.7
"""Seconds one way in the median, and the standard deviation of their logarithm."""


class World:
    """`count` peers by number, placed by `rng`."""

    def __init__(self, count: int, rng: np.random.Generator):
        weights = np.array([inhabitants for *_, inhabitants in CITIES], np.float64)
        self.cities = rng.choice(len(CITIES), count, p=weights / weights.sum())
        places = np.array([on_sphere(latitude, longitude) for _, latitude, longitude, _ in CITIES])
        scattered = places[self.cities] + rng.normal(0, SCATTER / EARTH_RADIUS, (count, 3))
        self._places = scattered / np.linalg.norm(scattered, axis=1, keepdims=True)
        self._last_mile = LAST_MILE * np.exp(rng.normal(0, LAST_MILE_SPREAD, count))

    def seconds(self, one: int, others: npt.ArrayLike) -> Floats:
        """From peer `one` to each of `others`, one way; 0 to itself."""
        to = np.asarray(others, np.int64)
        angles = np.arccos(np.clip(self._places[to] @ self._places[one], -1.0, 1.0))
        way = angles * EARTH_RADIUS * DETOUR / FIBRE + self._last_mile[one] + self._last_mile[to]
        return np.where(to == one, 0.0, way)


def on_sphere(latitude: float, longitude: float) -> Floats:
    """A place on the unit sphere, given in degrees."""
    up, around = np.radians(latitude), np.radians(longitude)
    return np.array([np.cos(up) * np.cos(around), np.cos(up) * np.sin(around), np.sin(up)])
