"""Keys in a basis of their own, in which four bits cost attention scores least [G].

Not the paper's. A score stays what it is when keys are multiplied by a matrix and queries by the
inverse of its transpose, and attention does not see what all keys of a sequence have in common. So
each KV head has a matrix A and a mean m, the same for all requests:

    key' = (key - m) A        query' = query A^-T

Every channel of a block of keys has its own range, so the error of a channel is in proportion to
how much the channel varies within a block. With S for the covariance of keys within a block and Q
for the second moment of queries, the expected squared error of a score is in proportion to

    sum over channels c of (A^T S A)_cc (A^-1 Q A^-T)_cc.

It is never below (sum of the roots of S Q's eigenvalues)^2 / D, which is reached where the two
matrices are equal and all channels alike: the first by a basis in which both are the same diagonal
matrix, the second by a rotation that spreads every channel over all, which ours nearly does.

`fit` finds A from what a model computes on some text. The kernels know nothing of it: pages,
residual rows and probes have transformed keys, whose scores are the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_plugins.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Mapping

# Tokens of a block, for the covariance of keys within one.
BLOCK = 64
# Share of the mean variance that is added to each channel's, so that none is nothing.
DAMPING = 1e-3
FORMAT = "vllm-plugins zipcache keys 1"
WHERE = "--plugin zipcache: key_transform"
MEND = "make one: vllm-plugins train zipcache"


@dataclass
class Moments:
    """What is counted of one layer's keys and queries, in float64.

    Attributes:
        kv_heads: Heads of keys.
        head_size: Channels (D).
        spread: Sum over blocks of keys' deviations from the block's mean, multiplied with each
            other, shape (kv heads, D, D).
        queries: Sum of queries multiplied with themselves, those of all heads that read a KV head,
            shape (kv heads, D, D).
        keys: Sum of keys, shape (kv heads, D).
        tokens: Keys counted.
    """

    kv_heads: int
    head_size: int
    spread: torch.Tensor = field(init=False)
    queries: torch.Tensor = field(init=False)
    keys: torch.Tensor = field(init=False)
    tokens: int = 0

    def __post_init__(self) -> None:
        square = self.kv_heads, self.head_size, self.head_size
        self.spread, self.queries = (torch.zeros(square, dtype=torch.float64) for _ in range(2))
        self.keys = torch.zeros(square[:2], dtype=torch.float64)

    def add(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """Count consecutive tokens of one sequence, in whole blocks.

        Args:
            query: Shape (tokens, heads, D).
            key: Shape (tokens, kv heads, D).
        """
        count = len(key) // BLOCK * BLOCK
        query, key = query[:count].double().cpu(), key[:count].double().cpu()
        blocks = key.unflatten(0, (-1, BLOCK))
        around = (blocks - blocks.mean(dim=1, keepdim=True)).flatten(0, 1)
        grouped = query.unflatten(1, (self.kv_heads, -1))
        self.spread += torch.einsum("nkd,nke->kde", around, around)
        self.queries += torch.einsum("nkgd,nkge->kde", grouped, grouped)
        self.keys += key.sum(dim=0)
        self.tokens += count


def fit(spread: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """Return the matrices that keys are multiplied by.

    Args:
        spread: Covariance of keys within a block up to a factor, float64, shape (kv heads, D, D).
        queries: Second moment of queries up to a factor, as ``spread``.

    Returns:
        A for each KV head, as ``spread``.
    """
    size = spread.shape[-1]
    lower = torch.linalg.cholesky(_damped(spread))
    values, vectors = torch.linalg.eigh(lower.mT @ _damped(queries) @ lower)
    basis = torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
    return basis * values[..., None, :] ** 0.25 @ rotation(size)


def _damped(moment: torch.Tensor) -> torch.Tensor:
    mean = moment.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    # A head that is always zero is only rotated.
    by = torch.where(mean > 0, DAMPING * mean, torch.ones_like(mean))
    return moment + by[..., None, None] * torch.eye(moment.shape[-1], dtype=moment.dtype)


def rotation(size: int) -> torch.Tensor:
    """Return an orthogonal matrix that spreads every channel over all (Hartley's), float64.

    A Hadamard matrix would do it evenly; not every size has one.
    """
    index = torch.arange(size, dtype=torch.float64)
    angle = 2 * torch.pi * index[:, None] * index / size
    return (angle.cos() + angle.sin()) / size**0.5


@dataclass(frozen=True)
class KeyTransform:
    """What one layer's keys and queries are multiplied by.

    Attributes:
        keys: A, shape (kv heads, D, D).
        queries: Inverse of its transpose, as ``keys``.
        centre: What is then taken off keys, m A, float32, shape (kv heads, D).
    """

    keys: torch.Tensor
    queries: torch.Tensor
    centre: torch.Tensor

    @classmethod
    def of(
        cls,
        matrix: torch.Tensor,
        mean: torch.Tensor,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> KeyTransform:
        """Make it for a model's dtype.

        The matrix is rounded first and inverted then, so that of the two roundings only the
        inverse's changes scores. On CPU, which multiplies float32 faster, the rounded numbers are
        kept as float32.

        Args:
            matrix: A, shape (kv heads, D, D).
            mean: m, shape (kv heads, D).
            dtype: The model's.
            device: Where.

        Raises:
            ValueError: Rounded to the dtype, the matrix is infinite or has no inverse in it.
        """
        rounded = matrix.to(dtype).double()
        inverse, problem = torch.linalg.inv_ex(rounded)
        inverse = inverse.mT.to(dtype)
        if problem.any() or not (rounded.isfinite().all() and inverse.isfinite().all()):
            raise ValueError(f"its numbers do not fit into {dtype}")
        kept = torch.float32 if torch.device(device).type == "cpu" else dtype
        centre = torch.einsum("kd,kde->ke", mean.double(), rounded)
        return cls(
            rounded.to(device, kept).contiguous(),
            inverse.to(device, kept).contiguous(),
            centre.float().to(device),
        )

    @property
    def bytes(self) -> int:
        """Bytes of all of it."""
        return self.keys.nbytes + self.queries.nbytes + self.centre.nbytes

    def apply(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Transform in float32, and round to the dtype that they came in.

        Args:
            query: Shape (tokens, heads, D).
            key: Shape (tokens, kv heads, D).

        Returns:
            Queries and keys, contiguous.
        """
        grouped = query.float().unflatten(1, (key.shape[1], -1))
        q = torch.einsum("tkgd,kde->tkge", grouped, self.queries.float()).flatten(1, 2)
        k = torch.einsum("tkd,kde->tke", key.float(), self.keys.float()) - self.centre
        return q.to(query.dtype).contiguous(), k.to(key.dtype).contiguous()


def write(path: Path, fitted: Mapping[str, tuple[torch.Tensor, torch.Tensor]], model: str) -> None:
    """Write a file, whole or not at all.

    Args:
        path: Overwritten where it exists.
        fitted: Matrix and mean of each layer, by vLLM's name of it.
        model: Its name, for messages.
    """
    tensors = {}
    for layer, (matrix, mean) in fitted.items():
        tensors[f"{layer}.matrix"] = matrix.float().contiguous()
        tensors[f"{layer}.mean"] = mean.float().contiguous()
    fresh = path.with_name(f".{path.name}.new")
    try:
        save_file(tensors, fresh, metadata={"format": FORMAT, "model": model})
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


class KeyTransformFile:
    """A file that `write` has written.

    Args:
        path: Of the file.

    Raises:
        PluginError: It is none, or cannot be read.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            with safe_open(path, framework="pt") as file:
                self._metadata = file.metadata() or {}
                names = list(file.keys())
                self._shapes = {x: tuple(file.get_slice(x).get_shape()) for x in names}
                types = {file.get_slice(x).get_dtype() for x in names}
        except (OSError, SafetensorError) as error:
            raise PluginError(f"{WHERE}={path}", f"it cannot be read ({error})", MEND) from None
        if self._metadata.get("format") != FORMAT or types != {"F32"}:
            raise PluginError(f"{WHERE}={path}", "it holds no transforms of keys", MEND)

    def layer(
        self,
        name: str,
        total: int,
        heads: slice,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> KeyTransform:
        """Return a layer's transform, that of a rank's heads alone.

        Args:
            name: vLLM's of the layer.
            total: KV heads of the model.
            heads: Of them.
            head_size: Channels of a head.
            dtype: The model's.
            device: Where.

        Raises:
            PluginError: The file is another model's, or has numbers that are none.
        """
        wanted = {"matrix": (total, head_size, head_size), "mean": (total, head_size)}
        for part, shape in wanted.items():
            found = self._shapes.get(f"{name}.{part}")
            if found != shape:
                lack = "has no" if found is None else f"has {list(found)}, not {list(shape)}, for"
                raise PluginError(
                    f"{WHERE}={self._path}",
                    f"it was made for another model ({self._metadata.get('model')}): it {lack} "
                    f"{name}.{part}",
                    MEND,
                )
        with safe_open(self._path, framework="pt") as file:
            matrix, mean = (file.get_slice(f"{name}.{part}")[heads] for part in wanted)
        try:
            if not mean.isfinite().all():
                raise ValueError("its numbers are none")
            return KeyTransform.of(matrix, mean, dtype, device)
        except ValueError as error:
            raise PluginError(f"{WHERE}={self._path}", f"{name}: {error}", MEND) from None
