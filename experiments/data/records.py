"""What the loaders return. Class labels are int32 from 0; binary labels are float32 -1 / +1, to multiply a margin."""

from typing import NamedTuple

import numpy as np


class Table(NamedTuple):
    """Rows in two parts; `note` is a string that every figure made from the data must print."""

    name: str
    train_x: np.ndarray  # [n, p] float32
    train_y: np.ndarray  # [n]
    test_x: np.ndarray  # [m, p] float32
    test_y: np.ndarray  # [m]
    classes: int
    note: str


class ThreeWay(NamedTuple):
    """Rows in three parts; `note` is a string that every figure made from the data must print."""

    name: str
    train_x: np.ndarray  # [n, p] float32
    train_y: np.ndarray  # [n]
    validation_x: np.ndarray  # [v, p] float32
    validation_y: np.ndarray  # [v]
    test_x: np.ndarray  # [m, p] float32
    test_y: np.ndarray  # [m]
    classes: int
    note: str


class Images(NamedTuple):
    """Images as published; `note` is a string that every figure made from the data must print."""

    name: str
    train_x: np.ndarray  # [n, 28, 28] uint8
    train_y: np.ndarray  # [n] int32
    test_x: np.ndarray  # [m, 28, 28] uint8
    test_y: np.ndarray  # [m] int32
    classes: int
    note: str


class Cleaning(NamedTuple):
    """Three parts with noisy training labels; `note` is a string that every figure made from the data must print."""

    name: str
    train_x: np.ndarray  # [n, p] float32
    train_y: np.ndarray  # [n] int32, noisy
    train_true_y: np.ndarray  # [n] int32
    corrupted: np.ndarray  # [n] bool: train_y differs from train_true_y
    validation_x: np.ndarray  # [v, p] float32
    validation_y: np.ndarray  # [v] int32
    test_x: np.ndarray  # [m, p] float32
    test_y: np.ndarray  # [m] int32
    classes: int
    note: str
