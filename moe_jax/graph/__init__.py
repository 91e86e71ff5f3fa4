"""The knowledge graph: a fixed-size memory that lives on the device."""

from moe_jax.graph.cells import Cells as Cells
from moe_jax.graph.cells import build_cells as build_cells
from moe_jax.graph.cells import num_missing as num_missing
from moe_jax.graph.cells import refine_cells as refine_cells
from moe_jax.graph.cells import update_cells as update_cells
from moe_jax.graph.cluster import ClusterLevel as ClusterLevel
from moe_jax.graph.cluster import Communities as Communities
from moe_jax.graph.cluster import cluster as cluster
from moe_jax.graph.cluster import label_propagation as label_propagation
from moe_jax.graph.evict import compact as compact
from moe_jax.graph.evict import delete as delete
from moe_jax.graph.evict import expire as expire
from moe_jax.graph.evict import record_reads as record_reads
from moe_jax.graph.link import link as link
from moe_jax.graph.link import link_similar as link_similar
from moe_jax.graph.probe import search_cells as search_cells
from moe_jax.graph.query import Hits as Hits
from moe_jax.graph.query import Neighbours as Neighbours
from moe_jax.graph.query import neighbours as neighbours
from moe_jax.graph.query import search as search
from moe_jax.graph.state import FOREVER as FOREVER
from moe_jax.graph.state import KnowledgeGraph as KnowledgeGraph
from moe_jax.graph.update import InsertInfo as InsertInfo
from moe_jax.graph.update import insert as insert
