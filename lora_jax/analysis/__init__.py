"""What training did to a weight: spectra, subspaces, amplification, intruders of an update ΔW.

And what can be measured before training: `gradients`, and `curvature` (JAX alone).

Pure functions. They take NumPy or JAX arrays and compute in the library and dtype of what they get:
on the host in float64, or inside `jit` and `vmap`. Matrices are [in, out] as in y = x·W, with
leading batch axes wherever they make sense, and low-rank ones are factors A [in, r] and B [r, out]:
a product A·B is never formed. `lora_jax.inside` applies this to whole adapters.
"""

from lora_jax.analysis.batched import all_singular_values
from lora_jax.analysis.curvature import (
    Top,
    hessian_product,
    random_direction,
    top_eigenvalue,
)
from lora_jax.analysis.gradients import (
    FirstGradients,
    first_gradients,
    noise_share,
    rank_above_noise,
)
from lora_jax.analysis.intruders import count_intruders, likeness
from lora_jax.analysis.spectra import (
    SVD,
    effective_rank,
    energy,
    entropy_rank,
    factored_svd,
    leading,
    norm,
    numerical_rank,
    rank_of_energy,
    singular_values,
    stable_rank,
    svd,
)
from lora_jax.analysis.subspaces import (
    captured_energy,
    gaussian_directions,
    random_similarity,
    similarities,
    similarity,
)
from lora_jax.analysis.weights import (
    amplification,
    projected_norm,
    random_projected_norm,
)

__all__ = [
    "SVD",
    "FirstGradients",
    "Top",
    "all_singular_values",
    "amplification",
    "captured_energy",
    "count_intruders",
    "effective_rank",
    "energy",
    "entropy_rank",
    "factored_svd",
    "first_gradients",
    "gaussian_directions",
    "hessian_product",
    "leading",
    "likeness",
    "noise_share",
    "norm",
    "numerical_rank",
    "projected_norm",
    "random_direction",
    "random_projected_norm",
    "random_similarity",
    "rank_above_noise",
    "rank_of_energy",
    "similarities",
    "similarity",
    "singular_values",
    "stable_rank",
    "svd",
    "top_eigenvalue",
]
