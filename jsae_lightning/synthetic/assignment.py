"""The best one-to-one assignment, in polynomial time."""

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor


def best_assignment(values: Float[Tensor, "rows columns"]) -> Int64[Tensor, " rows"]:
    """Return the column of each row, all different, with the largest sum of `values`; needs rows <= columns.

    Shortest augmenting paths with potentials (Jonker and Volgenant 1987), rows^2 columns steps, in float64. Raises
    ValueError if there are more rows than columns or a value is not finite.
    """
    num_rows, num_columns = values.shape
    if num_rows > num_columns:
        raise ValueError(f"{num_rows} rows cannot have different columns among {num_columns}")
    if not values.isfinite().all():
        raise ValueError("a value is not finite")
    costs = -values.detach().cpu().double().numpy()
    row_potential, column_potential = np.zeros(num_rows), np.zeros(num_columns)
    row_of = np.full(num_columns, -1)
    for row in range(num_rows):
        _augment(costs, row, row_of, row_potential, column_potential)
    columns = torch.empty(num_rows, dtype=torch.int64)
    for column in np.flatnonzero(row_of >= 0).tolist():
        columns[row_of[column]] = column
    return columns


def _augment(
    costs: np.ndarray, new_row: int, row_of: np.ndarray, row_potential: np.ndarray, column_potential: np.ndarray
) -> None:
    """Give `new_row` a column along the cheapest path through the columns that are taken, in place."""
    num_columns = costs.shape[1]
    distance, before = np.full(num_columns, np.inf), np.full(num_columns, -1)
    is_done = np.zeros(num_columns, dtype=bool)
    row, column, reached = new_row, -1, 0.0
    while row >= 0:
        through = reached + costs[row] - row_potential[row] - column_potential
        better = ~is_done & (through < distance)
        distance[better], before[better] = through[better], column
        column = int(np.where(is_done, np.inf, distance).argmin())
        reached, row = distance[column], row_of[column]
        is_done[column] = True
    is_done[column] = False  # the free one that the path ends at
    row_potential[new_row] += reached
    row_potential[row_of[is_done]] += reached - distance[is_done]
    column_potential[is_done] -= reached - distance[is_done]
    while column >= 0:
        previous = before[column]
        row_of[column] = row_of[previous] if previous >= 0 else new_row
        column = previous
