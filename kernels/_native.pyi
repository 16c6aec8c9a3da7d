def linear(
    x: int, w: int, bias: int, y: int, rows: int, out: int, into: int, is_half: int, threads: int, /
) -> None: ...
def decode(
    layers: int,
    slabs: int,
    count: int,
    x: int,
    cos: int,
    sin: int,
    rows: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    dim: int,
    intermediate: int,
    position: int,
    capacity: int,
    is_half: int,
    threads: int,
    eps: float,
    scale: float,
    /,
) -> None: ...
def is_supported() -> bool: ...
