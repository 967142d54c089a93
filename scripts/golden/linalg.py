"""Makes test/golden/linalg.json: factorisations by NumPy, in f64.

    python scripts/golden/linalg.py

Per matrix A of `svd`: singular values `s`, `Q` and `R` where they are unique, and `U` and `V`, the projections U·Uᵀ and V·Vᵀ
onto the `rank` leading singular vectors, which unlike the vectors are unique. Per matrix of `symmetric`: eigenvalues, largest
first, and the same projection. `definite` has A, its Cholesky factor L and the X of A·X = B.
"""

import numpy
from common import GOLDEN, MADE_WITH, deterministic, exact, plain, write_json

import torch

deterministic(7)
svd: dict[str, dict] = {}
symmetric: dict[str, dict] = {}


def case(name: str, A: torch.Tensor, rank: int, vectors: bool = True) -> None:
    U, s, Vt = numpy.linalg.svd(A.numpy(), full_matrices=False)
    assert rank == len(s) or s[rank - 1] - s[rank] >= 0.01 * s[0], f"{name}: the projection would not be unique"
    matrices = {"A": A.numpy()}
    if vectors:
        matrices |= {"U": U[:, :rank] @ U[:, :rank].T, "V": Vt[:rank].T @ Vt[:rank]}
    if vectors and s[-1] > 0.001 * s[0]:  # Q and R are unique
        Q, R = numpy.linalg.qr(A.numpy())
        for ours, theirs in zip((Q, R), torch.linalg.qr(A)):  # what PEFT's OLoRA calls
            assert numpy.allclose(ours, theirs.numpy(), rtol=1e-12, atol=1e-13 * abs(A).max().item()), name
        matrices |= {"Q": Q, "R": R}
    svd[name] = {"s": s.tolist(), "rank": rank} | {k: plain(torch.from_numpy(v)) for k, v in matrices.items()}


def symmetric_case(name: str, A: torch.Tensor, rank: int) -> None:
    values, vectors = numpy.linalg.eigh(A.numpy())
    values, V = values[::-1], vectors[:, ::-1][:, :rank]
    assert values[rank - 1] - values[rank] > 0.01 * abs(values).max(), f"{name}: the projection would not be unique"
    symmetric[name] = {"A": plain(A), "values": values.tolist(), "rank": rank, "V": plain(torch.from_numpy(V @ V.T))}


hadamard = torch.ones(1, 1, dtype=torch.float64)
for _ in range(3):
    hadamard = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.float64), hadamard)

case("1x1", exact(1, 1), 1)
case("1x6", exact(1, 6), 1)
case("6x1", exact(6, 1), 1)
case("7x5", exact(7, 5), 2)
case("5x7", exact(5, 7), 3)
case("rank 3 of 9x7", exact(9, 3) @ exact(3, 7), 3)
case("zeros 4x3", torch.zeros(4, 3, dtype=torch.float64), 3, vectors=False)
case("repeated singular values", hadamard * torch.tensor([3, 3, 3, 2, 2, 2, 1, 1], dtype=torch.float64), 3)
case("huge", exact(6, 4) * 2.0**500, 1)
case("tiny", exact(4, 6) * 2.0**-500, 1)
case("48x40", exact(48, 40), 1, vectors=False)

X = exact(8, 8)
symmetric_case("indefinite", X + X.T, 3)
symmetric_case("pairs of opposite sign", torch.kron(torch.eye(4), torch.eye(2).flip(0)).double(), 4)

A = X @ X.T + torch.eye(8)
B = exact(8, 3)
definite = {
    "A": plain(A),
    "L": plain(torch.from_numpy(numpy.linalg.cholesky(A.numpy()))),
    "B": plain(B),
    "X": plain(torch.from_numpy(numpy.linalg.solve(A.numpy(), B.numpy()))),
}

made_with = f"numpy {numpy.__version__}, {MADE_WITH}"
write_json(GOLDEN / "linalg.json", {"made_with": made_with, "svd": svd, "symmetric": symmetric, "definite": definite})
