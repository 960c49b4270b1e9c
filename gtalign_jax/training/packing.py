"""Packing: completions of unequal length side by side in rows of one width.

    make_plan  lengths, and which rows count  -> which row lies where    (host)
    lay_out    that, position by position     -> Placed
    take       values of completion tokens    -> the same in bins        (device: they stay there)

A padded batch `[Q, G, T]` computes T positions for every completion. Packed, completions stand one
after the other in *bins* of W = T positions; completions of up to m groups share a bin, since a bin
attends to the prompts of its groups. Rows that cannot change the gradient (not judged, empty, or
without signal where there is no KL term) are not packed at all. Bins are filled per batch shard, so
that no completion changes over to another device; as many as are needed are computed, in
micro-batches of one compiled size. Best fit, the longest completion first; where a group already
lies in a bin that has room, its other completions go there.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where rows lie, for X batch shards of R = Q G / X rows and N bins each; numpy, int32.

    bin_XR: the bin of each row, -1: in none. start_XR: its first position there. slot_XR: which of
    the bin's groups it belongs to. groups_XNm: those groups, as prompts of the shard. bins: how
    many are in use in the fullest shard.
    """

    bin_XR: np.ndarray
    start_XR: np.ndarray
    slot_XR: np.ndarray
    groups_XNm: np.ndarray
    bins: int


def make_plan(lengths_QG: np.ndarray, counts_QG: np.ndarray, width: int, groups: int,
              shards: int) -> Plan:
    """Bins for the rows where `counts_QG` holds.

    Args:
      lengths_QG: completion tokens, at most `width`.
      groups: m, of whose rows a bin may hold some.
    """
    Q, G = lengths_QG.shape
    R = Q * G // shards
    lengths_XR, counts_XR = lengths_QG.reshape(shards, R), counts_QG.reshape(shards, R)
    bin_XR, start_XR = np.full((shards, R), -1, np.int32), np.zeros((shards, R), np.int32)
    slot_XR, groups_XNm = np.zeros((shards, R), np.int32), np.zeros((shards, R, groups), np.int32)
    used = 0
    for x in range(shards):
        rows = [r for r in range(R) if counts_XR[x, r] and lengths_XR[x, r] > 0]
        bins = _fill(lengths_XR[x], rows, G, width, groups)
        for n, (held, members) in enumerate(bins):
            groups_XNm[x, n, : len(held)] = held
            at = 0
            for r in members:
                bin_XR[x, r], start_XR[x, r], slot_XR[x, r] = n, at, held.index(r // G)
                at += int(lengths_XR[x, r])
        used = max(used, len(bins))
    return Plan(bin_XR, start_XR, slot_XR, groups_XNm, used)


def _fill(lengths_R: np.ndarray, rows: list[int], G: int, width: int,
          groups: int) -> list[tuple[list[int], list[int]]]:
    """(groups, rows) of each bin: the longest row first, into the fullest bin that takes it."""
    bins: list[tuple[list[int], list[int]]] = []
    free: list[int] = []
    for r in sorted(rows, key=lambda r: (-int(lengths_R[r]), r)):
        group, length = r // G, int(lengths_R[r])
        fits = [n for n, (held, _) in enumerate(bins)
                if free[n] >= length and (group in held or len(held) < groups)]
        if fits:
            # A bin that has the group already spends no slot on it.
            best = min(fits, key=lambda n: (group not in bins[n][0], free[n]))
        else:
            best = len(bins)
            bins.append(([], []))
            free.append(width)
        held, members = bins[best]
        if group not in held:
            held.append(group)
        members.append(r)
        free[best] -= length
    return bins


@struct.dataclass
class Placed:
    """A plan on the devices: for each position of each bin, what lies there.

    row_XNW: the row of the shard, R where nothing lies. offset_XNW: which of its completion tokens.
    slot_XNW: which of the bin's groups. groups_XNm: those groups.
    """

    row_XNW: jax.Array
    offset_XNW: jax.Array
    slot_XNW: jax.Array
    groups_XNm: jax.Array


def lay_out(plan: Plan, lengths_QG: np.ndarray, width: int, at_once: int) -> Placed:
    """The plan position by position; numpy arrays, with all bins that a batch could need: whole
    micro-batches of `at_once`."""
    X, R = plan.bin_XR.shape
    lengths_XR, N = lengths_QG.reshape(X, R), -(-R // at_once) * at_once
    row = np.full((X, N, width), R, np.int32)
    offset, slot = np.zeros((X, N, width), np.int32), np.zeros((X, N, width), np.int32)
    for x, r in zip(*np.nonzero(plan.bin_XR >= 0), strict=True):
        n, start, length = plan.bin_XR[x, r], plan.start_XR[x, r], lengths_XR[x, r]
        here = slice(start, start + length)
        row[x, n, here], offset[x, n, here] = r, np.arange(length)
        slot[x, n, here] = plan.slot_XR[x, r]
    groups = np.pad(plan.groups_XNm, ((0, 0), (0, N - R), (0, 0)))
    return Placed(row, offset, slot, groups)


def take(x_QGT: jax.Array, placed: Placed) -> jax.Array:
    """Values of completion tokens, `[Q, G, T]`, or of rows, `[Q, G]`, where the plan has them:
    `[X, N, W]`; 0 elsewhere."""
    X, N, W = placed.row_XNW.shape
    R = x_QGT.shape[0] * x_QGT.shape[1] // X
    x_XR = x_QGT.reshape(X, R, *x_QGT.shape[2:])
    at = jnp.minimum(placed.row_XNW, R - 1)
    if x_QGT.ndim == 2:
        taken = jax.vmap(lambda x, at: x[at])(x_XR, at)
    else:
        flat = at * x_QGT.shape[2] + placed.offset_XNW
        taken = jax.vmap(lambda x, at: x.reshape(-1)[at])(x_XR, flat)
    return jnp.where(placed.row_XNW < R, taken, 0)


@dataclasses.dataclass(frozen=True)
class Packing:
    """A plan for rows of these lengths in bins of `width`, of which `at_once` are computed."""

    plan: Plan
    lengths_QG: np.ndarray
    width: int
    at_once: int

    @property
    def placed(self) -> Placed:
        return lay_out(self.plan, self.lengths_QG, self.width, self.at_once)

    @property
    def pieces(self) -> int:
        """Micro-batches that hold all bins in use."""
        return -(-self.plan.bins // self.at_once)

    @property
    def fill(self) -> float:
        """Share of the computed positions that hold a token; 1 where nothing is computed."""
        X = self.plan.bin_XR.shape[0]
        real = int(self.lengths_QG.reshape(X, -1)[self.plan.bin_XR >= 0].sum())
        computed = self.pieces * self.at_once * self.width * X
        return real / computed if computed else 1.0
