# SPDX-License-Identifier: Apache-2.0
"""Tokenised documents and conversations in rows of one fixed length, without padding between them.

A row is a dict of int64 tensors of shape [T]:
    input_ids
    labels         the ids of supervised tokens, -100 elsewhere (the model shifts the labels)
    position_ids   0, 1, 2, ... in each document; a 0 marks the start of a document
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch

from hmf.data.encoding import Encoded

PackedRow = dict[str, torch.Tensor]


def best_fit(lengths: Sequence[int], room: int, window: int) -> list[list[int]]:
    """Pack items into rows of at most `room` tokens, each item once and whole.

    The items of a window are placed from the longest to the shortest, each into the open row with the least sufficient
    room. At most `window` rows stay open, and the fullest are closed first. This bounds the search for any number of
    items.

    Returns:
        The indices of the items of each row.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row number), sorted
    for first in range(0, len(lengths), window):
        for item in sorted(range(first, min(first + window, len(lengths))), key=lambda i: -lengths[i]):
            if lengths[item] > room:
                raise ValueError(f"item {item} has {lengths[item]} tokens, a row has {room}")
            place = bisect_left(open_rows, (lengths[item], -1))
            if place < len(open_rows):
                free, row = open_rows.pop(place)
            else:
                free, row = room, len(rows)
                rows.append([])
            rows[row].append(item)
            if free > lengths[item]:
                insort(open_rows, (free - lengths[item], row))
        del open_rows[: max(0, len(open_rows) - window)]
    return rows


def row_tensors(row: Sequence[Encoded]) -> PackedRow:
    return {
        "input_ids": torch.tensor([token for item in row for token in item.ids]),
        "labels": torch.tensor([label for item in row for label in item.labels]),
        "position_ids": torch.tensor([position for item in row for position in range(len(item))]),
    }
