"""Tensor primitives: one plain reference of each, and faster versions chosen by device."""
