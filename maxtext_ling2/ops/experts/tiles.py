"""Tiles of the experts' grouped products: data, chosen for each TPU generation by counting cycles.

Made by `python benchmarks/experts_tiles.py --table`: of the tiles that it compiles, those of the fastest twelve products
of a layer. K is not split, so that each weight is read once. Nor is N, except into two blocks on chips with two cores,
which share them. A tile that does not fit VMEM is halved. More rows per tile suit experts with many rows: the last tile
of each expert is computed in full, even if it is partly filled.
"""

from typing import Final, NamedTuple

from maxtext_ling2.ops.pallas_utils import LANES

AXES: Final = {
  "wi_fwd": ("embed_dim", "mlp_dim"),
  "wi_dlhs": ("mlp_dim", "embed_dim"),
  "wi_drhs": ("embed_dim", "mlp_dim"),
  "wo_fwd": ("mlp_dim", "embed_dim"),
  "wo_dlhs": ("embed_dim", "mlp_dim"),
  "wo_drhs": ("mlp_dim", "embed_dim"),
}
"""K and N of each product. fwd: [rows, K] x [K, N]; dlhs: gradient of the rows; drhs: of the weights, [K, N]."""


class Tiles(NamedTuple):
  """The work of one grid step of a kernel; for drhs rows are contracted."""

  rows: int
  k: int
  n: int


class Chip(NamedTuple):
  """What the rule for shapes without a table entry depends on."""

  cores: int  # they share the blocks of N
  vmem: int  # bytes that a kernel may use unless it asks for more


_CHIPS: Final = {
  "TPU v4": Chip(2, 16 * 2**20),
  "TPU v5 lite": Chip(1, 16 * 2**20),
  "TPU v5": Chip(2, 16 * 2**20),
  "TPU v6 lite": Chip(1, 32 * 2**20),
  "TPU7x": Chip(1, 32 * 2**20),
}
"""By `device_kind`, the name JAX gives a generation."""

_OTHER: Final = Chip(1, 16 * 2**20)

_TABLE: Final[dict[str, dict[tuple[int, int], dict[int, tuple[tuple[int, int, int], ...]]]]] = {
  "TPU v5": {
    (2048, 512): {
      128: ((128, 2048, 256), (128, 512, 1024), (128, 2048, 256), (128, 512, 1024), (128, 2048, 256), (128, 512, 1024)),
      512: ((256, 2048, 256), (128, 512, 1024), (256, 2048, 256), (128, 512, 1024), (128, 2048, 256), (256, 512, 1024)),
      1024: ((256, 2048, 256), (256, 512, 1024), (256, 2048, 256), (256, 512, 1024), (256, 2048, 256), (256, 512, 1024)),
      4096: ((512, 2048, 256), (512, 512, 1024), (512, 2048, 256), (512, 512, 1024), (512, 2048, 256), (512, 512, 1024)),
    },
    (4096, 1024): {
      128: ((128, 4096, 512), (128, 1024, 2048), (128, 2048, 512), (128, 1024, 2048), (128, 4096, 512), (128, 512, 2048)),
      4096: (
        (256, 4096, 512),
        (256, 1024, 2048),
        (256, 2048, 512),
        (256, 1024, 2048),
        (256, 4096, 512),
        (256, 512, 2048),
      ),
    },
  },
  "TPU v6 lite": {
    (2048, 512): {
      128: ((256, 2048, 512), (256, 512, 2048), (256, 2048, 512), (128, 512, 2048), (256, 2048, 512), (256, 512, 2048)),
      256: ((256, 2048, 512), (256, 512, 2048), (256, 2048, 512), (256, 512, 2048), (256, 2048, 512), (256, 512, 2048)),
      4096: ((512, 2048, 512), (512, 512, 2048), (512, 2048, 512), (512, 512, 2048), (512, 2048, 512), (512, 512, 2048)),
    },
  },
  "TPU7x": {
    (2048, 512): {
      128: ((256, 2048, 512), (256, 512, 2048), (256, 2048, 512), (128, 512, 2048), (256, 2048, 512), (256, 512, 2048)),
      512: ((256, 2048, 512), (256, 512, 2048), (256, 2048, 512), (256, 512, 2048), (256, 2048, 512), (256, 512, 2048)),
      1024: ((512, 2048, 512), (256, 512, 2048), (512, 2048, 512), (256, 512, 2048), (512, 2048, 512), (512, 512, 2048)),
      4096: ((512, 2048, 512), (512, 512, 2048), (512, 2048, 512), (512, 512, 2048), (512, 2048, 512), (512, 512, 2048)),
    },
  },
}
"""Chip -> (width of the model, of an expert) -> least rows per expert -> (rows, K, N) of each product, in AXES' order."""


def tiles(kind: str, product: str, k: int, n: int, rows: float, itemsize: int = 2) -> Tiles | None:
  """Tiles of one product.

  Args:
    kind: the kind of device; the result is None unless it is a TPU.
    product: of AXES.
    k: the product's K on a device.
    n: the product's N on a device.
    rows: tokens per expert on the device.
    itemsize: bytes of an element.
  """
  if not kind.startswith("TPU"):
    return None
  chip = _CHIPS.get(kind, _OTHER)
  widths = (k, n) if AXES[product][0] == "embed_dim" else (n, k)
  if by_rows := _TABLE.get(kind, {}).get(widths):
    tile = Tiles(*_at_least(by_rows, rows)[list(AXES).index(product)])
  else:
    tile = _by_rule(chip, k, n, rows)
  return _fit(chip, product, tile, itemsize)


def vmem(product: str, tile: Tiles, itemsize: int = 2) -> int:
  """Bytes of VMEM of a grid step: its blocks, twice for prefetching, and the float32 accumulator."""
  result = tile.k * tile.n if product.endswith("drhs") else tile.rows * tile.n
  return 2 * itemsize * (tile.rows * tile.k + tile.k * tile.n + tile.rows * tile.n) + 4 * result


def vmem_of(kind: str) -> int:
  """Bytes of VMEM that a kernel may use on a kind of TPU."""
  return _CHIPS.get(kind, _OTHER).vmem


def _at_least(by_rows: dict[int, tuple[tuple[int, int, int], ...]], rows: float) -> tuple[tuple[int, int, int], ...]:
  """The entry with the most rows that does not exceed `rows`, else the smallest."""
  return by_rows[max((least for least in by_rows if least <= rows), default=min(by_rows))]


def _by_rule(chip: Chip, k: int, n: int, rows: float) -> Tiles:
  """All of K, and N in as many blocks as there are cores. Rows are those of ling2."""
  tile = Tiles(512 if rows >= 4096 else 256 if rows >= 1024 or chip.cores == 1 else 128, k, n)
  if chip.cores > 1 and n % (chip.cores * LANES) == 0:
    tile = tile._replace(n=n // chip.cores)
  return tile


def _fit(chip: Chip, product: str, tile: Tiles, itemsize: int) -> Tiles:
  """The tile with N and K halved until a step fits the VMEM."""
  while vmem(product, tile, itemsize) > chip.vmem:
    smaller = [
      tile._replace(**{axis: size // 2}) for axis, size in (("n", tile.n), ("k", tile.k)) if size % (2 * LANES) == 0
    ]
    if not smaller:
      break
    wide = product.endswith("drhs") and tile.k > tile.n  # for gmm K is not split as long as N can be halved
    tile = smaller[-1] if wide else smaller[0]
  return tile
