"""Pure array functions: exact similarity, nearest neighbours, top-k, k-means, sums."""

from moe_jax.ops.first_true import first_true as first_true
from moe_jax.ops.independent import first_independent as first_independent
from moe_jax.ops.search import Code as Code
from moe_jax.ops.search import Hits as Hits
from moe_jax.ops.search import Lists as Lists
from moe_jax.ops.search import encode as encode
from moe_jax.ops.search import nearest as nearest
from moe_jax.ops.search import nearest_in_cells as nearest_in_cells
from moe_jax.ops.segment import group_sums as group_sums
from moe_jax.ops.similarity import exact_cosine as exact_cosine
from moe_jax.ops.similarity import exact_cosine_at as exact_cosine_at
from moe_jax.ops.similarity import exact_cosine_pairs as exact_cosine_pairs
from moe_jax.ops.similarity import limbs as limbs
from moe_jax.ops.similarity import normalize as normalize
from moe_jax.ops.spherical_kmeans import Clusters as Clusters
from moe_jax.ops.spherical_kmeans import nearest_centroids as nearest_centroids
from moe_jax.ops.spherical_kmeans import spherical_kmeans as spherical_kmeans
from moe_jax.ops.top_k import top_k as top_k
