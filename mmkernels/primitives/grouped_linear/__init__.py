"""Grouped linear: rows that choose their weights."""

from mmkernels.primitives.grouped_linear.op import grouped_linear as grouped_linear
